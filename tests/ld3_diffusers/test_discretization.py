# SPDX-License-Identifier: Apache-2.0
"""Grids of times against the original authors' numbers (tests/golden) and against the installed stock schedulers."""

import math
import sys
from pathlib import Path

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

from ld3_diffusers.discretization import DISCRETIZATIONS, append_zero, discretization, stock_times
from ld3_diffusers.dmn import dmn_objective
from ld3_diffusers.noise_path import VE, RectifiedFlow, VPCosine, VPDiscrete, VPLinear, alphas_cumprod_from_config


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EXACT = {"rtol": 0, "atol": 1e-12}


def load_golden():
    with np.load(Path(__file__).parents[1] / "golden" / "schedules.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


GOLDEN = load_golden()


def vp_path(config=BETAS):
    return VPDiscrete(alphas_cumprod_from_config(BETAS | config).double().log() / 2)


LD3_PATHS = {"vp_linear": VPLinear(), "sd": VPDiscrete(GOLDEN["vp_space/sd/log_alpha_table"])}
EVERY_PATH = {
    "vp_discrete": vp_path(),
    "vp_linear": VPLinear(),
    "vp_cosine": VPCosine(),
    "ve": VE(),
    "flow": RectifiedFlow(t_max=0.999),
}


# Named grids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [5, 10])
@pytest.mark.parametrize(
    "skip_type, name, rho",
    [
        ("logSNR", "logsnr", None),
        ("time_uniform", "time_uniform", None),
        ("time_quadratic", "time_quadratic", None),
        ("edm", "edm", None),
        ("poly_3", "poly", 3),
    ],
)
@pytest.mark.parametrize("path", LD3_PATHS)
def test_ld3_grids(path, skip_type, name, rho, num_steps):
    times = discretization(name, LD3_PATHS[path], num_steps, rho=rho)
    torch.testing.assert_close(times, GOLDEN[f"vp_space/{path}/grid/{skip_type}/N{num_steps}"], **EXACT)


DIFF_SAMPLER = [key for key in GOLDEN if key.startswith("sigma_space/schedule/")]


@pytest.mark.parametrize("key", DIFF_SAMPLER, ids=lambda key: "-".join(key.split("/")[2:]))
def test_diff_sampler_grids(key):
    expected = GOLDEN[key]
    kind, rho, _ = key.split("/")[2].rsplit("_", 2)
    options = {} if kind == "logsnr" else {"rho": float(rho.removeprefix("rho"))}
    sigma_max, sigma_min = expected[0].item(), expected[-1].item()
    if kind != "discrete":  # in sigma, so on every path that has this sigma
        path = VE(sigma_min, sigma_max)
        name = {"time_uniform": "time_uniform_vp"}.get(kind, kind)
        times = discretization(name, path, len(expected) - 1, **options)
        torch.testing.assert_close(times, expected, rtol=1e-12, atol=0)
    if key.split("/")[2].endswith("_sd"):
        path, name = LD3_PATHS["sd"], {"time_uniform": "time_uniform_vp"}.get(kind, kind)
        t_max, t_min = path.inverse_sigma_edm(expected[[0, -1]]).tolist()
        times = discretization(name, path, len(expected) - 1, t_max=t_max, t_min=t_min, **options)
        torch.testing.assert_close(path.sigma_edm(times), expected, rtol=1e-12, atol=0)


def test_karras_steps_of_the_golden_runs():
    torch.testing.assert_close(discretization("polynomial", VE(), 6), GOLDEN["sigma_space/t_steps/poly7"], **EXACT)
    # diff-sampler's wrong [0.881, 0.5] for `discrete` with rho != 1: the start needs the power 1/rho as well.
    times = discretization("discrete", VE(0.5, 2.0), 1, rho=7)
    assert times.tolist() == [2.0, 0.5]


def test_flow_linear_is_the_shifted_uniform_grid():
    path, base = RectifiedFlow(), torch.linspace(1, 0, 5, dtype=torch.float64)
    torch.testing.assert_close(discretization("flow_linear", path, 4, t_min=0.0), base, **EXACT)
    expected = 3 * base / (1 + 2 * base)
    torch.testing.assert_close(discretization("flow_linear", path, 4, t_min=0.0, shift=3.0), expected, **EXACT)
    torch.testing.assert_close(discretization("flow_linear", path, 4, t_min=0.0, mu=math.log(3)), expected, **EXACT)
    # With t_min > 0 the ends stay where they were asked for, the grid is uniform before the shift.
    times = discretization("flow_linear", path, 4, t_min=0.01, mu=0.9)
    assert (times[0].item(), times[-1].item()) == (1, 0.01)
    unshifted = torch.special.expit(times[1:].logit() - 0.9)
    torch.testing.assert_close(unshifted.diff(), unshifted.diff()[:1].expand(3), **EXACT)


@pytest.mark.parametrize("path", EVERY_PATH.values(), ids=EVERY_PATH)
@pytest.mark.parametrize("name", DISCRETIZATIONS)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_every_grid_runs_exactly_between_its_ends(name, path, num_steps):
    if name == "flow_linear" and path.kind != "flow":
        pytest.skip("flow only")
    rho = 2.5 if name == "poly" else None
    times = discretization(name, path, num_steps, rho=rho)
    assert times.dtype == torch.float64 and times.shape == (num_steps + 1,)
    assert (times[0].item(), times[-1].item()) == (path.t_max, path.t_min) and (times.diff() < 0).all()
    assert append_zero(times).tolist() == [*times.tolist(), 0.0]
    if name == "time_uniform_vp":
        with pytest.raises(ValueError, match="give a smaller `t_min`"):
            discretization(name, path, num_steps, t_max=path.t_max, t_min=0.9 * path.t_max)
        return
    lower, upper = 0.7 * path.t_max + 0.3 * path.t_min, 0.3 * path.t_max + 0.7 * path.t_min
    inner = discretization(name, path, num_steps, rho=rho, t_max=lower, t_min=upper)
    assert (inner[0].item(), inner[-1].item()) == (lower, upper) and (inner.diff() < 0).all()


@pytest.mark.parametrize("name", [n for n in DISCRETIZATIONS if n not in ("logsnr", "time_uniform_vp", "dmn")])
def test_grids_that_may_end_at_clean_data(name):
    times = discretization(name, RectifiedFlow(), 4, t_max=0.99, t_min=0.0, rho=3 if name == "poly" else None)
    assert times[-1].item() == 0 and (times.diff() < 0).all()


@pytest.mark.parametrize(
    "arguments, options, fix",
    [
        (("karras", VE(), 5), {}, "use one of polynomial, logsnr"),
        (("logsnr", VE(), 0), {}, "must be a positive integer"),
        (("logsnr", VE(), 5.0), {}, "must be a positive integer"),
        (("polynomial", VE(), 5), {"rho": math.nan}, "positive finite number"),
        (("polynomial", VE(), 5), {"rho": math.inf}, "positive finite number"),
        (("logsnr", VE(), 5), {"rho": 7}, "has no option 'rho'"),
        (("time_uniform", VE(), 5), {"shift": 3}, "has no option 'shift'"),
        (("poly", VE(), 5), {}, "give one, for example `rho=3`"),
        (("logsnr", VE(), 5), {"t_min": 0.0}, "append the zero"),
        (("logsnr", VE(), 5), {"t_min": 90.0}, "0 <= t_min < t_max"),
        (("logsnr", VE(), 5), {"t_max": math.nan}, "0 <= t_min < t_max"),
        (("time_uniform", RectifiedFlow(), 5), {"t_max": 1.5}, "t_max <= 1"),
        (("polynomial", RectifiedFlow(), 5), {}, "use 'flow_linear'"),
        (("logsnr", RectifiedFlow(), 5), {}, "such as 0.999"),
        (("dmn", RectifiedFlow(), 5), {}, "such as 0.999"),
        (("flow_linear", RectifiedFlow(), 5), {"shift": 3, "mu": 1}, "give one"),
        (("flow_linear", RectifiedFlow(), 5), {"shift": 0}, "must be a positive number"),
        (("flow_linear", VPLinear(), 5), {}, "use 'time_uniform'"),
        (("poly", VE(), 500), {"rho": 200}, "use fewer steps"),
    ],
)
def test_refusals_name_the_fix(arguments, options, fix):
    with pytest.raises(ValueError, match=fix.replace("(", r"\(")) as caught:
        discretization(*arguments, **options)
    assert "\n" not in str(caught.value)


# DM-NonUniform ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LD3_PATHS)
def test_dmn_agrees_with_ld3(name):
    path, golden = LD3_PATHS[name], GOLDEN[f"vp_space/{name}/grid/dmn/N5"].double()
    torch.testing.assert_close(discretization("dmn", path, 5), golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LD3_PATHS)
def test_dmn_of_many_steps_is_near_ld3(name):
    # Beyond 7 steps the optimiser sticks at kinks of the bound: restating the objective with expm1 for exp - 1, or
    # another order of summation, moves the times by .005 to .08 and the bound by -20 to +10 %.
    path, golden = LD3_PATHS[name], GOLDEN[f"vp_space/{name}/grid/dmn/N10"].double()
    times = discretization("dmn", path, 10)
    bound, upstream = (dmn_objective(path.lam(t), latent=True).item() for t in (times, golden))
    uniform = dmn_objective(path.lam(discretization("time_uniform", path, 10)), latent=True).item()
    assert bound < 1.2 * upstream < 0.7 * uniform
    torch.testing.assert_close(times, golden, rtol=0, atol=0.12)


def quadrature_of_the_bound(lam, latent):
    """The same bound with the integrals of e^lambda times the Lagrange basis by brute force."""
    steps, total, signed = len(lam) - 1, 0.0, np.zeros(len(lam))
    for s in range(steps):
        order = min(s + 1, steps - s, 3)
        nodes = lam[s + 1 - order : s + 1]
        alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * nodes)), 1 / np.sqrt(1 + np.exp(2 * nodes))
        weight = sigma**2 / alpha if latent else sigma / alpha
        grid = np.linspace(lam[s], lam[s + 1], 4001)
        basis = [np.prod([(grid - b) / (a - b) for b in nodes if b != a] + [np.ones(4001)], axis=0) for a in nodes]
        terms = weight * np.array([np.trapezoid(np.exp(grid) * b, grid) for b in basis])
        if order == 1 or (steps <= 7 and s < 3):
            total += np.linalg.norm(terms)
        else:
            signed[s + 1 - order : s + 1] += terms
    return total + np.abs(signed).sum()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("latent", [True, False])
def test_dmn_objective_is_the_integral_it_claims(steps, latent):
    lam = torch.linspace(-2.5, 3.5, steps + 1, dtype=torch.float64)
    lam = lam + 0.2 * torch.sin(torch.arange(steps + 1, dtype=torch.float64))
    assert dmn_objective(lam, latent).item() == pytest.approx(quadrature_of_the_bound(lam.numpy(), latent), rel=1e-5)
    assert torch.autograd.gradcheck(lambda x: dmn_objective(x, latent), lam.requires_grad_())


def test_dmn_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        discretization("dmn", VPLinear(), 5)


# Stock spacings --------------------------------------------------------------------------------------------------

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
