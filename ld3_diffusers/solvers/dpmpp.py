# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver and DPM-Solver++, multistep."""

from dataclasses import dataclass

import torch

from .rows import Row, Solver, lowered_final_order, starts_at_pure_noise


@dataclass(frozen=True)
class DPMSolverMultistep(Solver):
    r"""DPM-Solver++ (data form) and DPM-Solver (noise form) of order 1 to 3 (Lu et al., arXiv:2211.01095, arXiv:2206.00927).

    With $h = \lambda'-\lambda$, $r_0 = h_0/h$, $r_1 = h_1/h$ for the last two steps $h_0, h_1$,

    $$ D_0 = \frac{m_0-m_1}{r_0}, \quad E = \frac{m_1-m_2}{r_1}, \quad
       D_1 = D_0 + \frac{r_0}{r_0+r_1}(D_0-E), \quad D_2 = \frac{D_0-E}{r_0+r_1} $$

    and $\phi_1 = e^{-h}-1,\ \phi_2 = \phi_1/h+1,\ \phi_3 = \phi_2/h-\frac12$ the data form of order 1, 2, 3 is

    $$ \tfrac{\sigma'}{\sigma}x - \alpha'\phi_1 m_0, \qquad \ldots - \tfrac12\alpha'\phi_1 D_0, \qquad
       \ldots + \alpha'\phi_2 D_1 - \alpha'\phi_3 D_2. $$

    The noise form has $\alpha'/\alpha$ for $\sigma'/\sigma$, $\sigma'$ for $\alpha'$, $\phi_1 = e^h-1,\ \phi_2 = \phi_1/h-1,\
    \phi_3 = \phi_2/h-\frac12$ and a minus sign before every term. `variant="heun"` takes $+\alpha'\phi_2 D_0$ (data) or
    $-\sigma'\phi_2 D_0$ (noise) at order 2. As in Diffusers, the order is lowered at the end only below 15 steps. Order 3
    converges with order 2, as published and in Diffusers: $D_2$ tends to half of what its weight assumes.
    """

    name = "dpmpp"
    order: int = 2
    variant: str = "midpoint"
    predict_x0: bool = True
    lower_order_final: bool = True

    def form(self, path):
        if self.predict_x0:
            return "data"
        if path.kind == "flow":
            raise ValueError(
                "dpmpp in noise form divides by alpha = 0 where rectified flow starts; set predict_x0=True"
            )
        return "noise"

    def step_order(self, i, num_rows):
        return lowered_final_order(self.order, i, num_rows, self.lower_order_final and num_rows < 15)

    def row(self, levels, i, order, previous_order, stage):
        alpha, sigma, lam = levels.alpha, levels.sigma, levels.lam
        if self.predict_x0:
            ratio, scale = sigma[i + 1] / sigma[i], alpha[i + 1]
            first = scale - alpha[i] * ratio  # -alpha' phi_1, finite where h is not
        else:
            ratio, scale = alpha[i + 1] / alpha[i], sigma[i + 1]
            first = scale - sigma[i] * ratio  # -sigma' phi_1
        if order == 1:
            return Row(ratio, [first])

        # Below, a level of pure noise (lambda = -inf) lies infinitely far back: inverse step ratios are 0 there.
        h = lam[i + 1] - lam[i]
        sign = -1.0 if self.predict_x0 else 1.0
        phi_1 = -first / scale
        phi_2 = phi_1 / h - sign
        inverse_r0 = self._inverse_ratio(levels, i, h)
        if order == 2:
            second = -sign * scale * phi_2 if self.variant == "heun" else 0.5 * first
            return Row(ratio, [first + second * inverse_r0, -second * inverse_r0])

        phi_3 = phi_2 / h - 0.5
        inverse_r1 = self._inverse_ratio(levels, i - 1, h)
        # r0/(r0+r1) and 1/(r0+r1), written in the inverse ratios
        total = inverse_r0 + inverse_r1
        empty = total == 0
        total = torch.where(empty, torch.ones_like(total), total)
        share, inverse_sum = inverse_r1 / total, inverse_r0 * inverse_r1 / total
        d0 = [inverse_r0, -inverse_r0, 0 * inverse_r0]
        e = [0 * inverse_r1, inverse_r1, -inverse_r1]
        weight_1, weight_2 = -sign * scale * phi_2, -scale * phi_3
        history = [first, 0 * first, 0 * first]
        for j in range(3):
            d1 = d0[j] + share * (d0[j] - e[j])
            d2 = inverse_sum * (d0[j] - e[j])
            history[j] = history[j] + weight_1 * d1 + weight_2 * d2
        return Row(ratio, history)

    @staticmethod
    def _inverse_ratio(levels, i, h):
        """h / (lambda_i - lambda_{i-1})."""
        if starts_at_pure_noise(levels, i - 1):
            return torch.zeros_like(h)
        return h / (levels.lam[i] - levels.lam[i - 1])
