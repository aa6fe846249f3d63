# SPDX-License-Identifier: Apache-2.0
"""UniPC: predictor and corrector in one row."""

from dataclasses import dataclass

import torch

from .rows import Row, Solver, lowered_final_order, solve, starts_at_pure_noise


@dataclass(frozen=True)
class UniPC(Solver):
    r"""UniPC of order 1 to 3 (Zhao et al., arXiv:2302.04867), variants $B(h)$ = bh1: $\pm h$, bh2: $e^{\pm h}-1$.

    With base point 0, target $'$, earlier points k = 1..p-1 at $r_k = (\lambda_k-\lambda_0)/h$ and
    $D_k = (m_k-m_0)/r_k$, in data form

    $$ \hat x' = \tfrac{\sigma'}{\sigma}x - \alpha'(e^{-h}-1)m_0 - \alpha'B\textstyle\sum_k\rho^p_k D_k, \qquad
       x' = \hat x' - \alpha'B\big(\textstyle\sum_k(\rho^c_k-\rho^p_k)D_k + \rho^c_p(m'-m_0)\big). $$

    $\rho$ solves $\sum_k \rho_k r_k^{j-1} = b_j$, with the fixed $\frac12$ for the predictor of order 2 and the corrector of
    order 1. The network sees the predicted $\hat x'$, and correcting it adds a combination of predictions that are all known
    there; so the state of a row is the predicted one, and its first act is to correct it. The noise form has
    $\alpha'/\alpha$, $\sigma'$ and $e^{h}$ for $\sigma'/\sigma$, $\alpha'$ and $e^{-h}$.
    """

    name = "unipc"
    order: int = 2
    variant: str = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    corrector: bool = True

    def form(self, path):
        if self.predict_x0:
            return "data"
        if path.kind == "flow":
            raise ValueError(
                "unipc in noise form divides by alpha = 0 where rectified flow starts; set predict_x0=True"
            )
        return "noise"

    def step_order(self, i, num_rows):
        return lowered_final_order(self.order, i, num_rows, self.lower_order_final)

    def check(self, levels):
        if self.variant == "bh1" and starts_at_pure_noise(levels, 0):
            raise ValueError(
                "unipc's bh1 is infinite for a step that starts at pure noise (s = 1); use solver_type='bh2'"
            )

    def row(self, levels, i, order, previous_order, stage):
        ratio, first, scale_b, b = self._terms(levels, i)
        history = [first] + [0 * first] * max(order - 1, previous_order if self.corrector else 0)
        self._add(history, self._differences(levels, i, self._predictor(levels, i, order, b)), -scale_b, 0)
        if i > 0 and self.corrector:
            _, _, scale_b, b = self._terms(levels, i - 1)
            predictor = self._predictor(levels, i - 1, previous_order, b)
            corrector, last = self._corrector(levels, i - 1, previous_order, b)
            change = [c - p for c, p in zip(corrector, predictor)]
            self._add(history, self._differences(levels, i - 1, change), -scale_b * ratio, 1)
            history[0] = history[0] - scale_b * ratio * last
            history[1] = history[1] + scale_b * ratio * last
        return Row(ratio, history)

    def _terms(self, levels, i):
        """Of step i: state weight, weight of m_0, scale' * B, and the function j -> b_j."""
        alpha, sigma = levels.alpha, levels.sigma
        ratio, scale, other = (
            (sigma[i + 1] / sigma[i], alpha[i + 1], alpha[i])
            if self.predict_x0
            else (alpha[i + 1] / alpha[i], sigma[i + 1], sigma[i])
        )
        first = scale - other * ratio
        h = levels.lam[i + 1] - levels.lam[i]
        hh = -h if self.predict_x0 else h
        exponential = -first / scale  # expm1(hh)
        big_b = hh if self.variant == "bh1" else exponential

        def b(count):
            phi, factorial, values = exponential / hh - 1, 1.0, []
            for j in range(1, count + 1):
                values.append(phi * factorial / big_b)
                factorial *= j + 1
                phi = phi / hh - 1 / factorial
            return values

        return ratio, first, scale * big_b, b

    def _nodes(self, levels, i, order):
        """r_k of the earlier points that step i of this order uses; those infinitely far back carry no weight."""
        h = levels.lam[i + 1] - levels.lam[i]
        back = [i - k for k in range(1, order)]
        return [(levels.lam[j] - levels.lam[i]) / h for j in back if not starts_at_pure_noise(levels, j)]

    def _predictor(self, levels, i, order, b):
        nodes = self._nodes(levels, i, order)
        if order == 2:
            return [torch.full_like(r, 0.5) for r in nodes]
        return self._weights(nodes, b)

    def _corrector(self, levels, i, order, b):
        if order == 1:
            return [], torch.full_like(levels.lam[i], 0.5)
        nodes = self._nodes(levels, i, order)
        *weights, last = self._weights([*nodes, torch.ones_like(levels.lam[i + 1])], b)
        return weights, last

    @staticmethod
    def _weights(nodes, b):
        if not nodes:
            return []
        matrix = [[r**j for r in nodes] for j in range(len(nodes))]
        return solve(matrix, b(len(nodes)))

    def _differences(self, levels, i, weights):
        """Weights of m_0, m_1, ... in sum_k rho_k (m_k - m_0) / r_k."""
        nodes = self._nodes(levels, i, len(weights) + 1)
        scaled = [rho / r for rho, r in zip(weights, nodes)]
        return [-sum(scaled), *scaled] if scaled else []

    @staticmethod
    def _add(history, weights, factor, offset):
        for j, w in enumerate(weights):
            history[offset + j] = history[offset + j] + factor * w
