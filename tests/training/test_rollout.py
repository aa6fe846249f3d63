# SPDX-License-Identifier: Apache-2.0
"""The pipeline as student: same states as the pipeline itself, true gradients."""

from dataclasses import replace

import pytest
import torch

from ld3_diffusers import LD3Scheduler, SolverSpec
from tests.tiny_pipelines import PIPELINES
from tests.training.rollouts import close, make, noise_for, schedule_for
from training.gradient_check import check_gradients


# ---------------------------------------------------------------------- the student is the pipeline


@pytest.mark.parametrize(
    "name",
    [
        "sd",
        "sd_controlnet",
        "sdxl",
        "sd3",
        "flux",
        "pixart",
        "sana",
        "wan",
        "ltx",
        "qwen_image",
        "z_image",
        "animatediff",
        "edm",
        "adm",
        "latent_diffusion",
    ],
)
def test_same_end_state_as_the_pipeline_itself(name):
    rollout, call = make(name)
    conditioning = rollout.encode()
    schedule = schedule_for(rollout)
    noise = noise_for(rollout, conditioning)
    with torch.no_grad():
        student = rollout(schedule, noise, conditioning)
    differentiable = rollout(replace(schedule, times=schedule.times.clone().requires_grad_()), noise, conditioning)

    pipe, call = PIPELINES[name]()
    pipe.scheduler = LD3Scheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.use_schedule(schedule)
    call = {**call, "num_inference_steps": 3, "latents": noise, "output_type": "latent", "return_dict": False}
    teacher = pipe(**call)[0]
    assert close(student, teacher)
    assert close(differentiable, teacher, 1e-4)
    assert student.std() > 1e-3


@pytest.mark.parametrize("name", ["ddpm", "dit"])
def test_pipelines_that_draw_their_own_noise_are_driven_by_seeds(name):
    rollout, call = make(name)
    conditioning = rollout.encode()
    assert not rollout.moves_noise
    schedule = schedule_for(rollout)
    seeds = noise_for(rollout, conditioning, 2)
    with torch.no_grad():
        ends = rollout(schedule, seeds, conditioning)
        images = (rollout.decode(ends) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    pipe, call = PIPELINES[name]()
    pipe.scheduler = LD3Scheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.use_schedule(schedule)
    for i, seed in enumerate(seeds.tolist()):
        call = {
            **call,
            "num_inference_steps": 3,
            "output_type": "np",
            "generator": torch.Generator().manual_seed(seed),
        }
        teacher = torch.as_tensor(pipe(**call).images)
        # a batch of two rounds otherwise than one sample, by 2e-5 on some processors; another seed is another image
        assert torch.allclose(images[i : i + 1], teacher, atol=1e-4)
    with pytest.raises(ValueError, match="LongTensor"):
        rollout(schedule, torch.randn(2, 3, 16, 16), conditioning)


def test_prompts_are_encoded_as_by_the_pipeline_and_alike_in_any_batch():
    rollout, _ = make("sd")
    noise = noise_for(rollout, rollout.encode(), 2)
    together = rollout.encode(["a red fox", "blue"], "grey")
    with torch.no_grad():
        ends = rollout(2, noise, together)
        for i, prompt in enumerate(["a red fox", "blue"]):
            alone = rollout(2, noise[i : i + 1], rollout.encode([prompt], ["grey"]))
            assert close(ends[i : i + 1], alone)
        other = rollout(2, noise, rollout.encode(["a red fox", "blue"], "sharp"))
    assert (ends - other).abs().max() > 1e-4
    with pytest.raises(ValueError, match="rows"):
        rollout(2, noise[:1], together)


def test_negative_prompts_of_a_second_encoding():
    """Flux encodes negative prompts by a second call, without a prefix in the names it returns."""
    rollout, _ = make("flux", true_cfg_scale=2.0)
    conditioning = rollout.encode(["fox"], "blurry")
    positive = rollout.encode(["blurry"], "fox")
    assert torch.equal(conditioning["negative_prompt_embeds"], positive["prompt_embeds"])
    assert torch.equal(conditioning["negative_pooled_prompt_embeds"], positive["pooled_prompt_embeds"])
    assert not torch.equal(conditioning["prompt_embeds"], positive["prompt_embeds"])


def test_unpacks_and_scales_before_decoding():
    pipe, call = PIPELINES["flux"]()
    rollout, _ = make("flux")
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning)
    with torch.no_grad():
        images = rollout.decode(rollout(2, noise, conditioning))
    pipe.scheduler = LD3Scheduler.from_config(pipe.scheduler.config)
    call = {**call, "num_inference_steps": 2, "latents": noise, "output_type": "pt", "return_dict": False}
    assert torch.allclose((images / 2 + 0.5).clamp(0, 1), pipe(**call)[0], atol=1e-5)


def test_decoding_is_differentiable_and_says_when_it_cannot():
    rollout, _ = make("sd")
    latents = torch.randn(1, 4, 16, 16, requires_grad=True)
    rollout.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="compare latents"):
        make("ltx")[0].decode(torch.zeros(1, 192, 8))


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["sd", "flux", "edm"])
def test_gradients_agree_with_finite_differences(name):
    rollout, _ = make(name)
    rollout.pipe.to(torch.float64)
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning).double().requires_grad_()
    schedule = schedule_for(rollout)
    # distinct parts of the times: the first state is noise, the last network time the most sensitive
    times, network_times = (v.clone().requires_grad_() for v in (schedule.times, schedule.network_times))
    end = rollout(replace(schedule, times=times, network_times=network_times), noise, conditioning)
    assert end.dtype == torch.float64
    cotangent = torch.randn(end.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((end * cotangent).sum(), [times, network_times, noise])

    def value(field=None, i=None, h=0.0, moved=noise.detach()):
        changed = schedule
        if field is not None:
            entries = getattr(schedule, field).clone()
            entries[i] += h
            changed = replace(schedule, **{field: entries})
        with torch.no_grad():
            return float((rollout(changed, moved, conditioning) * cotangent).sum())

    # Fourth order, with steps that stand clear of the float32 in which pipelines hold timesteps.
    h = 2e-4
    for field, gradient in (("times", gradients[0]), ("network_times", gradients[1])):
        inner = range(1, len(gradient) - (field == "times"))
        expected = torch.tensor(
            [
                (8 * (value(field, i, h) - value(field, i, -h)) - (value(field, i, 2 * h) - value(field, i, -2 * h)))
                / 12
                / h
                for i in inner
            ]
        )
        error = (gradient[list(inner)] - expected).abs().max() / expected.abs().max()
        assert error < 1e-3, (field, gradient, expected)
    direction = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ahead, behind = (value(moved=noise.detach() + s * 1e-4 * direction) for s in (1, -1))
    assert float((gradients[2] * direction).sum()) == pytest.approx((ahead - behind) / 2e-4, rel=1e-4)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (True, False):
        rollout, _ = make("sd", checkpointing=checkpointing)
        conditioning = rollout.encode()
        schedule = schedule_for(rollout)
        times = schedule.times.clone().requires_grad_()
        rollout(
            replace(schedule, times=times), noise_for(rollout, conditioning), conditioning
        ).square().sum().backward()
        gradients.append(times.grad)
        assert rollout.evaluations.recomputed == (3 if checkpointing else 0)
    assert torch.equal(*gradients)


def test_bfloat16_pipelines_learn_in_their_own_dtype():
    rollout, _ = make("sd")
    rollout.pipe.to(torch.bfloat16)
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning)
    check_gradients(rollout, schedule_for(rollout), noise, conditioning)
    assert rollout(2, noise, conditioning).dtype == torch.bfloat16


# ---------------------------------------------------------------------- gradient check


def cut_time(network) -> None:
    forward = network.forward
    network.forward = lambda sample, timestep, *args, **kwargs: forward(sample, timestep.detach(), *args, **kwargs)


def test_names_the_network_times_that_a_denoiser_detaches():
    rollout, _ = make("sd")
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning)
    schedule = schedule_for(rollout)
    check_gradients(rollout, schedule, noise, conditioning)
    cut_time(rollout.pipe.unet)
    # The conversion to the solver's form knows the network times too; with epsilon and a noise-form solver nothing does.
    schedule = replace(schedule, spec=SolverSpec("ddim"), network_times=schedule.network_times)
    table = schedule.table(rollout.path)
    assert table.form == "data"
    schedule = replace(schedule, spec=SolverSpec("ipndm"))
    assert schedule.table(rollout.path).form == "noise"
    with pytest.raises(ValueError, match=r"reaches network_times\[1\], network_times\[2\];.*t\.item\(\)"):
        check_gradients(rollout, schedule, noise, conditioning)


def test_names_everything_when_the_pipeline_cuts_the_graph():
    rollout, _ = make("sd")
    conditioning = rollout.encode()
    network = rollout.pipe.unet
    forward = network.forward

    def detached(sample, timestep, **kwargs):
        return tuple(t.detach() for t in forward(sample.detach(), timestep.detach(), **kwargs))

    network.forward = detached
    step = rollout.scheduler.step
    rollout.scheduler.step = lambda output, t, sample, **kwargs: tuple(
        v.detach() if isinstance(v, torch.Tensor) else v for v in step(output, t, sample, **kwargs)
    )
    with pytest.raises(ValueError, match=r"times\[1\], times\[2\], network_times\[1\], network_times\[2\]"):
        check_gradients(rollout, schedule_for(rollout), noise_for(rollout, conditioning), conditioning)


@pytest.mark.parametrize("name", ["sd", "flux", "dit"])
def test_visits_every_evaluation_and_may_move_the_state(name):
    rollout, _ = make(name)
    conditioning = rollout.encode()
    schedule, noise = schedule_for(rollout), noise_for(rollout, conditioning, 2)
    seen = []
    rollout.visit(schedule, noise, conditioning, lambda *step: seen.append(step))
    assert [step[0] for step in seen] == [0, 1, 2]
    assert all(len(value) == 2 for step in seen for value in step[1:])
    with torch.no_grad():
        assert torch.equal(seen[-1][3], rollout(schedule, noise, conditioning))
    table = schedule.table(rollout.path, mu=rollout.mu)
    _, state, output, result = seen[0]
    prediction = table.p[0] * state.double() + table.q[0] * output.double()
    assert close(result.double(), table.state[0] * state.double() + table.history[0, 0] * prediction)

    moved = []

    def elsewhere(i, state, output, result):
        moved.append((state, output))
        return 0.5 * result

    rollout.visit(schedule, noise, conditioning, elsewhere)
    assert torch.equal(moved[0][0], seen[0][1]) and close(moved[1][0], 0.5 * seen[0][3])
    assert not torch.equal(moved[1][1], seen[1][2])
