# SPDX-License-Identifier: Apache-2.0
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from training.decoding import decode
from training.objectives import Decoded, Distance, decoded, huber, l1, l2, make_distance, mean_square, shift_tolerant
from training.stlpips import ShiftTolerantLPIPS, enlarge


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("stlpips_pytorch") is None, reason="the weights of stlpips_pytorch are not installed"
)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_distances_are_what_they_say_for_each_sample():
    end = torch.zeros(2, 3, 2, 2)
    target = torch.stack([torch.full((3, 2, 2), 3.0), torch.tensor([[1.0, 0], [0, 0]]).expand(3, 2, 2)])
    torch.testing.assert_close(l1(end, target), torch.tensor([3.0, 0.25]))
    torch.testing.assert_close(l2(end, target), torch.tensor([9.0, 0.25]))
    torch.testing.assert_close(huber(c=4.0)(end, target), torch.tensor([1.0, (0.25 + 16) ** 0.5 - 4]))


def test_l2_is_the_published_sum_over_the_size():
    end, target = random(2, 3, 8, 8, seed=1), random(2, 3, 8, 8, seed=2)
    torch.testing.assert_close(l2(end, target), ((end - target) ** 2).sum((1, 2, 3)) / (3 * 8**2))


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32_and_stays_as_it_is():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, force_upcast=True).requires_grad_(False)
    vae.post_quant_conv.weight.mul_(1e5 / vae.post_quant_conv.weight.abs().max())  # beyond the largest float16
    vae.post_quant_conv.weight.clamp_(-6e4, 6e4)
    half, pipe = vae.half(), SimpleNamespace(vae=vae)
    latents = (3 * random(1, 4, 4, 4)).requires_grad_()
    images = decode(pipe, latents)
    images.square().sum().backward()
    assert images.isfinite().all() and latents.grad.isfinite().all() and latents.grad.abs().max() > 0
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}
    with torch.no_grad():
        torch.testing.assert_close(decode(pipe, latents), images)
        vae.register_to_config(force_upcast=False)
        assert not decode(pipe, latents).isfinite().all()
        vae.register_to_config(force_upcast=True)
        torch.testing.assert_close(decode(SimpleNamespace(vae=vae.float()), latents), images)


def test_huber_is_l2_for_close_pairs_and_l1_for_far_ones():
    target = torch.zeros(1, 4)
    near, far = torch.full((1, 4), 1e-4), torch.full((1, 4), 1e3)
    near_and_far = huber(c=0.03)
    torch.testing.assert_close(
        near_and_far(near.double(), target.double()), l2(near, target).double() / 0.06, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(near_and_far(far, target), l1(far, target), rtol=1e-4, atol=0)


def test_pixel_space_decodes_both_and_gives_gradients_to_the_student_alone():
    calls = []

    def decode(latents):
        calls.append(latents.requires_grad)
        return 2 * latents

    end, target = random(2, 4).requires_grad_(), random(2, 4, seed=1).requires_grad_()
    # a distance of features stays one, and anything else that compares images is decoded for
    objectives = (
        decoded(make_distance("l2", "pixel"), decode),
        decoded(lambda end, target: l2(end, target), decode),
    )
    assert [type(objective) for objective in objectives] == [Distance, Decoded]
    for objective in objectives:
        end.grad = None
        losses = objective(end, target)
        torch.testing.assert_close(losses, 4 * l2(end, target))
        losses.sum().backward()
        assert end.grad is not None and target.grad is None


def linear_student(parameters=5, samples=3, seed=0):
    """End points that are linear in some parameters, their Jacobian, and targets."""
    generator = torch.Generator().manual_seed(seed)
    base, target = torch.randn(2, samples, 1, 6, 6, generator=generator, dtype=torch.float64)
    jacobian = torch.randn(parameters, samples, 1, 6, 6, generator=generator, dtype=torch.float64)
    return (lambda theta: base + torch.einsum("p,p...->...", theta, jacobian)), jacobian, target


CURVED = Distance(mean_square, lambda images: torch.tanh(0.3 * images).flatten(1))


@pytest.mark.parametrize("objective", [l2, l1, huber(0.5), CURVED], ids=["l2", "l1", "huber", "features"])
def test_linearised_losses_have_the_gradient_of_the_losses(objective):
    student, jacobian, target = linear_student()
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    losses = objective(student(theta), target)
    (expected,) = torch.autograd.grad(losses.sum(), theta)
    found, gradient, hessian = objective.linearised(student(theta.detach()), target, jacobian)
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=1e-3)  # features change along finite steps
    torch.testing.assert_close(hessian, hessian.T)
    assert torch.linalg.eigvalsh(hessian).min() > 0


def test_features_are_taken_of_no_more_samples_at_once_than_there_are():
    student, jacobian, target = linear_student()
    seen = []

    def features(images):
        seen.append(len(images))
        return torch.tanh(images).flatten(1)

    Distance(mean_square, features).linearised(student(torch.zeros(5, dtype=torch.float64)), target, jacobian)
    assert max(seen) == 3 and sum(seen) == 2 * 3 + 5 * 3


def test_of_a_linear_student_the_second_derivatives_of_l2_are_exact():
    student, jacobian, target = linear_student()
    theta = torch.zeros(5, dtype=torch.float64)
    exact = torch.autograd.functional.hessian(lambda theta: l2(student(theta), target).sum(), theta)
    _, gradient, hessian = l2.linearised(student(theta), target, jacobian)
    torch.testing.assert_close(hessian, exact)
    best = -torch.linalg.solve(hessian, gradient)
    assert l2(student(best), target).sum() < l2(student(1.01 * best), target).sum()


def test_what_stands_in_the_place_of_a_teacher_s_end_point_may_be_anything():
    end, directions = random(2, 1, 4, 4), random(2, 3, seed=3)
    toward = Distance(mean_square, lambda images: images.flatten(1)[:, :3], target_features=lambda target: target)
    torch.testing.assert_close(toward(end, directions), ((end.flatten(1)[:, :3] - directions) ** 2).mean(1))
    behind = decoded(toward, lambda latents: 2 * latents)
    torch.testing.assert_close(behind(end, directions), toward(2 * end, directions))
    _, gradient, _ = toward.linearised(end, directions, torch.ones(1, 2, 1, 4, 4))
    torch.testing.assert_close(
        gradient, (2 * (end.flatten(1)[:, :3] - directions) / 3).sum()[None], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("l3", "latent"), "unknown loss 'l3'"),
        (("l2", "noise"), "unknown loss_space"),
        (("stlpips", "latent"), "compares images"),
        (("lpips", "latent"), "compares images"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_distance(*arguments)


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_a_missing_lpips_is_named_when_it_is_asked_for():
    with pytest.raises(ImportError, match="needs the packages lpips and torchvision"):
        make_distance("lpips", "pixel")


@pytest.fixture(scope="module")
def stlpips():
    return ShiftTolerantLPIPS()


@needs_weights
def test_stlpips_has_its_package_s_values(stlpips):
    # Of the package's own class (AlexNet, shift_tolerant, version 0.0) on the same random images.
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    expected = torch.tensor([0.038261272, 0.038307667, 0.039725728])
    torch.testing.assert_close(stlpips(first, second), expected, rtol=1e-5, atol=1e-7)


@needs_weights
def test_as_a_loss_it_compares_vectors(stlpips):
    first, second = random(2, 1, 32, 32), random(2, 1, 32, 32, seed=1)
    torch.testing.assert_close(shift_tolerant()(first, second), stlpips(first, second))


@needs_weights
def test_stlpips_orders_distortions_and_ignores_small_shifts(stlpips):
    # A picture with structure: a few soft discs.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = torch.sigmoid(20 * (0.4 - (x**2 + y**2).sqrt()))
    other = torch.sigmoid(20 * (0.3 - ((x - 0.3) ** 2 + (y + 0.4) ** 2).sqrt()))
    image = torch.stack([disc, other, disc * other])[None] * 2 - 1
    distance = {
        "same": image,
        "faint noise": image + 0.02 * random(*image.shape, seed=3),
        "noise": image + 0.3 * random(*image.shape, seed=3),
        "shift": image.roll(1, -1),
        "blur": F.avg_pool2d(image, 9, 1, 4),
    }
    distance = {name: float(stlpips(image, changed)) for name, changed in distance.items()}
    assert distance["same"] == 0
    assert distance["shift"] < distance["blur"]
    assert 0 < distance["faint noise"] < distance["noise"]


@needs_weights
def test_stlpips_is_symmetric_per_sample_and_differentiable(stlpips):
    first, second = random(2, 3, 64, 64, seed=1), random(2, 3, 64, 64, seed=2)
    together = stlpips(first, second)
    torch.testing.assert_close(together, stlpips(second, first))
    torch.testing.assert_close(together[1:], stlpips(first[1:], second[1:]))
    first.requires_grad_()
    stlpips(first, second).sum().backward()
    step = 1e-3 * first.grad / first.grad.norm()
    with torch.no_grad():
        fallen = stlpips(first - step, second).sum() - together.sum()
        torch.testing.assert_close(fallen, -1e-3 * first.grad.norm(), rtol=0.1, atol=1e-7)


@needs_weights
def test_small_and_grey_images_are_enlarged_and_repeated(stlpips):
    grey, other = random(1, 1, 32, 32, seed=1), random(1, 1, 32, 32, seed=2)
    large = [enlarge(image, 64).expand(-1, 3, -1, -1) for image in (grey, other)]
    assert large[0].shape == (1, 3, 64, 64)
    torch.testing.assert_close(stlpips(grey, other), stlpips(*large))
    assert enlarge(random(1, 3, 16, 32), 64).shape == (1, 3, 64, 128)
    assert enlarge(random(1, 3, 80, 96), 64).shape == (1, 3, 80, 96)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        stlpips(random(1, 4, 64, 64), random(1, 4, 64, 64))
