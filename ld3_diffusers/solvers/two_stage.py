# SPDX-License-Identifier: Apache-2.0
"""Two network evaluations a step: Heun, DPM-Solver-2, AMED-Solver. All are written so that a row starts from the state it is given.

A step that would end in clean data is one first-order row, so a schedule of n steps has 2n - 1 evaluations if it ends at
sigma = 0 and 2n if it ends above; the other parity spends its spare evaluation as one more first-order row at the end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise_path import NoisePath, float64
from .rows import Row, Solver, ends_at_zero, euler_row, same_level


def geometric_mean(path: NoisePath, start: Tensor, end: Tensor, r: Tensor | float) -> Tensor:
    r"""The time at which $z = z_{end}^r z_{start}^{1-r}$: linear in lambda, on rectified flow geometric in s.

    An end in clean data counts as the path's t_min."""
    end = torch.where(end > 0, end, torch.full_like(end, path.t_min))
    if path.kind == "flow":
        return end**r * start ** (1 - r)
    return path.inverse_lam((1 - r) * path.lam(start) + r * path.lam(end))


class TwoStage(Solver):
    stages = 2
    order: int = 2

    def num_steps(self, num_rows, ends_at_zero):
        return (num_rows + 1 + (num_rows % 2 == 0)) // 2 if ends_at_zero else (num_rows + 1) // 2

    def _stage_time(self, path, start, end):
        raise NotImplementedError

    def expand_to(self, path, steps, num_rows):
        steps = float64(steps)
        spare = 2 * (len(steps) - 1) - num_rows  # steps that get one evaluation only; they are the last ones
        levels = [steps[0]]
        for i in range(len(steps) - 1):
            if i < len(steps) - 1 - spare:
                levels.append(self._stage_time(path, steps[i], steps[i + 1]))
            levels.append(steps[i + 1])
        return torch.stack(levels)

    def expand(self, path, steps):
        count = len(steps) - 1
        return self.expand_to(path, steps, 2 * count - int(bool((float64(steps)[-1] == 0).any())))


@dataclass(frozen=True)
class Heun(TwoStage):
    r"""$\hat y' = y + (z'-z)d$, then $y' = \hat y' + \frac12(z'-z)(\hat d'-d)$ (Karras et al., arXiv:2206.00364, algorithm 1).

    The second row stays at the level that the first one reached."""

    name = "heun"
    order: int = 2

    def _stage_time(self, path, start, end):
        return end

    def row(self, levels, i, order, previous_order, stage):
        if not same_level(levels, i, i + 1) or i == 0:
            return euler_row(levels, i)
        half = 0.5 * levels.scale[i] * (levels.z[i] - levels.z[i - 1])
        return Row(torch.ones_like(half), [half, -half])


@dataclass(frozen=True)
class DPMSolver2(TwoStage):
    r"""DPM-Solver-2 (Lu et al., arXiv:2206.00927): a stage at $z_s = z'^r z^{1-r}$ (on rectified flow in s), then

    $$ y' = y + (z'-z)\big(\tfrac1{2r}d_s + (1-\tfrac1{2r})d\big). $$

    r places the stage; a row reads it back from its levels, so a stage that was moved by learning keeps the order."""

    name = "dpm2"
    order: int = 2
    r: float = 0.5

    def _stage_time(self, path, start, end):
        return geometric_mean(path, start, end, self.r)

    def row(self, levels, i, order, previous_order, stage):
        if stage == 0 or i == 0 or ends_at_zero(levels, i):
            return euler_row(levels, i)
        start, middle, end = levels.z[i - 1], levels.z[i], levels.z[i + 1]
        ratio, scale = levels.scale[i + 1] / levels.scale[i], levels.scale[i + 1]
        weight = torch.log(end / start) / (2 * torch.log(middle / start))
        return Row(ratio, [scale * (end - start) * weight, scale * ((end - start) * (1 - weight) - (middle - start))])


@dataclass(frozen=True)
class AMED(TwoStage):
    r"""AMED-Solver (Zhou et al., arXiv:2312.00094): Euler to a stage, whose derivative alone makes the step, $y' = y + (z'-z)d_s$.

    The stage's place is learned, by default the geometric mean: the second-order midpoint rule in log z. Where the solver is
    used without a learned stage, this is DPM-Solver-2. It is consistent wherever the stage lies, of second order at the mean.
    Unlike the others it has a stage also in a step that ends in clean data, unless the number of evaluations is odd."""

    name = "amed"
    order: int = 2

    def num_steps(self, num_rows, ends_at_zero):
        return (num_rows + 1) // 2

    def _stage_time(self, path, start, end):
        return geometric_mean(path, start, end, 0.5)

    def row(self, levels, i, order, previous_order, stage):
        if stage == 0 or i == 0:
            return euler_row(levels, i)
        start, middle, end = levels.z[i - 1], levels.z[i], levels.z[i + 1]
        ratio, scale = levels.scale[i + 1] / levels.scale[i], levels.scale[i + 1]
        return Row(ratio, [scale * (end - start), -scale * (middle - start)])
