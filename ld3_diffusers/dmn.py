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
from functools import lru_cache

import torch
from torch import Tensor

from .noise_path import NoisePath, float64


START = 0.99  # where the bound begins on rectified flow, whose lambda is infinite at s = 1
RUNS, MOVED_BY = 5, 1e-12  # a run of the optimiser is one draw from a scatter; see `dmn`


def dmn_objective(lam: Tensor, latent: bool) -> Tensor:
    """The bound F of the module's docstring at half log-SNRs `lam` (..., N + 1), increasing; differentiable, (...)."""
    lam = lam.movedim(-1, 0)
    steps = len(lam) - 1
    log_alpha, log_sigma = torch.nn.functional.logsigmoid(2 * lam) / 2, torch.nn.functional.logsigmoid(-2 * lam) / 2
    weight = ((2 if latent else 1) * log_sigma - log_alpha).exp()
    h, growth = lam.diff(dim=0), lam.exp()
    h0 = torch.expm1(h)
    h1 = h * h.exp() - h0
    h2 = h**2 * h.exp() - 2 * h1
    first_signed = 3 if steps <= 7 else 0

    bound, signed = lam.new_zeros(lam.shape[1:]), lam.new_zeros(h.shape)
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
        bound = bound + terms[apart].norm(dim=1).sum(0)
        signed = signed.index_add(0, n[~apart].flatten(), terms[~apart].flatten(0, 1))
    return bound + signed.abs().sum(0)


def dmn(
    path: NoisePath,
    num_steps: int,
    t_max: float,
    t_min: float,
    *,
    latent: bool | None = None,
    start: float | None = None,
) -> Tensor:
    r"""The times (num_steps + 1,) whose half log-SNRs minimise [`dmn_objective`], both ends fixed, order kept.

    SciPy's `trust-constr` with forward differences, at its default tolerances, from times uniform in t (in lambda on
    variance-exploding paths), as in LD3. Up to 5 steps it finds a minimum, the same to 1e-6.

    Beyond, the bound has kinks, where a signed sum changes sign. Stopping at one of the first is part of the method: a
    finer optimiser finds bounds several times lower whose times bunch at the clean end. But where it stops hangs on
    rounding: runs from starts 1e-13 apart, or on two processors, end up to .03 apart in t, and LD3's own times are one
    such run. So the median, time by time, of 5 runs from starts 1e-12 apart is taken, whose bound is like theirs.

    Args:
        latent: Whether the model works in a latent space, which chooses the weight; by default on all paths but 've',
            as in LD3.
        start: The time at which the bound begins, by default `t_max`, and 0.99 where lambda is infinite there
            (rectified flow at s = 1); it keeps the grid's first time at `t_max`. The later it is the larger the bound
            and the fewer steps are left for small s: lambda is -4.6 at 0.99, where variance-preserving models begin.

    Raises:
        ImportError: without SciPy.
        ValueError: for a `start` outside (t_min, t_max], or one where lambda is infinite.
    """
    latent = path.kind != "ve" if latent is None else latent
    if start is None:
        start = t_max if bool(path.lam(float64(t_max)).isfinite()) else START
    if not t_min < start <= t_max or not bool(path.lam(float64(start)).isfinite()):
        raise ValueError(
            f"discretization 'dmn' cannot begin its bound at start={float(start)}; give a `start` above "
            f"t_min={float(t_min)} and up to t_max={float(t_max)}, with a finite lambda, such as {START}"
        )
    ends = path.lam(float64([float(start), float(t_min)]))
    ramp = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    lam = ends[0] + ramp * (ends[1] - ends[0]) if path.kind == "ve" else path.lam(start + ramp * (t_min - start))
    times = path.inverse_lam(float64(_median_minimum(tuple(lam.tolist()), latent)))
    return torch.cat([float64(t_max)[None], times[1:]])


@lru_cache(maxsize=256)  # a scheduler asks again for every picture
def _median_minimum(lam: tuple[float, ...], latent: bool) -> tuple[float, ...]:
    start = float64(lam)
    if len(lam) == 2:
        return lam
    found = [_minimum(start, MOVED_BY * run, latent) for run in (0, 1)]
    if not torch.allclose(*found, rtol=0, atol=1e-5):
        found += [_minimum(start, MOVED_BY * run, latent) for run in range(2, RUNS)]
    return tuple(torch.stack(found).median(dim=0).values.tolist())


def _minimum(lam: Tensor, moved: float, latent: bool) -> Tensor:
    """Where `trust-constr` stops from `lam` (N + 1,) with its inner values `moved`; both ends stay."""
    try:
        from scipy.optimize import LinearConstraint, minimize
    except ImportError as error:
        raise ImportError("discretization 'dmn' needs SciPy; install it with `pip install scipy`") from error

    steps = len(lam) - 1
    first, last = lam[:1], lam[-1:]

    def objective(inner) -> tuple:
        # Forward differences of the step that SciPy would take, all at once.
        inner = torch.from_numpy(inner)
        width = math.sqrt(torch.finfo(torch.float64).eps) * inner.abs().clamp(min=1) * (2 * (inner >= 0) - 1)
        points = torch.cat([inner[None], inner + width.diag()])
        values = dmn_objective(torch.cat([first.expand(steps, 1), points, last.expand(steps, 1)], dim=1), latent)
        return values[0].item(), ((values[1:] - values[0]) / ((inner + width) - inner)).numpy()

    # Row i is lambda_{i+1} - lambda_i >= 0, the fixed ends moved to the right-hand side.
    order = torch.eye(steps, dtype=torch.float64)[:, :-1]
    order[1:] -= torch.eye(steps - 1, dtype=torch.float64)
    bound = torch.zeros(steps, dtype=torch.float64)
    bound[0], bound[-1] = lam[0], -lam[-1]
    with warnings.catch_warnings():
        # The quasi-Newton update meets equal gradients on the flat sides of a kink; it skips them by itself.
        warnings.filterwarnings("ignore", message="delta_grad == 0.0")
        inner = minimize(
            objective,
            (lam[1:-1] + moved).numpy(),
            jac=True,
            method="trust-constr",
            constraints=[LinearConstraint(order.numpy(), bound.numpy(), math.inf)],
        ).x
    return torch.cat([first, torch.from_numpy(inner), last])
