# SPDX-License-Identifier: Apache-2.0
r"""AMED's steps (Zhou et al., "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps", arXiv:2312.00094) as schedules.

A student step from $t_n$ to $t_{n+1}$ makes two network evaluations: at $t_n$, and at a stage

$$ z_s = z_{n+1}^{r_n} z_n^{1-r_n}, \qquad z = \sigma/\alpha, \text{ on rectified flow } s, $$

where the network is told the time of $a_n z_s$ and the direction of the step is scaled by $c_n$. So N student steps are a [`Schedule`] of
2N rows: `times` $t_0, s_0, t_1, \ldots, t_N$, `network_times` $t_0, (a_0 s_0), t_1, \ldots$ and `direction_scales` $1, c_0, 1, c_1, \ldots$ The
solver is AMED-Solver or DPM-Solver-2, whose steps have two stages, or one of the plugin's: Euler, iPNDM and DPM-Solver++, which step from
each of these times to the next.

A last step that ends in clean data, where no mean is geometric, has the stage that it would have if it ended at the path's t_min.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .noise_path import NoisePath, float64
from .schedule import Schedule, SolverSpec
from .solvers.two_stage import geometric_mean


STUDENTS = ("amed", "dpm2", "euler", "ipndm", "dpmpp")
STUDENT_KEYS = ("solver", "solver_order", "predict_x0", "lower_order_final", "afs")  # as in [`SolverSpec`]
FORMS = ("per_sample", "static")  # of a predictor, see [`AMEDPredictor`]


class StepPrediction(NamedTuple):
    """What is predicted for a step, each () or (batch,): r in (0, 1), the factors c of the direction and a of the stage's time."""

    r: Tensor | float = 0.5
    scale_dir: Tensor | float = 1.0
    scale_time: Tensor | float = 1.0


def check_student(spec: SolverSpec) -> None:
    """Raises a `ValueError` for a solver that makes no AMED steps."""
    if spec.solver not in STUDENTS:
        raise ValueError(f"{spec.solver} is no solver of AMED steps; use one of {', '.join(STUDENTS)}")
    spec.make()


def num_student_steps(nfe: int, afs: bool) -> int:
    """Student steps of `nfe` network evaluations: two each, one less with an analytical first step.

    Raises:
        ValueError: for a count that whole steps cannot make.
    """
    least = 2 - int(afs)
    if nfe < least or (nfe - least) % 2:
        raise ValueError(
            f"AMED steps make an odd number of evaluations with an analytical first step and an even one without, not {nfe}; use "
            f"{max(nfe + 1, least)} evaluations, or {'drop afs' if afs else 'set afs'}"
        )
    return (nfe + int(afs)) // 2


def amed_schedule(steps, spec: SolverSpec, path: NoisePath, prediction_type: str, *, final: bool = False) -> Schedule:
    """The schedule of the bare solver: r = 1/2, c = a = 1.

    Args:
        steps: (N + 1,) times of the step ends, from noise to data.

    Raises:
        ValueError: for a solver that makes no AMED steps.
    """
    check_student(spec)
    steps = float64(steps)
    levels = torch.stack([steps[:-1], steps[:-1]], 1).flatten()
    scales = torch.ones_like(levels)
    bare = Schedule(
        torch.cat([levels, steps[-1:]]), levels, spec, path.kind, prediction_type, final=final, direction_scales=scales
    )
    for n in range(len(steps) - 1):
        bare = with_step(bare, n, StepPrediction(), path)
    return bare


def with_step(schedule: Schedule, n: int, prediction: StepPrediction, path: NoisePath) -> Schedule:
    """The schedule with step n as predicted, for a batch of samples where the prediction is; gradients flow.

    The time told to the network is kept within the step, so that it never rises.
    """
    start, end = schedule.times[2 * n], schedule.times[2 * n + 2]
    r, scale_dir, scale_time = (torch.as_tensor(value, dtype=torch.float64) for value in prediction)
    stage = geometric_mean(path, start, end, r)
    if path.kind == "flow":
        told = scale_time * stage
    else:
        # A difference, so that where the factor is 1 the network is told the stage's own time to the last bit.
        sigma = path.sigma_edm(stage)
        told = stage + (path.inverse_sigma_edm(scale_time * sigma) - path.inverse_sigma_edm(sigma))
    least = torch.where(end > 0, end, torch.full_like(end, path.t_min))
    told = torch.minimum(torch.maximum(told, least), start)
    return replace(
        schedule,
        times=_with(schedule.times, 2 * n + 1, stage),
        network_times=_with(schedule.network_times, 2 * n + 1, told),
        direction_scales=_with(schedule.direction_scales, 2 * n + 1, scale_dir),
        checksum=None,
    )


def step_levels(schedule: Schedule, n: int, path: NoisePath) -> tuple[float, float]:
    """z at both ends of step n of a schedule that is one for all samples; where it ends in clean data, 0."""
    z = path.levels(schedule.times[[2 * n, 2 * n + 2]]).z
    return float(z[0]), float(z[1])


def static_schedule(schedule: Schedule, predictor, path: NoisePath) -> Schedule:
    """All steps as an [`AMEDPredictor`] places them without looking at any sample: of the per-sample form with features of 0.

    Raises:
        ValueError: for a static predictor of another number of steps.
    """
    steps = (len(schedule.times) - 1) // 2
    if predictor.config.num_steps not in (None, steps):
        raise ValueError(
            f"the predictor was trained for {predictor.config.num_steps} steps and this schedule has {steps}; use the one that belongs "
            "to it"
        )
    with torch.no_grad():
        for n in range(steps):
            prediction = predictor(None, *step_levels(schedule, n, path), n)
            values = (torch.as_tensor(value, dtype=torch.float64).squeeze() for value in prediction)
            schedule = with_step(schedule, n, StepPrediction(*values), path)
    return schedule


def _with(values: Tensor, i: int, value: Tensor) -> Tensor:
    """`values` with entry i replaced; (N,) or (N, batch) as these and `value` are."""
    entries = list(values.unbind(0))
    entries[i] = value
    return torch.stack(torch.broadcast_tensors(*entries))
