# SPDX-License-Identifier: Apache-2.0
r"""Noise paths: what a diffusion or flow model does to data as time runs.

Notation, used everywhere in this project. A sample at time $t$ is

$$ x_t = \alpha_t x_0 + \sigma_t \varepsilon, \qquad
   \lambda_t = \log(\alpha_t / \sigma_t), \qquad \sigma^{edm}_t = \sigma_t / \alpha_t = e^{-\lambda_t}. $$

`time` is what a path is parameterised by, in `[0, t_max]`, and time 0 is clean data on every path; `timestep` is the
number that the network is given. All functions take and return float64 tensors of any shape and are differentiable.

| path | time | $\alpha_t$, $\sigma_t$ | timestep |
|---|---|---|---|
| [`VPDiscrete`] | k/K after k of K training steps | $\log\alpha$ linear in t between the K betas | K t - 1, fractional |
| [`VPLinear`], [`VPCosine`] | [0, 1] | closed forms of Score SDE / improved DDPM | 999 t |
| [`VE`] | the noise level sigma | 1, t | ln(sigma) / 4 |
| [`RectifiedFlow`] | s in [0, 1] | 1 - s, s | 1000 s |
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr
from torch import Tensor


class Levels(NamedTuple):
    r"""A path at a grid of times; everything a solver may use.

    `scale` and `z` are the variables in which the ODE is $dy/dz = d$ with $y = x / scale$: on variance-preserving and
    -exploding paths `scale` is alpha, `z` is sigma_edm and `d` the noise prediction; on rectified flow 1, s and the
    velocity, which stay finite at s = 1.
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor
    scale: Tensor
    z: Tensor


def float64(times) -> Tensor:
    return times.double() if isinstance(times, Tensor) else torch.tensor(times, dtype=torch.float64)


def _interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """Piecewise linear through the increasing knots `xp`, the outer pieces continued."""
    xp, fp = xp.to(x.device), fp.to(x.device)
    right = torch.searchsorted(xp, x.detach().contiguous()).clamp(1, len(xp) - 1)
    x0, x1, f0, f1 = xp[right - 1], xp[right], fp[right - 1], fp[right]
    return f0 + (x - x0) * ((f1 - f0) / (x1 - x0))


def _where_finite(at_edge: Tensor, edge_value: float, x: Tensor, safe: float, function) -> Tensor:
    """`function(x)`, but `edge_value` (with zero, not NaN, gradient) where `at_edge`."""
    inside = function(torch.where(at_edge, torch.full_like(x, safe), x))
    return torch.where(at_edge, torch.full_like(x, edge_value), inside)


class NoisePath:
    """Base of all paths. Subclasses give `log_alpha`, `_time_of_log_alpha` or override what follows from them."""

    kind: str
    t_max: float
    t_min: float  # the smallest time a network should be asked about
    derivative = "noise"  # what `d` of dy/dz = d is: "noise" or "velocity"

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        square = -torch.expm1(2 * self.log_alpha(t))
        return _where_finite(square <= 0, 0.0, square, 1.0, torch.sqrt)

    def lam(self, t: Tensor) -> Tensor:
        """Half log-SNR, log(alpha / sigma); +inf at clean data."""
        log_alpha = self.log_alpha(t)
        square = -torch.expm1(2 * log_alpha)
        return log_alpha - 0.5 * _where_finite(square <= 0, -math.inf, square, 1.0, torch.log)

    def inverse_lam(self, lam: Tensor) -> Tensor:
        """The time at which the half log-SNR is `lam`."""
        return self._time_of_log_alpha(-0.5 * torch.nn.functional.softplus(-2 * lam))

    def _time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma_edm(self, t: Tensor) -> Tensor:
        """sigma / alpha, the noise level in the coordinates of EDM and k-diffusion."""
        return self.sigma(t) / self.alpha(t)

    def inverse_sigma_edm(self, sigma: Tensor) -> Tensor:
        """The time at which sigma / alpha is `sigma`."""
        return self.inverse_lam(-_where_finite(sigma <= 0, -math.inf, sigma, 1.0, torch.log))

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is given at time `t`: a real number, never rounded."""
        raise NotImplementedError

    def time(self, timestep: Tensor) -> Tensor:
        """Inverse of [`timestep`]."""
        raise NotImplementedError

    def levels(self, times) -> Levels:
        times = float64(times)
        alpha, sigma = self.alpha(times), self.sigma(times)
        return Levels(times, alpha, sigma, self.lam(times), alpha, sigma / alpha)

    def scale(self, t: Tensor) -> Tensor:
        """x / y, with y the variable of the ODE, see [`Levels`]."""
        return self.alpha(t)

    def data_prediction(self, prediction_type: str, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""(p, q) with $\hat x_0 = p\,x + q\,\mathrm{net}(x, t)$, alpha and sigma taken at the network's time `t`.

        Raises:
            ValueError: if the path has no such prediction type.
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        one = torch.ones_like(alpha)
        if prediction_type == "epsilon":
            return 1 / alpha, -sigma / alpha
        if prediction_type == "sample":
            return 0 * one, one
        if prediction_type == "v_prediction" and self.kind.startswith("vp"):
            return alpha, -sigma
        if prediction_type == "flow_prediction" and self.kind == "flow":
            return one, -sigma
        raise ValueError(
            f"a {self.kind!r} noise path has no prediction type {prediction_type!r}; "
            f"set `prediction_type` to what the network was trained to predict, one of {self.prediction_types}"
        )

    @property
    def prediction_types(self) -> list[str]:
        return ["epsilon", "sample"] + (["flow_prediction"] if self.kind == "flow" else ["v_prediction"])

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in: what the state is multiplied by before the network sees it."""
        return torch.ones_like(t)


@dataclass(frozen=True, eq=False)
class VPDiscrete(NoisePath):
    r"""Variance-preserving path of a model trained on K discrete steps (Ho et al., arXiv:2006.11239).

    $\log\alpha$ is interpolated linearly in t between t = k/K, k = 1..K, where it is $\frac12\log\bar\alpha_k$, and t = 0,
    where it is 0 (DPM-Solver, arXiv:2206.00927, appendix D.4).
    """

    log_alphas: Tensor  # (K,), decreasing
    kind: str = field(default="vp_discrete", init=False)

    def __post_init__(self):
        table = self.log_alphas.double()
        if table.ndim == 1 and len(table) > 1 and bool(table[-1] < -8.3):  # log(2**-12) = -8.32
            # Stock's floor for a zero terminal SNR, alphas_cumprod = 2**-24, can lie above the steps before it (linear
            # betas): these are raised to it, apart by a hair, so that the last step keeps stock's noise level.
            above = torch.arange(len(table) - 1, -1, -1, dtype=torch.float64, device=table.device)
            table = torch.maximum(table, table[-1] + 1e-9 * above)
        if table.ndim != 1 or len(table) < 2 or not bool((table.diff() < 0).all()) or not bool(table[0] < 0):
            raise ValueError("the betas must all lie in (0, 1); check `trained_betas`, `beta_start` and `beta_end`")
        steps = len(table)
        knots = torch.arange(steps + 1, dtype=torch.float64) / steps
        values = torch.cat([torch.zeros(1, dtype=torch.float64), table])
        object.__setattr__(self, "_knots", knots)
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "t_max", 1.0)
        object.__setattr__(self, "t_min", 1.0 / steps)

    def log_alpha(self, t):
        return _interpolate(t, self._knots, self._values)

    def _time_of_log_alpha(self, log_alpha):
        return _interpolate(log_alpha, self._values.flip(0), self._knots.flip(0))

    def timestep(self, t):
        return len(self.log_alphas) * t - 1

    def time(self, timestep):
        return (timestep + 1) / len(self.log_alphas)


@dataclass(frozen=True)
class VPLinear(NoisePath):
    r"""$\log\alpha_t = -\frac14 t^2(\beta_1-\beta_0) - \frac12 t\beta_0$ (Song et al., arXiv:2011.13456)."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0
    kind: str = field(default="vp_linear", init=False)

    def log_alpha(self, t):
        return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def _time_of_log_alpha(self, log_alpha):
        slope = self.beta_1 - self.beta_0
        twice = -4 * slope * log_alpha
        return twice / ((self.beta_0**2 + twice).sqrt() + self.beta_0) / slope

    def timestep(self, t):
        return 999 * t

    def time(self, timestep):
        return timestep / 999


@dataclass(frozen=True)
class VPCosine(NoisePath):
    r"""$\alpha_t = \cos(\frac{t+s}{1+s}\frac\pi2) / \cos(\frac{s}{1+s}\frac\pi2)$ (Nichol & Dhariwal, arXiv:2102.09672)."""

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946
    kind: str = field(default="vp_cosine", init=False)

    @property
    def _log_cos_0(self) -> float:
        return math.log(math.cos(self.s / (1 + self.s) * math.pi / 2))

    def log_alpha(self, t):
        return torch.cos((t + self.s) / (1 + self.s) * (math.pi / 2)).log() - self._log_cos_0

    def _time_of_log_alpha(self, log_alpha):
        return torch.arccos((log_alpha + self._log_cos_0).exp()) * (2 * (1 + self.s) / math.pi) - self.s

    def timestep(self, t):
        return 999 * t

    def time(self, timestep):
        return timestep / 999


@dataclass(frozen=True)
class VE(NoisePath):
    r"""Variance-exploding path, $x = x_0 + \sigma\varepsilon$, time = sigma (Karras et al., arXiv:2206.00364).

    With `preconditioned` the network is EDM's F in $D = c_{skip} x + c_{out} F(c_{in} x, c_{noise})$, whose sign of
    $c_{out}$ follows `prediction_type` as in Diffusers' `EDMEulerScheduler`; without, it predicts noise or velocity of the
    unit-variance sample $x/\sqrt{\sigma^2+1}$, as in `EulerDiscreteScheduler` with continuous timesteps.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 1.0
    preconditioned: bool = False
    kind: str = field(default="ve", init=False)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def log_alpha(self, t):
        return torch.zeros_like(t)

    def sigma(self, t):
        return t

    def lam(self, t):
        return -_where_finite(t <= 0, -math.inf, t, 1.0, torch.log)

    def inverse_lam(self, lam):
        return torch.exp(-lam)

    def timestep(self, t):
        return 0.25 * _where_finite(t <= 0, -math.inf, t, 1.0, torch.log)

    def time(self, timestep):
        return torch.exp(4 * timestep)

    def data_prediction(self, prediction_type, t):
        variance = t**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, t * self.sigma_data / variance.sqrt()
        if prediction_type == "v_prediction":
            return c_skip, -c_out
        if prediction_type == "epsilon" and self.preconditioned:
            return c_skip, c_out
        return super().data_prediction(prediction_type, t)

    def input_scale(self, t):
        return 1 / (t**2 + self.sigma_data**2).sqrt()


@dataclass(frozen=True)
class RectifiedFlow(NoisePath):
    r"""$x_s = (1-s)x_0 + s\varepsilon$, velocity $\varepsilon - x_0$ (Liu et al., arXiv:2209.03003). lambda = -inf at s = 1."""

    num_train_timesteps: int = 1000
    t_min: float = 1e-3
    t_max: float = 1.0
    kind: str = field(default="flow", init=False)
    derivative = "velocity"

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def scale(self, t):
        return torch.ones_like(t)

    def log_alpha(self, t):
        return _where_finite(t >= 1, -math.inf, t, 0.5, lambda s: torch.log1p(-s))

    def lam(self, t):
        return self.log_alpha(t) - _where_finite(t <= 0, -math.inf, t, 0.5, torch.log)

    def inverse_lam(self, lam):
        return torch.sigmoid(-lam)

    def timestep(self, t):
        return self.num_train_timesteps * t

    def time(self, timestep):
        return timestep / self.num_train_timesteps

    def levels(self, times):
        times = float64(times)
        return Levels(times, self.alpha(times), self.sigma(times), self.lam(times), torch.ones_like(times), times)


def shift_flow_time(s: Tensor, mu: float) -> Tensor:
    r"""Resolution shift of rectified flow, $s' = e^\mu s / (e^\mu s + 1 - s)$: exactly `+ mu` in logit s.

    Diffusers' exponential shift has this mu, its linear shift ln(mu), its static `shift` ln(shift) (Esser et al., arXiv:2403.03206).
    """
    ratio = math.exp(mu)
    return ratio * s / (1 + (ratio - 1) * s)


def betas_from_config(config: dict) -> Tensor:
    """The betas of a Diffusers scheduler config, float32 as Diffusers makes them (from `trained_betas` or by `beta_schedule`).

    Raises:
        ValueError: for an unknown `beta_schedule`.
    """
    steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    name = config["beta_schedule"]
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif name == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif name == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif name == "squaredcos_cap_v2":
        betas = betas_for_alpha_bar(steps)
    elif name == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    else:
        raise ValueError(
            f"unknown beta_schedule {name!r}; use 'linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid', or give the "
            "betas themselves as `trained_betas`"
        )
    if config.get("rescale_betas_zero_snr"):
        betas = rescale_zero_terminal_snr(betas)
    return betas


def alphas_cumprod_from_config(config: dict) -> Tensor:
    """Cumulative product of 1 - beta, float32 as stock schedulers have it; a zero terminal SNR gets stock's floor of 2**-24."""
    alphas_cumprod = (1 - betas_from_config(config)).cumprod(0)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod[-1] = 2**-24
    return alphas_cumprod
