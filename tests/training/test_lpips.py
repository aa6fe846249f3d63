# SPDX-License-Identifier: Apache-2.0
"""LPIPS, in the environment that has it (`make test-lpips`): random trunk weights, because the real ones are downloaded."""

import pytest
import torch

from training.objectives import LPIPS


lpips = pytest.importorskip("lpips", reason="lpips is installed by `make test-lpips` only")


def test_adapter_is_lpips_sample_by_sample_and_has_a_gradient():
    from diffusers import UNet2DModel  # noqa: F401  its import fails where torchvision's does

    torch.manual_seed(0)
    distance = LPIPS(net="alex", pnet_rand=True)
    image, other = torch.rand(2, 3, 3, 64, 64).mul(2).sub(1)
    losses = distance(image.requires_grad_(), other)

    assert torch.equal(distance(image, image), torch.zeros(3))
    assert torch.allclose(losses, distance.network(image, other).flatten())
    losses.sum().backward()
    with torch.no_grad():  # it goes downhill along its gradient
        step = 1e-2 * image.grad / image.grad.abs().amax((1, 2, 3), keepdim=True)
        assert bool((distance(image - step, other) < losses).all())
