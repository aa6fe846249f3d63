# SPDX-License-Identifier: Apache-2.0
"""AMED's schedules inside real tiny pipelines: the same stages for all samples in any of them, and stages of each sample's own."""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.amed import step_levels, with_step
from ld3_diffusers.noise_path import shift_flow_time
from ld3_diffusers.schedule import Schedule
from ld3_diffusers.schedulers.scheduling_amed import AMEDScheduler
from tests.amed_runs import (
    PROMPTS,
    bare_schedule,
    bottlenecks,
    by_hand,
    per_sample,
    recorded,
    serving,
    shaped,
    static_schedule,
    watched,
)
from tests.tiny_pipelines import PIPELINES


NFE = 6
# Pipeline, first row, call: tails begin at a step and at a stage.
STATIC = [
    ("sd", 0, {}),
    ("sd_img2img", 2, {"strength": 0.7}),
    ("sd_img2img", 3, {"strength": 0.5}),
    ("sd_inpaint", 2, {"strength": 0.7}),
    ("sd_controlnet", 0, {}),
    ("sdxl", 0, {}),
    ("flux", 0, {}),
    ("flux_img2img", 2, {"strength": 0.6}),
    ("flux_img2img", 3, {"strength": 0.5}),
]
PER_SAMPLE = ("sd", "sd_controlnet", "sdxl")
built = {}


def pipeline(name):
    """The pipeline as built, with its own scheduler, and a call of `NFE` evaluations."""
    if name not in built:
        pipe, call = PIPELINES[name]()
        built[name] = pipe, call, pipe.scheduler
    pipe, call, scheduler = built[name]
    pipe.scheduler = copy.deepcopy(scheduler)
    return pipe, {**call, "num_inference_steps": NFE}


def sampled(pipe, call):
    return pipe(**{"generator": torch.Generator().manual_seed(0), **call})[0]


def at_resolution(schedule, mu):
    """With the resolution shift that a flow pipeline asks for."""
    if not mu:
        return schedule
    times, network_times = (shift_flow_time(t, mu) for t in (schedule.times, schedule.network_times))
    return replace(schedule, times=times, network_times=network_times)


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max())
    )


# ---------------------------------------------------------------------- the same for all samples


@pytest.mark.parametrize("solver", ["amed", "euler"])
@pytest.mark.parametrize("name, first, call", STATIC, ids=str)
def test_static_steps_are_those_written_by_hand(name, first, call, solver):
    pipe, defaults = pipeline(name)
    schedule, path = static_schedule(pipe.scheduler.config, solver=solver)
    pipe.scheduler = serving(AMEDScheduler, pipe.scheduler.config, schedule, path)
    network = getattr(pipe, "unet", None) or pipe.transformer
    with recorded(pipe.scheduler) as steps, watched(network, first="hidden_states") as calls:
        sampled(pipe, {**defaults, **call})
    assert len(steps) == NFE - first
    schedule = at_resolution(schedule, pipe.scheduler.mu)
    states, _, timesteps = by_hand(schedule, path, steps, first)
    for expected, (_, _, after) in zip(states, steps, strict=True):
        close(after, expected)
    told = [float(t.max()) * (1000 if name.startswith("flux") else 1) for _, t in calls]
    np.testing.assert_allclose(told, path.timestep(schedule.network_times)[first:], rtol=1e-5)
    assert torch.equal(torch.stack(timesteps), path.timestep(schedule.network_times)[first:])


@pytest.mark.parametrize("solver", ["ipndm", "dpmpp"])
@pytest.mark.parametrize("name, first, call", STATIC, ids=str)
def test_both_schedulers_serve_static_schedules_alike(name, first, call, solver):
    pipe, defaults = pipeline(name)
    config = {**pipe.scheduler.config}
    # dpmpp's noise form, AMED's own, is infinite where rectified flow starts
    schedule, path = static_schedule(config, solver=solver, predict_x0=name.startswith("flux"))
    results = []
    for cls in (LD3Scheduler, AMEDScheduler):
        pipe.scheduler = serving(cls, config, schedule, path)
        with recorded(pipe.scheduler) as steps:
            results.append(sampled(pipe, {**defaults, **call}))
    assert torch.equal(*results)
    table = schedule.table(path, first=first, mu=pipe.scheduler.mu)
    predictions = []
    for i, (state, output, after) in enumerate(steps):
        predictions.insert(0, table.p[i] * state + table.q[i] * output)
        close(after, table.state[i] * state + sum(c * m for c, m in zip(table.history[i], predictions)))


def test_inpainting_keeps_the_known_part_at_the_levels_of_the_stages():
    pipe, call = pipeline("sd_inpaint")
    schedule, path = static_schedule(pipe.scheduler.config)
    pipe.scheduler = serving(AMEDScheduler, pipe.scheduler.config, schedule, path)
    with recorded(pipe.scheduler) as steps:
        sampled(pipe, call)
    known = torch.stack([state[..., -1].flatten() for state, _, _ in steps[1:]])
    levels = path.levels(schedule.times[-1 - len(known) : -1])
    mixture = torch.stack([levels.alpha, levels.sigma], 1)  # of the image and one noise
    close(mixture @ torch.linalg.lstsq(mixture, known).solution, known, 1e-6)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_the_mean_and_no_scales_are_the_bare_solver(name):
    pipe, call = pipeline(name)
    config = {**pipe.scheduler.config}
    results = []
    for schedule, path in (
        bare_schedule(config, solver="dpm2"),
        static_schedule(config, solver="dpm2", r=[0.5] * 3, scale_dir=[1.0] * 3, scale_time=[1.0] * 3),
    ):
        pipe.scheduler = serving(AMEDScheduler, config, schedule, path)
        results.append(sampled(pipe, call))
    # LD3's own DPM-Solver-2 at the same levels, without AMED's conversion and scales
    plain = Schedule(schedule.times, None, schedule.spec, schedule.noise_path, schedule.prediction_type)
    pipe.scheduler = serving(LD3Scheduler, config, plain, path)
    results.append(sampled(pipe, call))
    assert torch.equal(results[0], results[1])
    close(results[2], results[0], 1e-6)


# ---------------------------------------------------------------------- each sample's own


def for_batch(call, guided=True, of=slice(None), **more):
    """The call for four samples, or those `of` them."""
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))[of]
    count = len(latents)
    call = {**call, "prompt": PROMPTS[of], "negative_prompt": ["blurry"] * count, "latents": latents, **more}
    call["guidance_scale"] = 4.0 if guided else 1.0
    return call | {key: call[key].repeat(count, 1, 1, 1) for key in ("image", "mask_image") if key in call}


def replayed(scheduler, steps, means, batch=4, first=0):
    """[`by_hand`] with what the predictor says of the bottlenecks that were seen."""
    (schedule,), (predictor,) = scheduler.learned_schedules.values(), scheduler.predictors.values()

    def predict(n):
        return predictor(means[2 * n - first][-batch:], *step_levels(schedule, n, scheduler.path), n)

    return by_hand(schedule, scheduler.path, steps, first, predict)


@contextmanager
def attached(pipe, **options):
    pipe.scheduler = per_sample(pipe.scheduler.config, **options)
    pipe.scheduler.attach(pipe)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler.detach()


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name, noise_path", [("sd", None), ("sd_controlnet", None), ("sdxl", None), ("sd", "ve")])
def test_each_sample_has_the_stages_that_its_bottleneck_asks_for(name, noise_path, guided):
    pipe, call = pipeline(name)
    networks = [pipe.unet, *([pipe.controlnet] if name == "sd_controlnet" else [])]
    with attached(pipe, noise_path=noise_path) as scheduler, bottlenecks(pipe.unet) as means, ExitStack() as stack:
        steps = stack.enter_context(recorded(scheduler))
        records = [stack.enter_context(watched(network)) for network in networks]
        sampled(pipe, for_batch(call, guided=guided))
    states, seen, timesteps = replayed(scheduler, steps, means)
    copies = 2 if guided else 1
    for row in range(NFE):
        close(steps[row][2], states[row])
        for record in records:
            sample, told = record[row]
            assert told.shape == (4 * copies,) and told.dtype == torch.float32
            torch.testing.assert_close(told.double(), timesteps[row].expand(4).repeat(copies), rtol=1e-6, atol=1e-4)
            close(sample, seen[row].repeat(copies, 1, 1, 1), 1e-6)
    if noise_path is None:
        assert all(told.std() > 0.1 for told in timesteps[1::2])  # the samples do differ


@pytest.mark.parametrize("solver", ["dpm2", "ipndm", "dpmpp"])
@pytest.mark.parametrize("afs", [False, True], ids=["", "afs"])
def test_other_students_with_stages_of_each_samples_own(solver, afs):
    """The rows are those of the whole table at the stages that were predicted."""
    pipe, call = pipeline("sd")
    nfe = NFE - afs
    with attached(pipe, solver=solver, afs=afs, predict_x0=False) as scheduler, bottlenecks(pipe.unet) as means:
        with recorded(scheduler) as steps:
            sampled(pipe, for_batch(call, num_inference_steps=nfe))
    bare = schedule = scheduler.learned_schedules[nfe]
    for n in range(afs, NFE // 2):
        levels = step_levels(bare, n, scheduler.path)
        prediction = scheduler.predictors[nfe](means[2 * n - afs][-4:], *levels, n)
        schedule = with_step(schedule, n, prediction, scheduler.path)
    table, predictions = schedule.table(scheduler.path), []
    if afs:
        predictions.append(shaped(table.first_prediction, steps[0][0]) * steps[0][0])
    for i, (state, output, after) in enumerate(steps):
        predictions.insert(0, shaped(table.p[i], state) * state + shaped(table.q[i], state) * output)
        extrapolated = sum(shaped(c, state) * m for c, m in zip(table.history[i], predictions))
        close(after, shaped(table.state[i], state) * state + extrapolated)


def test_the_conditional_half_is_looked_at():
    """The first bottleneck under guidance is that of no guidance, so the first stages are, too."""
    pipe, call = pipeline("sd")
    stages = []
    for guided in (True, False):
        with attached(pipe), watched(pipe.unet) as calls:
            sampled(pipe, for_batch(call, guided=guided))
        stages.append(calls[1][1][:4])
    torch.testing.assert_close(*stages, rtol=1e-5, atol=0)
    assert stages[0].std() > 0.1


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_a_batch_is_its_samples_one_by_one(name):
    pipe, call = pipeline(name)
    with attached(pipe):
        together = sampled(pipe, for_batch(call))
        for k in range(4):
            close(sampled(pipe, for_batch(call, of=slice(k, k + 1))), together[k : k + 1], 1e-4)


def test_several_images_of_a_prompt_have_stages_of_their_own():
    pipe, call = pipeline("sd")
    several = for_batch(call) | {"prompt": PROMPTS[:2], "negative_prompt": ["blurry"] * 2, "num_images_per_prompt": 2}
    repeated = for_batch(call) | {"prompt": [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2}
    with attached(pipe):
        close(sampled(pipe, several), sampled(pipe, repeated), 1e-6)


@pytest.mark.parametrize("guess_mode", [False, True], ids=["", "guess_mode"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_every_controlnet_is_told_the_times_of_its_samples(several, guess_mode):
    pipe, call = pipeline("sd_controlnet")
    one = pipe.controlnet
    call = for_batch(call, guess_mode=guess_mode)
    if several:
        pipe.controlnet = MultiControlNetModel([one, copy.deepcopy(one)])
        call |= {"image": [call["image"]] * 2, "controlnet_conditioning_scale": [0.5, 0.7]}
    try:
        with attached(pipe), watched(pipe.unet) as told, ExitStack() as stack:
            nets = pipe.controlnet.nets if several else [one]
            records = [stack.enter_context(watched(net)) for net in nets]
            sampled(pipe, call)
    finally:
        pipe.controlnet = one
    for row in range(NFE):
        sample, times = told[row]
        for record in records:
            # in guess mode a ControlNet sees the conditional half only
            own_sample, own_times = record[row]
            assert len(own_times) == len(own_sample) == (4 if guess_mode else 8)
            assert torch.equal(own_times, times[-len(own_times) :]) and torch.equal(
                own_sample, sample[-len(own_sample) :]
            )
        assert torch.equal(times[:4], times[4:])


@pytest.mark.parametrize("strength, first", [(0.7, 2), (0.5, 3)], ids=["step", "stage"])
@pytest.mark.parametrize("name", ["sd_img2img", "sd_inpaint"])
def test_tails_that_begin_at_a_step_and_at_a_stage(name, strength, first):
    pipe, call = pipeline(name)
    call = for_batch(call, strength=strength)
    del call["latents"]
    with attached(pipe) as scheduler, bottlenecks(pipe.unet) as means, recorded(scheduler) as steps:
        with watched(pipe.unet) as calls:
            sampled(pipe, call)
    assert len(steps) == NFE - first
    states, _, timesteps = replayed(scheduler, steps, means, first=first)
    for k, (_, _, after) in enumerate(steps):
        close(after, states[k])
        torch.testing.assert_close(calls[k][1].double(), timesteps[k].expand(4).repeat(2), rtol=1e-6, atol=1e-4)
    if first % 2:  # a stage whose step nobody saw is where the bare solver has it
        bare = scheduler.path.timestep(scheduler.learned_schedules[NFE].network_times[first])
        assert torch.equal(calls[0][1], bare.float().expand(8))
