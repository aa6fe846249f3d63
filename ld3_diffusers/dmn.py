# SPDX-License-Identifier: Apache-2.0
r"""DM-NonUniform: a grid of times optimised without a network (Xue et al., arXiv:2402.17376).

An exponential multistep solver of the data form multiplies the data prediction of time $n$, in the step that ends at
$\lambda_{s+1}$, by $J_{s,n} = \int e^\lambda \ell_n(\lambda)\,d\lambda$, with $\ell_n$ the Lagrange basis over the
times used; orders ramp 1, 2, 3, ..., 3, 2, 1. If the network's error at time $n$ is at most $w_n$, the error at the end
is at most

$$ F(\lambda) = R + \sum_n \Big|\sum_{s \ge s_0} w_n J_{s,n}\Big|, \qquad
   R = \sum_{s\,\mathrm{first\ order}} |w_s J_{s,s}| + \sum_{s < s_0} \Big(\sum_n (w_n J_{s,n})^2\Big)^{1/2}, $$

which depends on the half log-SNRs $\lambda_0 < ... < \lambda_N$ alone. The inner sum is signed (neighbouring steps may
cancel) from the step $s_0$ on: 3 up to 7 steps, else 0. With alpha and sigma those of a variance-preserving path at
the same lambda, $w = \sigma^2/\alpha$ for latent-space models and $\sigma/\alpha = e^{-\lambda}$ for pixel-space ones.

With h a step of lambda, $H_k(h) = \int_0^h e^{u} u^k du$ up to the sign that integration by parts leaves:
$H_0 = e^h - 1$, $H_1 = h e^h - H_0$, $H_2 = h^2 e^h - 2 H_1$.
"""

import math
import warnings

import torch
from torch import Tensor

from .noise_path import NoisePath, float64


def dmn_objective(lam: Tensor, latent: bool) -> Tensor:
    """The bound F of the module's docstring at half log-SNRs `lam` (N + 1,), increasing; a differentiable scalar."""
    steps = len(lam) - 1
    log_alpha, log_sigma = torch.nn.functional.logsigmoid(2 * lam) / 2, torch.nn.functional.logsigmoid(-2 * lam) / 2
    weight = ((2 if latent else 1) * log_sigma - log_alpha).exp()
    h, growth = lam.diff(), lam.exp()
    h0 = torch.expm1(h)
    h1 = h * h.exp() - h0
    h2 = h**2 * h.exp() - 2 * h1
    first_signed = 3 if steps <= 7 else 0

    bound, signed = lam.new_zeros(()), lam.new_zeros(steps)
    for order in (1, 2, 3):
        s = torch.tensor([i for i in range(steps) if min(i + 1, steps - i, 3) == order], dtype=torch.long)
        if order == 1:
            basis = [h0[s]]
        elif order == 2:
            b = h[s - 1]
            basis = [-h1[s] / b, h1[s] / b + h0[s]]
        else:
            a, b = h[s - 2], h[s - 1]
            basis = [
                (h2[s] + b * h1[s]) / (a * (a + b)),
                -(h2[s] + (a + b) * h1[s]) / (a * b),
                (h2[s] + (2 * b + a) * h1[s]) / (b * (a + b)) + h0[s],
            ]
        n = s[:, None] + torch.arange(1 - order, 1)
        terms = weight[n] * growth[s, None] * torch.stack(basis, dim=1)
        apart = (s < first_signed) | (order == 1)
        bound = bound + terms[apart].norm(dim=1).sum()
        signed = signed.index_add(0, n[~apart].flatten(), terms[~apart].flatten())
    return bound + signed.abs().sum()


def dmn(path: NoisePath, num_steps: int, t_max: float, t_min: float, *, latent: bool | None = None) -> Tensor:
    r"""The times (num_steps + 1,) whose half log-SNRs minimise [`dmn_objective`], both ends fixed, order kept.

    SciPy's `trust-constr` at its default tolerances, from times uniform in t (in lambda on variance-exploding paths), as
    in LD3. Up to 7 steps the minimum is reached to 1e-6. Beyond, the bound has kinks, where a signed sum changes sign,
    and stopping at one of the first is part of the method: a finer optimiser finds bounds several times lower whose
    times bunch at the clean end. There rounding alone moves times by .01 to .08, so keep the times that you used.

    Args:
        latent: Whether the model works in a latent space, which chooses the weight; by default on all paths but 've',
            as in LD3.

    Raises:
        ImportError: without SciPy.
    """
    try:
        from scipy.optimize import LinearConstraint, minimize
    except ImportError as error:
        raise ImportError("discretization 'dmn' needs SciPy; install it with `pip install scipy`") from error

    latent = path.kind != "ve" if latent is None else latent
    ends = path.lam(float64([float(t_max), float(t_min)]))
    if num_steps == 1:
        return path.inverse_lam(ends)
    ramp = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if path.kind == "ve":
        start = ends[0] + ramp * (ends[1] - ends[0])
    else:
        start = path.lam(t_max + ramp * (t_min - t_max))

    def objective(inner) -> tuple:
        inner = torch.tensor(inner, requires_grad=True)
        with torch.enable_grad():
            value = dmn_objective(torch.cat([ends[:1], inner, ends[1:]]), latent)
        return value.item(), torch.autograd.grad(value, inner)[0].numpy()

    # Row i is lambda_{i+1} - lambda_i >= 0, the fixed ends moved to the right-hand side.
    order = torch.eye(num_steps, dtype=torch.float64)[:, :-1]
    order[1:] -= torch.eye(num_steps - 1, dtype=torch.float64)
    bound = torch.zeros(num_steps, dtype=torch.float64)
    bound[0], bound[-1] = ends[0], -ends[1]
    with warnings.catch_warnings():
        # The quasi-Newton update meets equal gradients on the flat sides of a kink; it skips them by itself.
        warnings.filterwarnings("ignore", message="delta_grad == 0.0")
        inner = minimize(
            objective,
            start[1:-1].numpy(),
            jac=True,
            method="trust-constr",
            constraints=[LinearConstraint(order.numpy(), bound.numpy(), math.inf)],
        ).x
    return path.inverse_lam(torch.cat([ends[:1], torch.from_numpy(inner), ends[1:]]))
