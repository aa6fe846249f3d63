# SPDX-License-Identifier: Apache-2.0
"""What a rollout costs and leaves behind: flat memory, counted evaluations, nothing changed; and what it refuses."""

from dataclasses import replace

import pytest
import torch

from tests.tiny_pipelines import PIPELINES
from tests.training.rollouts import make, noise_for, schedule_for
from training.rollout import PipelineRollout


# ---------------------------------------------------------------------- memory and counts


def saved_bytes(rollout: PipelineRollout, nfe: int) -> tuple[int, int]:
    """Bytes kept for the backward pass: (activations and conditioning, states).

    Counted are the distinct storages of tensors saved by autograd outside the networks, and of tensor arguments of network
    calls, which their recomputation keeps. States are those with a state's number of elements or, under guidance, twice it.
    Left out are the step table's own numbers (float64, and masks and indices of some N) and the N timesteps.
    """
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning)
    schedule = schedule_for(rollout, nfe)
    schedule = replace(
        schedule, times=schedule.times.requires_grad_(), network_times=schedule.network_times.requires_grad_()
    )
    storages: dict[int, torch.Tensor] = {}

    def keep(tensor):
        # keeping it keeps its address from being used again
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    network = rollout.pipe.unet if hasattr(rollout.pipe, "unet") else rollout.pipe.transformer

    def arguments(_module, args, kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                keep(value)

    handle = network.register_forward_pre_hook(arguments, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        end = rollout(schedule, noise, conditioning)
    handle.remove()
    assert end.requires_grad
    kept = [t for t in storages.values() if t.is_floating_point() and t.dtype != torch.float64]
    sizes = [(t.untyped_storage().nbytes(), t.untyped_storage().nbytes() // t.element_size()) for t in kept]
    states = sum(size for size, count in sizes if count in (noise.numel(), 2 * noise.numel()))
    return sum(size for size, count in sizes if count > nfe) - states, states


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_memory_does_not_grow_with_the_number_of_evaluations(name):
    (few, few_states), (many, many_states) = (saved_bytes(make(name)[0], nfe) for nfe in (4, 10))
    assert abs(many - few) < 0.15 * few, (few, many)
    # at most a constant number of states an evaluation: input, guided input, output, prediction, products
    assert many_states <= 10 / 4 * few_states * 1.15
    activations, _ = saved_bytes(make(name, checkpointing=False)[0], 4)
    assert activations > 5 * few


@pytest.mark.parametrize("name", ["sd", "qwen_image", "sd_controlnet", "dit"])
def test_counts_evaluations_guidance_and_companions_apart(name):
    rollout, _ = make(name)
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning, 2)
    schedule = schedule_for(rollout)
    # free network times, so that the first evaluation is differentiated too
    schedule = replace(schedule, network_times=schedule.network_times.requires_grad_())
    end = rollout(schedule, noise, conditioning)
    counts = rollout.evaluations
    assert (counts.forward, counts.recomputed, counts.backward) == (6, 0, 0)
    end.square().sum().backward()
    assert (counts.forward, counts.recomputed, counts.backward) == (6, 6, 6)
    with torch.no_grad():
        rollout(2, noise, conditioning)
    assert (counts.forward, counts.recomputed, counts.backward) == (10, 6, 6)


# ---------------------------------------------------------------------- nothing left behind


@pytest.mark.parametrize("failing", [False, True])
def test_puts_back_exactly_what_it_found(failing):
    pipe, call = PIPELINES["sd"]()
    # as Accelerate's hooks: a forward of the instance's own
    original = pipe.unet.forward
    calls = []

    def hooked(*args, **kwargs):
        calls.append(1)
        if failing and len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    pipe.unet.forward = hooked
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.text_encoder.requires_grad_(False)
    modes = {name: m.training for name, m in pipe.unet.named_modules()}
    trainable = {
        name: [p.requires_grad for p in getattr(pipe, name).parameters()] for name in ("unet", "vae", "text_encoder")
    }
    bar = pipe._progress_bar_config
    scheduler = pipe.scheduler
    held = {name: dict(vars(part)) for name, part in (("unet", pipe.unet), ("vae", pipe.vae))}

    with PipelineRollout(pipe, guidance_scale=7.5, prompt="fox") as rollout:
        conditioning = rollout.encode(["fox"])
        assert pipe.unet.__dict__["forward"] is hooked
        noise = torch.randn(1, 4, 16, 16)
        try:
            rollout(schedule_for(rollout), noise, conditioning)
        except RuntimeError:
            assert failing
        assert calls
        assert pipe.unet.__dict__["forward"] is hooked
        assert not {"step", "encode_prompt"} & (set(vars(pipe.scheduler)) | set(vars(pipe)))
        assert not any(p.requires_grad for p in pipe.unet.parameters())

    assert pipe.scheduler is scheduler
    assert pipe._progress_bar_config is bar
    assert {name: m.training for name, m in pipe.unet.named_modules()} == modes
    assert trainable == {name: [p.requires_grad for p in getattr(pipe, name).parameters()] for name in trainable}
    for name, before in held.items():
        assert vars(getattr(pipe, name)).keys() == before.keys()


def test_an_instance_without_own_forward_ends_without_one():
    rollout, _ = make("flux")
    rollout(2, noise_for(rollout, rollout.encode()), rollout.encode())
    assert "forward" not in rollout.pipe.transformer.__dict__


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "name", ["sd_img2img", "sd_inpaint", "flux_img2img", "wan_video_to_video", "sdxl_denoising_end"]
)
def test_refuses_what_does_not_start_from_noise(name):
    with pytest.raises(ValueError, match="pure noise"):
        make(name)


def test_refuses_arguments_that_are_its_own_or_nobodys():
    pipe, _ = PIPELINES["ddpm"]()
    with pytest.raises(ValueError, match="set by the rollout"):
        PipelineRollout(pipe, num_inference_steps=4)
    with pytest.raises(ValueError, match="no argument 'guidance_scale'"):
        PipelineRollout(pipe, guidance_scale=2.0)
    with pytest.raises(ValueError, match="unconditional"):
        PipelineRollout(pipe).encode(["fox"])


def test_refuses_a_pipeline_without_wrapped_call():
    base = type(PIPELINES["ddpm"]()[0])

    class Bare(base):
        def __call__(self, **kwargs):
            return super().__call__(**kwargs)

    pipe, _ = PIPELINES["ddpm"]()
    pipe.__class__ = Bare
    with pytest.raises(ValueError, match="__wrapped__"):
        PipelineRollout(pipe)
