# SPDX-License-Identifier: Apache-2.0
"""First-order solvers: Euler and DDIM."""

from dataclasses import dataclass

from .rows import Row, Solver, euler_row


@dataclass(frozen=True)
class Euler(Solver):
    r"""Euler in the ODE's own variable: $x' = \frac{\alpha'}{\alpha}x + \alpha'(\sigma'_{edm}-\sigma_{edm})\,\epsilon$, on
    rectified flow $x' = x + (s'-s)u$ (Karras et al., arXiv:2206.00364; Liu et al., arXiv:2209.03003)."""

    name = "euler"
    order: int = 1

    def row(self, levels, i, order, previous_order, stage):
        return euler_row(levels, i)


@dataclass(frozen=True)
class DDIM(Solver):
    r"""The same step on the data prediction, $x' = \frac{\sigma'}{\sigma}x + (\alpha'-\alpha\frac{\sigma'}{\sigma})\hat x_0$
    (Song et al., arXiv:2010.02502); differs from Euler only when network times differ from the levels' or data is clipped."""

    name = "ddim"
    order: int = 1

    def form(self, path):
        return "data"

    def row(self, levels, i, order, previous_order, stage):
        ratio = levels.sigma[i + 1] / levels.sigma[i]
        return Row(ratio, [levels.alpha[i + 1] - levels.alpha[i] * ratio])
