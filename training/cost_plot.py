# SPDX-License-Identifier: Apache-2.0
"""A picture of a search's costs: every jump from one level of the teacher's grid to a later one, and the jumps that were chosen."""

from pathlib import Path

import torch
from torch import Tensor

from .whole_files import write_whole


SHOWN = 4  # schedules drawn; more of them hide each other


def plot_costs(cost: Tensor, z: Tensor, ways: list[list[int]], file: Path) -> None:
    """Writes a PNG: `cost`, (N, N), by the jump's start and end, and some of `ways`, index lists of 1, 2, ... steps, on it."""
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5.2), layout="constrained")
    axes = figure.subplots()
    shown = torch.where(torch.ones_like(cost, dtype=torch.bool).triu(1), cost, torch.nan)
    # Costs are signed, and most far smaller than those of the longest jumps.
    usual = max(float(shown.abs().nanmedian()), 1e-12)
    image = axes.imshow(shown.numpy(), norm=SymLogNorm(usual), cmap="viridis", origin="upper")
    figure.colorbar(image, ax=axes, label="cost of the jump")
    evenly = torch.linspace(0, len(ways) - 1, min(SHOWN, len(ways))).round().int().tolist()
    for k, position in enumerate(evenly):
        way = ways[position]
        axes.plot(way[1:], way[:-1], "o-", color=f"C{k + 1}", markersize=3, linewidth=1, label=f"{len(way) - 1} steps")
    points = torch.linspace(0, len(z) - 1, min(6, len(z))).round().int().tolist()
    labels = [f"{z[i]:.3g}" for i in points]
    axes.set(xlabel="jump to noise level", ylabel="jump from noise level")
    axes.set_xticks(points, labels)
    axes.set_yticks(points, labels)
    axes.legend(loc="lower left", fontsize=8)
    write_whole(file, lambda temporary: figure.savefig(temporary, dpi=100))
