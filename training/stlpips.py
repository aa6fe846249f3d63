# SPDX-License-Identifier: Apache-2.0
"""Shift-tolerant LPIPS on AlexNet (Ghildyal & Liu, ECCV 2022, arXiv:2207.13686), from the weights of `stlpips_pytorch`.

The package is found, not imported: importing it asks for torchvision, and part of its code is licensed for non-commercial
use. Its weights are under BSD-2.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


SMALLEST_SIDE = 64  # below, the ranking of distortions is distorted: enlarge first


def weights_file() -> Path:
    """Where the weights lie. Raises an `ImportError` without the package."""
    spec = importlib.util.find_spec("stlpips_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the loss 'stlpips' needs weights; install them with `pip install --no-deps stlpips_pytorch`"
        )
    return Path(next(iter(spec.submodule_search_locations)), "weights", "vST0.0", "alex_shift_tolerant.pth")


class ShiftTolerantLPIPS(torch.nn.Module):
    r"""Per-sample distance of images in [-1, 1].

    $d = \sum_l \mathrm{mean}_{hw} \sum_c w_{lc} (\hat f_{lc} - \hat g_{lc})^2$ with the features f, g of both images after each of
    five convolutions, scaled to unit length over channels. Subsampling is by a 3 x 3 blur at stride 2 on features that are
    extended by 2 reflected pixels. Images with a side below 64 are enlarged to it first, grey ones repeated.

    Args:
        state: the state dict of `alex_shift_tolerant.pth`; read from the installed package if None.
    """

    def __init__(self, state: dict[str, Tensor] | None = None):
        super().__init__()
        state = torch.load(weights_file(), map_location="cpu", weights_only=True) if state is None else state
        for name, value in state.items():
            self.register_buffer(name.replace(".", "_"), value.float())

    def features(self, images: Tensor) -> list[Tensor]:
        def convolve(x, layer, padding):
            return F.conv2d(
                x, getattr(self, f"net_{layer}_weight"), getattr(self, f"net_{layer}_bias"), padding=padding
            )

        def blur(x, layer):
            kernel = getattr(self, f"net_{layer}_filt")
            return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])

        x = (images - self.scaling_layer_shift) / self.scaling_layer_scale
        x = blur(convolve(x, "slice1_0", 2), "slice1_1").relu()
        found = [x]
        x = convolve(blur(F.max_pool2d(x, 3, 1), "slice2_4"), "slice2_5", 2).relu()
        found.append(x)
        x = convolve(blur(F.max_pool2d(x, 3, 1), "slice3_8"), "slice3_9", 1).relu()
        found.append(x)
        for layer in ("slice4_11", "slice5_13"):
            x = convolve(x, layer, 1).relu()
            found.append(x)
        return found

    def embedded(self, images: Tensor) -> Tensor:
        """(B, R) vectors, the mean of whose squared difference is the distance: $\\sqrt{R w_{lc}/hw}\\,\\hat f_{lchw}$."""
        parts = []
        for layer, f in enumerate(self.features(enlarge(three_channels(images.float()), SMALLEST_SIDE))):
            f = f / ((f**2).sum(1, keepdim=True).sqrt() + 1e-10)
            weight = getattr(self, f"lin{layer}_model_1_weight") / (f.shape[2] * f.shape[3])
            parts.append((weight.sqrt() * f).flatten(1))
        together = torch.cat(parts, 1)
        return together * together.shape[1] ** 0.5

    def forward(self, end: Tensor, target: Tensor) -> Tensor:
        return ((self.embedded(end) - self.embedded(target)) ** 2).mean(1)


def three_channels(images: Tensor) -> Tensor:
    """(B, 3, H, W) from grey or colour images; raises a `ValueError` for anything else."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"a perceptual loss needs images of 1 or 3 channels, got {tuple(images.shape)}; use loss_space='pixel', or a loss "
            "that does not look at images such as 'l2'"
        )
    return images.expand(-1, 3, -1, -1)


def enlarge(images: Tensor, side: int) -> Tensor:
    """Bilinear, so that the smaller side is at least `side`."""
    smaller = min(images.shape[-2:])
    if smaller >= side:
        return images
    size = [round(length * side / smaller) for length in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
