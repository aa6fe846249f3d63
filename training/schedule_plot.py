# SPDX-License-Identifier: Apache-2.0
"""A picture of schedules: noise level against evaluation, in log sigma."""

from pathlib import Path

import torch

from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.schedule import Schedule


def plot_schedules(schedules: dict[str, Schedule], path: NoisePath, file: str | Path) -> None:
    """Writes a PNG: each schedule's levels as a line, what its network is told as crosses.

    The vertical axis is log sigma/alpha, on rectified flow log s; a level of clean data is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
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
    figure.savefig(file, dpi=100, format="png")
    pyplot.close(figure)
