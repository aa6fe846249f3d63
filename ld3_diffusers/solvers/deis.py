# SPDX-License-Identifier: Apache-2.0
"""DEIS: polynomial extrapolation of the noise prediction, integrated exactly."""

import math
from dataclasses import dataclass

import torch

from .adams_bashforth import adams_bashforth_weights
from .rows import (
    Row,
    Solver,
    derivative_row,
    euler_row,
    lowered_final_order,
    solve,
)


# The tabulated mode integrates in the time of a VP-linear path fitted to this range, whatever the schedule's own.
TAB_SIGMA_MIN, TAB_SIGMA_MAX, TAB_EPSILON, TAB_POINTS = 0.002, 80.0, 1e-3, 10_000


@dataclass(frozen=True)
class DEIS(Solver):
    r"""DEIS of order 1 to 4, $y' = y + \sum_j C_j\,\epsilon_{i-j}$, $C_j = \int L_j\,d\rho$, $\rho = \sigma/\alpha$ (Zhang & Chen,
    arXiv:2204.13902).

    `variant` says in which variable the Lagrange basis L is a polynomial: "logrho" log rho, integrated exactly, as in
    Diffusers; "rhoab" rho itself, which is variable-step Adams-Bashforth (on rectified flow in s, with the velocity);
    "tab" the time of a fixed VP-linear path, by a rectangle sum over 10,000 points that counts both ends, as published with
    AMED and GITS (its weights are right to about 1e-4). As in Diffusers, the order is lowered at the end below 15 steps.
    """

    name = "deis"
    order: int = 2
    variant: str = "logrho"
    lower_order_final: bool = True

    @property
    def sum_rule(self):
        return 0.1 if self.variant == "tab" else 1e-10  # a 10,000th of d sigma / d tau, which is large at the start

    def step_order(self, i, num_rows):
        return lowered_final_order(self.order, i, num_rows, self.lower_order_final and num_rows < 15)

    def form(self, path):
        if path.kind == "flow" and self.variant != "rhoab":
            raise ValueError(
                f"deis with solver_type={self.variant!r} divides by alpha = 0 where rectified flow starts; "
                "use solver_type='rhoab'"
            )
        return path.derivative

    def row(self, levels, i, order, previous_order, stage):
        if order == 1:
            return euler_row(levels, i)
        if self.variant == "rhoab":
            return derivative_row(levels, i, adams_bashforth_weights(levels.z, i, order))
        coefficients = (_tab_weights if self.variant == "tab" else _logrho_weights)(levels, i, order)
        return Row(levels.scale[i + 1] / levels.scale[i], [levels.scale[i + 1] * c for c in coefficients])


def _logrho_weights(levels, i, order):
    r"""$\int L_j d\rho$ by moments: with $u = \log(\rho/\rho_i)$, $M_k = \rho_i\int_0^{u'} u^k e^u du$, $M_k = \rho' u'^k - k M_{k-1}$."""
    nodes = [levels.lam[i] - levels.lam[i - j] for j in range(order)]
    end = levels.lam[i] - levels.lam[i + 1]
    moments = [levels.z[i + 1] - levels.z[i]]
    for k in range(1, order):
        moments.append(levels.z[i + 1] * end**k - k * moments[-1])
    return solve([[u**k for u in nodes] for k in range(order)], moments)


def _tab_weights(levels, i, order):
    e = TAB_EPSILON
    low, high = math.log1p(TAB_SIGMA_MIN**2), math.log1p(TAB_SIGMA_MAX**2)
    beta_d = 2 * (low / e - high) / (e - 1)
    beta_min = high - 0.5 * beta_d

    def time(z):
        return ((beta_min**2 + 2 * beta_d * torch.log1p(z**2)).sqrt() - beta_min) / beta_d

    points = [time(levels.z[i - j]) for j in range(order)]
    start, stop = time(levels.z[i]), time(levels.z[i + 1])
    tau = start + (stop - start) * torch.linspace(0, 1, TAB_POINTS, dtype=start.dtype).reshape(-1, *[1] * start.ndim)
    alpha_bar = torch.exp(-0.5 * beta_d * tau**2 - beta_min * tau)
    speed = 0.5 * (beta_d * tau + beta_min) / (alpha_bar * (1 - alpha_bar)).sqrt()  # d sigma / d tau
    weights = []
    for j, own in enumerate(points):
        basis = torch.ones_like(tau)
        for k, other in enumerate(points):
            if k != j:
                basis = basis * (tau - other) / (own - other)
        weights.append((speed * basis).sum(0) * (stop - start) / TAB_POINTS)
    return weights
