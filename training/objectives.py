# SPDX-License-Identifier: Apache-2.0
r"""What a learner minimises: the distance of a student's end point from the teacher's.

An objective is a callable `(end, target) -> losses`, both (B, ...) end points and (B,) losses, one a sample; the learner
averages them. In latent space the end points are compared as they are, in pixel space after decoding.

The recipes "adam" and "published" differentiate any such callable. The default one wants to know what is compared, a
[`Distance`]: a penalty of the difference of features. To add one, give it features, a function from end points to (B, R) vectors;
what stands in the place of the teacher's end point may be anything, if `target_features` makes such a vector of it. See
`examples/clip_objective.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .stlpips import ShiftTolerantLPIPS, enlarge, three_channels


Objective = Callable[[Tensor, Tensor], Tensor]
Features = Callable[[Tensor], Tensor]
# of (B, R) differences: (B,) losses, and weights w, of their shape or (B, 1), with d loss / d difference = 2 w difference / R
Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]

LOSSES = ("l1", "l2", "huber", "lpips", "stlpips")
PERCEPTUAL = ("lpips", "stlpips")
LOSS_SPACES = ("latent", "pixel")
SMALLEST_DIFFERENCE = 1e-3  # below, the weights of L1 grow no more
CHANGE = 1e-2  # of an end point along which features are differentiated, relative to its size


def mean_square(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared difference.

    LD3 divides the sum by C r^2 of the *latents* also where it compares decoded images, which is this times a constant
    (the ratio of both sizes, 48 for Stable Diffusion); learning with Adam or RMSprop is the same.
    """
    return (difference**2).mean(1), torch.ones_like(difference[:, :1])


def mean_absolute(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute difference."""
    return difference.abs().mean(1), 0.5 / difference.detach().abs().clamp(min=SMALLEST_DIFFERENCE)


@dataclass(frozen=True)
class PseudoHuber:
    r"""$\sqrt{d^2 + c^2} - c$, $d$ the root of the mean squared difference: L2 for close pairs, and far ones, such as those whose
    image has flipped to another mode, pull no harder than in L1."""

    c: float = 0.03

    def __call__(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        root = ((difference**2).mean(1) + self.c**2).sqrt()
        return root - self.c, 0.5 / root.detach()[:, None]


def entries(end: Tensor) -> Tensor:
    """(B, R): an end point as it is."""
    return end.flatten(1)


@dataclass(frozen=True)
class Distance:
    """A penalty of the difference of features.

    Attributes:
        penalty: of differences.
        features: (B, ...) end points -> (B, R).
        target_features: the same of targets; None: `features`.
    """

    penalty: Penalty = mean_square
    features: Features = entries
    target_features: Features | None = None

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        return self.penalty(self.features(end) - self._of_target(target))[0]

    def _of_target(self, target: Tensor) -> Tensor:
        with torch.no_grad():
            return (self.target_features or self.features)(target)

    @torch.no_grad()
    def linearised(self, end: Tensor, target: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) losses, (P,) gradient and (P, P) Gauss-Newton second derivatives of their sum.

        Args:
            jacobian: (P, B, ...) derivatives of the end points.
        """
        features = self.features(end)
        difference = features - self._of_target(target)
        losses, weights = self.penalty(difference)
        weights = 2 / difference.shape[1] * weights
        count = len(jacobian)
        gradient, hessian = difference.new_zeros(count), difference.new_zeros(count, count)
        # Sample by sample: features may be a thousand times as many as an end point's entries.
        for k in range(len(end)):
            parts = jacobian[:, k].split(len(end))
            of_features = torch.cat([self._along(part, end[k], features[k]) for part in parts])
            weighted = of_features * weights[k]
            gradient += weighted @ difference[k]
            hessian += weighted @ of_features.T
        return losses, gradient, hessian

    def _along(self, directions: Tensor, end: Tensor, features: Tensor) -> Tensor:
        """(n, R) derivatives of one sample's features along (n, ...) directions, from finite changes."""
        if self.features is entries:
            return entries(directions)
        sizes = directions.flatten(1).norm(dim=1)
        steps = CHANGE * end.norm() / sizes.clamp(min=1e-30)
        moved = end + steps.view(-1, *[1] * end.ndim) * directions
        change = (self.features(moved) - features) / steps[:, None]
        return torch.where(sizes[:, None] > 0, change, torch.zeros_like(change))


l1 = Distance(mean_absolute)
l2 = Distance(mean_square)


def huber(c: float = 0.03) -> Distance:
    """[`PseudoHuber`] of the end points."""
    return Distance(PseudoHuber(c))


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


def shift_tolerant() -> Distance:
    """Shift-tolerant LPIPS, see [`ShiftTolerantLPIPS`]."""
    network = ShiftTolerantLPIPS()
    return Distance(mean_square, lambda images: network.to(images.device).embedded(images))


@dataclass(frozen=True)
class Decoded:
    """A distance of decoded images that is no [`Distance`]; `decode` maps latents to pixels in [-1, 1]."""

    distance: Objective
    decode: Callable[[Tensor], Tensor]

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.decode(target)
        return self.distance(self.decode(end), target)


def decoded(distance: Objective, decode: Callable[[Tensor], Tensor]) -> Objective:
    """The distance of decoded images; `decode` maps latents to pixels in [-1, 1]."""
    if not isinstance(distance, Distance):
        return Decoded(distance, decode)
    features, of_target = distance.features, distance.target_features
    return replace(distance, features=lambda end: features(decode(end)), target_features=of_target)


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
        "huber": huber,
        "stlpips": shift_tolerant,
        "lpips": lambda: LPIPS(lpips_net),
    }
    return makers[loss]()
