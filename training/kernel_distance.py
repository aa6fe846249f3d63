# SPDX-License-Identifier: Apache-2.0
r"""Maximum mean discrepancies between a set of features and a reference: KID and CMMD.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

KID (Binkowski et al., arXiv:1801.01401): k(x, y) = (x.y / d + 1)^3, the unbiased estimate, averaged over random subsets. CMMD
(Jayasumana et al., arXiv:2401.09603): CLIP embeddings of unit length, k(x, y) = exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10,
the estimate with all pairs, times 1000. Neither supposes a Gaussian, and KID may be used with few samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.kid import poly_kernel, poly_mmd

from .features import Features, StoredFeatures


SUBSETS = 100
SUBSET_SIZE = 1000
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
INNER_SAMPLES = 1000  # over which the means inside the influence function are taken


# ---------------------------------------------------------------------- KID


def kernel_inception_distances(
    features: Features, reference: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> Tensor:
    """(subsets,) float64: the unbiased estimate on each pair of random subsets. Their mean is KID.

    Only the rows of one subset are read at a time. Subsets have `subset_size` rows, or as many as both sides have; they depend on
    `seed` and the two lengths alone.

    Args:
        reference: (m, d) features.

    Raises:
        ValueError: for fewer than two samples on a side.
    """
    size = min(subset_size, len(features), len(reference))
    if size < 2:
        raise ValueError("KID needs at least 2 images on both sides; give more")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        real = reference[torch.randperm(len(reference), generator=generator)[:size]]
        own = features.select(torch.randperm(len(features), generator=generator)[:size].tolist())
        values.append(poly_mmd(real.double(), own.double()))
    return torch.stack(values)


# ---------------------------------------------------------------------- CMMD


def cmmd_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) Gaussian kernel of embeddings (n, d) and (m, d), scaled to unit length here; float64."""
    cosine = F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T
    return ((cosine - 1) / CMMD_SIGMA**2).exp()


def mean_kernel(kernel: Callable[[Tensor, Tensor], Tensor], a: Features, b: Features) -> float:
    """Mean of `kernel` over all pairs, block by block."""
    total = sum(float(kernel(x, y).sum()) for x in a.chunks() for y in b.chunks())
    return total / (len(a) * len(b))


def cmmd(features: Features, reference: Tensor, reference_term: float | None = None) -> float:
    """CMMD of embeddings from those of the reference, (m, d).

    Args:
        reference_term: the mean kernel within the reference, where it is known already.
    """
    stored = StoredFeatures(reference)
    within = mean_kernel(cmmd_kernel, stored, stored) if reference_term is None else reference_term
    own, across = mean_kernel(cmmd_kernel, features, features), mean_kernel(cmmd_kernel, features, stored)
    return CMMD_SCALE * (own + within - 2 * across)


# ---------------------------------------------------------------------- how much each sample decides


def discrepancy_influence(features: Features, reference: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    r"""(n,) float64, of mean 0: drawing sample i $w_i$ times moves MMD^2 by $\frac1n \sum_i w_i h_i$ to first order.

    $h_i = 2 (E_{x'} k(x_i, x') - E_y k(x_i, y))$ less its mean, with the reference held fixed; both means are taken over at
    most `INNER_SAMPLES` samples. Resamples themselves would count copies of a sample as pairs of different ones, which the
    estimate is not made for.
    """
    generator = torch.Generator().manual_seed(0)
    own = features.select(torch.randperm(len(features), generator=generator)[:INNER_SAMPLES].sort().values.tolist())
    real = reference[torch.randperm(len(reference), generator=generator)[:INNER_SAMPLES]]
    influence = torch.cat([2 * (kernel(x, own).mean(1) - kernel(x, real).mean(1)) for x in features.chunks()]).double()
    return influence - influence.mean()


def kid_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) polynomial kernel of features (n, d) and (m, d); float64."""
    return poly_kernel(x.double(), y.double())
