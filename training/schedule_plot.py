# SPDX-License-Identifier: Apache-2.0
"""A picture of schedules: noise level against evaluation, in log sigma, and what was learned of their coefficients."""

from pathlib import Path

import torch
from torch import Tensor

from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.schedule import Schedule


def plot_schedules(schedules: dict[str, Schedule], path: NoisePath, file: str | Path) -> None:
    """Writes a PNG: each schedule's levels as a line, what its network is told as crosses.

    The vertical axis is log sigma/alpha, on rectified flow log s; a level of clean data is left out. Beside them a map of the residuals of each
    schedule that has some.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    learned = {name: schedule.residuals for name, schedule in schedules.items() if schedule.residuals is not None}
    columns = 1 + len(learned)
    figure, grid = pyplot.subplots(1, columns, figsize=(3 + 3 * columns, 4), layout="constrained", squeeze=False)
    axes, *maps = grid[0]
    for name, schedule in schedules.items():
        times, network_times = schedule.times.detach(), schedule.network_times.detach()
        levels = path.levels(times).z
        shown = levels > 0
        [line] = axes.plot(torch.arange(len(times))[shown], levels[shown], "o-", markersize=4, label=name)
        told = path.levels(network_times).z
        axes.plot(torch.arange(len(told)), told, "x", color=line.get_color(), markersize=7)
    axes.set(yscale="log", xlabel="evaluation", ylabel="s" if path.kind == "flow" else "sigma / alpha")
    axes.plot([], [], "kx", label="told to the network")
    axes.legend()
    for beside, (name, residuals) in zip(maps, learned.items()):
        _draw_residuals(beside, residuals.detach(), name)
    figure.savefig(file, dpi=100, format="png")
    pyplot.close(figure)


def _draw_residuals(axes, residuals: Tensor, name: str) -> None:
    """Rows downwards, predictions by age to the right."""
    rows, window = residuals.shape
    there = torch.arange(window)[None] <= torch.arange(rows)[:, None]
    most = float(residuals.abs().max()) or 1.0
    image = axes.imshow(torch.where(there, residuals, torch.nan), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set(title=f"residuals: {name}", ylabel="evaluation", xlabel="of predictions, by age", xticks=range(window))
    axes.set_yticks(range(rows))
    axes.figure.colorbar(image, ax=axes)
