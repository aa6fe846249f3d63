# SPDX-License-Identifier: Apache-2.0
"""LPIPS, in the environment that has it (`make test-lpips`): random trunk weights, because the real ones are downloaded."""

import pytest
import torch


lpips = pytest.importorskip("lpips", reason="lpips is installed by `make test-lpips` only")


def test_lpips_runs_beside_diffusers_and_has_a_gradient():
    from diffusers import UNet2DModel  # noqa: F401  its import fails where torchvision's does

    torch.manual_seed(0)
    distance = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    image, other = torch.rand(2, 1, 3, 64, 64).mul(2).sub(1)
    image.requires_grad_()

    assert distance(image, image).item() == 0.0
    distance(image, other).backward()
    assert image.grad.abs().max() > 0

    # it goes downhill along its gradient
    with torch.no_grad():
        step = 1e-2 * image.grad / image.grad.abs().max()
        assert distance(image - step, other) < distance(image, other)
