# SPDX-License-Identifier: Apache-2.0
r"""Where a schedule loses accuracy: the error that each of its steps makes by itself.

Row i of a schedule, given the teacher's states $X_0 .. X_i$ at its levels and the network's outputs there, makes
$\Phi_i(X_i, \dots)$; the teacher is at $X_{i+1}$. With alpha and sigma those of the level where the row ends,

$$ e_i = \mathrm{mean}\,\frac{(\Phi_i - X_{i+1})^2}{\alpha_{i+1}^2 + \sigma_{i+1}^2}, $$

over samples and entries. The division makes the unit the state's own variance for data of unit variance, so that errors
compare along a path, and between paths. Earlier errors do not enter: a step's size, its solver's order and the time that
its network is told do.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ld3_diffusers.noise_path import NoisePath, float64, shift_flow_time
from ld3_diffusers.schedule import Schedule, SolverSpec

from .conditioning import Conditioning


TEACHER = SolverSpec("heun")


class Visitable(Protocol):
    """What [`local_errors`] asks of a rollout; see [`training.rollout.PipelineRollout`]."""

    path: NoisePath
    mu: float  # resolution shift of the last call

    def visit(self, schedule: Schedule, noise: Tensor, conditioning: Conditioning | None, at_step) -> None: ...


def step_ends(schedule: Schedule) -> list[int]:
    """The evaluations after which a step is complete: all, but for the first of the two of a two-stage or an AMED step.

    AMED's direction scale makes up for the errors of both of a step's rows, whatever its solver.
    """
    rows = len(schedule.times) - 1
    skipped = int(schedule.spec.afs)
    solver = schedule.spec.make()
    # Steps of one evaluation come last: all of them, or those that `expand_to` leaves to a two-stage solver.
    steps = solver.num_steps(rows, bool(schedule.times[-1] == 0)) if schedule.stages is None else rows // 2
    paired = 2 * (rows - steps)
    return [row - skipped for row in range(skipped, rows) if row >= paired or row % 2]


def refined(schedule: Schedule, path: NoisePath, substeps: int, solver: SolverSpec = TEACHER) -> tuple[Schedule, list]:
    """The teacher's schedule, `substeps` steps for each one of `schedule`, and which of its steps end where those end.

    Levels are uniform in lambda, or in s where lambda is infinite at one end. A step that ends in clean data is refined down
    to the path's `t_min`, below which no network is asked, with one more step from there to 0.

    Raises:
        ValueError: for fewer than 2 substeps.
    """
    if substeps < 2:
        raise ValueError(
            f"`substeps` must be at least 2 to know more than the schedule does, got {substeps}; 8 is usual"
        )
    skipped = int(schedule.spec.afs)
    ends = schedule.times.detach()[[0, *(row + skipped + 1 for row in step_ends(schedule))]]
    times, last = [ends[:1]], []
    for first, end in zip(ends[:-1], ends[1:]):
        inner = _between(path, first, end, substeps)
        times.append(inner)
        last.append(sum(map(len, times)) - 2)
    levels = torch.cat(times)
    spec = replace(solver, afs=False, starting_scale=schedule.spec.starting_scale)
    teacher = Schedule(
        spec.make().expand(path, levels),
        None,
        spec,
        schedule.noise_path,
        schedule.prediction_type,
        final=schedule.final,
    )
    return teacher, [step_ends(teacher)[step] for step in last]


def _between(path: NoisePath, first: Tensor, end: Tensor, substeps: int) -> Tensor:
    """The levels after `first` and up to `end`."""
    if end == 0:
        if first <= path.t_min:
            return end[None]
        return torch.cat([_between(path, first, float64(path.t_min), substeps - 1), end[None]])
    ramp = torch.arange(1, substeps + 1, dtype=torch.float64) / substeps
    lam = path.lam(torch.stack([first, end]))
    inner = path.inverse_lam(torch.lerp(*lam, ramp)) if bool(lam.isfinite().all()) else torch.lerp(first, end, ramp)
    return torch.cat([inner[:-1], end[None]])


def local_errors(
    rollout: Visitable,
    schedule: Schedule,
    noise: Tensor,
    conditioning: Conditioning | None = None,
    *,
    substeps: int = 8,
    solver: SolverSpec = TEACHER,
) -> Tensor:
    r"""$e_i$ of the module's docstring for each network evaluation, (nfe,) float64 on the CPU.

    The teacher is the same rollout on the [`refined`] schedule. The student's network is asked at the teacher's states, at
    the network times of its schedule. The first evaluation of a two-stage step makes no state of the trajectory: its entry is
    NaN, and the step's error stands at its second. UniPC's rows correct the state that they are given, which here was exact,
    so that their errors hold the error of the prediction before. An analytical first step counts to the first entry.

    Args:
        rollout: a pipeline's, or anything with `visit`, `path` and `mu`.
        noise, conditioning: as the rollout takes them; their samples are averaged over.
        substeps: the teacher's steps for each one of the schedule.
        solver: the teacher's; two-stage solvers need no history and are accurate from the first step on.

    Raises:
        ValueError: for fewer than 2 substeps, or a schedule whose stages are predicted for each sample.
    """
    if schedule.stages == "per sample":
        raise ValueError("stages that are predicted for each sample have no table of their own; use a static schedule")
    teacher, ends = refined(schedule, rollout.path, substeps, solver)
    states: dict[int, Tensor] = {}
    student_row = dict(zip(ends, step_ends(schedule)))

    def record(i: int, _state: Tensor, _output: Tensor, result: Tensor) -> None:
        if i in student_row:
            states[student_row[i]] = result.clone()

    rollout.visit(teacher, noise, conditioning, record)

    squares = torch.full((schedule.nfe,), torch.nan, dtype=torch.float64)

    def compare(i: int, _state: Tensor, _output: Tensor, result: Tensor) -> Tensor | None:
        if i in states:
            squares[i] = (result.double() - states[i].double()).square().mean().cpu()
        return states.get(i)

    rollout.visit(schedule, noise, conditioning, compare)

    levels = schedule.times.detach()[1 + int(schedule.spec.afs) :]
    if rollout.path.kind == "flow" and not schedule.final:
        levels = shift_flow_time(levels, rollout.mu)
    return squares / (rollout.path.alpha(levels) ** 2 + rollout.path.sigma(levels) ** 2)
