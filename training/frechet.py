# SPDX-License-Identifier: Apache-2.0
r"""The Frechet distance between two sets of features, seen as Gaussians (Heusel et al., arXiv:1706.08500), and its bootstrap.

    d^2 = |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^{1/2})

Means m and covariances C (unbiased) are float64 and gathered in one pass over the features, in memory O(d^2). The last trace
is taken from the symmetric C_1^{1/2} C_2 C_1^{1/2}, which has the eigenvalues of C_1 C_2 and none that is negative but by
rounding.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Features


RESAMPLING_MEMORY = 2**28  # bytes for the covariances of resamples that share one pass over the features
NOT_FINITE = "some features are not finite; look at the images, or for half precision in the network"


@dataclass(frozen=True)
class Scatter:
    """Running sums that merge exactly (Chan, Golub & LeVeque 1979): count, mean (d,), scatter (d, d) about it; float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Scatter":
        """Of features (k, d)."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merged(self, other: "Scatter") -> "Scatter":
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Scatter(count, mean, self.scatter + other.scatter + between)

    def moments(self) -> "Moments":
        """Raises a `ValueError` for fewer than two rows, or rows that are not finite."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}; give more")
        if not bool(self.scatter.isfinite().all()):
            raise ValueError(NOT_FINITE)
        return Moments(self.count, self.mean, self.scatter / (self.count - 1))


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d), float64, of `count` feature vectors; a count that is not known is None."""

    count: int | None
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, chunks: Iterable[Tensor]) -> "Moments":
        """Of features that come in chunks (k, d).

        Raises:
            ValueError: for fewer than two rows, or rows that are not finite.
        """
        total = None
        for chunk in chunks:
            if len(chunk):
                part = Scatter.of(chunk)
                total = part if total is None else total.merged(part)
        if total is None:
            raise ValueError("a covariance needs at least 2 images, got none; give more")
        return total.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Frechet distance of two sets, squared as is usual; 0 for equal moments.

    Raises:
        ValueError: if a side is known to be of no more samples than features, or the dimensions differ.
    """
    for side in (a, b):
        check_count(side.count, len(side.mean))
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared; use one feature network for both"
        )
    return _distance(a.mean, a.covariance, b, _root(b.covariance))


def check_count(count: int | None, dim: int) -> None:
    """Raises a `ValueError` where covariances are singular for want of samples."""
    if count is not None and count <= dim:
        raise ValueError(
            f"the Frechet distance is undefined with fewer samples than features: {count} <= {dim}; use kid, or at least "
            f"{dim + 1} samples"
        )


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _distance(mean: Tensor, covariance: Tensor, reference: Moments, root: Tensor) -> float:
    trace_root = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    shift = (mean - reference.mean).square().sum()
    # Never negative but by rounding.
    return max(0.0, float(shift + covariance.trace() + reference.covariance.trace() - 2 * trace_root))


# ---------------------------------------------------------------------- bootstrap


def resampling_counts(resamples: int, count: int, seed: int) -> Iterator[Tensor]:
    """How often each of `count` samples is drawn, (count,) float64, for one resample (with replacement) after the other.

    They depend on nothing else, so that contenders on the same starting noises are resampled alike.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield torch.randint(count, (count,), generator=generator).bincount(minlength=count).double()


def resampled_frechet(features: Features, reference: Moments, resamples: int, seed: int) -> Tensor:
    """(resamples,) float64: distances of bootstrap resamples of the features from a reference that is held fixed.

    A resample has fewer distinct samples than the set, so that each lies above the set's own distance by about as much as that is
    biased: read spreads and, between contenders on the same seeds, paired differences from them, no levels.

    Raises:
        ValueError: as [`frechet_distance`].
    """
    count, dim = len(features), len(reference.mean)
    check_count(count, dim)
    root = _root(reference.covariance)
    # Sums about a point near every resample's mean lose no digits.
    centre = sum(chunk.double().sum(0) for chunk in features.chunks()) / count
    if not bool(centre.isfinite().all()):
        raise ValueError(NOT_FINITE)
    at_once = max(1, RESAMPLING_MEMORY // (8 * dim * dim))
    weights = resampling_counts(resamples, count, seed)
    distances = []
    while len(distances) < resamples:
        block = torch.stack([next(weights) for _ in range(min(at_once, resamples - len(distances)))])
        first = torch.zeros(len(block), dim, dtype=torch.float64)
        second = torch.zeros(len(block), dim, dim, dtype=torch.float64)
        start = 0
        for chunk in features.chunks():
            centred = chunk.double() - centre
            drawn = block[:, start : start + len(chunk)]
            first += drawn @ centred
            for k, times in enumerate(drawn):
                second[k].addmm_(centred.T * times, centred)
            start += len(chunk)
        for shift, square in zip(first / count, second):
            covariance = (square - count * torch.outer(shift, shift)) / (count - 1)
            distances.append(_distance(centre + shift, covariance, reference, root))
    return torch.tensor(distances, dtype=torch.float64)
