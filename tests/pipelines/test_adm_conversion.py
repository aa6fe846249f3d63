# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of guided-diffusion and consistency models: same outputs as the original code, all names used, others refused."""

import pytest
import torch
from diffusers import UNet2DModel

from pipelines.adm import ADMUNet2DModel
from pipelines.conversion.adm import adm_classifier, adm_unet, consistency_unet
from tests.pipelines.adm_networks import OPTIONS, distance, golden, in_float64, layouts, parameters


UNETS = {
    "guided_unet_cond": (adm_unet, 5e-6),
    "guided_unet_plain": (adm_unet, 5e-6),
    "guided_unet_neworder": (adm_unet, 5e-6),
    "cm_unet_uncond": (consistency_unet, 2e-5),
    "cm_unet_cond": (consistency_unet, 2e-5),
}


def convert(name: str):
    return UNETS[name][0](parameters(name), **OPTIONS[name])


# ---------------------------------------------------------------------- the original code's outputs


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unets_give_what_the_original_code_gives(name):
    data, unet = golden(name), convert(name)
    given = data["raw/timesteps"], data.get("raw/y")
    assert not unet.training
    assert distance(unet(data["raw/x"], *given).sample, data["raw/out_f32"]) < UNETS[name][1]
    output = in_float64(unet, name)(data["raw/x"].double(), *given).sample
    assert distance(output, data["raw/out_f64"]) < 1e-12
    if "raw/out_legacy_order_f64" in data:  # of consistency models with q, k and v in guided-diffusion's order
        assert distance(output, data["raw/out_legacy_order_f64"]) > 0.1


@pytest.mark.parametrize(
    "name, option", [("guided_unet_cond", {"use_new_attention_order": True}), ("guided_unet_plain", {"num_heads": 1})]
)
@torch.no_grad()
def test_order_and_number_of_heads_matter(name, option):
    data, unet = golden(name), adm_unet(parameters(name), **{**OPTIONS[name], **option})
    output = unet(data["raw/x"], data["raw/timesteps"], data.get("raw/y")).sample
    assert distance(output, data["raw/out_f32"]) > 1e-3


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial"])
def test_classifiers_give_what_the_original_code_gives(pool):
    name = f"guided_classifier_{pool}"
    data, classifier = golden(name), adm_classifier(parameters(name), **OPTIONS[name])
    assert classifier.config.pool == pool and classifier.config.sample_size == data["raw/x"].shape[-1]
    for precision, logits, gradients in (("f32", 5e-6, 1e-5), ("f64", 1e-12, 1e-12)):
        x = data["raw/x"]
        if precision == "f64":
            classifier, x = in_float64(classifier, name), x.double()
        given = x, data["raw/timesteps"]
        assert distance(classifier(*given), data[f"raw/logits_{precision}"]) < logits
        with torch.no_grad():
            assert distance(classifier.guidance(*given, data["raw/y"]), data[f"raw/grad_{precision}"]) < gradients
    chosen = data["raw/log_probs_f64"].gather(1, data["raw/y"][:, None])[:, 0]
    assert distance(classifier.log_probability(*given, data["raw/y"]), chosen) < 1e-12


@pytest.mark.parametrize("name", ["cm_unet_uncond", "cm_unet_cond"])
@torch.no_grad()
def test_consistency_teachers_are_preconditioned_as_edm_and_told_250_ln_sigma(name):
    data, unet = golden(name), in_float64(convert(name), name)
    x, sigma = data["CMPrecond/x"].double(), data["CMPrecond/sigma"].double()
    times = 1000 * (sigma.log() / 4)
    assert distance(times, data["CMPrecond/rescaled_t"]) < 1e-12
    variance = sigma**2 + 0.5**2
    c_skip, c_out, c_in = (
        c[:, None, None, None] for c in (0.25 / variance, 0.5 * sigma * variance**-0.5, variance**-0.5)
    )
    denoised = c_skip * x + c_out * unet(c_in * x, times, data.get("CMPrecond/y")).sample
    assert distance(denoised, data["CMPrecond/out_f64"]) < 1e-12


# ---------------------------------------------------------------------- the published sizes


@pytest.mark.parametrize(
    "name, convert_layout",
    [
        ("256x256_diffusion", adm_unet),
        ("256x256_diffusion_uncond", adm_unet),
        ("256x256_classifier", adm_classifier),
        ("edm_bedroom256_ema", consistency_unet),
        ("edm_imagenet64_ema", consistency_unet),
    ],
)
def test_published_checkpoints_are_covered_exactly(name, convert_layout):
    layout = layouts()[name]
    original = layout["constructor_kwargs"]
    # nothing is allocated: as large as the public files, without content
    network = convert_layout({key: torch.empty(shape, device="meta") for key, shape in layout["state_dict"]})
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in network.parameters()) == layout["num_parameters"]
    config = network.config
    assert config.sample_size == original["image_size"]
    assert config.layers_per_block == original["num_res_blocks"]
    widths = [multiple * original["model_channels"] for multiple in original["channel_mult"]]
    assert list(config.block_out_channels) == widths
    attended = [2**level for level, kind in enumerate(config.down_block_types) if kind == "AttnDownBlock2D"]
    assert attended == original["attention_resolutions"]
    assert config.resnet_time_scale_shift == ("scale_shift" if original["use_scale_shift_norm"] else "default")
    if convert_layout is adm_classifier:
        assert (config.num_classes, config.pool) == (original["out_channels"], original["pool"])
    else:
        assert (config.num_class_embeds, config.out_channels) == (original["num_classes"], original["out_channels"])


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["guided_unet_cond", "guided_unet_plain", "cm_unet_uncond"])
@torch.no_grad()
def test_converted_networks_are_saved_and_loaded(name, tmp_path):
    data, unet = golden(name), convert(name)
    unet.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.*")].count("diffusion_pytorch_model.safetensors") == 1
    loaded = (ADMUNet2DModel if name.startswith("guided") else UNet2DModel).from_pretrained(tmp_path)
    given = data["raw/x"], data["raw/timesteps"], data.get("raw/y")
    assert torch.equal(loaded(*given).sample, unet(*given).sample)


def test_half_precision_checkpoints_become_float32():
    state_dict = {key: value.half() for key, value in parameters("guided_unet_cond").items()}
    unet = adm_unet(state_dict, num_head_channels=32)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


# ---------------------------------------------------------------------- refusals


def broken(change) -> dict:
    state_dict = parameters("guided_unet_cond")
    change(state_dict)
    return state_dict


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("middle_block.1.norm.bias"), "missing: middle_block.1.norm.bias"),
        (lambda s: s.update(ema_decay=torch.ones(())), "unexpected: ema_decay"),
        (lambda s: s.update({"out.0.bias": torch.ones(31)}), "another shape .*: out.0.bias"),
        (lambda s: s.update({"out.0.bias": s["out.0.bias"].long()}), "not of floating point: out.0.bias"),
        (lambda s: s.update({"out.0.bias": torch.full((32,), torch.nan)}), "not of finite numbers: out.0.bias"),
        (
            lambda s: s.update({"out.0.bias": torch.full((32,), 1e300, dtype=torch.float64)}),
            "not of finite numbers: out.0.bias",
        ),
        (lambda s: s.update({"out.0.bias": 3.0}), "not of floating point: out.0.bias"),
        (lambda s: s.pop("input_blocks.0.0.weight"), "no checkpoint .* input_blocks.0.0.weight is missing"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("input_blocks.3.0")],
            "no checkpoint .* input_blocks.3.0",
        ),
        (lambda s: s.update({"input_blocks.4.0.in_layers.0.weight": torch.ones(64)}), "5 input_blocks do not"),
        (lambda s: [s.pop(k) for k in list(s) if ".1.qkv" in k], "neither strided convolutions nor attention"),
        (lambda s: s.update({"input_blocks.0.0.op.weight": torch.ones(32, 32, 3, 3)}), "4 input_blocks do not"),
        (lambda s: s.update({"time_embed.0.weight": torch.ones(128, 64)}), "timestep embedding is not as wide"),
    ],
)
def test_refuses_other_state_dicts(change, message):
    with pytest.raises(ValueError, match=message):
        adm_unet(broken(change), num_head_channels=32)


def test_refuses_networks_of_another_kind():
    with pytest.raises(ValueError, match="another shape .*qkv.weight"):
        adm_unet(parameters("cm_unet_cond"), num_head_channels=32)
    with pytest.raises(ValueError, match="another shape .*qkv.weight"):
        consistency_unet(parameters("guided_unet_cond"), num_head_channels=32)
    with pytest.raises(ValueError, match="no checkpoint"):
        adm_unet(parameters("guided_classifier_attention"), num_head_channels=32)
    with pytest.raises(ValueError, match="unexpected: .*output_blocks"):
        adm_classifier(parameters("guided_unet_cond"), num_head_channels=32)
    with pytest.raises(ValueError, match="no checkpoint"):
        adm_unet({})


def test_refuses_options_that_do_not_fit():
    with pytest.raises(ValueError, match="num_head_channels 48 does not divide the 64 channels"):
        adm_unet(parameters("guided_unet_cond"), num_head_channels=48)
    with pytest.raises(ValueError, match="num_head_channels must be at least 1"):
        adm_unet(parameters("guided_unet_cond"), num_head_channels=0)
    with pytest.raises(ValueError, match="num_heads 5 does not divide"):
        adm_unet(parameters("guided_unet_cond"), num_heads=5)
    with pytest.raises(ValueError, match="made for 16 pixels, not 32"):
        adm_classifier(parameters("guided_classifier_attention"), num_head_channels=32, image_size=32)
    for make, name in ((adm_unet, "guided_unet_cond"), (adm_classifier, "guided_classifier_spatial")):
        with pytest.raises(ValueError, match="image_size 17 is not divisible by 2"):
            make(parameters(name), num_head_channels=32, image_size=17)
    with pytest.raises(ValueError, match="image_size 17 is not divisible by 2"):
        consistency_unet(parameters("cm_unet_cond"), num_head_channels=32, image_size=17)
