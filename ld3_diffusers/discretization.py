# SPDX-License-Identifier: Apache-2.0
r"""Discretizations: the times at which a sampler evaluates its network.

All grids are float64, in the path's own time (see `noise_path`), from the noisiest time to the cleanest. Two families:

* [`discretization`]: named grids $t_0 = t_{max} > \dots > t_N = t_{min}$. With $f_i = i/N$ and
  $P_\rho(a, b; f) = (a^{1/\rho} + f\,(b^{1/\rho} - a^{1/\rho}))^\rho$:

| name | grid | source |
|---|---|---|
| `polynomial` | $\sigma^{edm} = P_\rho(\sigma_{max}, \sigma_{min}; f)$, rho = 7 | Karras et al., arXiv:2206.00364 |
| `logsnr` | lambda uniform | Lu et al., arXiv:2206.00927 |
| `time_uniform` | t uniform | Ho et al., arXiv:2006.11239 |
| `time_quadratic` | `poly` with rho = 2 | LD3, arXiv:2405.15506 |
| `poly` | $t = t_{min} + (t_{max} - t_{min})(1 - f)^\rho$, rho required | LD3 |
| `edm` | $t = P_\rho(t_{max}, t_{min}; f)$, rho = 7, whatever t means | LD3 |
| `discrete` | the same, rho = 1 | diff-sampler (for rho other than 1 its start lacks the power 1/rho) |
| `time_uniform_vp` | $P_\rho(1, 10^{-3}; f)$ in the time of a VP-linear path through both ends | diff-sampler |
| `flow_linear` | uniform before the resolution shift by `mu` or `shift` | Esser et al., arXiv:2403.03206 |
| `dmn` | minimises a bound on the solver's error | Xue et al., arXiv:2402.17376; see `dmn` |
| `ays`, `ays_sd15`, `ays_sdxl`, `ays_svd` | levels published for these models | Sabour et al., arXiv:2404.14507; see `ays` |

* [`discretization_to_zero`]: the same grids for samplers that end in clean data.
* [`stock_times`]: what Diffusers' own schedulers would use, for a scheduler without a learned schedule; see `stock_grids`.
"""

import inspect
import math
from functools import partial

import torch
from torch import Tensor

from .ays import TABLES, ays
from .dmn import dmn
from .noise_path import NoisePath, float64, shift_flow_time
from .stock_grids import _log_shift, _positive_integer, _power, _ramp, stock_times


def _polynomial(path, num_steps, t_max, t_min, *, rho=7.0):
    return path.inverse_sigma_edm(_power(path.sigma_edm(t_max), path.sigma_edm(t_min), num_steps + 1, rho))


def _logsnr(path, num_steps, t_max, t_min):
    first, last = path.lam(t_max), path.lam(t_min)
    return path.inverse_lam(first + _ramp(num_steps + 1) * (last - first))


def _time_uniform(path, num_steps, t_max, t_min):
    return t_max + _ramp(num_steps + 1) * (t_min - t_max)


def _time_quadratic(path, num_steps, t_max, t_min):
    return _poly(path, num_steps, t_max, t_min, rho=2.0)


def _poly(path, num_steps, t_max, t_min, *, rho=None):
    if rho is None:
        raise ValueError("discretization 'poly' has no usual exponent; give one, for example `rho=3`")
    return t_min + (t_max - t_min) * (1 - _ramp(num_steps + 1)) ** rho


def _edm(path, num_steps, t_max, t_min, *, rho=7.0):
    return _power(t_max, t_min, num_steps + 1, rho)


def _discrete(path, num_steps, t_max, t_min, *, rho=1.0):
    return _power(t_max, t_min, num_steps + 1, rho)


def _time_uniform_vp(path, num_steps, t_max, t_min, *, rho=1.0):
    # The VP-linear path with ln(1 + sigma^2) = beta_d u^2 / 2 + beta_min u has two ends to fix it: (t_max, u = 1) and
    # (t_min, u = e).
    e = 1e-3
    at_one, at_e = torch.log1p(path.sigma_edm(t_max) ** 2), torch.log1p(path.sigma_edm(t_min) ** 2)
    beta_d = 2 * (at_e / e - at_one) / (e - 1)
    beta_min = at_one - beta_d / 2
    if min(beta_min + beta_d * e, beta_min + beta_d) <= 0:
        raise ValueError(
            "discretization 'time_uniform_vp' needs a sigma/alpha near 0 at t_min, where VP-linear paths end; give a "
            "smaller `t_min`, or use 'time_uniform'"
        )
    u = _power(float64(1.0), float64(e), num_steps + 1, rho)
    return path.inverse_sigma_edm(torch.expm1(beta_d * u**2 / 2 + beta_min * u).sqrt())


def _flow_linear(path, num_steps, t_max, t_min, *, mu=None, shift=None):
    if mu is not None and shift is not None:
        raise ValueError("discretization 'flow_linear' was given both `mu` and `shift`; give one (mu = ln shift)")
    if path.kind != "flow":
        raise ValueError(f"discretization 'flow_linear' needs a flow path, not {path.kind!r}; use 'time_uniform'")
    mu = _log_shift(shift) if mu is None else mu
    # Both ends are times after the shift, so that 'from t_max to t_min' holds for every grid.
    first, last = shift_flow_time(t_max, -mu), shift_flow_time(t_min, -mu)
    return shift_flow_time(first + _ramp(num_steps + 1) * (last - first), mu)


def _ays(path, num_steps, t_max, t_min, *, name):
    if (float(t_max), float(t_min)) != (path.t_max, path.t_min):
        raise ValueError(
            f"discretization {name!r} has the levels of a whole path; drop `t_max` and `t_min`, or use 'polynomial'"
        )
    return ays(name, path, num_steps)


_AYS = ("ays", *TABLES)
DISCRETIZATIONS = {
    "polynomial": _polynomial,
    "logsnr": _logsnr,
    "time_uniform": _time_uniform,
    "time_quadratic": _time_quadratic,
    "poly": _poly,
    "edm": _edm,
    "discrete": _discrete,
    "time_uniform_vp": _time_uniform_vp,
    "flow_linear": _flow_linear,
    "dmn": dmn,
    **{name: partial(_ays, name=name) for name in _AYS},
}
# Infinite noise levels at one end leave these nothing to divide evenly.
_NEEDS_FINITE_START = {"polynomial", "logsnr", "time_uniform_vp"}
_NEEDS_POSITIVE_END = {"logsnr", "time_uniform_vp", "dmn"}
# Grids whose last level was published, or is meant, to be replaced by 0 where sampling ends in clean data: DMN's are optimised for
# a solver that takes all N steps, and few-step ones are several times nearer to a teacher so than with a step to spare for 0.
_ENDS_FOR_ZERO = {*_AYS, "dmn"}


def discretization(
    name: str,
    path: NoisePath,
    num_steps: int,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
    rho: float | None = None,
    **options,
) -> Tensor:
    r"""The named grid of the module's table: float64 times (num_steps + 1,), strictly decreasing, no zero appended.

    Args:
        name: A key of `DISCRETIZATIONS`.
        path: The noise path whose time the grid is in.
        num_steps: N, the number of steps between the N + 1 times.
        t_max, t_min: The exact ends, by default the path's. `t_min=0` (clean data) is an end like any other, except
            for 'logsnr', 'time_uniform_vp' and 'dmn', which need t_min > 0: use [`append_zero`].
        rho: The exponent, for grids that have one.
        options: `mu` or `shift` for 'flow_linear'; `latent` and `start` for 'dmn'.

    Raises:
        ValueError: for an unknown name or option, a count, rho or end out of range, and grids in sigma/alpha or lambda
            that start where these are infinite (rectified flow at s = 1); for AYS levels on another model's path.
    """
    if name not in DISCRETIZATIONS:
        raise ValueError(
            f"unknown discretization {name!r}; use one of {', '.join(DISCRETIZATIONS)}, or explicit times"
        )
    _positive_integer(num_steps, "num_steps")
    if rho is not None:
        if not 0 < rho < math.inf:
            raise ValueError(f"`rho` must be a positive finite number, got {rho}; the usual value is 7")
        options["rho"] = rho
    grid = DISCRETIZATIONS[name]
    known = [key for key, p in inspect.signature(grid).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"discretization {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")

    first = float64(path.t_max if t_max is None else t_max)
    last = float64(path.t_min if t_min is None else t_min)
    if not 0 <= last < first < math.inf or (path.kind != "ve" and first > 1):
        raise ValueError(
            f"a grid on a {path.kind!r} path cannot run from {float(first)} to {float(last)}; times must satisfy "
            f"0 <= t_min < t_max{'' if path.kind == 've' else ' <= 1'}"
        )
    if name in _NEEDS_FINITE_START and not bool(path.sigma_edm(first).isfinite()):
        raise ValueError(
            f"discretization {name!r} cannot start at t_max={float(first)}, where sigma/alpha is infinite; give a "
            "smaller `t_max` such as 0.999, or use 'flow_linear' or 'time_uniform'"
        )
    if name in _NEEDS_POSITIVE_END and last == 0:
        raise ValueError(
            f"discretization {name!r} cannot end at t_min=0, where lambda is infinite; give a positive `t_min` "
            f"such as {path.t_min} and append the zero"
        )
    times = grid(path, num_steps, first, last, **options)
    # Through sigma and back the ends return with rounding errors; solvers compare them with the path's exact ends.
    times = torch.cat([first[None], times[1:-1], last[None]])
    if not bool((times.diff() < 0).all()):
        raise ValueError(
            f"discretization {name!r} with {num_steps} steps is not strictly decreasing in float64; use fewer steps, "
            "or a smaller `rho` or shift"
        )
    return times


def append_zero(times: Tensor) -> Tensor:
    """`times` followed by time 0, which is clean data on every path."""
    return torch.cat([times, times.new_zeros(1)])


def discretization_to_zero(
    name: str, path: NoisePath, num_steps: int, *, before_zero: bool | None = None, **options
) -> Tensor:
    """The named grid for `num_steps` steps the last of which ends in clean data: times (num_steps + 1,), the last 0.

    Args:
        name, path, num_steps, options: as for [`discretization`].
        before_zero: True: one step fewer leads to `t_min`, then comes the step to 0. False: 0 takes the place of `t_min`
            in the grid of `num_steps` steps. None: as the grid is meant; False for AYS and DMN, else True. One step is [t_max, 0].

    Raises:
        ValueError: as [`discretization`], and for a single step that was asked to come after `t_min`.
    """
    _positive_integer(num_steps, "num_steps")
    if before_zero and num_steps == 1:
        raise ValueError(f"discretization {name!r} before a step to 0 needs at least two steps; use more steps")
    before_zero = num_steps > 1 and name not in _ENDS_FOR_ZERO if before_zero is None else before_zero
    times = discretization(name, path, num_steps - before_zero, **options)
    return append_zero(times if before_zero else times[:-1])


__all__ = ["DISCRETIZATIONS", "append_zero", "discretization", "discretization_to_zero", "stock_times"]
