# SPDX-License-Identifier: Apache-2.0
"""The grids of stock schedulers against the installed ones."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ld3_diffusers.discretization import (
    stock_times,
)
from ld3_diffusers.noise_path import VE, RectifiedFlow, VPDiscrete, VPLinear, alphas_cumprod_from_config


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EXACT = {"rtol": 0, "atol": 1e-12}


def vp_path(config=BETAS):
    return VPDiscrete(alphas_cumprod_from_config(BETAS | config).double().log() / 2)


MULTISTEP = [UniPCMultistepScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler]
EULER = [EulerDiscreteScheduler, HeunDiscreteScheduler]
SPACINGS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
]


def stock_grid(cls, num, config, **set_options):
    """(sigmas, timesteps) of the stock scheduler, one entry a level where Heun repeats them."""
    scheduler = cls(**config)
    scheduler.set_timesteps(num, **set_options)
    sigmas, timesteps = scheduler.sigmas.double(), scheduler.timesteps.double()
    if "Heun" in cls.__name__:
        sigmas = torch.cat([sigmas[:1], sigmas[1::2]])
        timesteps = torch.cat([timesteps[:1], timesteps[1::2]])
    return sigmas, timesteps


def ours(cls, num, config, path, **options):
    if cls is DEISMultistepScheduler:  # has no such key and always ends there
        config = config | {"final_sigmas_type": "sigma_min"}
    convention = "multistep" if cls in MULTISTEP else "euler"
    return stock_times(config, path, num, spacing_convention=convention, **options)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing", SPACINGS, ids=lambda s: s["timestep_spacing"])
@pytest.mark.parametrize("cls", MULTISTEP + EULER, ids=lambda c: c.__name__)
def test_vp_spacing(cls, spacing, final):
    if final == "sigma_min" and cls in (HeunDiscreteScheduler, DEISMultistepScheduler):
        pytest.skip("has no final_sigmas_type")
    path, config = vp_path(), BETAS | spacing
    config |= {} if cls in (HeunDiscreteScheduler, DEISMultistepScheduler) else {"final_sigmas_type": final}
    for num in (1, 3, 5, 7, 10, 25):
        sigmas, timesteps = stock_grid(cls, num, config)
        times, network = ours(cls, num, config, path)
        torch.testing.assert_close(network, timesteps, rtol=1e-6, atol=0)
        # Stock tables are float32; between integers (Euler's linspace) stock interpolates sigma, the path log alpha.
        rtol = 1e-4 if spacing["timestep_spacing"] == "linspace" and cls in EULER else 1e-6
        torch.testing.assert_close(path.sigma_edm(times), sigmas, rtol=rtol, atol=0)
        torch.testing.assert_close(path.timestep(times[:-1]), network, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS, ids=lambda s: s["timestep_spacing"])
def test_rounding_equals_stock_for_every_count(spacing):
    path, multistep, ddim = vp_path(), UniPCMultistepScheduler(**BETAS | spacing), DDIMScheduler(**BETAS | spacing)
    for num in range(1, 1001):
        if num < 1000 or spacing["timestep_spacing"] != "leading":
            multistep.set_timesteps(num)
            _, network = stock_times(BETAS | spacing, path, num)
            # For 62 of the counts rounding gives stock's 'trailing' an extra timestep -1, which no network knows.
            assert network.tolist() == multistep.timesteps[:num].tolist()
        ddim.set_timesteps(num)
        _, network = stock_times(BETAS | spacing, path, num, spacing_convention="euler")
        if num % 111 == 0 or spacing["timestep_spacing"] != "linspace":
            assert network.round().tolist() == ddim.timesteps[:num].tolist()


@pytest.mark.parametrize("clip", [-5.1, -math.inf])
@pytest.mark.parametrize("spacing", SPACINGS[:2], ids=lambda s: s["timestep_spacing"])
def test_clipped_cosine_of_dpmpp(clip, spacing):
    config = BETAS | spacing | {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": clip}
    path = vp_path(config)
    sigmas, timesteps = stock_grid(DPMSolverMultistepScheduler, 10, config)
    times, network = stock_times(config, path, 10)
    assert network.tolist() == timesteps.tolist()
    torch.testing.assert_close(path.sigma_edm(times), sigmas, rtol=1e-6, atol=0)
    if spacing["timestep_spacing"] == "linspace":
        assert (network[0] < 999) == (clip == -5.1)


@pytest.mark.parametrize("spacing", SPACINGS, ids=lambda s: s["timestep_spacing"])
@pytest.mark.parametrize("rule", ["karras", "exponential", "beta", "lu"])
@pytest.mark.parametrize("cls", MULTISTEP + EULER, ids=lambda c: c.__name__)
def test_vp_sigma_rules(cls, rule, spacing):
    if rule == "lu" and cls is not DPMSolverMultistepScheduler:
        pytest.skip("only DPM++ has use_lu_lambdas")
    key = "use_lu_lambdas" if rule == "lu" else f"use_{rule}_sigmas"
    path, config = vp_path(), BETAS | spacing | {key: True}
    for num in (1, 2, 7):
        sigmas, timesteps = stock_grid(cls, num, config)
        times, network = ours(cls, num, config, path)
        # The lowest sigma comes out of float32 1 - alphas_cumprod.
        torch.testing.assert_close(path.sigma_edm(times), sigmas, rtol=2e-6, atol=0)
        # The multistep classes round or truncate these timesteps, the Euler family keeps them.
        atol = 1.001 if cls in MULTISTEP else 2e-3
        torch.testing.assert_close(network, timesteps, rtol=0, atol=atol)
        assert (times.diff() <= 0).all()


def test_own_sigma_range_and_final_sigma_of_unipc_and_euler():
    path = vp_path()
    for cls in (UniPCMultistepScheduler, EulerDiscreteScheduler):
        for final in ("zero", "sigma_min"):
            config = BETAS | {
                "use_karras_sigmas": True,
                "sigma_min": 0.05,
                "sigma_max": 12.0,
                "final_sigmas_type": final,
            }
            sigmas, _ = stock_grid(cls, 5, config)
            times, _ = ours(cls, 5, config, path)
            torch.testing.assert_close(path.sigma_edm(times), sigmas, rtol=2e-6, atol=0)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_edm_schedulers(schedule, final):
    config = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 5.0}
    config |= {"sigma_schedule": schedule, "final_sigmas_type": final}
    sigmas, timesteps = stock_grid(EDMEulerScheduler, 7, config)
    times, network = stock_times(config, VE(0.002, 80.0, 0.5, True), 7)
    torch.testing.assert_close(times, sigmas, rtol=3e-6, atol=0)
    torch.testing.assert_close(network, timesteps, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("extra", [{"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}, {}])
def test_continuous_euler(extra):
    # Stable Video Diffusion's configuration, and the same without its Karras range.
    config = BETAS | extra | {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    config["timestep_spacing"] = "leading"
    sigmas, timesteps = stock_grid(EulerDiscreteScheduler, 8, config)
    times, network = stock_times(config, VE(0.002, 700.0), 8, spacing_convention="euler")
    torch.testing.assert_close(times, sigmas, rtol=3e-6, atol=0)
    torch.testing.assert_close(network, timesteps, rtol=3e-6, atol=1e-6)


FLOW_MATCH = [
    {},
    {"shift": 3.0},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"shift": 2.0, "use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"shift": 3.0, "shift_terminal": 0.1},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift": 3.0},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02},
]


@pytest.mark.parametrize("config", FLOW_MATCH, ids=str)
def test_flow_match_euler(config):
    mu = 0.77 if config.get("use_dynamic_shifting") else None
    for num in (2, 4, 9):
        for given in (None, np.linspace(1.0, 1 / num, num).tolist()):
            sigmas, timesteps = stock_grid(FlowMatchEulerDiscreteScheduler, num, config, mu=mu, sigmas=given)
            times, network = stock_times(config, RectifiedFlow(), num, mu=mu, sigmas=given)
            torch.testing.assert_close(times, sigmas, rtol=2e-6, atol=0)
            torch.testing.assert_close(network, timesteps, rtol=2e-6, atol=0)


def test_flow_match_heun():
    sigmas, timesteps = stock_grid(FlowMatchHeunDiscreteScheduler, 6, {"shift": 3.0})
    times, network = stock_times({"shift": 3.0}, RectifiedFlow(), 6)
    torch.testing.assert_close(times, sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(network, timesteps, rtol=1e-6, atol=0)


UNIPC_FLOW = [
    {"flow_shift": 1.0},
    {"flow_shift": 3.0, "final_sigmas_type": "sigma_min"},
    {"flow_shift": 3.0, "shift_terminal": 0.1},
    {"use_dynamic_shifting": True},
    {"flow_shift": 3.0, "use_karras_sigmas": True},
    {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0},
]


@pytest.mark.parametrize("config", UNIPC_FLOW, ids=str)
def test_unipc_flow(config):
    config = BETAS | config | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    mu = 0.77 if config.get("use_dynamic_shifting") else None
    for num in (1, 4, 9):
        if num == 1 and config.get("shift_terminal"):
            continue  # a single s = 1 cannot be stretched anywhere
        sigmas, _ = stock_grid(UniPCMultistepScheduler, num, config, mu=mu)
        times, network = stock_times(config, RectifiedFlow(), num, mu=mu, flow_grid="unipc")
        # Stock lowers s = 1 by 1e-6; its timesteps are truncated to integers.
        torch.testing.assert_close(times, sigmas, rtol=0, atol=1.1e-6)
        torch.testing.assert_close(network, 1000 * times[:-1], **EXACT)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, DEISMultistepScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_and_deis_flow(cls, shift):
    config = BETAS | {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    for num in (1, 4, 9):
        sigmas, _ = stock_grid(cls, num, config)
        times, _ = ours(cls, num, config, RectifiedFlow(), flow_grid="dpmpp")
        torch.testing.assert_close(times, sigmas, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "config, path, num, options, fix",
    [
        ({}, vp_path(), 0, {}, "must be a positive integer"),
        ({}, vp_path(), 1001, {}, "ask for at most 1000"),
        ({"timestep_spacing": "leading"}, vp_path(), 1000, {}, "use timestep_spacing='trailing'"),
        ({"timestep_spacing": "even"}, vp_path(), 5, {}, "use 'linspace', 'leading' or 'trailing'"),
        ({"final_sigmas_type": "one"}, vp_path(), 5, {}, "use 'zero' or 'sigma_min'"),
        ({"use_karras_sigmas": True, "use_lu_lambdas": True}, vp_path(), 5, {}, "set one of them to False"),
        ({"use_dynamic_shifting": True}, RectifiedFlow(), 5, {}, "needs `mu`"),
        ({"shift": -1.0}, RectifiedFlow(), 5, {}, "must be a positive number"),
        ({"use_beta_sigmas": True}, RectifiedFlow(), 5, {"flow_grid": "dpmpp"}, "switch that flag off"),
        ({}, RectifiedFlow(), 5, {"flow_grid": "heun"}, "use 'flow_match_euler', 'unipc' or 'dpmpp'"),
        ({}, vp_path(), 5, {"spacing_convention": "ddim"}, "use 'multistep' or 'euler'"),
        ({"sigma_schedule": "cosine"}, VE(), 5, {}, "use 'karras' or 'exponential'"),
        ({}, VPLinear(), 5, {}, "choose one of the named discretizations"),
    ],
)
def test_stock_refusals_name_the_fix(config, path, num, options, fix):
    with pytest.raises(ValueError, match=fix):
        stock_times(config, path, num, **options)
