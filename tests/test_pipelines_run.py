# SPDX-License-Identifier: Apache-2.0
"""Every tiny pipeline runs end to end, its network called once an evaluation at exactly the schedule's network times."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from ld3_diffusers import LD3Scheduler
from tests.schedules import plausible_schedule, scheduler_with
from tests.tiny_pipelines import PIPELINES


NFE = 5
# Evaluations that a truncating pipeline skips at strength 0.8, or denoising_end 0.7.
FROM_A_PICTURE = ("sd_img2img", "sd_inpaint", "sdxl_img2img", "flux_img2img")
FIRST = dict.fromkeys((*FROM_A_PICTURE, "wan_video_to_video"), 1)
# Networks that are told something else than the timestep: t / 1000, 1 - t / 1000, or one time a token.
TOLD = {"flux": 1e-3, "flux_img2img": 1e-3, "qwen_image": 1e-3}
SHIFT_TERMINAL = ("ltx", "qwen_image")
built = {}


def pipeline(name):
    """The pipeline as built, with its own scheduler: kept, since building costs more than running."""
    if name not in built:
        pipe, call = PIPELINES[name]()
        built[name] = pipe, call, pipe.scheduler
    pipe, call, scheduler = built[name]
    pipe.scheduler = copy.deepcopy(scheduler)
    return pipe, dict(call)


def sample(pipe, call):
    """The final latents or images, and the times that the network was told, guidance's repetitions left out."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    told = []

    def note(module, args, kwargs):
        time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        told.append(float(torch.as_tensor(time, dtype=torch.float64).max()))

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        result = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    finally:
        hook.remove()
    result = result[0] if isinstance(result, list) else result
    told = [t for k, t in enumerate(told) if k == 0 or t != told[k - 1]]
    return torch.as_tensor(np.asarray(result)).double(), told


def steps_of(name, pipe):
    timesteps = pipe.scheduler.timesteps.double()
    if name == "sdxl_denoising_end":
        return timesteps[timesteps >= 300]
    return timesteps[FIRST.get(name, 0) :]


def told_for(name, timesteps):
    if name == "z_image":
        return (1000 - timesteps) / 1000
    return timesteps * TOLD.get(name, 1)


@pytest.mark.parametrize("name", PIPELINES)
def test_without_a_schedule(name):
    pipe, call = pipeline(name)
    stock = pipe.scheduler
    pipe.scheduler = LD3Scheduler.from_config(stock.config)
    result, told = sample(pipe, call)
    assert torch.isfinite(result).all()
    np.testing.assert_allclose(told, told_for(name, steps_of(name, pipe)), rtol=1e-5)


def learned(name, stock, solver, order, **options):
    scheduler = scheduler_with((NFE,), solver, order, config=stock.config, options=options)
    if name in SHIFT_TERMINAL:  # no shift in logit s: only final times serve
        schedule = plausible_schedule(scheduler.path, NFE, solver, order)
        final = type(schedule)(
            schedule.times, schedule.network_times, schedule.spec, "flow", schedule.prediction_type, final=True
        )
        scheduler = LD3Scheduler.from_config(stock.config, schedules={str(NFE): final.to_dict(scheduler.path)})
    return scheduler


@pytest.mark.parametrize("name", FROM_A_PICTURE)
def test_from_a_picture_a_learned_schedule_changes_nothing(name):
    pipe, call = pipeline(name)
    stock = pipe.scheduler
    pipe.scheduler = learned(name, stock, "dpmpp", 3)
    result, told = sample(pipe, call)
    pipe.scheduler = LD3Scheduler.from_config(stock.config)
    expected, _ = sample(pipe, call)
    assert torch.equal(result, expected)
    np.testing.assert_allclose(told, told_for(name, steps_of(name, pipe)), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in FROM_A_PICTURE])
def test_with_a_learned_schedule(name):
    pipe, call = pipeline(name)
    stock = pipe.scheduler
    results = {}
    for solver, order in (("euler", None), ("unipc", 3), ("dpmpp", 3), ("ipndm", 4), ("heun", None)):
        clip = {} if solver in ("unipc", "dpmpp") else {"clip_sample": False}
        config = {**stock.config, **clip}
        pipe.scheduler = learned(name, type("", (), {"config": config}), solver, order)
        schedule = pipe.scheduler._schedules[NFE]
        result, told = sample(pipe, call)
        assert torch.isfinite(result).all()
        steps = steps_of(name, pipe)
        np.testing.assert_allclose(told, told_for(name, torch.unique_consecutive(steps)), rtol=1e-5)
        assert pipe.scheduler.step_index == (len(steps) if name == "sdxl_denoising_end" else NFE)
        if pipe.scheduler.config.noise_path == "vp_discrete":
            np.testing.assert_allclose(
                pipe.scheduler.timesteps, pipe.scheduler.path.timestep(schedule.network_times), rtol=1e-6
            )
        results[solver] = result
    # Solvers at the same times end elsewhere, but not far.
    for solver in ("unipc", "dpmpp", "ipndm"):
        a, b = results[solver].flatten(), results["euler"].flatten()
        assert not torch.equal(a, b)
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.5


def test_the_result_is_that_of_the_loop_written_by_hand():
    pipe, call = pipeline("sd")
    call["guidance_scale"] = 1.0
    pipe.scheduler = scheduler_with((NFE,), "dpmpp", 3, config=pipe.scheduler.config)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    result = pipe(**call, latents=latents)[0]
    prompt, _ = pipe.encode_prompt(call["prompt"], "cpu", 1, False)
    schedule = plausible_schedule(pipe.scheduler.path, NFE, "dpmpp", 3)
    table = schedule.table(pipe.scheduler.path)
    x, predictions = latents.double(), []
    with torch.no_grad():
        for i in range(NFE):
            t = table.timesteps[i].float()
            output = pipe.unet(x.float(), t, encoder_hidden_states=prompt).sample.double()
            predictions.insert(0, table.p[i] * x + table.q[i] * output)
            x = table.state[i] * x + sum(c * m for c, m in zip(table.history[i], predictions))
    torch.testing.assert_close(result.double(), x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def test_analytical_first_step_in_a_pipeline():
    pipe, call = pipeline("sd")
    pipe.scheduler = scheduler_with((NFE,), "dpmpp", 3, config=pipe.scheduler.config, options={"afs": True})
    result, told = sample(pipe, call)
    wanted = plausible_schedule(pipe.scheduler.path, NFE, "dpmpp", 3, afs=True).network_times[1:]
    np.testing.assert_allclose(told, pipe.scheduler.path.timestep(wanted), rtol=1e-6)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", ["dit", "ddpm", "ldm", "ldm_unconditional", "sd_img2img"])
def test_analytical_first_step_is_refused_by_pipelines_that_do_not_scale(name):
    """They start from unit noise, from an image, or ask for the scale too early."""
    pipe, call = pipeline(name)
    call |= {"strength": 1.0} if name == "sd_img2img" else {}
    config = {**pipe.scheduler.config, "clip_sample": False}
    pipe.scheduler = scheduler_with((NFE,), "dpmpp", 3, config=config, options={"afs": True})
    with pytest.raises(ValueError, match="does not multiply by init_noise_sigma"):
        sample(pipe, call)


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_counts_that_were_not_learned_are_refused_with_the_learned_ones(name):
    pipe, call = pipeline(name)
    pipe.scheduler = learned(name, pipe.scheduler, "unipc", 2)
    with pytest.raises(ValueError, match="num_inference_steps = 5, or load with interpolate=True"):
        pipe(**{**call, "num_inference_steps": 28})


def test_a_users_own_times_beside_a_learned_schedule_are_refused():
    for name, grid in (
        ("sd", {"timesteps": [900, 700, 500, 300, 100]}),
        ("flux", {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.2]}),
    ):
        pipe, call = pipeline(name)
        pipe.scheduler = learned(name, pipe.scheduler, "unipc", 2)
        with pytest.raises(ValueError, match=f"custom {next(iter(grid))} contradict the learned schedule"):
            pipe({**call, **grid}.pop("prompt"), **{k: v for k, v in {**call, **grid}.items() if k != "prompt"})


def test_bfloat16_pipelines_cast_the_time_and_still_find_their_steps():
    pipe, call = PIPELINES["flux"]()
    pipe.to(torch.bfloat16)
    pipe.scheduler = learned("flux", pipe.scheduler, "unipc", 2)
    result = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    assert result.dtype == torch.bfloat16 and torch.isfinite(result).all() and pipe.scheduler.step_index == NFE


def test_known_limit_ddim_pipeline_makes_a_scheduler_of_its_own():
    """`DDIMPipeline` converts whatever it is given, so that a learned schedule is silently lost; Diffusers asks no scheduler."""
    pipe, _ = pipeline("ddpm")
    scheduler = scheduler_with((NFE,), "dpmpp", 3, config={**pipe.scheduler.config, "clip_sample": False})
    assert type(DDIMPipeline(pipe.unet, scheduler).scheduler) is DDIMScheduler
