# SPDX-License-Identifier: Apache-2.0
"""Grids of times against the original authors' numbers (tests/golden)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ld3_diffusers.discretization import (
    DISCRETIZATIONS,
    append_zero,
    discretization,
    discretization_to_zero,
)
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
@pytest.mark.parametrize("name", [name for name in DISCRETIZATIONS if not name.startswith("ays")])
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


@pytest.mark.parametrize(
    "name", ["polynomial", "time_uniform", "time_quadratic", "poly", "edm", "discrete", "flow_linear"]
)
def test_grids_that_may_end_at_clean_data(name):
    times = discretization(name, RectifiedFlow(), 4, t_max=0.99, t_min=0.0, rho=3 if name == "poly" else None)
    assert times[-1].item() == 0 and (times.diff() < 0).all()


def test_two_ways_to_clean_data():
    path = VE()
    before = [*discretization("logsnr", path, 4).tolist(), 0.0]
    instead = [*discretization("logsnr", path, 5).tolist()[:-1], 0.0]
    assert discretization_to_zero("logsnr", path, 5).tolist() == before
    assert discretization_to_zero("logsnr", path, 5, before_zero=True).tolist() == before
    assert discretization_to_zero("logsnr", path, 5, before_zero=False).tolist() == instead
    assert discretization_to_zero("polynomial", path, 1, rho=3).tolist() == [80.0, 0.0]
    whole = discretization("dmn", path, 4).tolist()
    assert discretization_to_zero("dmn", path, 4).tolist() == [*whole[:-1], 0.0]
    with pytest.raises(ValueError, match="use more steps"):
        discretization_to_zero("logsnr", path, 1, before_zero=True)
    with pytest.raises(ValueError, match="positive integer"):
        discretization_to_zero("logsnr", path, 0)


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
