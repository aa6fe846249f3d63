# SPDX-License-Identifier: Apache-2.0
"""Latent diffusion: the pipeline against a loop by hand, and CompVis's names back to the networks they were made from."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel

from ld3_diffusers import LD3Scheduler
from pipelines.adm import ADMUNet2DModel
from pipelines.conversion.files import Unfit
from pipelines.conversion.ldm import noise_schedule, pipeline_of
from pipelines.ldm import LatentDiffusionPipeline, LDMClassEmbedder

from .ldm_networks import compvis_unet, compvis_vae, conditional, counted_heads, kl, unconditional, vq


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
CLASSES = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(vae=None, unet=None, embedder=None) -> LatentDiffusionPipeline:
    scheduler = DDIMScheduler(clip_sample=False, **BETAS)
    pipe = LatentDiffusionPipeline(vae or vq(), unet or conditional(), scheduler, embedder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def classes():
    torch.manual_seed(0)
    return make(embedder=LDMClassEmbedder(CLASSES, 24))


# ---------------------------------------------------------------------- the pipeline


def test_class_embedder_has_one_more_row_than_classes():
    embedder = LDMClassEmbedder(CLASSES, 24)
    assert embedder.embedding.weight.shape == (CLASSES + 1, 24) and embedder.null_class == CLASSES
    assert torch.equal(embedder(torch.tensor([2, 4])), embedder.embedding.weight[[2, 4], None])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["ddim", "ld3"])
def test_guided_trajectory_is_that_of_a_loop_by_hand(classes, scale, kind):
    scheduler = DDIMScheduler(clip_sample=False, **BETAS)
    if kind == "ld3":
        scheduler = LD3Scheduler.from_config(scheduler.config, solver="unipc")
    classes.scheduler, noise = scheduler, torch.randn(2, 3, 8, 8)
    call = {"class_labels": [1, 3], "guidance_scale": scale, "num_inference_steps": 3, "latents": noise}
    found = classes(output_type="latent", **call).images
    rows = classes.class_embedder.embedding.weight
    scheduler.set_timesteps(3)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        cond = classes.unet(scaled, t, encoder_hidden_states=rows[[1, 3], None]).sample
        uncond = classes.unet(scaled, t, encoder_hidden_states=rows[[CLASSES, CLASSES], None]).sample
        x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    assert float((found - x).abs().max() / x.abs().max()) < 2e-6
    expected = (classes.vae.decode(found / classes.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(classes(output_type="pt", **call).images, expected, atol=1e-6)


@torch.no_grad()
def test_latents_are_divided_by_the_scaling_factor():
    pipe = make(vae=kl(), unet=counted_heads())
    call = {"num_inference_steps": 2, "latents": torch.randn(1, 4, 8, 8)}
    z = pipe(output_type="latent", **call).images
    assert pipe.vae.config.scaling_factor == 0.25
    expected = (pipe.vae.decode(4 * z).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipe(output_type="pt", **call).images, expected, atol=1e-6)


def test_batch_is_a_batch_of_ones(classes):
    noise, labels = torch.randn(2, 3, 8, 8), [0, 2]
    call = {"guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "latent"}
    classes.scheduler = DDIMScheduler(clip_sample=False, **BETAS)
    both = classes(class_labels=labels, latents=noise, **call).images
    ones = [classes(class_labels=labels[i], latents=noise[i : i + 1], **call).images for i in range(2)]
    assert torch.allclose(both, torch.cat(ones), atol=1e-5)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    drawn = classes(class_labels=1, batch_size=2, generator=generators, **call).images
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.equal(drawn, classes(class_labels=1, latents=noise, **call).images)


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "is class-conditional; give class_labels, 0 to 3"),
        ({"class_labels": 4}, "integers from 0 to 3, got"),
        ({"class_labels": [0, -1]}, "integers from 0 to 3, got"),
        ({"class_labels": [0, 1], "batch_size": 3}, "2 class_labels are given for 3 images"),
        ({"class_labels": 0, "latents": torch.zeros(1, 3, 4, 4)}, r"samples \(1, 3, 8, 8\)"),
    ],
)
def test_calls_that_cannot_be_answered(classes, call, message):
    with pytest.raises(ValueError, match=message):
        classes(**call)


@pytest.mark.parametrize("call", [{"class_labels": 1}, {"guidance_scale": 2.0}])
def test_unconditional_networks_take_neither_classes_nor_guidance(call):
    with pytest.raises(ValueError, match="is unconditional; drop"):
        make(unet=unconditional())(**call)


# ---------------------------------------------------------------------- from CompVis's names


def checkpoint(unet: dict, vae: dict, **others) -> dict:
    return {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()},
        **{f"first_stage_model.{name}": tensor for name, tensor in vae.items()},
        "alphas_cumprod": torch.ones(1000),
        **others,
    }


CASES = {
    "classes": (conditional, vq, [False, True], None, {"num_heads": 1}),
    "bedrooms": (unconditional, vq, [False, True], {64: 2}, {"num_head_channels": 32}),
    "churches": (counted_heads, kl, [True, False], {32: 8, 64: 8}, {"num_heads": 8}),
}


def made(name: str) -> tuple:
    make_unet, make_vae, attended, heads, _ = CASES[name]
    unet, vae = make_unet().eval(), make_vae().eval()
    return unet, vae, compvis_unet(unet, attended, heads), compvis_vae(vae)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("explicit", [False, True])
def test_networks_come_back_exactly(name, explicit):
    unet, vae, unet_state, vae_state = made(name)
    others = {"scale_factor": torch.tensor(0.25)} if name == "churches" else {}
    if name == "classes":
        others["cond_stage_model.embedding.weight"] = torch.randn(CLASSES + 1, 24)
    heads = CASES[name][4] if explicit else {}
    state = checkpoint(unet_state, vae_state, **others)
    pipe = pipeline_of(state, image_size=16, **heads)
    kinds = {"classes": (UNet2DConditionModel, VQModel), "bedrooms": (UNet2DModel, VQModel), "churches": (ADMUNet2DModel, AutoencoderKL)}  # fmt: skip
    assert (type(pipe.unet), type(pipe.vae)) == kinds[name]
    assert pipe.vae.config.scaling_factor == vae.config.scaling_factor
    x, t = torch.randn(2, unet.config.in_channels, 8, 8), torch.tensor([3, 700])
    tokens = {"encoder_hidden_states": torch.randn(2, 1, 24)} if name == "classes" else {}
    assert torch.equal(pipe.unet(x, t, **tokens).sample, unet(x, t, **tokens).sample)
    assert torch.equal(pipe.vae.decode(x).sample, vae.decode(x).sample)
    image = torch.randn(1, 3, 16, 16)
    first, second = (part.encode(image, return_dict=False)[0] for part in (pipe.vae, vae))
    if name == "churches":  # distributions
        first, second = first.parameters, second.parameters
    assert torch.equal(first, second)
    if name == "classes":
        assert torch.equal(pipe.class_embedder.embedding.weight, others["cond_stage_model.embedding.weight"])
    pipe.set_progress_bar_config(disable=True)
    labels = {"class_labels": 2} if name == "classes" else {}
    assert pipe(num_inference_steps=2, output_type="pt", **labels).images.shape == (1, 3, 16, 16)


def test_averaged_weights_are_taken_when_asked_for():
    _, _, unet, vae = made("bedrooms")
    # names as the averaging of CompVis makes them: without dots, behind one prefix
    averages = {"model_ema.diffusion_model" + name.replace(".", ""): 2 * tensor for name, tensor in unet.items()}
    state = checkpoint(unet, vae, **averages, **{"model_ema.decay": torch.tensor(0.9999)})
    last, averaged = (pipeline_of(state, ema=ema, image_size=16).unet.state_dict() for ema in (False, True))
    assert all(torch.equal(averaged[name], 2 * last[name]) for name in last)
    del state["model_ema.diffusion_modelinput_blocks00weight"]
    with pytest.raises(ValueError, match="no averaged 'input_blocks.0.0.weight'"):
        pipeline_of(state, ema=True, image_size=16)


def test_noise_schedule_is_the_checkpoints():
    published = noise_schedule(None).config
    assert (published.beta_start, published.beta_end, published.beta_schedule) == (0.0015, 0.0195, "scaled_linear")
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    churches = noise_schedule(betas.float())
    assert (churches.config.beta_start, churches.config.beta_end) == (0.0015, 0.0155)
    assert torch.allclose(churches.betas.double(), betas, rtol=1e-5, atol=0)
    other = torch.linspace(1e-4, 0.02, 500)
    found = noise_schedule(other)
    assert torch.equal(found.betas, other) and found.config.num_train_timesteps == 500
    assert not found.config.clip_sample


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.diffusion_model.out.2.bias"), "lacks|missing"),
        (lambda s: s.pop("first_stage_model.decoder.norm_out.bias"), "VQModel lacks 'decoder.conv_norm_out.bias'"),
        (lambda s: s.update({"model.diffusion_model.extra.weight": torch.zeros(2)}), "unexpected: extra.weight"),
        (lambda s: s.update({"first_stage_model.extra.weight": torch.zeros(2)}), "the rest has unknown names"),
        (lambda s: s.update({"cond_stage_model.bert.weight": torch.zeros(2, 2)}), "the weight 'cond_stage_model.bert"),
        (
            lambda s: s.update({"first_stage_model.encoder.down.1.attn.0.q.weight": torch.zeros(64, 64, 1, 1)}),
            "VQModel has the unknown",
        ),
        (
            lambda s: s.update({"first_stage_model.quantize.embedding.weight": torch.zeros(16, 4)}),
            "quant_conv.weight of",
        ),
        (lambda s: s.update({"model.diffusion_model.out.2.bias": torch.zeros(4)}), "of another shape"),
    ],
)
def test_names_and_shapes_must_be_exactly_the_networks(change, message):
    _, _, unet, vae = made("bedrooms")
    state = checkpoint(unet, vae)
    change(state)
    with pytest.raises(ValueError, match=message):
        pipeline_of(state, image_size=16)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.diffusion_model.out.2.bias"), "UNet2DConditionModel lacks 'conv_out.bias'"),
        (lambda s: s.update({"model.diffusion_model.extra.weight": torch.zeros(2)}), "the rest has unknown names"),
        (
            lambda s: s.update({"cond_stage_model.embedding.weight": torch.zeros(5, 12)}),
            "embedded in 12 numbers, and the",
        ),
    ],
)
def test_names_and_shapes_of_conditional_networks(change, message):
    _, _, unet, vae = made("classes")
    state = checkpoint(unet, vae, **{"cond_stage_model.embedding.weight": torch.zeros(5, 24)})
    change(state)
    with pytest.raises(ValueError, match=message):
        pipeline_of(state, image_size=16)


def spoilt(state: dict, name: str) -> None:
    state[name] = torch.full_like(state[name], torch.nan)


NUMBERS = {  # of a checkpoint -> what is said of it
    "weights of the network": (lambda s: spoilt(s, "model.diffusion_model.out.2.bias"), "bias that is not of finite numbers"),
    "weights of the autoencoder": (lambda s: spoilt(s, "first_stage_model.decoder.conv_out.bias"), "bias that is not of finite"),
    "classes": (lambda s: spoilt(s, CLASS_TABLE), "weight that is not of finite"),
    "one row": (lambda s: s.update({CLASS_TABLE: torch.zeros(1, 24)}), r"shape \(1, 24\), where a row for each class and"),
    "one axis": (lambda s: s.update({CLASS_TABLE: torch.zeros(24)}), r"shape \(24,\), where a row for each class and"),
    **{
        f"betas {name}": (lambda s, betas=betas: s.update(betas=betas), "betas are no list of numbers between 0 and 1")
        for name, betas in {
            "nan": torch.full((10,), torch.nan),
            "above 1": torch.linspace(1, 200, 10),
            "negative": torch.full((10,), -0.1),
            "zero": torch.zeros(10),
            "complex": torch.full((10,), 0.1 + 0.1j),
            "whole": torch.ones(10, dtype=torch.int64),
            "scalar": torch.tensor(0.1),
            "empty": torch.zeros(0),
        }.items()
    },
    **{
        f"scale {factor}": (lambda s, factor=factor: s.update(scale_factor=factor), "scale_factor is no positive number")
        for factor in (torch.tensor(torch.nan), torch.tensor(torch.inf), torch.tensor(0.0), torch.tensor(-1.0), torch.ones(2))
    },
}  # fmt: skip
CLASS_TABLE = "cond_stage_model.embedding.weight"


@pytest.mark.parametrize("name", NUMBERS)
def test_impossible_numbers_are_refused(name):
    change, message = NUMBERS[name]
    _, _, unet, vae = made("classes")
    state = checkpoint(unet, vae, **{CLASS_TABLE: torch.zeros(5, 24)})
    change(state)
    with pytest.raises(ValueError, match=message):
        pipeline_of(state, image_size=16)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("classes", {"num_head_channels": 1000}, "num_head_channels 1000 does not divide the 64 channels"),
        ("classes", {"num_heads": 5}, "num_heads 5 does not divide the 64 channels"),
        ("bedrooms", {"num_head_channels": 1000}, "num_head_channels 1000 does not divide the 64 channels"),
        ("classes", {"image_size": 17}, "image_size 17 is not divisible by 2"),
        ("classes", {"image_size": 2}, "image_size 1 is not divisible by 2"),
        ("bedrooms", {"image_size": 2}, "image_size 1 is not divisible by 2"),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    _, _, unet, vae = made(name)
    classes = {CLASS_TABLE: torch.zeros(5, 24)} if name == "classes" else {}
    with pytest.raises(Unfit, match=message):
        pipeline_of(checkpoint(unet, vae, **classes), **{"image_size": 16, **options})
