# SPDX-License-Identifier: Apache-2.0
"""Align Your Steps against the tables of Diffusers."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers import AysSchedules

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.discretization import discretization, discretization_to_zero
from ld3_diffusers.noise_path import VE, RectifiedFlow, VPCosine, VPDiscrete, VPLinear, alphas_cumprod_from_config


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SVD = {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "prediction_type": "v_prediction"}


def betas(**changes):
    return VPDiscrete(alphas_cumprod_from_config(BETAS | changes).double().log() / 2)


SD = betas()
EVERY = [("ays_sd15", SD), ("ays_sdxl", SD), ("ays_svd", VE(0.002, 700.0))]


@pytest.mark.parametrize("name, table", [("ays", ""), ("ays_sd15", ""), ("ays_sdxl", "XL")])
def test_ten_steps_of_a_pipeline_are_diffusers_timesteps(name, table):
    scheduler = LD3Scheduler.from_config(
        DPMSolverMultistepScheduler(**BETAS).config, discretization=name, solver="dpmpp"
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == AysSchedules[f"StableDiffusion{table}Timesteps"]
    # Stock DPM-Solver++ with these timesteps stands at the same levels. The list of sigmas is rounded:
    # its .113 for SDXL is .1114 at the timestep 13 beside it.
    stock = DPMSolverMultistepScheduler(**BETAS)
    stock.set_timesteps(timesteps=AysSchedules[f"StableDiffusion{table}Timesteps"])
    torch.testing.assert_close(scheduler.sigmas, stock.sigmas, rtol=1e-5, atol=0)
    listed = torch.tensor(AysSchedules[f"StableDiffusion{table}Sigmas"])
    torch.testing.assert_close(scheduler.sigmas, listed, rtol=0.015, atol=0)
    assert len(scheduler.sigmas) == 11 and scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("name", ["ays", "ays_svd"])
def test_ten_steps_of_video_are_diffusers_sigmas(name):
    scheduler = LD3Scheduler.from_config(EulerDiscreteScheduler(**SVD).config, discretization=name, solver="euler")
    scheduler.set_timesteps(10)
    torch.testing.assert_close(
        scheduler.sigmas, torch.tensor(AysSchedules["StableDiffusionVideoSigmas"]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(scheduler.timesteps, 0.25 * scheduler.sigmas[:-1].log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, path", EVERY)
def test_other_counts_interpolate_log_sigma(name, path):
    ten = discretization(name, path, 10)
    assert (ten[0].item(), ten[-1].item()) == (path.t_max, path.t_min)
    # Every second of 20 steps is one of the 10, the ones between are geometric means; 5 steps are every second.
    twenty, five = path.sigma_edm(discretization(name, path, 20)), discretization(name, path, 5)
    torch.testing.assert_close(twenty[::2], path.sigma_edm(ten), rtol=1e-10, atol=0)
    torch.testing.assert_close(twenty[1::2] ** 2, twenty[:-1:2] * twenty[2::2], rtol=1e-10, atol=0)
    torch.testing.assert_close(five, ten[::2], rtol=1e-10, atol=0)
    for steps in (1, 3, 7, 100):
        times = discretization(name, path, steps)
        assert (times[0].item(), times[-1].item()) == (path.t_max, path.t_min) and (times.diff() < 0).all()


@pytest.mark.parametrize("name, path", EVERY)
def test_zero_stands_for_the_last_level(name, path):
    ten = discretization(name, path, 10)
    assert discretization_to_zero(name, path, 10).tolist() == [*ten[:-1].tolist(), 0.0]
    assert discretization_to_zero(name, path, 11, before_zero=True).tolist() == [*ten.tolist(), 0.0]


def test_image_models_share_betas_and_get_the_older_table():
    assert torch.equal(discretization("ays", SD, 7), discretization("ays_sd15", SD, 7))
    assert not torch.allclose(discretization("ays", SD, 7), discretization("ays_sdxl", SD, 7), atol=1e-2)


@pytest.mark.parametrize(
    "name, path, fix",
    [
        ("ays", RectifiedFlow(), "use 'flow_linear'"),
        ("ays", VPLinear(), "use 'polynomial'"),
        ("ays", VPCosine(), "use 'polynomial'"),
        ("ays", VE(), "starts at 80"),
        ("ays", betas(beta_schedule="linear"), "Stable Diffusion 1.5 or Stable Diffusion XL or Stable Video"),
        ("ays", betas(num_train_timesteps=500), "not applicable"),
        ("ays_sdxl", betas(rescale_betas_zero_snr=True), "made for Stable Diffusion XL,"),
        ("ays_svd", SD, "made for Stable Video Diffusion,"),
        ("ays_sd15", VE(0.002, 700.0), "made for Stable Diffusion 1.5,"),
    ],
)
def test_other_models_are_refused(name, path, fix):
    with pytest.raises(ValueError, match=fix) as caught:
        discretization(name, path, 10)
    assert "\n" not in str(caught.value)


def test_a_part_of_the_path_is_refused():
    with pytest.raises(ValueError, match="drop `t_max` and `t_min`"):
        discretization("ays", SD, 10, t_max=0.9)
    with pytest.raises(ValueError, match="has no option 'rho'"):
        discretization("ays", SD, 10, rho=7.0)
