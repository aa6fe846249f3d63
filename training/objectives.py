# SPDX-License-Identifier: Apache-2.0
r"""What a learner minimises: the distance of a student's end point from the teacher's.

An objective is a callable `(end, target) -> losses`, both (B, ...) end points and (B,) losses, one a sample; the learner
averages them. In latent space the end points are compared as they are, in pixel space after decoding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .stlpips import ShiftTolerantLPIPS, enlarge, three_channels


Objective = Callable[[Tensor, Tensor], Tensor]

LOSSES = ("l1", "l2", "huber", "lpips", "stlpips")
PERCEPTUAL = ("lpips", "stlpips")
LOSS_SPACES = ("latent", "pixel")


def l1(end: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (end - target).abs().flatten(1).mean(1)


def l2(end: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference.

    LD3 divides the sum by C r^2 of the *latents* also where it compares decoded images, which is this times a constant
    (the ratio of both sizes, 48 for Stable Diffusion); learning with Adam or RMSprop is the same.
    """
    return ((end - target) ** 2).flatten(1).mean(1)


@dataclass(frozen=True)
class Huber:
    r"""$\sqrt{d^2 + c^2} - c$ (pseudo-Huber), $d$ the root of the mean squared difference: L2 for close pairs, and far ones,
    such as those whose image has flipped to another mode, pull no harder than in L1."""

    c: float = 0.03

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        return (l2(end, target) + self.c**2).sqrt() - self.c


class LPIPS:
    """LPIPS (Zhang et al., arXiv:1801.03924) by the package `lpips`, on images in [-1, 1].

    Args:
        net: "vgg", as LD3 uses, or "alex".
        smallest_side: smaller images are enlarged to it; LD3 resizes nothing (0), but AlexNet needs 64.
        options: passed to `lpips.LPIPS`.

    Raises:
        ImportError: without the package.
        ValueError: if its weights cannot be downloaded.
    """

    def __init__(self, net: str = "vgg", smallest_side: int | None = None, **options):
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                "the loss 'lpips' needs the packages lpips and torchvision and downloads their weights; install "
                "them as training/README.md says, or use the loss 'stlpips', whose weights come in a package"
            ) from error
        self.smallest_side = {"alex": 64}.get(net, 0) if smallest_side is None else smallest_side
        try:
            network = lpips.LPIPS(net=net, verbose=False, **options)
        except OSError as error:
            raise ValueError(
                f"the weights of LPIPS could not be downloaded ({error}); connect, or use the loss 'stlpips'"
            ) from error
        self.network = network.eval().requires_grad_(False)

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        self.network.to(end.device)
        end, target = (enlarge(three_channels(images.float()), self.smallest_side) for images in (end, target))
        return self.network(end, target).flatten()


class _ShiftTolerant:
    def __init__(self):
        self.network = ShiftTolerantLPIPS()

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        return self.network.to(end.device)(end, target)


@dataclass(frozen=True)
class Decoded:
    """A distance of decoded images; `decode` maps latents to pixels in [-1, 1]."""

    distance: Objective
    decode: Callable[[Tensor], Tensor]

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.decode(target)
        return self.distance(self.decode(end), target)


def make_distance(loss: str, loss_space: str, lpips_net: str = "vgg") -> Objective:
    """The distance of that name, without decoding.

    Raises:
        ValueError: for an unknown name, or a perceptual loss on latents.
        ImportError: for a loss whose package is missing.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; use one of {', '.join(LOSSES)}")
    if loss_space not in LOSS_SPACES:
        raise ValueError(f"unknown loss_space {loss_space!r}; use 'latent' or 'pixel'")
    if loss in PERCEPTUAL and loss_space == "latent":
        raise ValueError(f"the loss {loss!r} compares images; use loss_space='pixel', or 'l1' or 'l2' on latents")
    makers = {
        "l1": lambda: l1,
        "l2": lambda: l2,
        "huber": Huber,
        "stlpips": _ShiftTolerant,
        "lpips": lambda: LPIPS(lpips_net),
    }
    return makers[loss]()


def make_objective(
    loss: str,
    *,
    loss_space: str = "latent",
    decode: Callable[[Tensor], Tensor] | None = None,
    lpips_net: str = "vgg",
) -> Objective:
    """The objective of that name.

    Args:
        loss: one of `LOSSES`.
        loss_space: "latent" compares end points as they are, "pixel" decodes them first.
        decode: needed for "pixel".
        lpips_net: "vgg" or "alex".

    Raises:
        ValueError, ImportError: as [`make_distance`], and for "pixel" without a decoder.
    """
    distance = make_distance(loss, loss_space, lpips_net)
    if loss_space == "latent":
        return distance
    if decode is None:
        raise ValueError("loss_space='pixel' needs a decoder; use loss_space='latent' for models without one")
    return Decoded(distance, decode)
