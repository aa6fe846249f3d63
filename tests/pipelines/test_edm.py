# SPDX-License-Identifier: Apache-2.0
"""EDM's networks against outputs of the original ones, its preconditionings, and its pipeline against the loop written out."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from ld3_diffusers import AMEDScheduler, LD3Scheduler, SolverSpec
from ld3_diffusers.amed import amed_schedule
from ld3_diffusers.attachment import bottleneck_of
from ld3_diffusers.discretization import discretization
from pipelines.edm import (
    PRECONDITIONINGS,
    EDMPipeline,
    EDMUNet2DModel,
    iddpm_sigmas,
    vp_sigma,
    vp_time,
)
from tests.ld3_diffusers.amed_steps import random_predictor
from tests.pipelines.edm_networks import GOLDEN, golden, network_of
from training.features import load_feature_network
from training.teacher import load_teacher


ROOT = Path(__file__).parent.parent.parent
# File and preconditioning; tolerances of float32 are those of the files' README: NCSN++ has phases of several hundred radians.
CASES = [
    ("edm_ddpmpp_uncond", "EDMPrecond"),
    ("edm_ddpmpp_uncond", "VPPrecond"),
    ("edm_ddpmpp_cond", "EDMPrecond"),
    ("edm_ddpmpp_cond", "VPPrecond"),
    ("edm_ncsnpp_uncond", "EDMPrecond"),
    ("edm_ncsnpp_uncond", "VEPrecond"),
    ("edm_ncsnpp_cond", "EDMPrecond"),
    ("edm_ncsnpp_cond", "VEPrecond"),
    ("edm_adm_cond", "EDMPrecond"),
    ("edm_adm_uncond_2heads", "EDMPrecond"),
    ("edm_adm_iddpm", "iDDPMPrecond"),
]
FILES = list(dict.fromkeys(name for name, _ in CASES))
LAYOUTS = json.loads(gzip.decompress((GOLDEN / "edm_layouts.json.gz").read_bytes()))


def relative(value, reference) -> float:
    reference = torch.as_tensor(reference).double()
    return float((value.double() - reference).abs().max() / reference.abs().max())


def tolerance(name: str) -> float:
    return 2e-5 if "ncsnpp" in name else 5e-6


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_the_bare_network_is_the_original(name):
    data = golden(name)
    unet = network_of(data)
    x, noise = data["raw/x"], data["raw/noise_labels"]
    labels, augment = data.get("raw/class_labels"), data.get("raw/augment_labels")
    if "raw/freqs" in data:
        assert torch.equal(unet.map_noise.frequencies(), data["raw/freqs"])
    assert relative(unet.raw(x, noise, labels), data["raw/out_f32"]) < tolerance(name)
    if labels is not None:
        assert relative(unet.raw(x, noise), data["raw/out_zero_label_f32"]) < tolerance(name)
        number = torch.where(labels.any(1), labels.argmax(1), -1)
        assert torch.equal(unet.raw(x, noise, number), unet.raw(x, noise, labels))
    unet = unet.double()
    x, noise = x.double(), noise.double()
    assert relative(unet.raw(x, noise, labels), data["raw/out_f64"]) < 1e-12
    if augment is not None:
        assert relative(unet.raw(x, noise, labels, augment.double()), data["raw/out_augment_f64"]) < 1e-12


@pytest.mark.parametrize("name,wrapper", CASES)
@torch.no_grad()
def test_the_denoiser_is_the_original(name, wrapper):
    data = golden(name)
    unet = network_of(data, wrapper)
    x, sigma, labels = (data.get(f"{wrapper}/{key}") for key in ("x", "sigma", "class_labels"))
    single = tolerance(name) if wrapper != "iDDPMPrecond" else 5e-6
    assert relative(unet.denoise(x, sigma, labels), data[f"{wrapper}/out_f32"]) < single
    one = unet.denoise(x, float(sigma[1]), labels)
    assert relative(one, data[f"{wrapper}/out_scalar_sigma_f32"]) < single
    if labels is not None:
        assert relative(unet.denoise(x, sigma), data[f"{wrapper}/out_no_labels_f32"]) < single
    double = unet.double().denoise(x.double(), sigma.double(), labels)
    assert relative(double, data[f"{wrapper}/out_f64"]) < 1e-12


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_public_layout_is_covered(name):
    layout = LAYOUTS[name]
    config = {"config": {"network_class": layout["network"], "kwargs": layout["kwargs"]}}
    with torch.device("meta"):
        unet = network_of(config, layout["wrapper"], load=False)
    shapes = {f"model.{key}": list(value.shape) for key, value in unet.state_dict().items()}
    assert shapes == layout["names"]
    assert sum(parameter.numel() for parameter in unet.parameters()) == layout["num_parameters"]


def test_checkpointed_blocks_have_the_same_gradients():
    data = golden("edm_ncsnpp_cond")
    unet, x = network_of(data).double(), data["raw/x"].double()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        given = x.clone().requires_grad_()
        unet(given, data["raw/noise_labels"].double()).sample.square().sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)


def test_half_precision_keeps_the_frequencies(tmp_path):
    unet = network_of(golden("edm_ncsnpp_uncond"))
    unet.save_pretrained(tmp_path)
    half = EDMUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.dec["16x16_aux_conv"].weight.dtype == torch.float16
    assert torch.equal(half.map_noise.freqs, unet.map_noise.freqs)
    frequencies = unet.map_noise.freqs.clone()
    assert torch.equal(unet.to(torch.bfloat16).map_noise.freqs, frequencies)
    assert unet.double().map_noise.freqs.dtype == torch.float64


@pytest.mark.parametrize(
    "name,wrapper,sigma", [("edm_ncsnpp_uncond", "VEPrecond", 0.05), ("edm_adm_iddpm", "iDDPMPrecond", 1.0)]
)
@torch.no_grad()
def test_a_network_cast_to_half_precision_says_about_the_same(name, wrapper, sigma):
    data = golden(name)
    unet, x = network_of(data, wrapper), data["raw/x"]
    whole = unet(x, 0.25 * math.log(sigma)).sample
    half = unet.to(torch.bfloat16)(x.bfloat16(), torch.tensor(0.25 * math.log(sigma))).sample
    assert relative(half.float(), whole) < 0.03


# ---------------------------------------------------------------------- preconditioning


def test_sigma_and_time_are_each_others_inverse():
    t = torch.logspace(-5, 0, 200, dtype=torch.float64)
    assert torch.allclose(vp_time(vp_sigma(t)), t, rtol=1e-9, atol=0)
    sigma = torch.logspace(-3, 2.1, 200, dtype=torch.float64)
    assert torch.allclose(vp_sigma(vp_time(sigma)), sigma, rtol=1e-9, atol=0)
    path = LD3Scheduler(noise_path="vp_linear").path
    assert torch.allclose(path.sigma_edm(t), vp_sigma(t), rtol=1e-9, atol=0)
    assert torch.allclose(path.inverse_sigma_edm(sigma), vp_time(sigma), rtol=1e-9, atol=0)


def test_noise_levels_of_improved_ddpm():
    data = golden("edm_adm_iddpm")
    u = iddpm_sigmas()
    # upstream's recursion runs in float32, and drifts
    assert torch.allclose(u, data["iDDPMPrecond/u"].double(), rtol=1e-3, atol=1e-6)
    nearest = (u[None] - data["iDDPMPrecond/sigma"].double()[:, None]).abs().argmin(1)
    assert torch.equal(nearest, data["iDDPMPrecond/round_index"].long())


@pytest.mark.parametrize("name,wrapper", [("edm_ddpmpp_uncond", "VPPrecond"), ("edm_ddpmpp_uncond", "EDMPrecond")])
def test_the_range_is_the_originals(name, wrapper):
    data = golden(name)
    low, high = network_of(data, wrapper).sigma_range
    if wrapper == "VPPrecond":
        original = data["VPPrecond/sigma_min_max"].tolist()
        # theirs at t = 1e-5 subtracts 1 in float32
        assert low == pytest.approx(original[0], rel=0.03) and high == pytest.approx(original[1], rel=1e-6)
        assert low == pytest.approx(math.sqrt(math.expm1(0.5 * 19.9e-10 + 0.1e-5)), rel=1e-9)
    else:
        assert (low, high) == (0.002, 80)


@pytest.mark.parametrize("name,wrapper", CASES)
@torch.no_grad()
def test_without_noise_a_denoiser_is_the_identity(name, wrapper):
    data = golden(name)
    unet = network_of(data, wrapper).double()
    x = data["raw/x"].double()
    distances = [float((unet.denoise(x, sigma) - x).abs().max()) for sigma in (1e-3, 1e-4)]
    # D - x is sigma times what the network says, and its own noise label is all that changes beside
    assert distances[0] < 1e-3 * 100 and distances[1] < 0.3 * distances[0]


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_what_the_scheduler_makes_of_the_output_is_the_denoiser(preconditioning):
    """Stock and learned schedulers turn F into data by EDM's coefficients, whatever the network was trained with."""
    torch.manual_seed(0)
    unet = small(preconditioning=preconditioning, out_channels=4 if preconditioning == "iddpm" else 2)
    x, labels = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    for sigma in (0.05, 1.3, 40.0):
        stock = EDMEulerScheduler()
        scaled = stock.precondition_inputs(x, sigma)
        given = stock.precondition_noise(torch.tensor(sigma, dtype=torch.float64))
        with torch.no_grad():
            found = stock.precondition_outputs(x, unet(scaled, given, labels).sample, sigma)
            expected = unet.denoise(x, sigma, labels)
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------- pipeline


def small(**changes) -> EDMUNet2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "in_channels": 2, "out_channels": 2, "num_class_embeds": 3, "model_channels": 8,
        "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,),
    }  # fmt: skip
    unet = EDMUNet2DModel(**{**config, **changes}).double().eval()
    for name, parameter in unet.named_parameters():
        if name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


SCHEDULERS = {
    "EDMEuler": lambda: EDMEulerScheduler(),
    "EDMDPM++": lambda: EDMDPMSolverMultistepScheduler(),
    "euler": lambda: LD3Scheduler.from_config(EDMEulerScheduler().config, solver="euler"),
    "heun": lambda: LD3Scheduler.from_config(EDMEulerScheduler().config, solver="heun"),
    "ipndm": lambda: LD3Scheduler.from_config(EDMEulerScheduler().config, solver="ipndm"),
    "unipc": lambda: LD3Scheduler.from_config(EDMEulerScheduler().config, solver="unipc", discretization="logsnr"),
}


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_the_pipeline_is_its_loop_with_every_scheduler(name):
    unet, labels = small(), torch.tensor([0, 2])
    pipe = EDMPipeline(unet, SCHEDULERS[name]())
    pipe.set_progress_bar_config(disable=True)
    found = pipe(class_labels=[0, 2], latents=noise(2), num_inference_steps=7, output_type="latent").images
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(7)
    x = noise(2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, t), t, labels).sample, t, x).prev_sample
    assert torch.equal(found, x)
    alone = pipe(class_labels=2, latents=noise(2)[1:], num_inference_steps=7, output_type="latent").images
    assert torch.allclose(alone[0], found[1], atol=1e-4)  # stock schedulers compute in float32


@pytest.mark.parametrize("preconditioning,tolerance", [("edm", 1e-6), ("ve", 1e-4)])
@torch.no_grad()
def test_euler_steps_are_those_of_the_denoiser(preconditioning, tolerance):
    """x' = x + (sigma' - sigma) (x - D(x; sigma)) / sigma, on EDM's own grid and to sigma = 0."""
    unet = small(preconditioning=preconditioning)
    scheduler = LD3Scheduler.from_config(EDMEulerScheduler(sigma_min=0.02, sigma_max=100).config, solver="euler")
    pipe = EDMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(class_labels=[1, 1], latents=noise(2), num_inference_steps=5, output_type="latent").images
    sigmas = [*((100 ** (1 / 7) + i / 4 * (0.02 ** (1 / 7) - 100 ** (1 / 7))) ** 7 for i in range(5)), 0.0]
    x = 100 * noise(2)
    for sigma, following in zip(sigmas, sigmas[1:]):
        x = x + (following - sigma) * (x - unet.denoise(x, sigma, torch.tensor([1, 1]))) / sigma
    # A step computes in float32, of which EDM's F takes sigma / sigma_data, here 200, where the network predicts noise.
    assert relative(found, x) < tolerance


def test_the_time_scale_is_that_of_the_teachers_of_consistency_models():
    told = []

    class Listening(EDMUNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            told.append(float(timestep))
            return super().forward(sample, timestep / 1000, class_labels, return_dict)

    unet = small()
    unet.__class__ = Listening
    pipe = EDMPipeline(unet, EDMEulerScheduler(), timestep_scale=1000.0)
    pipe.set_progress_bar_config(disable=True)
    pipe(class_labels=0, num_inference_steps=3)
    assert told[0] == pytest.approx(250 * math.log(80), rel=1e-6)


def test_a_generator_draws_the_noise_and_images_are_pictures():
    pipe = EDMPipeline(small(in_channels=1, out_channels=1).float(), EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipe(class_labels=[0, 1], num_inference_steps=3, generator=generators, output_type="pt").images
    alone = pipe(class_labels=1, num_inference_steps=3, generator=torch.Generator().manual_seed(4), output_type="pt")
    assert torch.allclose(images[1], alone.images[0], atol=1e-5)
    (picture,) = pipe(class_labels=1, num_inference_steps=3, generator=torch.Generator().manual_seed(4))[0]
    assert picture.size == (8, 8)
    assert np.abs(np.asarray(picture, dtype=np.float32) / 255 - alone.images[0, 0].numpy()).max() < 1 / 255


@pytest.mark.parametrize(
    "call,said",
    [
        ({}, "give class_labels, 0 to 2"),
        ({"class_labels": 3}, "from 0 to 2"),
        ({"class_labels": [-1, 0]}, "from 0 to 2"),
        ({"class_labels": [0.5]}, "must be integers"),
        ({"class_labels": [0, 1], "batch_size": 3}, "2 class_labels are given for 3 images"),
        ({"class_labels": "three"}, "must be integers, got 'three'"),
        ({"class_labels": [True, False]}, "must be integers"),
        ({"class_labels": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"class_labels": 1, "batch_size": 3, "generator": [torch.Generator()] * 2}, "2 generators are given for 3"),
        ({"class_labels": 1, "latents": torch.zeros(1, 3, 8, 8)}, r"samples \(1, 2, 8, 8\)"),
    ],
)
def test_bad_calls_are_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        EDMPipeline(small(), EDMEulerScheduler())(**call)


@pytest.mark.parametrize("labels", [torch.tensor(2), np.array([0, 2]), range(3), (0, 1, 2)])
def test_labels_come_in_any_sequence(labels):
    pipe = EDMPipeline(small(), EDMEulerScheduler())
    images = pipe(class_labels=labels, num_inference_steps=2, output_type="latent").images
    assert len(images) == torch.as_tensor(labels).numel()


def test_stochastic_schedulers_draw_from_the_generator():
    pipe = EDMPipeline(small().float(), EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    call = {"class_labels": [0, 1], "num_inference_steps": 3, "output_type": "latent"}
    first, again, other = (
        pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
        for seeds in ((0, 1), (0, 1), (0, 2))
    )
    assert torch.equal(first, again) and not torch.equal(first[1], other[1])


def test_schedulers_without_the_preconditioning_are_refused():
    with pytest.raises(ValueError, match="DDIMScheduler does not know EDM's preconditioning"):
        EDMPipeline(small(), DDIMScheduler())(class_labels=0)
    EDMPipeline(small(), LD3Scheduler(noise_path="edm"))(class_labels=0, num_inference_steps=2)


def test_an_unconditional_network_takes_no_labels():
    pipe = EDMPipeline(small(num_class_embeds=None), EDMEulerScheduler())
    with pytest.raises(ValueError, match="unconditional; drop class_labels"):
        pipe(class_labels=0)
    assert len(pipe(batch_size=3, num_inference_steps=2, output_type="latent").images) == 3


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"architecture": "unet"}, "unknown architecture 'unet'; use one of song, dhariwal"),
        ({"preconditioning": "eps"}, "unknown preconditioning 'eps'"),
        ({"embedding_type": "learned"}, "unknown embedding_type"),
        ({"encoder_type": "skip"}, "unknown encoder_type"),
        ({"sample_size": 7}, "give a multiple of 2"),
    ],
)
def test_bad_networks_are_refused_in_words(changes, said):
    with pytest.raises(ValueError, match=said):
        small(**changes)


@torch.no_grad()
def test_stages_for_each_sample_attach_to_the_bottleneck():
    config = EDMEulerScheduler().config
    path = LD3Scheduler.from_config(config).path
    steps = discretization("polynomial", path, 2)
    schedule = amed_schedule(steps, SolverSpec("amed"), path, "epsilon")
    pipe = EDMPipeline(small().float(), AMEDScheduler.from_config(config, schedules={"4": schedule.to_dict(path)}))
    pipe.scheduler.set_predictor(4, random_predictor(solver="amed"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.attach(pipe)
    assert bottleneck_of(pipe) == (pipe.unet, pipe.unet.enc["4x4_block0"])  # the encoder's last, not its first block
    given = {"num_inference_steps": 4, "output_type": "latent"}
    together = pipe(class_labels=[0, 2], latents=noise(2).float(), **given).images
    alone = pipe(class_labels=2, latents=noise(2)[1:].float(), **given).images
    pipe.scheduler.detach()
    assert torch.allclose(together[1], alone[0], atol=1e-4)


# ---------------------------------------------------------------------- the one that ships


@torch.no_grad()
def test_the_shipped_teacher_draws_what_it_is_asked_for():
    folder = ROOT / "examples" / "teachers" / "fashion-edm"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6e6
    pipe = load_teacher(str(folder))
    labels = torch.arange(10).repeat_interleave(6)
    generator = torch.Generator().manual_seed(0)
    images = pipe(class_labels=labels, num_inference_steps=10, generator=generator, output_type="pt").images
    judge = load_feature_network(f"{ROOT}/examples/teachers/fashion_classifier.py:features_of_images")
    seen = judge.logits((images * 255).round().byte().expand(-1, 3, -1, -1)).argmax(1)
    # 82.6 % of 500 samples with 50 steps; by chance a tenth
    assert (seen == labels).double().mean() > 0.6
