# SPDX-License-Identifier: Apache-2.0
r"""GITS: few times out of a teacher's many, by dynamic programming (Chen et al., arXiv:2405.11326).

The student is thought to go in long Euler jumps along the teacher's trajectory $X_0..X_{N-1}$ with derivatives $d_i$. A jump
from level i to level j > i lands at $y_{ij} = X_i + (z_j - z_i)\,d_i$, and costs, as a mean over samples,

| metric | $C_{ij}$ |
|---|---|
| `l1`, `l2` | $\lVert y_{ij} - X_j\rVert_{1,2}$ |
| `dev` | $\mathrm{dev}(y_{ij}) - \mathrm{dev}(X_j)$, with dev the distance from the straight line through $X_0$ and $X_{N-1}$ |

`dev` is signed: a jump may land nearer to the line than the teacher does. Of all ways with K jumps from 0 to N-1 the one is
taken whose $\sum_k \gamma^k C_k$, k = 0 for the first jump, is smallest; `coeff` $\gamma > 1$ puts more levels at low noise.
"""

import math

import torch
from torch import Tensor

from .trajectory import Trajectory


METRICS = ("dev", "l1", "l2")
COEFF = 1.15  # the authors' for EDM's models
COEFFS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)  # those for which they print schedules


def cost_sums(trajectory: Trajectory, metric: str = "dev") -> Tensor:
    r"""(N, N) float64, on the CPU: costs of all jumps summed over the batch; 0 unless i < j.

    A part of a trajectory that is linear in z takes no part in any of these costs, since Euler's jump is exact for it. So the
    chord from $X_0$ to $X_{N-1}$ is subtracted first, which leaves numbers small enough for the closed forms
    $\lVert Y_i + \delta e_i\rVert^2 = \lVert Y_i\rVert^2 + 2\delta\langle Y_i, e_i\rangle + \delta^2\lVert e_i\rVert^2$ in
    products that number N (dev) or N^2 (l2) a sample, and not one image for every pair of levels.

    Raises:
        ValueError: for an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; use one of {', '.join(METRICS)}")
    z, count = trajectory.z, len(trajectory.z)
    jump, rows = z[None] - z[:-1, None], _ROWS[metric]
    cost = torch.zeros(count, count, dtype=torch.float64, device=z.device)
    # Sample by sample and in place: what is computed stays in the processor's cache.
    bent, turned = torch.empty_like(trajectory.states[0]), torch.empty_like(trajectory.derivatives[0])
    for states, derivatives in zip(trajectory.states, trajectory.derivatives):
        slope = (states[-1] - states[0]) / (z[-1] - z[0])
        torch.sub(states, states[-1], out=bent).addr_(z - z[-1], slope, alpha=-1)
        torch.sub(derivatives, slope, out=turned)
        cost[:-1] += rows(jump, bent, turned, slope)
    return cost.triu(1).cpu()


def _squares(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).square()


def _deviations(jump: Tensor, states: Tensor, derivatives: Tensor, slope: Tensor) -> Tensor:
    line = torch.nn.functional.normalize(slope, dim=0)
    states.addr_(states @ line, line, alpha=-1)
    derivatives.addr_(derivatives @ line, line, alpha=-1)
    own, moved = _squares(states), _squares(derivatives)[:, None]
    mixed = derivatives.mul_(states[:-1]).sum(-1, keepdim=True)
    landed = own[:-1, None] + 2 * jump * mixed + jump**2 * moved
    return landed.clamp(min=0).sqrt() - own.sqrt()


def _euclidean(jump: Tensor, states: Tensor, derivatives: Tensor, _slope: Tensor) -> Tensor:
    between, along = states[:-1] @ states.mT, derivatives @ states.mT
    own, started, moved = _squares(states), along.diagonal()[:, None], _squares(derivatives)[:, None]
    square = own[:-1, None] + own - 2 * between + 2 * jump * (started - along) + jump**2 * moved
    rows = square.clamp(min=0).sqrt()
    # Jumps to the next level are the teacher's own to first order: too close for a difference of products.
    landed = torch.addcmul(states[:-1], derivatives, jump.diagonal(1)[:, None], out=derivatives).sub_(states[1:])
    rows.diagonal(1).copy_(torch.linalg.vector_norm(landed, dim=-1))
    return rows


def _absolute(jump: Tensor, states: Tensor, derivatives: Tensor, _slope: Tensor) -> Tensor:
    rows = torch.zeros_like(jump)
    for i, jumps in enumerate(jump):
        landed = states[i] + jumps[i + 1 :, None] * derivatives[i]
        rows[i, i + 1 :] = torch.linalg.vector_norm(landed - states[i + 1 :], ord=1, dim=-1)
    return rows


# (N - 1, N) costs of one sample's jumps, from states and derivatives without the chord and the chord's slope
_ROWS = {"dev": _deviations, "l2": _euclidean, "l1": _absolute}


def dynamic_programme(cost: Tensor, num_steps: int, coeff: float = COEFF) -> list[list[int]]:
    r"""The cheapest ways with 1, 2, ..., `num_steps` jumps: lists of indices, 0 first and N-1 last.

    With $V^1_j = C_{j,N-1}$ and $V^k_j = \min_{j<i<N-1} C_{ji} + \gamma V^{k-1}_i$ one pass serves every number of jumps. Of
    ways that cost the same, the first level where they part decides: the one with the smaller index is taken.

    Args:
        cost: (N, N); only what is above the diagonal counts.
        coeff: gamma.

    Raises:
        ValueError: for more jumps than the grid has, a coeff that is not positive, or costs that are not finite.
    """
    count = len(cost)
    if not 1 <= num_steps < count:
        raise ValueError(
            f"a teacher's grid of {count} points has schedules of 1 to {count - 1} steps, not {num_steps}; use more grid "
            "points or fewer evaluations"
        )
    if not 0 < coeff < math.inf:
        raise ValueError(f"coeff must be a positive number, got {coeff}; 1.15 is usual")
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("the cost matrix is not finite; use another metric or solver of the teacher")
    forward = torch.ones_like(cost, dtype=torch.bool).triu(1)
    inner = cost.double().masked_fill(~forward, math.inf)
    value = inner[:, -1].clone()
    inner[:, -1] = math.inf
    following: list[list[int]] = []  # [k - 2][j]: where a way with k jumps goes from j
    ways = [[0, count - 1]]
    for _ in range(2, num_steps + 1):
        value, index = (inner + coeff * value).min(1)
        following.append(index.tolist())
        way = [0]
        for step in reversed(following):
            way.append(step[way[-1]])
        ways.append([*way, count - 1])
    return ways
