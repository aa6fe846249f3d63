# SPDX-License-Identifier: Apache-2.0
"""ADM's classifier guidance and pipeline: the original wrapper's numbers, trajectories by hand, derivatives, refusals."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.noise_path import VPLinear
from pipelines.adm import ADMClassifier, ADMPipeline, ADMUNet2DModel, log_alpha_bar
from pipelines.conversion.adm import adm_classifier, adm_unet, consistency_unet
from pipelines.edm import EDMPipeline
from tests.pipelines.adm_networks import OPTIONS, StoredFrequencies, distance, golden, in_float64, parameters
from tests.tiny_pipelines.adm import CLASSES, adm


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


# ---------------------------------------------------------------------- noise schedule


@pytest.mark.parametrize(
    "betas",
    [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.01, 0.02, 0.4], "num_train_timesteps": 3}],
)
def test_noise_schedule_is_that_of_the_schedulers_noise_path(betas):
    scheduler = LD3Scheduler(**betas)
    last = scheduler.config.num_train_timesteps - 1
    timesteps = torch.tensor([[-1.0, -0.5, 0.3], [0.6 * last, last - 0.001, last]], dtype=torch.float64)
    for config in (scheduler.config, DDIMScheduler(**betas).config):
        expected = 2 * scheduler.path.log_alpha(scheduler.path.time(timesteps))
        assert torch.allclose(log_alpha_bar(timesteps, config), expected, rtol=1e-10, atol=1e-15)


def test_the_continuous_noise_schedule_is_that_of_the_noise_path():
    path, timesteps = VPLinear(), torch.tensor([0.0, 17.25, 999.0], dtype=torch.float64)
    expected = 2 * path.log_alpha(path.time(timesteps))
    assert torch.allclose(log_alpha_bar(timesteps, {"noise_path": "vp_linear"}), expected, rtol=1e-12)
    assert torch.allclose(log_alpha_bar(timesteps, DDIMScheduler().config, "vp_linear"), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="no noise path 've'"):
        log_alpha_bar(timesteps, {"noise_path": "ve"})


def test_the_noise_schedule_is_differentiable():
    # d log alphabar / d timestep within a step is the step's log(1 - beta)
    inner = torch.tensor([-0.5, 41.5], dtype=torch.float64, requires_grad=True)
    slopes = torch.autograd.grad(log_alpha_bar(inner, DDIMScheduler().config).sum(), inner)[0]
    assert torch.allclose(slopes, (1 - BETAS[[0, 42]]).log(), rtol=2e-3)  # the table is Diffusers', in float32


@torch.no_grad()
def test_schedulers_of_edms_preconditioning_are_refused():
    pipe, call = adm()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler is for EDM's preconditioning"):
        pipe(**call)


@torch.no_grad()
def test_guidance_works_in_inference_mode():
    pipe, _ = adm()
    given = torch.randn(1, 3, 16, 16), torch.tensor(300.5), torch.tensor([7])
    with torch.inference_mode():
        found = pipe.predict_noise(*given, 20.0)
    assert torch.equal(found, pipe.predict_noise(*given, 20.0))


# ---------------------------------------------------------------------- guidance


@pytest.mark.parametrize("rate", [0, 1, 50])
@torch.no_grad()
def test_guided_denoiser_of_the_original_wrapper(rate):
    """D = x - sigma eps, in AMED's convention: the network is told 999 t of the continuous variance-preserving path."""
    unet_name, classifier_name, data = "guided_unet_cond", "guided_classifier_attention", golden("guided_cg_wrapper")
    unet = adm_unet(parameters(unet_name), **OPTIONS[unet_name])
    classifier = adm_classifier(parameters(classifier_name), **OPTIONS[classifier_name])
    path = VPLinear()
    sigma = data["sigma"].double()
    told = path.timestep(path.inverse_sigma_edm(sigma))
    assert distance(told, data["c_noise"]) < 1e-12
    sigma = sigma[:, None, None, None]
    for dtype, stored, tolerance in ((torch.float32, "out_f32", 2e-4), (torch.float64, "out_f64", 1e-11)):
        if dtype == torch.float64:
            unet, classifier = in_float64(unet, unet_name), in_float64(classifier, classifier_name)
        pipe = ADMPipeline(unet, DDIMScheduler(), classifier, noise_path="vp_linear")
        x = data["x"].to(dtype)
        sample = x / (sigma**2 + 1).sqrt().to(dtype)
        noise = pipe.predict_noise(sample, told.to(dtype), data["y"], rate)
        denoised = x - sigma.to(dtype) * noise
        assert distance(denoised.clamp(-1, 1), data[f"rate{rate}/{stored}"]) < tolerance
    assert distance(denoised, data[f"rate{rate}/unclamped_f64"]) < tolerance
    if rate == 0:
        assert distance(noise, data["eps_f64"]) < 1e-12


def float64_classifier(**options) -> ADMClassifier:
    classifier = ADMClassifier(
        sample_size=4,
        in_channels=2,
        num_classes=3,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        attention_head_dim=4,
        norm_num_groups=2,
        **options,
    )
    frequencies = torch.tensor([1.0, 0.01])
    classifier.time_proj = StoredFrequencies(frequencies)
    return classifier.double().eval().requires_grad_(False)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial"])
def test_guidance_is_the_gradient_of_the_log_probability_and_differentiable(pool):
    classifier, labels = float64_classifier(pool=pool), torch.tensor([2, 0])
    sample = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([3.7, 120.2], dtype=torch.float64, requires_grad=True)

    log_probability = torch.log_softmax(classifier(sample, times), 1)[[0, 1], labels]
    by_autograd = torch.autograd.grad(log_probability.sum(), sample)[0]
    with torch.no_grad():
        guidance = classifier.guidance(sample, times, labels)
    assert not guidance.requires_grad and distance(guidance, by_autograd) < 1e-12
    # samples do not mix
    assert distance(classifier.guidance(sample[1:], times[1:], labels[1:]).detach(), by_autograd[1:]) < 1e-10
    # fourth-order differences of the log-probability
    direction, h = torch.randn_like(sample), 1e-5

    def value(step: float) -> float:
        with torch.no_grad():
            return float(classifier.log_probability(sample + step * direction, times, labels).sum())

    expected = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert float((guidance * direction).sum()) == pytest.approx(expected, rel=1e-6)
    # and of the guidance itself, in sample and timestep
    inputs = sample, times
    assert torch.autograd.gradcheck(
        lambda z, t: classifier.guidance(z, t, labels), inputs, eps=1e-6, atol=1e-9, fast_mode=True
    )


def test_one_timestep_serves_the_batch():
    classifier, labels = float64_classifier(), torch.tensor([2, 0])
    sample = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    times = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)
    each = times.expand(2)
    one, two = (classifier.guidance(sample, t, labels) for t in (times, each))
    assert torch.equal(one, two)
    cotangent = torch.randn_like(one)
    first, second = (torch.autograd.grad((g * cotangent).sum(), times)[0] for g in (one, two))
    assert first == pytest.approx(float(second), rel=1e-10)


def test_guided_noise_is_differentiable_in_timestep():
    pipe, _ = adm()
    pipe.to(torch.float64)
    for network in (pipe.unet, pipe.classifier):
        network.requires_grad_(False).time_proj = StoredFrequencies(torch.tensor([1.0, 0.01], dtype=torch.float64))
    sample, cotangent = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    labels, h = torch.tensor([7, 1]), 1e-3
    times = torch.tensor([20.4, 700.6], dtype=torch.float64, requires_grad=True)  # one a sample, clear of whole steps

    def guidance_part(times):
        noise = pipe.predict_noise(sample, times, labels, 20.0) - pipe.predict_noise(sample, times, labels, 0.0)
        return (noise * cotangent).sum((1, 2, 3))

    derivative = torch.autograd.grad(guidance_part(times).sum(), times)[0]
    with torch.no_grad():
        near, far = (guidance_part(times + step) - guidance_part(times - step) for step in (h, 2 * h))
    assert torch.allclose(derivative, (8 * near - far) / (12 * h), rtol=1e-6)


# ---------------------------------------------------------------------- sampling


def guided_noise(pipe, sample, timestep, labels, scale):
    """The noise prediction that the formula of guidance gives, by differentiation of the classifier's logits."""
    noise = pipe.unet(sample, timestep, class_labels=labels).sample[:, :3]
    with torch.enable_grad():
        sample = sample.detach().requires_grad_()
        chosen = torch.log_softmax(pipe.classifier(sample, timestep), 1)[range(len(labels)), labels]
        gradient = torch.autograd.grad(chosen.sum(), sample)[0]
    step = float(timestep) + 1
    low, high = (0.0 if k == 0 else float(ALPHAS_CUMPROD[k - 1].log()) for k in (int(step), min(int(step) + 1, 1000)))
    alpha_bar = torch.tensor(low + (step - int(step)) * (high - low)).exp()
    return noise - scale * (1 - alpha_bar).sqrt() * gradient


@pytest.mark.parametrize("clip", [False, True])
@torch.no_grad()
def test_ddim_trajectory_by_hand(clip):
    pipe, _ = adm()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=clip)
    latents, labels = torch.randn(2, 3, 16, 16), torch.tensor([7, 1])
    images = pipe(
        class_labels=[7, 1], guidance_scale=20.0, num_inference_steps=4, latents=latents, output_type="latent"
    )

    x = latents
    for t in (750, 500, 250, 0):
        noise = guided_noise(pipe, x, torch.tensor(t), labels, 20.0)
        now = ALPHAS_CUMPROD[t].float()
        before = ALPHAS_CUMPROD[t - 250].float() if t else torch.tensor(1.0)
        data = (x - (1 - now).sqrt() * noise) / now.sqrt()
        data = data.clamp(-1, 1) if clip else data
        x = before.sqrt() * data + (1 - before).sqrt() * noise
    assert distance(images.images, x) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        DPMSolverMultistepScheduler.from_config,
        UniPCMultistepScheduler.from_config,
        EulerDiscreteScheduler.from_config,  # scales the state before the networks see it
        lambda config: LD3Scheduler.from_config(config, solver="dpmpp"),  # tells the networks fractional times
    ],
)
@torch.no_grad()
def test_trajectories_of_other_schedulers(make):
    pipe, _ = adm()
    config = pipe.scheduler.config
    pipe.scheduler = make(config)
    latents, labels = torch.randn(1, 3, 16, 16), torch.tensor([7])
    images = pipe(class_labels=7, guidance_scale=20.0, num_inference_steps=5, latents=latents, output_type="latent")

    scheduler = make(config)
    scheduler.set_timesteps(5)
    x = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = guided_noise(pipe, scheduler.scale_model_input(x, t), t, labels, 20.0)
        x = scheduler.step(noise, t, x).prev_sample
    assert distance(images.images, x) < 1e-4
    unguided = pipe(class_labels=7, guidance_scale=0, num_inference_steps=5, latents=latents, output_type="latent")
    assert distance(unguided.images, x) > 1e-2


@torch.no_grad()
def test_noise_path_follows_the_scheduler_unless_it_is_set():
    pipe, _ = adm()
    pipe.scheduler = LD3Scheduler(noise_path="vp_linear")
    given = torch.randn(1, 3, 16, 16), torch.tensor(300.5), torch.tensor([7])
    unguided, followed = pipe.predict_noise(*given, 0.0), pipe.predict_noise(*given, 20.0)
    t = 300.5 / 999
    sigma = (1 - torch.exp(torch.tensor(-0.5 * 19.9 * t**2 - 0.1 * t))).sqrt()
    assert distance(followed, unguided - 20.0 * sigma * pipe.classifier.guidance(*given)) < 1e-6
    fixed = ADMPipeline(pipe.unet, pipe.scheduler, pipe.classifier, noise_path="vp_discrete")
    assert distance(fixed.predict_noise(*given, 20.0), guided_noise(pipe, *given, 20.0)) < 1e-6
    pipe.scheduler = LD3Scheduler(noise_path="vp_cosine")
    with pytest.raises(ValueError, match="no noise path 'vp_cosine'"):
        pipe.predict_noise(*given, 20.0)


def test_a_batch_is_a_batch_of_ones_and_starts_from_generators_or_latents():
    pipe, call = adm()
    call = {"guidance_scale": 20.0, "num_inference_steps": 3, "output_type": "pt"}
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    batch = pipe(class_labels=[7, 1], generator=seeds, **call).images
    for i, label in enumerate((7, 1)):
        noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(i))
        (alone,) = pipe(class_labels=label, latents=noise, return_dict=False, **call)
        assert torch.allclose(batch[i : i + 1], alone, atol=1e-4)
    images = pipe(batch_size=3, class_labels=7, **{**call, "output_type": "pil"}).images
    assert len(images) == 3 and images[0].size == (16, 16)


def test_stochastic_schedulers_draw_from_the_generator():
    pipe, _ = adm()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_large")
    call = {"class_labels": 7, "num_inference_steps": 3, "output_type": "latent"}
    first, second = (pipe(generator=torch.Generator().manual_seed(4), **call).images for _ in range(2))
    assert torch.equal(first, second)


def test_half_precision():
    pipe, call = adm()
    noise = torch.randn(1, 3, 16, 16)
    expected = pipe(**{**call, "latents": noise, "output_type": "latent"}).images
    pipe.to(torch.bfloat16)
    images = pipe(**{**call, "latents": noise, "output_type": "latent"}).images
    assert images.dtype == torch.bfloat16
    assert distance(images.float(), expected) < 0.05


@torch.no_grad()
def test_consistency_teachers_sample_in_the_edm_pipeline():
    """One step of Euler to noise 0 is D(x; 80), which the network is told as 250 ln 80."""
    unet = consistency_unet(parameters("cm_unet_uncond"), **OPTIONS["cm_unet_uncond"])
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    pipe = EDMPipeline(unet, scheduler, timestep_scale=1000.0)
    pipe.set_progress_bar_config(disable=True)
    noise, variance = torch.randn(2, 3, 16, 16), torch.tensor(80.0**2 + 0.25)
    images = pipe(num_inference_steps=1, latents=noise, output_type="latent").images
    x = noise * scheduler.init_noise_sigma
    network = unet(x / variance.sqrt(), 250 * torch.tensor(80.0).log()).sample
    assert distance(images, 0.25 / variance * x + 0.5 * 80 / variance.sqrt() * network) < 1e-4


# ---------------------------------------------------------------------- files and refusals


def test_networks_are_saved_and_loaded(tmp_path):
    pipe, call = adm()
    for name in ("unet", "classifier"):
        getattr(pipe, name).save_pretrained(tmp_path / name)
    unet = ADMUNet2DModel.from_pretrained(tmp_path / "unet")
    classifier = ADMClassifier.from_pretrained(tmp_path / "classifier")
    noise = torch.randn(1, 3, 16, 16)
    expected = pipe(**call, latents=noise).images
    loaded = ADMPipeline(unet, pipe.scheduler, classifier)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(**call, latents=noise).images, expected)


def test_unconditional_networks():
    pipe, _ = adm()
    pipe.unet = ADMUNet2DModel.from_config(pipe.unet.config, num_class_embeds=None).eval()
    call = {"num_inference_steps": 2, "latents": torch.randn(1, 3, 16, 16), "output_type": "latent"}
    guided = pipe(class_labels=7, guidance_scale=20.0, **call).images
    unguided = pipe(guidance_scale=0, **call).images
    assert distance(guided, unguided) > 1e-3
    with pytest.raises(ValueError, match="give class_labels, 0 to 9, or guidance_scale=0"):
        pipe(**call)
    pipe.classifier = None
    assert torch.equal(pipe(**call).images, unguided)
    with pytest.raises(ValueError, match="drop class_labels"):
        pipe(class_labels=7, **call)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, f"give class_labels, 0 to {CLASSES - 1}$"),
        ({"class_labels": CLASSES}, f"from 0 to {CLASSES - 1}, got"),
        ({"class_labels": [-1]}, "must be integers"),
        ({"class_labels": [0.5]}, "must be integers"),
        ({"class_labels": [1, 2], "batch_size": 3}, "2 class_labels are given for 3 images"),
        ({"class_labels": 1, "latents": torch.zeros(1, 3, 8, 8)}, "this call samples"),
        ({"class_labels": 1, "latents": torch.zeros(2, 3, 16, 16), "batch_size": 1}, "this call samples"),
    ],
)
def test_refuses_calls(arguments, message):
    pipe, _ = adm()
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_refuses_what_guidance_cannot_serve():
    pipe, _ = adm()
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="'epsilon'"):
        pipe(class_labels=1)
    with pytest.raises(ValueError, match="unknown noise_path"):
        ADMPipeline(pipe.unet, pipe.scheduler, noise_path="ve")
    with pytest.raises(ValueError, match="needs a classifier"):
        ADMPipeline(pipe.unet, DDIMScheduler())(class_labels=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="unknown pool"):
        float64_classifier(pool="max")
    with pytest.raises(ValueError, match="exclude each other"):
        ADMUNet2DModel(num_attention_heads=2, attention_head_dim=8)
    with pytest.raises(ValueError, match="3 heads do not divide 32"):
        ADMUNet2DModel(num_attention_heads=3, block_out_channels=(32,) * 4)
