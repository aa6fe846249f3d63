# SPDX-License-Identifier: Apache-2.0
"""Grids that flow pipelines hand to every scheduler when their user gave none.

They cannot be told from a user's own grid but by value: Flux, Qwen-Image and most others pass linspace(1, 1/n, n), HunyuanVideo
linspace(1, 0, n + 1) without its end, LTX's conditioned pipeline a linear-quadratic grid, as timesteps, and CogView4
linspace(1000, 1, n) cut to integers, as both.
"""

from collections.abc import Callable

import torch

from ..noise_path import float64


def _linear_quadratic(n: int, threshold: float = 0.025) -> torch.Tensor:
    """Uniform steps of noise for the first half, then quadratic ones (Movie Gen, arXiv:2410.13720, section 3.4.2)."""
    if n < 2:
        return torch.ones(1, dtype=torch.float64)
    linear = n // 2
    quadratic = n - linear
    excess = linear - threshold * n
    i = torch.arange(n, dtype=torch.float64)
    a = excess / (linear * quadratic**2)
    b = threshold / linear - 2 * excess / quadratic**2
    noise = torch.where(i < linear, i * threshold / linear, a * i**2 + b * i + a * linear**2)
    return 1 - noise


def _linspace(n: int) -> torch.Tensor:
    return torch.linspace(1, 1 / n, n, dtype=torch.float64)


def _linspace_to_zero(n: int) -> torch.Tensor:
    return torch.linspace(1, 0, n + 1, dtype=torch.float64)[:-1]


def _integers(n: int) -> torch.Tensor:
    # start + i * step, as NumPy's linspace: its last bit decides what is cut
    return (1000 + torch.arange(n, dtype=torch.float64) * (-999 / max(n - 1, 1))).trunc() / 1000


def default_grid(grid, n: int) -> Callable[[int], torch.Tensor] | None:
    """The pipeline's default, as a function of n, that `grid` (sigmas, or timesteps of 1000 training steps) is; else None."""
    grid = float64(grid if isinstance(grid, torch.Tensor) else list(grid)).cpu()
    if len(grid) != n:
        return None
    grid = grid / 1000 if grid[0] > 2 else grid
    for candidate in (_linspace, _linspace_to_zero, _linear_quadratic, _integers):
        if torch.allclose(grid, candidate(n), rtol=0, atol=1e-5):
            return candidate
    return None
