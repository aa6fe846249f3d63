# SPDX-License-Identifier: Apache-2.0
r"""Adams-Bashforth methods on $dy/dz = d$: $y' = y + (z'-z)\sum_j c_j d_{i-j}$ with the last p derivatives."""

import math
from dataclasses import dataclass

import torch

from .rows import Solver, derivative_row, solve


CONSTANT_STEP = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class IPNDM(Solver):
    """iPNDM: the constant-step coefficients whatever the steps (Liu et al., arXiv:2202.09778; Zhang & Chen, arXiv:2204.13902)."""

    name = "ipndm"
    order: int = 4
    lowers_order_at_zero = False

    def row(self, levels, i, order, previous_order, stage):
        return derivative_row(levels, i, [torch.full_like(levels.z[i], c) for c in CONSTANT_STEP[order - 1]])


def adams_bashforth_weights(z, i, order):
    r"""Exact variable-step weights: $\sum_j c_j u_j^k = 1/(k+1)$, $u_j = (z_{i-j}-z_i)/(z_{i+1}-z_i)$, k = 0..order-1."""
    h = z[i + 1] - z[i]
    nodes = [(z[i - j] - z[i]) / h for j in range(order)]
    return solve(
        [[u**k for u in nodes] for k in range(order)], [torch.full_like(h, 1 / (k + 1)) for k in range(order)]
    )


@dataclass(frozen=True)
class AdamsBashforth(Solver):
    """Adams-Bashforth with the exact variable-step weights, order 1 to 4 (Hairer, Norsett & Wanner, section III.5)."""

    name = "abv"
    order: int = 4
    lowers_order_at_zero = False

    def row(self, levels, i, order, previous_order, stage):
        return derivative_row(levels, i, adams_bashforth_weights(levels.z, i, order))


@dataclass(frozen=True)
class IPNDMV(Solver):
    """iPNDM_v as published with AMED and GITS (arXiv:2312.00094): variable steps, but at order 3 and 4 *not* Adams-Bashforth.

    Orders 1 and 2 are exact. With h the step and h1, h2, h3 the earlier ones, newest first, the published weights of order 3
    use k1 and those of order 4 k1 and k2 of the code below; at order 4 they do not sum to 1 unless the steps are geometric.
    Kept because published results and other programs use it, and because at few steps it stays closer to [`IPNDM`], which
    does better there.
    """

    name = "ipndm_v"
    order: int = 4
    lowers_order_at_zero = False

    @property
    def sum_rule(self):
        return 1e-10 if self.order < 4 else math.inf  # the excess k2 q (h2/h3 - h1/h2) has no bound

    def row(self, levels, i, order, previous_order, stage):
        z = levels.z
        h = z[i + 1] - z[i]
        one = torch.ones_like(h)
        if order == 1:
            return derivative_row(levels, i, [one])
        h1 = z[i] - z[i - 1]
        half = h / (2 * h1)
        if order == 2:
            return derivative_row(levels, i, [one + half, -half])
        h2 = z[i - 1] - z[i - 2]
        k1 = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
        if order == 3:
            return derivative_row(levels, i, [one + half + k1, -half - (1 + h1 / h2) * k1, k1 * h1 / h2])
        h3 = z[i - 2] - z[i - 3]
        k2 = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        k2 = k2 * h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        q = h1 * (h1 + h2) / (h2 * (h2 + h3))
        weights = [
            one + half + k1 + k2,
            -half - (1 + h1 / h2) * k1 - (1 + h1 / h2 + q) * k2,
            k1 * h1 / h2 + (h1 / h2 + q * (1 + h2 / h3)) * k2,
            -k2 * q * h1 / h2,
        ]
        return derivative_row(levels, i, weights)
