# SPDX-License-Identifier: Apache-2.0
"""What need not be in memory while a schedule is learned: activations of all blocks, text encoders, pixels."""

import gc
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from torch import Tensor, nn

from tests.benchmarks.learning_memory import (
    DTYPES,
    GB,
    MODELS,
    RECIPES,
    Case,
    LiveBytes,
    accounted,
    flux_dev,
    measured_on_cpu,
    sd15,
)
from tests.tiny_pipelines import PIPELINES
from tests.training.rollouts import close, make, noise_for, schedule_for
from training import make_teacher_set
from training.conditioning import ConditioningStore
from training.denoisers import denoisers, gradient_checkpointing
from training.gradient_check import check_gradients
from training.rollout import PipelineRollout
from training.teacher import free_text_encoders, load_teacher
from training.teacher_set import TeacherSet, TeacherSetWriter, has_embeddings


# ---------------------------------------------------------------------- blocks


def gradient_and_peak(name: str, nfe: int = 2, **options) -> tuple[Tensor, int]:
    """Gradient of the squared end state by all times, and the most bytes alive beyond those kept when backward starts."""
    rollout, _ = make(name, **options)
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning, 8)  # so that activations outweigh the conditioning
    schedule = schedule_for(rollout, nfe)
    times = [schedule.times.requires_grad_(), schedule.network_times.requires_grad_()]
    live = LiveBytes()
    with live:
        end = rollout(replace(schedule, times=times[0], network_times=times[1]), noise, conditioning)
        before = live.peak = live.live
        gradients = torch.autograd.grad(end.square().sum(), times)
    assert not any(module.training for module in rollout.pipe.components.values() if isinstance(module, nn.Module))
    return torch.cat(gradients), live.peak - before


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sd_controlnet", "dit"])
def test_checkpointed_blocks_have_the_same_gradients_and_a_lower_peak(name):
    whole, peak = gradient_and_peak(name)
    blocks, lower = gradient_and_peak(name, gradient_checkpointing=True)
    assert whole.abs().max() > 0 and close(blocks, whole, 1e-5)
    assert lower < 0.8 * peak, (lower, peak)
    alone, _ = gradient_and_peak(name, gradient_checkpointing=True, checkpointing=False)
    assert close(alone, whole, 1e-5)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_the_peak_does_not_grow_with_the_number_of_evaluations(name):
    (_, few), (_, many) = (gradient_and_peak(name, nfe, gradient_checkpointing=True) for nfe in (4, 10))
    assert abs(many - few) < 0.05 * few, (few, many)


def settings(pipe) -> list[tuple]:
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    parts = [part for network in denoisers(pipe).values() for part in network.modules()]
    return [tuple(part.__dict__.get(name, "absent") for name in names) for part in parts]


def test_checkpointing_of_blocks_is_put_back_exactly():
    pipe, _ = PIPELINES["sd"]()
    pipe.unet.mid_block.gradient_checkpointing = True
    before = settings(pipe)
    with PipelineRollout(pipe, gradient_checkpointing=True):
        assert pipe.unet.is_gradient_checkpointing and settings(pipe) != before
    assert settings(pipe) == before
    with pytest.raises(RuntimeError), gradient_checkpointing(pipe):
        raise RuntimeError
    assert settings(pipe) == before


def test_networks_without_it_are_refused_and_left_alone():
    network = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16
    )
    with pytest.raises(ValueError, match="HunyuanDiT2DModel, the pipeline's transformer, .* drop gradient_checkp"):
        with gradient_checkpointing(SimpleNamespace(transformer=network)):
            pass
    pipe, _ = PIPELINES["sd"]()
    scheduler = pipe.scheduler
    pipe.unet._supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="drop gradient_checkpointing"):
        PipelineRollout(pipe, gradient_checkpointing=True)
    assert pipe.scheduler is scheduler


@pytest.mark.slow
@pytest.mark.parametrize(
    "build, options",
    [
        (sd15, {"widths": (32, 32, 64, 64), "side": 16}),
        (flux_dev, {"blocks": (2, 3), "heads": 1, "side": 32}),
    ],
)
def test_accounted_bytes_are_those_that_a_real_run_allocates(build, options):
    def small(pairs, room):
        return build(pairs, room, vae_widths=(32,) * 4, **options)

    for recipe, blocks in RECIPES:
        case = Case(small, torch.float32, 2, 2, blocks, recipe)
        peak, measured = accounted(case)[1], measured_on_cpu(case)
        # what is left are the kernels' workspaces
        assert abs(peak - measured) < 0.05 * measured, (peak, measured)


@pytest.mark.slow
@pytest.mark.parametrize("name, blocks, pairs", [("sd15", False, 2), ("flux-dev", True, 1)])
def test_models_of_true_size_fit(name, blocks, pairs):
    build, _, limit, dtypes, _ = MODELS[name]
    _, peak = accounted(Case(build, DTYPES[dtypes[0]], pairs, 2, blocks))
    assert peak < 0.9 * limit * GB  # the rest for what is not accounted for


# ---------------------------------------------------------------------- text encoders

START_FROM_IMAGES = {
    "sd_img2img",
    "sd_inpaint",
    "sdxl_img2img",
    "sdxl_denoising_end",
    "flux_img2img",
    "wan_video_to_video",
    "ltx_condition",
}
READ_PROMPTS = {"ldm"}  # takes no embeddings, so that each of its calls encodes the prompt


def text_encoders(pipe) -> list[str]:
    return [name for name, part in pipe.components.items() if "text_encoder" in name and part is not None]


@pytest.mark.parametrize("name", sorted(PIPELINES.keys() - START_FROM_IMAGES))
def test_every_pipeline_samples_from_its_stored_conditioning(name):
    rollout, _ = make(name)
    store = ConditioningStore.of([rollout.encode()])
    assert store.has_text == (name in READ_PROMPTS)
    noise = noise_for(rollout, rollout.encode())
    schedule = schedule_for(rollout)
    with torch.no_grad():
        expected = rollout(schedule, noise, store.select([0]))
    shape = rollout.state_shape(store.select([0]))
    if not store.has_text:
        free_text_encoders(rollout.pipe)
        assert not text_encoders(rollout.pipe)
    rollout._start = None  # what a process finds out that never had the encoders
    assert rollout.state_shape(store.select([0])) == shape
    with torch.no_grad():
        assert torch.equal(rollout(schedule, noise, store.select([0])), expected)
    check_gradients(rollout, schedule, noise, store.select([0]))


@pytest.mark.parametrize("name", sorted(START_FROM_IMAGES))
def test_the_other_pipelines_are_refused_anyway(name):
    with pytest.raises(ValueError, match="pure noise"):
        make(name)


def test_freed_text_encoders_are_gone_though_the_rollout_is_open():
    rollout, _ = make("sd3")
    rollout.encode()
    weights = [
        weakref.ref(p) for name in text_encoders(rollout.pipe) for p in getattr(rollout.pipe, name).parameters()
    ]
    kept = [weakref.ref(p) for p in rollout.pipe.transformer.parameters()]
    free_text_encoders(rollout.pipe)
    gc.collect()
    assert weights and not any(reference() is not None for reference in weights)
    rollout.close()
    assert all(reference().requires_grad for reference in kept)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_loads_without_reading_text_encoders(name, tmp_path):
    pipe, _ = PIPELINES[name]()
    pipe.save_pretrained(tmp_path / name)
    for folder in (tmp_path / name).glob("text_encoder*"):
        shutil.rmtree(folder)
    loaded = load_teacher(str(tmp_path / name), text_encoders=False)
    assert not text_encoders(loaded) and loaded.vae is not None and loaded.tokenizer is not None
    with pytest.raises(ValueError, match="cannot load the teacher"):
        load_teacher(str(tmp_path / name))


def test_a_set_is_continued_and_learned_from_without_text_encoders(tmp_path, monkeypatch):
    pipe, _ = PIPELINES["sd"]()
    pipe.save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a red fox\nblue\n")
    values = {"teacher": tmp_path / "sd", "output_dir": tmp_path / "set", "prompts_file": tmp_path / "prompts.txt"}
    values |= {"num_samples": 3, "batch_size": 2, "num_inference_steps": 2, "resolution": 32}
    command = [f"--{name}={value}" for name, value in values.items()]
    write = TeacherSetWriter.write

    def killed(*_args):
        raise KeyboardInterrupt

    assert not has_embeddings(tmp_path / "set")
    monkeypatch.setattr(TeacherSetWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        make_teacher_set.main(command)
    assert has_embeddings(tmp_path / "set")
    shutil.rmtree(tmp_path / "sd" / "text_encoder")
    monkeypatch.setattr(TeacherSetWriter, "write", write)
    make_teacher_set.main(command)
    assert not TeacherSet.load(tmp_path / "set").needs_text_encoders and has_embeddings(tmp_path / "set")
    make_teacher_set.main(command)  # finished already


def test_a_set_of_prompts_needs_text_encoders(tmp_path):
    pipe, _ = PIPELINES["ldm"]()
    pipe.save_pretrained(tmp_path / "ldm")
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    values = {"teacher": tmp_path / "ldm", "output_dir": tmp_path / "set", "prompts_file": tmp_path / "prompts.txt"}
    values |= {"num_samples": 2, "num_inference_steps": 2, "resolution": 64}
    make_teacher_set.main([f"--{name}={value}" for name, value in values.items()])
    assert TeacherSet.load(tmp_path / "set").needs_text_encoders and not has_embeddings(tmp_path / "set")


# ---------------------------------------------------------------------- pixels


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "qwen_image", "wan"])
def test_latent_losses_leave_the_autoencoder_alone(name):
    rollout, _ = make(name)
    called = []
    for part in rollout.pipe.vae.modules():
        part.register_forward_pre_hook(lambda module, _: called.append(type(module).__name__))
    conditioning = rollout.encode()
    noise, schedule = noise_for(rollout, conditioning), schedule_for(rollout)
    end = rollout(replace(schedule, times=schedule.times.requires_grad_()), noise, conditioning)
    end.square().sum().backward()
    assert not called
    with torch.no_grad():
        rollout.decode(end)
    assert called
