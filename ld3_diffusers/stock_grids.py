# SPDX-License-Identifier: Apache-2.0
"""The grids of Diffusers' own schedulers, for a scheduler without a learned schedule: [`stock_times`]."""

import math

import torch
from torch import Tensor

from .noise_path import NoisePath, VPDiscrete, _interpolate, alphas_cumprod_from_config, float64, shift_flow_time


def _ramp(num: int) -> Tensor:
    """0, ..., 1 in `num` points; 0 if there is one."""
    return torch.linspace(0, 1, num, dtype=torch.float64)


def _power(first: Tensor, last: Tensor, num: int, rho: float) -> Tensor:
    """`num` points from `first` to `last`, uniform in the power 1 / rho."""
    first, last = first ** (1 / rho), last ** (1 / rho)
    return (first + _ramp(num) * (last - first)) ** rho


def _positive_integer(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}; give the number of network evaluations")
    return value


# DPM-Solver's uniform lambda (`use_lu_lambdas`) and k-diffusion's exponential sigmas are the same grid.
_SIGMA_RULES = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "exponential",
    "use_beta_sigmas": "beta",
}


def _sigma_rule(config: dict) -> str | None:
    chosen = [key for key in _SIGMA_RULES if config.get(key)]
    if len(chosen) > 1:
        raise ValueError(f"the config sets {' and '.join(chosen)}, which exclude each other; set one of them to False")
    return _SIGMA_RULES[chosen[0]] if chosen else None


def _sigmas_by_rule(rule: str, sigma_max: Tensor, sigma_min: Tensor, num: int, rho: float = 7.0) -> Tensor:
    if rule == "karras":
        return _power(sigma_max, sigma_min, num, rho)
    if rule == "exponential":
        return (sigma_max.log() + _ramp(num) * (sigma_min / sigma_max).log()).exp()
    if rule == "beta":
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise ImportError("`use_beta_sigmas` needs SciPy; install it with `pip install scipy`") from error
        quantiles = torch.as_tensor(beta.ppf((1 - _ramp(num)).numpy(), 0.6, 0.6), dtype=torch.float64)
        return sigma_min + quantiles * (sigma_max - sigma_min)
    raise ValueError(f"unknown `sigma_schedule` {rule!r}; use 'karras' or 'exponential'")


def _spaced_timesteps(config: dict, path: VPDiscrete, num: int, convention: str) -> Tensor:
    """The timesteps of `timestep_spacing` (Lin et al., arXiv:2305.08891, table 2), rounded where stock rounds."""
    spacing = config.get("timestep_spacing") or "linspace"
    trained = len(path.log_alphas)
    if num > trained:
        raise ValueError(
            f"{num} inference steps exceed the {trained} training steps; ask for at most {trained}, or set "
            "`use_karras_sigmas`"
        )
    clip = config.get("lambda_min_clipped")
    if clip is not None and convention == "multistep":
        trained -= int((path.lam(path.time(torch.arange(trained, dtype=torch.float64))) < clip).sum())
    # The multistep classes lay out one step more and drop the cleanest; they round, the Euler family does not.
    points = num + 1 if convention == "multistep" else num
    count = torch.arange(points, dtype=torch.float64)
    if spacing == "linspace":
        timesteps = (count * ((trained - 1) / max(points - 1, 1))).flip(0)[:num]
        return timesteps.round() if convention == "multistep" else timesteps
    if spacing == "leading":
        if trained // points == 0:
            raise ValueError(f"'leading' leaves no gap between {num} timesteps; use timestep_spacing='trailing'")
        return (count * (trained // points)).flip(0)[:num] + (config.get("steps_offset") or 0)
    if spacing == "trailing":
        # The difference is taken at `trained`, as NumPy's arange does: ties of the rounding depend on its last bit.
        ratio = trained / num
        return (trained + count[:num] * ((trained - ratio) - trained)).round() - 1
    raise ValueError(f"unknown timestep_spacing {spacing!r}; use 'linspace', 'leading' or 'trailing'")


def _stock_vp_times(config: dict, path: VPDiscrete, num: int, convention: str, final: str) -> tuple[Tensor, Tensor]:
    rule = _sigma_rule(config)
    # Stock sigmas are a table looked up at the timestep: past its end (`steps_offset`) they stay at the last.
    timesteps = _spaced_timesteps(config, path, num, convention) if rule is None or convention == "euler" else None
    if rule is None:
        times = path.time(timesteps).clamp(max=path.t_max)
    else:
        # The Euler family bends the range of the spaced timesteps, the multistep classes that of all training steps.
        ends = float64([path.t_max, path.t_min]) if timesteps is None else path.time(timesteps)[[0, -1]]
        ends = path.sigma_edm(ends.clamp(max=path.t_max))
        given = [config.get("sigma_max"), config.get("sigma_min")]
        sigmas = _sigmas_by_rule(rule, *(end if own is None else float64(own) for own, end in zip(given, ends)), num)
        times = path.inverse_sigma_edm(sigmas)
        table = torch.arange(len(path.log_alphas), dtype=torch.float64)
        # The network is told what stock tells it, interpolated in log sigma where our levels are in log alpha.
        timesteps = _interpolate(sigmas.log(), -path.lam(path.time(table)), table).clamp(0, len(table) - 1)
    if final == "zero":
        last = times.new_zeros(1)
    elif rule is not None and convention == "multistep":
        last = times[-1:]
    else:
        last = times[-1:].clamp(max=path.t_min)
    return torch.cat([times, last]), timesteps


def _log_shift(shift: float | None) -> float:
    if shift is None:
        return 0.0
    if not 0 < shift < math.inf:
        raise ValueError(f"a flow shift must be a positive number, got {shift}; 1 shifts nothing, SD3 uses 3")
    return math.log(shift)


def _stock_flow_times(config: dict, path: NoisePath, num: int, grid: str, mu, sigmas, alphas_cumprod) -> Tensor:
    rule = _sigma_rule(config)
    if grid == "unipc" and rule == "karras" and sigmas is None:
        # UniPC bends the sigma/alpha range of its betas, though a flow model has none, and shifts nothing.
        vp = _path_of_betas(config, alphas_cumprod)
        edm = vp.sigma_edm(_stock_vp_times(config, vp, num, "multistep", "zero")[0][:-1])
        return edm / (1 + edm)
    if rule is not None and grid != "flow_match_euler":
        raise ValueError(
            f"Diffusers has no meaningful {rule} sigmas for a {grid!r} flow grid; switch that flag off or use "
            "flow_grid='flow_match_euler'"
        )
    names = ("shift", "flow_shift") if grid == "flow_match_euler" else ("flow_shift", "shift")
    static = _log_shift(next((config[name] for name in names if config.get(name) is not None), None))
    dynamic = bool(config.get("use_dynamic_shifting"))
    if dynamic and mu is None:
        raise ValueError("`use_dynamic_shifting` needs `mu`; pass it to `set_timesteps`, as Diffusers' pipelines do")
    linear = config.get("time_shift_type") == "linear"
    log_shift = (_log_shift(mu) if linear else float(mu)) if dynamic else static

    smallest = float64(1 / path.num_train_timesteps)
    if sigmas is not None:
        s = float64(sigmas)
    elif grid == "flow_match_euler":
        # Its sigma_min has been shifted once already in __init__: stock's default grid is shifted twice.
        s = 1 + _ramp(num) * ((smallest if dynamic else shift_flow_time(smallest, static)) - 1)
    elif grid == "unipc":
        s = 1 + _ramp(num + 1)[:-1] * (smallest - 1)
    elif grid == "dpmpp":
        s = (1 - smallest) * (1 - _ramp(num + 1)[:-1])
    else:
        raise ValueError(f"unknown flow_grid {grid!r}; use 'flow_match_euler', 'unipc' or 'dpmpp'")
    s = shift_flow_time(s, log_shift)
    if config.get("shift_terminal"):
        s = 1 - (1 - s) * ((1 - config["shift_terminal"]) / (1 - s[-1]))
    return s if rule is None else _sigmas_by_rule(rule, s[0], s[-1], num)


def _path_of_betas(config: dict, alphas_cumprod: Tensor | None) -> VPDiscrete:
    table = alphas_cumprod_from_config(config) if alphas_cumprod is None else alphas_cumprod
    return VPDiscrete(table.double().log() / 2)


def stock_times(
    config: dict,
    path: NoisePath,
    num_inference_steps: int,
    *,
    spacing_convention: str = "multistep",
    flow_grid: str = "flow_match_euler",
    mu: float | None = None,
    sigmas: list[float] | Tensor | None = None,
    alphas_cumprod: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The grid that a stock Diffusers scheduler with this config would use.

    On 'vp_discrete' paths: `timestep_spacing`, or Karras, exponential, lu or beta sigmas. On 've' paths: `sigma_schedule`
    and `rho` of the EDM schedulers, or, with `timestep_type="continuous"`, EulerDiscrete's sigmas. On 'flow' paths: a
    uniform grid, shifted (`shift` or `flow_shift`, or mu), stretched to `shift_terminal`, then perhaps bent.

    Integer grids are rounded as stock rounds them; no other timestep is rounded or truncated (DPM++, DEIS and UniPC
    truncate theirs to integers, DPM++ with Karras rounds them). UniPC's 1e-6 below s = 1 is not imitated.

    Args:
        config: Stock keys; a missing one has the stock default.
        spacing_convention: 'multistep' as UniPC, DPM++ and DEIS space timesteps, 'euler' as Euler, Heun and DDIM do.
        flow_grid: 'flow_match_euler' (also FlowMatchHeun), 'unipc' or 'dpmpp' (also DEIS) with `use_flow_sigmas`.
        mu: The shift of `use_dynamic_shifting`.
        sigmas: The unshifted flow grid (n,) that a pipeline hands over (Flux: linspace(1, 1/n, n)).
        alphas_cumprod: The betas' table where the path has none but the grid needs it; by default the config's.

    Returns:
        The times of the n + 1 levels, non-increasing, the last 0 or, by `final_sigmas_type="sigma_min"`, stock's
        (DEIS always ends there; it may repeat the one before), and the n timesteps for the network; both float64.

    Raises:
        ValueError: for an unknown value of a key, and for keys that exclude each other.
        ImportError: for beta sigmas without SciPy.
    """
    num = _positive_integer(num_inference_steps, "num_inference_steps")
    final = config.get("final_sigmas_type") or "zero"
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"unknown final_sigmas_type {final!r}; use 'zero' or 'sigma_min'")
    if spacing_convention not in ("multistep", "euler"):
        raise ValueError(f"unknown spacing_convention {spacing_convention!r}; use 'multistep' or 'euler'")
    if path.kind == "vp_discrete":
        return _stock_vp_times(config, path, num, spacing_convention, final)
    if path.kind == "ve" and config.get("timestep_type") == "continuous":
        vp = _path_of_betas(config, alphas_cumprod)
        times = vp.sigma_edm(_stock_vp_times(config, vp, num, spacing_convention, final)[0])
        return times, path.timestep(times[:-1])
    if path.kind == "ve":
        rule = _sigma_rule(config) or config.get("sigma_schedule") or "karras"
        rho = 7.0 if config.get("rho") is None else config["rho"]
        times = _sigmas_by_rule(rule, float64(path.t_max), float64(path.t_min), num, rho)
    elif path.kind == "flow":
        times = _stock_flow_times(config, path, num, flow_grid, mu, sigmas, alphas_cumprod)
    else:
        raise ValueError(
            f"Diffusers has no scheduler on a {path.kind!r} path; choose one of the named discretizations instead"
        )
    last = times.new_zeros(1) if final == "zero" else times[-1:]
    return torch.cat([times, last]), path.timestep(times)
