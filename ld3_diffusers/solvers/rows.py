# SPDX-License-Identifier: Apache-2.0
r"""What a solver is: a causal builder of rows.

With $m_k$ the prediction at step k in the solver's form (data, noise or velocity), a row is

$$ x_{i+1} = a_i x_i + \sum_{j \ge 0} w_{ij}\, m_{i-j}, $$

one network evaluation a row. Row i may use the levels up to i + 1 and nothing later. Everything is float64 torch and
differentiable in the levels, which may carry trailing batch axes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..noise_path import Levels, NoisePath, float64


LOOK_BACK = 3  # a row reads no level older than i - LOOK_BACK


class Row(NamedTuple):
    state: Tensor  # a_i
    history: list[Tensor]  # w_i0, w_i1, ...: of the newest prediction first


def same_level(levels: Levels, i: int, j: int) -> bool:
    return bool((levels.z[i] == levels.z[j]).all())


def ends_at_zero(levels: Levels, i: int) -> bool:
    """Whether step i ends in clean data."""
    return bool((levels.sigma[i + 1] == 0).any())


def starts_at_pure_noise(levels: Levels, i: int) -> bool:
    """Whether level i has no signal at all (rectified flow at s = 1), so that its lambda is -inf."""
    return bool((levels.alpha[i] <= 0).any())


def euler_row(levels: Levels, i: int) -> Row:
    r"""$y' = y + (z' - z) d$ with $y = x/scale$."""
    return derivative_row(levels, i, [torch.ones_like(levels.z[i])])


def derivative_row(levels: Levels, i: int, weights: list[Tensor]) -> Row:
    r"""$y' = y + (z' - z)\sum_j w_j d_{i-j}$, written for x."""
    ratio = levels.scale[i + 1] / levels.scale[i]
    step = levels.scale[i + 1] * (levels.z[i + 1] - levels.z[i])
    return Row(ratio, [step * w for w in weights])


def scaled_direction(row: Row, scale: Tensor, stage: Row | None = None) -> Row:
    r"""The row whose step goes `scale` times as far along its predictions: $x' = a x + c\sum_j w_j m_j$ (AMED, arXiv:2312.00094).

    `stage` is the row before where both make one step of a two-stage solver. The step is then scaled as a whole, from the
    state in which the stage began, unless the row goes on from the stage by itself, as Euler's.
    """
    if stage is None or len(row.history) == 1:
        return Row(row.state, [scale * w for w in row.history])
    moved = row.state * stage.history[0]  # what the stage has moved already
    newest, before = row.history
    return Row(row.state, [scale * newest, scale * (before + moved) - moved])


def solve(matrix: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Solution of a small linear system whose entries may have trailing batch axes."""
    shape = torch.broadcast_shapes(*(e.shape for line in matrix for e in line), *(b.shape for b in right))
    dense = torch.stack([torch.stack([e.expand(shape) for e in line], -1) for line in matrix], -2)
    solution = torch.linalg.solve(dense, torch.stack([b.expand(shape) for b in right], -1).unsqueeze(-1))
    return list(solution.squeeze(-1).unbind(-1))


class Solver:
    """Base of all solvers; subclasses are frozen dataclasses whose fields are the solver's options.

    Attributes:
        name: what `LD3Scheduler(solver=...)` calls it.
        stages: network evaluations a step, 1 or 2.
        sum_rule: how exactly rows keep the sum rules of a constant prediction, for validation.
    """

    name: str
    stages = 1
    sum_rule = 1e-10
    order: int

    def form(self, path: NoisePath) -> str:
        """What the rows extrapolate: "data", "noise" or "velocity"."""
        return path.derivative

    def row(self, levels: Levels, i: int, order: int, previous_order: int, stage: int) -> Row:
        """Row i. `order` is this step's, `previous_order` the last one's, `stage` 0 or 1 for two-stage solvers."""
        raise NotImplementedError

    def step_order(self, i: int, num_rows: int) -> int:
        """Order of step i when `num_rows` rows are taken: ramps up with the history."""
        return min(self.order, i + 1)

    def check(self, levels: Levels) -> None:
        """Raises a `ValueError` where the formula is undefined on these levels."""

    def rows(self, levels: Levels, first: int = 0, wanted: range | None = None) -> list[Row]:
        """All rows, or those `wanted`. `first` is the index of the first one in the schedule that these levels are the tail of."""
        self.check(levels)
        num_rows = len(levels.time) - 1
        wanted = range(num_rows) if wanted is None else wanted
        rows: list[Row | None] = [None] * num_rows
        groups: dict[tuple, list[int]] = {}
        previous_order = 0
        for i in range(num_rows):
            zero = ends_at_zero(levels, i)
            order = 1 if zero and self.lowers_order_at_zero else self.step_order(i, num_rows)
            kind = (order, previous_order, (first + i) % self.stages, zero, same_level(levels, i, i + 1))
            kind += (starts_at_pure_noise(levels, max(i - LOOK_BACK, 0)),)  # formulas drop such a level
            if i not in wanted:
                pass
            elif i < LOOK_BACK:
                rows[i] = self.row(levels, i, *kind[:3])
            else:
                groups.setdefault(kind, []).append(i)
            previous_order = order
        # Long schedules consist of a few kinds of rows: each kind is built at once, the rows as a batch axis.
        for kind, members in groups.items():
            index = torch.tensor(members) + torch.arange(-LOOK_BACK, 2)[:, None]
            batch = self.row(Levels(*(part[index] for part in levels)), LOOK_BACK, *kind[:3])
            states, histories = batch.state.unbind(0), [w.unbind(0) for w in batch.history]
            for k, i in enumerate(members):
                rows[i] = Row(states[k], [w[k] for w in histories])
        return [rows[i] for i in wanted]

    lowers_order_at_zero = True

    def expand(self, path: NoisePath, steps) -> Tensor:
        """Times of all levels from the times of the step ends; the same thing for one-stage solvers."""
        return float64(steps)

    def expand_to(self, path: NoisePath, steps, num_rows: int) -> Tensor:
        """[`expand`] to `num_rows` network evaluations, of which there are `num_steps(num_rows)` steps."""
        return float64(steps)

    def num_steps(self, num_rows: int, ends_at_zero: bool) -> int:
        """How many steps make `num_rows` network evaluations."""
        return num_rows


def lowered_final_order(order: int, i: int, num_rows: int, lower: bool) -> int:
    """Multistep order that ramps up at the start and, if `lower`, down to 1 at the end."""
    return min(order, i + 1, num_rows - i) if lower else min(order, i + 1)
