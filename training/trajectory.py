# SPDX-License-Identifier: Apache-2.0
"""A teacher's trajectories: where each sample is at every level of a fine grid, and how it moves there.

Kept in the variables in which the ODE is dy/dz = d (see `noise_path.Levels`): y = x/alpha, z = sigma/alpha and the noise
prediction, the space of EDM, on variance-preserving and -exploding paths; y = x, z = s and the velocity on rectified flow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ld3_diffusers import Schedule
from ld3_diffusers.step_table import conversion

from .conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Some samples on a grid of N levels, float64.

    Attributes:
        z: (N,) levels, decreasing; the last may be 0, clean data.
        states: (batch, N, D) y.
        derivatives: (batch, N - 1, D) dy/dz, as the network sees it at each level but the last.
    """

    z: Tensor
    states: Tensor
    derivatives: Tensor


def flat(state: Tensor) -> Tensor:
    """(batch, D) float64, on the state's own device, but on the host for Apple's GPUs, which have no float64."""
    state = state.cpu() if state.device.type == "mps" else state
    return state.flatten(1).double()


def record(rollout, schedule: Schedule, noise: Tensor, conditioning: Conditioning | None = None) -> Trajectory:
    """The trajectories of a batch through the pipeline itself, with its guidance and its resolution shift.

    Args:
        rollout: a [`PipelineRollout`], or anything with its `visit`, `path` and `mu`.
        schedule: the teacher's. Of a two-stage solver all steps but the last have two rows, as `Solver.expand` makes them;
            states and derivatives are those of the first.
        noise: (batch, ...) unit-normal, or seeds; see [`PipelineRollout`].

    Raises:
        ValueError: for a teacher with an analytical first step, or whose trajectory is not finite.
    """
    if schedule.spec.afs:
        raise ValueError("a teacher's first step is evaluated like the others; use a teacher without afs")
    stages, states, outputs = schedule.spec.make().stages, [], []

    def keep(i: int, state: Tensor, output: Tensor, result: Tensor) -> None:
        if i % stages == 0:
            states.append(flat(state))
            outputs.append(flat(output))
        if i == schedule.nfe - 1:
            states.append(flat(result))

    rollout.visit(schedule, noise, conditioning, keep)
    # The shift is known once the pipeline has run.
    table, path = schedule.table(rollout.path, mu=rollout.mu), rollout.path
    first_rows = list(range(0, schedule.nfe, stages))
    levels = path.levels(table.times[[*first_rows, schedule.nfe]])
    p, q = conversion(path, path.derivative, schedule.prediction_type, table.network_times[first_rows])
    x, net = torch.stack(states, 1), torch.stack(outputs, 1)
    z, scale, p, q = (part.to(x.device) for part in (levels.z, levels.scale, p, q))
    derivatives = p[:, None] * x[:, :-1] + q[:, None] * net
    if not bool(torch.isfinite(x).all() and torch.isfinite(derivatives).all()):
        raise ValueError(
            "the teacher's trajectory is not finite; use --mixed_precision no or bf16, or another solver of the teacher"
        )
    return Trajectory(z, x / scale[:, None], derivatives)
