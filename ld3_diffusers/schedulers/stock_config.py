# SPDX-License-Identifier: Apache-2.0
"""Reading the config of a stock Diffusers scheduler.

Diffusers drops, when one scheduler is made from another's config, every value that was a default of the first class. For
preferences (spacing, order) that is its rule and ours. For facts about the model it is wrong: a default `HeunDiscreteScheduler`
has other betas than a default `DDIMScheduler`, and all of `FlowMatchEulerDiscreteScheduler().config` counts as defaults. So
facts are read raw, and they decide the noise path.
"""

import math
from numbers import Integral, Real
from typing import Any

from diffusers.utils import logging

from ..noise_path import VE, NoisePath, RectifiedFlow, VPCosine, VPDiscrete, VPLinear, alphas_cumprod_from_config
from ..solvers import SOLVERS


logger = logging.get_logger(__name__)

NOISE_PATHS = ("vp_discrete", "vp_linear", "vp_cosine", "ve", "edm", "flow")
BETA_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
FLOW_KEYS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
SIGMA_KEYS = ("sigma_min", "sigma_max", "sigma_data")
# What a scheduler's config says of the model.
MODEL_KEYS = (
    *("noise_path", "prediction_type", "num_train_timesteps", "shift_terminal", "time_shift_type"),
    *(*BETA_KEYS, *FLOW_KEYS, *SIGMA_KEYS),
)
# Options that only choose a stock grid; a learned schedule replaces them all.
GRID_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
GRID_KEYS = (*GRID_FLAGS, "timestep_spacing", "steps_offset", "final_sigmas_type", "discretization", "rho")
SOLVER_CHOICES = ("solver", "solver_order", "solver_type", "predict_x0", "lower_order_final", "afs", "starting_scale")


def stock_overrides(config: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that, before `explicit` ones, make an `LD3Scheduler` of a raw config of any scheduler.

    Raises:
        ValueError: for what is no config, and for stock options that no deterministic ODE schedule can follow.
    """
    if not isinstance(config, dict):
        raise ValueError(
            f"from_config takes the config of a scheduler, a mapping, and got {type(config).__name__}; "
            "use from_pretrained for a folder or a repository"
        )
    for key, why in (
        ("invert_sigmas", "its model runs time backwards"),
        ("stochastic_sampling", "it adds noise at every step"),
    ):
        if explicit.get(key, config.get(key)):
            raise ValueError(f"a scheduler config with {key}=True cannot be converted: {why}; use the stock scheduler")
    overrides = {}
    if "noise_path" not in config:
        overrides |= _noise_path_facts(config)
    overrides |= _solver_preferences(config, explicit)
    if "discretization" in explicit and explicit["discretization"] != config.get("discretization"):
        overrides["rho"] = None  # the exponent of another grid, which this one may not have
    schedules = explicit.get("schedules", config.get("schedules"))
    if "schedules" in explicit and schedules is None:
        overrides["curve"] = None  # whoever asks for no learned schedule wants none from there, either
    curve = explicit.get("curve", overrides.get("curve", config.get("curve")))
    if schedules or curve:
        # a named discretization, and its rho, serve the counts without a learned schedule
        asked = [key for key in GRID_KEYS if key in explicit and key not in ("discretization", "rho")]
        if asked:
            raise ValueError(
                f"{', '.join(asked)} would choose a stock grid, but a learned schedule brings its own times; "
                "drop the option, or pass schedules=None to sample without the learned schedule"
            )
        dropped = [key for key in GRID_FLAGS if config.get(key)]
        if dropped:
            logger.warning(
                f"a learned schedule brings its own times; ignoring {', '.join(dropped)} of the stock config"
            )
        overrides |= dict.fromkeys(dropped, False)
        _refuse_other_solver(explicit, schedules, curve)
    return {key: value for key, value in overrides.items() if key not in explicit}


def _noise_path_facts(config):
    facts = {"num_train_timesteps": config["num_train_timesteps"]} if "num_train_timesteps" in config else {}
    has_betas = "beta_start" in config or config.get("trained_betas") is not None
    if (
        config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
        or (not has_betas and ("shift" in config or "base_image_seq_len" in config))
    ):
        facts |= {key: config[key] for key in (*FLOW_KEYS, "shift_terminal", "time_shift_type") if key in config}
        if "flow_shift" in config:
            # of the two stock grids for flow models, DPM++ and DEIS, which alone have this key, use the other
            grid = "dpmpp" if "algorithm_type" in config else "unipc"
            facts |= {"shift": config["flow_shift"], "flow_grid": grid}
        return facts | {
            "noise_path": "flow",
            "prediction_type": config.get("prediction_type", "flow_prediction"),
        }
    if "prediction_type" in config:
        facts["prediction_type"] = config["prediction_type"]
    if "sigma_data" in config or config.get("timestep_type") == "continuous":
        facts |= {key: config[key] for key in SIGMA_KEYS if config.get(key) is not None}
        return facts | {"noise_path": "edm" if "sigma_data" in config else "ve"}
    return facts | {key: config[key] for key in BETA_KEYS if key in config}


def _solver_preferences(config, explicit):
    """Bounds on the data prediction, inherited for a solver that does not extrapolate it, are dropped."""
    solver = explicit.get("solver", config.get("solver", "unipc"))
    if solver not in SOLVERS:
        return {}
    overrides = {}
    used_defaults = config.get("_use_default_values", ())
    if solver not in ("ddim", "dpmpp", "unipc"):
        ignored = [key for key in ("clip_sample", "thresholding") if config.get(key) and key not in used_defaults]
        if ignored:
            logger.warning(f"{solver} does not extrapolate the data prediction; ignoring {', '.join(ignored)}")
        overrides |= dict.fromkeys(ignored, False)
    return overrides


def _refuse_other_solver(explicit, schedules, curve):
    entries = (
        {f"schedule learned for {nfe} evaluations": schedules[nfe] for nfe in schedules}
        if isinstance(schedules, dict)
        else {}
    )
    for key in SOLVER_CHOICES:
        for what, entry in {**entries, "learned curve": curve}.items():
            if key in explicit and isinstance(entry, dict) and key in entry and entry[key] != explicit[key]:
                raise ValueError(
                    f"{key}={explicit[key]!r} contradicts the {what}, which was learned with "
                    f"{key}={entry[key]!r}; drop the option, or pass schedules=None to sample without the learned schedule"
                )


MAX_TRAIN_TIMESTEPS = 100_000  # models have 1000 to 8000; what is computed for each must stay small for any config
NUMBERS = (
    *("beta_start", "beta_end", "rho", "steps_offset", "clip_sample_range", "dynamic_thresholding_ratio"),
    *("sample_max_value", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    *("shift_terminal", *SIGMA_KEYS),
)


def _check_numbers(config) -> None:
    """Raises a `ValueError` if an option that must be a number is none, or is NaN or infinite, which JSON would carry along."""
    for key in NUMBERS:
        value = config[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)):
            raise ValueError(f"{key} must be a finite number, got {value!r:.60}; check the config it came from")
    count = config["num_train_timesteps"]
    if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= count <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"num_train_timesteps must be a positive integer of at most {MAX_TRAIN_TIMESTEPS}, got {count!r:.60}; check the "
            "config it came from"
        )
    if config["shift"] <= 0:
        raise ValueError(f"shift must be positive, got {config['shift']!r}; 1 shifts nothing")


def refuse_grid_flags(config) -> None:
    """Raises a `ValueError` if options beside a learned schedule would choose a stock grid."""
    chosen = [flag for flag in GRID_FLAGS if config[flag]]
    if chosen:
        raise ValueError(
            f"{', '.join(chosen)} would choose a stock grid, but a learned schedule brings its own times; "
            "drop the option, or pass schedules=None"
        )


def logit_shift(config, mu: float | None) -> float:
    """How far a config moves the times of rectified flow in logit s, `mu` being what the pipeline passes for its resolution.

    Raises:
        ValueError: if `mu` is missing, or with `shift_terminal`, which is no shift in logit s.
    """
    if config["noise_path"] != "flow":
        return 0.0
    if config["shift_terminal"]:
        raise ValueError(
            "shift_terminal stretches the times in a way that does not transfer; use a schedule of final times "
            "(Schedule.final), or set shift_terminal=None"
        )
    if not config["use_dynamic_shifting"]:
        return math.log(config["shift"])
    if mu is None:
        raise ValueError(
            "this flow scheduler shifts with the resolution; pass `mu`, or set use_dynamic_shifting=False"
        )
    return float(mu) if config["time_shift_type"] == "exponential" else math.log(mu)


def make_noise_path(config) -> NoisePath:
    """The noise path that an `LD3Scheduler` config describes.

    Raises:
        ValueError: for an unknown `noise_path`, impossible betas or sigmas, or what should be a number and is none.
    """
    _check_numbers(config)
    kind = config["noise_path"]
    if kind == "vp_discrete":
        return VPDiscrete(0.5 * alphas_cumprod_from_config(config).double().log())
    if kind == "vp_linear":
        return VPLinear()
    if kind == "vp_cosine":
        return VPCosine()
    if kind == "flow":
        return RectifiedFlow(num_train_timesteps=config["num_train_timesteps"])
    if kind in ("ve", "edm"):
        given = {key: config[key] for key in SIGMA_KEYS if config[key] is not None}
        if kind == "edm":
            given.setdefault("sigma_data", 0.5)
        if given.get("sigma_min", 0.002) >= given.get("sigma_max", 80.0):
            raise ValueError("sigma_min must be below sigma_max; swap them")
        return VE(preconditioned=kind == "edm", **given)
    raise ValueError(f"unknown noise_path {kind!r}; use one of {', '.join(NOISE_PATHS)}")
