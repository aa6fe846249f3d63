# SPDX-License-Identifier: Apache-2.0
r"""The Frechet distance between two sets of features, seen as Gaussians (Heusel et al., arXiv:1706.08500).

    d^2 = |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^{1/2})

Means m and covariances C (unbiased) are float64 and gathered in one pass over the features, in memory O(d^2). The last trace
is taken from the symmetric C_1^{1/2} C_2 C_1^{1/2}, which has the eigenvalues of C_1 C_2 and none that is negative but by
rounding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .features import Features


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

    @cached_property
    def root(self) -> Tensor:
        """(d, d) symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


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
    trace_root = torch.linalg.eigvalsh(b.root @ a.covariance @ b.root).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    # Never negative but by rounding.
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * trace_root))


def check_count(count: int | None, dim: int) -> None:
    """Raises a `ValueError` where covariances are singular for want of samples."""
    if count is not None and count <= dim:
        raise ValueError(
            f"the Frechet distance is undefined with fewer samples than features: {count} <= {dim}; use kid, or at least "
            f"{dim + 1} samples"
        )


# ---------------------------------------------------------------------- how much each sample decides


def frechet_influence(features: Features, reference: Moments) -> Tensor:
    r"""(n,) float64, of mean 0: drawing sample i $w_i$ times moves the distance by $\frac1n \sum_i w_i h_i$ to first order.

        h_i = 2 (m - m_r).z_i + (z_i^T G z_i - E z^T G z) n / (n - 1),    z_i = x_i - m,    G = 1 - R (R C R)^{-1/2} R,    R = C_r^{1/2}

    The reference, with the index r, is held fixed. G is the derivative of the distance in C (Bhatia, Jain & Lim,
    arXiv:1712.01504). Bootstrap resamples would cost a covariance and its eigenvalues each, and have fewer distinct samples,
    which lifts every one of them by about as much as the distance is biased.

    Raises:
        ValueError: as [`frechet_distance`].
    """
    own, dim = Moments.of(features.chunks()), len(reference.mean)
    check_count(own.count, dim)
    values, vectors = torch.linalg.eigh(reference.root @ own.covariance @ reference.root)
    # A direction that one side does not vary in moves nothing.
    kept = values > dim * torch.finfo(torch.float64).eps * values[-1]
    half = reference.root @ vectors[:, kept] * values[kept] ** -0.25
    parts, unbiased = [], own.count / (own.count - 1)
    for chunk in features.chunks():
        z = chunk.double() - own.mean
        quadratic = z.square().sum(1) - (z @ half).square().sum(1)
        parts.append(2 * z @ (own.mean - reference.mean) + unbiased * quadratic)
    influence = torch.cat(parts)
    return influence - influence.mean()
