# SPDX-License-Identifier: Apache-2.0
"""Noise paths against the original authors' numbers (tests/golden), Diffusers' tables and finite differences."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ld3_diffusers.noise_path import (
    VE,
    RectifiedFlow,
    VPCosine,
    VPDiscrete,
    VPLinear,
    alphas_cumprod_from_config,
    betas_from_config,
    shift_flow_time,
)


SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "schedules.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def sd_path():
    return VPDiscrete(alphas_cumprod_from_config(SD).double().log() / 2)


def grid(*times):
    return torch.tensor(times, dtype=torch.float64)


PATHS = {
    "vp_discrete": sd_path(),
    "vp_linear": VPLinear(),
    "vp_cosine": VPCosine(),
    "ve": VE(),
    "edm": VE(sigma_data=0.5, preconditioned=True),
    "flow": RectifiedFlow(),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def interior(path):
    """Times inside (0, t_max], off the knots of the discrete table."""
    return path.t_min + (path.t_max - path.t_min) * grid(0.00037, 0.0123, 0.21717, 0.5003, 0.77777, 0.99931)


@pytest.mark.parametrize("name", ["vp_linear", "sd"])
def test_maps_agree_with_ld3(golden, name):
    path = VPLinear() if name == "vp_linear" else VPDiscrete(golden["vp_space/sd/log_alpha_table"])
    probe = {key: golden[f"vp_space/{name}/probe/{key}"] for key in ("t", "log_alpha", "sigma", "lambda")}
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(path.log_alpha(probe["t"]), probe["log_alpha"], **exact)
    torch.testing.assert_close(path.sigma(probe["t"]), probe["sigma"], **exact)
    torch.testing.assert_close(path.lam(probe["t"]), probe["lambda"], **exact)
    lam = golden[f"vp_space/{name}/probe/lambda_in"]
    torch.testing.assert_close(path.inverse_lam(lam), golden[f"vp_space/{name}/probe/inverse_lambda"], **exact)
    ends = path.lam(grid(path.t_max, path.t_min))
    torch.testing.assert_close(ends, golden[f"vp_space/{name}/lambda_min_max"], **exact)


def test_sigma_map_agrees_with_diff_sampler(golden):
    path = VPDiscrete(golden["vp_space/sd/log_alpha_table"])
    t, sigma, back = (golden[f"sigma_space/sd_map/{key}"] for key in ("t", "sigma", "t_back"))
    torch.testing.assert_close(path.sigma_edm(t), sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.inverse_sigma_edm(sigma), back, rtol=0, atol=1e-12)


def test_known_values():
    # The ends that LD3's code gives; its float32 loses up to 3e-4 at the clean end, where 1 - alpha^2 is 4e-5.
    for path, ends in (
        (VPLinear(), (-5.02498, 4.55759)),
        (VPCosine(), (-4.77763, 5.04723)),
        (sd_path(), (-2.68202, 3.53470)),
    ):
        torch.testing.assert_close(path.lam(grid(path.t_max, path.t_min)), grid(*ends), rtol=0, atol=3e-4)
    torch.testing.assert_close(sd_path().sigma_edm(grid(1.0, 0.001)), grid(14.6146, 0.029167), rtol=3e-5, atol=0)
    assert sd_path().timestep(grid(1.0, 0.001)).tolist() == pytest.approx([999, 0])
    assert RectifiedFlow().timestep(grid(1.0, 0.25)).tolist() == [1000, 250]
    assert VE().timestep(grid(math.e)).item() == pytest.approx(0.25)


@every_path
def test_inverses(path):
    t = interior(path)
    tight = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(path.inverse_lam(path.lam(t)), t, **tight)
    torch.testing.assert_close(path.inverse_sigma_edm(path.sigma_edm(t)), t, **tight)
    torch.testing.assert_close(path.time(path.timestep(t)), t, **tight)
    lam = torch.linspace(-2.5, 3.5, 7, dtype=torch.float64)
    torch.testing.assert_close(path.lam(path.inverse_lam(lam)), lam, rtol=0, atol=1e-11)
    torch.testing.assert_close(path.lam(t), (path.alpha(t) / path.sigma(t)).log(), rtol=1e-9, atol=1e-9)


@every_path
def test_clean_end(path):
    zero = grid(0.0)
    assert path.sigma(zero).item() == 0 and path.alpha(zero).item() == pytest.approx(1, abs=1e-15)
    assert path.lam(zero).item() == math.inf
    assert path.inverse_lam(grid(math.inf)).item() == pytest.approx(0, abs=1e-14)
    assert path.inverse_sigma_edm(zero).item() == pytest.approx(0, abs=1e-14)


def test_flow_at_pure_noise():
    path, one = RectifiedFlow(), grid(1.0)
    assert (path.alpha(one).item(), path.sigma(one).item(), path.lam(one).item()) == (0, 1, -math.inf)
    assert path.sigma_edm(one).item() == math.inf
    assert path.inverse_lam(grid(-math.inf)).item() == 1 and path.inverse_sigma_edm(grid(math.inf)).item() == 1
    levels = path.levels([1.0, 0.5, 0.0])
    assert levels.scale.tolist() == [1, 1, 1] and levels.z.tolist() == [1, 0.5, 0]


@every_path
def test_gradients_agree_with_finite_differences(path):
    t = interior(path)[1:].requires_grad_()  # the first is too near the clean end for a symmetric difference
    for function in (path.log_alpha, path.alpha, path.sigma, path.lam, path.sigma_edm):
        assert torch.autograd.gradcheck(function, t, eps=1e-7, atol=1e-5, rtol=1e-5)
    lam = grid(-2.3, -0.4, 0.0, 1.1, 3.3).requires_grad_()
    assert torch.autograd.gradcheck(path.inverse_lam, lam, eps=1e-7, atol=1e-5, rtol=1e-5)


@every_path
@pytest.mark.parametrize("end", ["clean", "noisy"])
def test_gradients_are_finite_at_the_ends(path, end):
    t = grid(0.0 if end == "clean" else path.t_max)
    for function in (path.log_alpha, path.alpha, path.sigma, path.lam):
        x = t.clone().requires_grad_()
        (function(x).nan_to_num() + 0 * x).sum().backward()  # VE's log alpha is a constant
        assert x.grad.isfinite().all(), function
    lam = path.lam(t).detach().requires_grad_()
    path.inverse_lam(lam).sum().backward()
    assert lam.grad.isfinite().all()


def network_output(prediction_type, path, t, x0, noise):
    """What a perfect network of that type answers, from the definition of each target."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    x = alpha * x0 + sigma * noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow_prediction":
        return noise - x0
    if path.kind == "ve" and (prediction_type == "v_prediction" or path.preconditioned):
        # EDM's F: (D - c_skip x) / c_out; v-prediction has the opposite sign of c_out.
        sd = path.sigma_data
        c_skip, c_out = sd**2 / (t**2 + sd**2), t * sd / (t**2 + sd**2).sqrt()
        return (x0 - c_skip * x) / (-c_out if prediction_type == "v_prediction" else c_out)
    return noise if prediction_type == "epsilon" else alpha * noise - sigma * x0


@pytest.mark.parametrize(
    "name, prediction_type", [(name, p) for name, path in PATHS.items() for p in path.prediction_types]
)
def test_data_prediction(name, prediction_type):
    path, t = PATHS[name], interior(PATHS[name])
    x0, noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = path.data_prediction(prediction_type, t)
    x = path.alpha(t) * x0 + path.sigma(t) * noise
    predicted = p * x + q * network_output(prediction_type, path, t, x0, noise)
    # epsilon divides by alpha, which is 7e-3 at the noisy end of VP-linear.
    torch.testing.assert_close(predicted, x0.expand_as(t), rtol=1e-9, atol=1e-9)


def test_v_prediction_of_ve_is_stock_euler():
    stock = EulerDiscreteScheduler(**SD, prediction_type="v_prediction")
    stock.set_timesteps(5)
    x, v = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
    p, q = VE().data_prediction("v_prediction", stock.sigmas[:1].double())
    expected = stock.step(v, stock.timesteps[0], x).pred_original_sample
    torch.testing.assert_close((p * x + q * v).float(), expected)


@pytest.mark.parametrize(
    "path, wrong", [(sd_path(), "flow_prediction"), (RectifiedFlow(), "v_prediction"), (VE(), "f")]
)
def test_unknown_prediction_type(path, wrong):
    with pytest.raises(ValueError, match="set `prediction_type` to what the network was trained"):
        path.data_prediction(wrong, grid(0.5))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"])
def test_betas_are_stock_betas(schedule, rescale):
    trained = torch.linspace(0.001, 0.02, 10).tolist() if schedule == "trained" else None
    config = {"num_train_timesteps": 10 if trained else 1000, "beta_start": 0.0001, "beta_end": 0.02}
    config |= {
        "beta_schedule": "linear" if trained else schedule,
        "trained_betas": trained,
        "rescale_betas_zero_snr": rescale,
    }
    stock = DDPMScheduler if schedule == "sigmoid" else UniPCMultistepScheduler
    expected = stock(**config)
    torch.testing.assert_close(betas_from_config(config), expected.betas, rtol=0, atol=0)
    floored = expected.alphas_cumprod.clone()
    if rescale:
        floored[-1] = 2**-24  # DDPM keeps the zero
    torch.testing.assert_close(alphas_cumprod_from_config(config), floored, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_keeps_the_stock_noise_level(schedule):
    # With linear betas stock's floor lies above the three steps before it; the path must stay monotonic.
    config = SD | {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": schedule, "rescale_betas_zero_snr": True}
    path = VPDiscrete(alphas_cumprod_from_config(config).double().log() / 2)
    stock = UniPCMultistepScheduler(**config)
    t = path.time(torch.arange(1000, dtype=torch.float64))
    assert path.sigma_edm(t[-1:]).item() == pytest.approx(4096, rel=1e-6) == stock.sigmas[-1].item()
    kept = stock.sigmas < 4096
    assert kept.sum() >= 996
    torch.testing.assert_close(path.sigma_edm(t)[kept], stock.sigmas[kept].double(), rtol=1e-6, atol=0)
    assert (path.lam(t).diff() < 0).all()


def test_unusable_betas():
    with pytest.raises(ValueError, match="check `trained_betas`"):
        VPDiscrete(grid(-0.1, -0.3, -0.2))
    with pytest.raises(ValueError, match="unknown beta_schedule 'cosine'; use 'linear'"):
        betas_from_config(SD | {"beta_schedule": "cosine"})


def test_flow_shift_is_additive_in_logit_and_stock():
    s, mu = torch.linspace(0.001, 0.999, 9, dtype=torch.float64), 0.83
    torch.testing.assert_close(shift_flow_time(s, mu).logit(), s.logit() + mu, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(shift_flow_time(shift_flow_time(s, mu), -mu), s, rtol=1e-12, atol=0)
    assert shift_flow_time(grid(0.0, 1.0), mu).tolist() == [0, 1]
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    torch.testing.assert_close(shift_flow_time(s, mu), stock.time_shift(mu, 1.0, s), rtol=1e-12, atol=0)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = stock.sigmas.flip(0)[[0, 499, 999]].double()
    torch.testing.assert_close(shift_flow_time(grid(0.001, 0.5, 1.0), math.log(3)), expected, rtol=1e-6, atol=0)
