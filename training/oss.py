# SPDX-License-Identifier: Apache-2.0
r"""OSS: optimal stepsizes by dynamic programming on the student's own states (Pei et al., arXiv:2503.21774).

On every path a state is $y = x/(\alpha+\sigma)$ at $s = \sigma/(\alpha+\sigma)$, which is rectified flow's own form, with the
velocity $v = (y - \hat x_0)/s$; Euler's step $y' = y + (s' - s)v$ is DDIM's. Levels are numbered 0 (noise) to N here. The
teacher takes all N steps, $y_0..y_N$. In round k a student that has taken k steps may stand at any level i, in the state
$z^{(k)}_i$; from there it jumps to every j > i, and

$$ c = \mathrm{mean}\,|z^{(k)}_i + (s_j - s_i)v_i - y_j|^p < C_j \quad\Rightarrow\quad C_j = c,\ \mathrm{from}_k(j) = i,\
   z^{(k+1)}_j = z^{(k)}_i + (s_j - s_i)v_i. $$

A level that no jump improves keeps its state with fewer steps. K rounds give the schedules of 1, ..., K steps.
"""

import math

import torch
from torch import Tensor

from ld3_diffusers import Schedule
from ld3_diffusers.step_table import conversion

from .conditioning import Conditioning
from .trajectory import flat


COST_POWER = 2.0


def optimal_paths(
    rollout,
    teacher: Schedule,
    noise: Tensor,
    conditioning: Conditioning | None,
    num_steps: int,
    *,
    cost_power: float = COST_POWER,
) -> Tensor:
    """Levels that the students of each sample visit: (batch, num_steps, num_steps + 1) long, on the CPU.

    Entry [b, k - 1] is the list of k steps, 0 first and N last, filled up with -1. Where fewer steps served the sample better, 0
    is repeated. The pipeline runs once for the teacher and once for every round but the first, which is the teacher's first
    evaluation; what is kept is a few states a level, for the batch alone.

    Args:
        rollout: a [`PipelineRollout`], or anything with its `visit`, `path` and `mu`.
        teacher: Euler's schedule on the whole grid.
        cost_power: p.

    Raises:
        ValueError: for a teacher that is not Euler's, more steps than it has, a power that is not positive, or states that are not
            finite.
    """
    if teacher.spec.solver not in ("euler", "ddim") or teacher.spec.afs:
        raise ValueError(f"the steps compared here are Euler's; use an euler teacher, not {teacher.spec.solver}")
    if not 1 <= num_steps <= teacher.nfe:
        raise ValueError(
            f"a teacher of {teacher.nfe} steps has schedules of 1 to {teacher.nfe} steps, not {num_steps}; use more grid "
            "points or fewer evaluations"
        )
    if not 0 < cost_power < math.inf:
        raise ValueError(f"cost_power must be a positive number, got {cost_power}; 2 is usual")
    raw: list[Tensor] = []
    first_output: list[Tensor] = []

    def keep(i: int, state: Tensor, output: Tensor, result: Tensor) -> None:
        raw.append(flat(state))
        if i == 0:
            first_output.append(flat(output))
        if i == teacher.nfe - 1:
            raw.append(flat(result))

    rollout.visit(teacher, noise, conditioning, keep)
    path, table = rollout.path, teacher.table(rollout.path, mu=rollout.mu)
    levels = path.levels(table.times)
    p, q = conversion(path, "data", teacher.prediction_type, table.network_times)
    total, device = levels.alpha + levels.sigma, raw[0].device
    s = (levels.sigma / total).to(device)
    total, p, q = total.tolist(), p.tolist(), q.tolist()

    def jumps(i: int, state: Tensor, output: Tensor) -> Tensor:
        """(batch, N - i, D): where Euler's steps from level i end, at i + 1, ..., N."""
        y = state / total[i]
        velocity = (y - (p[i] * state + q[i] * output)) / s[i]
        return y[:, None] + (s[i + 1 :] - s[i])[:, None] * velocity[:, None]

    target = torch.stack([state / scale for state, scale in zip(raw, total)], 1)
    if not bool(torch.isfinite(target).all()):
        raise ValueError("the teacher's trajectory is not finite; use --mixed_precision no or bf16")

    def costs(landed: Tensor, i: int) -> Tensor:
        return (landed - target[:, i + 1 :]).abs().pow(cost_power).mean(-1)

    landed = jumps(0, raw[0], first_output[0])
    reached = torch.cat([target[:, :1], landed], 1)
    best = torch.cat([torch.full_like(target[:, :1, 0], -math.inf), costs(landed, 0)], 1)
    origins = [torch.zeros(best.shape, dtype=torch.long, device=device)]
    for _ in range(1, num_steps):
        standing, reached, origin = reached, reached.clone(), origins[-1].clone()

        def improve(i: int, state: Tensor, output: Tensor, result: Tensor) -> Tensor | None:
            # The starting noise itself has jumped in the first round.
            if i > 0:
                landed = jumps(i, flat(state), flat(output))
                cost = costs(landed, i)
                better = cost < best[:, i + 1 :]
                best[:, i + 1 :] = torch.where(better, cost, best[:, i + 1 :])
                origin[:, i + 1 :].masked_fill_(better, i)
                reached[:, i + 1 :] = torch.where(better[..., None], landed, reached[:, i + 1 :])
            return (total[i + 1] * standing[:, i + 1]).view(result.shape)

        rollout.visit(teacher, noise, conditioning, improve)
        origins.append(origin)
    return _traced_back([origin.cpu() for origin in origins])


def _traced_back(origins: list[Tensor]) -> Tensor:
    batch, levels = origins[0].shape
    paths = torch.full((batch, len(origins), len(origins) + 1), -1)
    for last in range(len(origins)):
        paths[:, last, last + 1] = levels - 1
        for k in range(last, -1, -1):
            paths[:, last, k] = origins[k].gather(1, paths[:, last, k + 1, None])[:, 0]
    return paths


def combined_path(paths: Tensor, num_levels: int) -> list[int]:
    """One list of level indices for all samples: at each position the middle of the sorted ones.

    Of an even number it is the mean of the two middle ones, rounded towards clean data, as the authors number levels.
    Levels that still coincide, because some samples wanted fewer steps, are moved to the next free ones.

    Args:
        paths: (samples, steps + 1) of [`optimal_paths`].
        num_levels: N + 1 of the grid.

    Raises:
        ValueError: if the grid has too few levels.
    """
    last, samples, steps = num_levels - 1, len(paths), paths.shape[1] - 1
    if steps > last:
        raise ValueError(f"{steps} steps do not fit on a grid of {num_levels} points; use more grid points")
    ordered = (last - paths).sort(0).values
    middle = (last - (ordered[(samples - 1) // 2] + ordered[samples // 2]) // 2).tolist()
    for k in range(1, steps + 1):
        middle[k] = max(middle[k], middle[k - 1] + 1)
    for k in range(steps + 1):
        middle[k] = min(middle[k], last - (steps - k))
    return middle
