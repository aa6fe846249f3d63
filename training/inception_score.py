# SPDX-License-Identifier: Apache-2.0
r"""The Inception score (Salimans et al., arXiv:1606.03498): exp E KL(p(y | x) || p(y)), averaged over random splits."""

import torch
from torch import Tensor

from .features import Features


SPLITS = 10


def inception_score(logits: Features, *, splits: int = SPLITS, seed: int = 0) -> float:
    """The score, by one pass over the logits: KL averages to E sum p log p - sum m log m with m = E p.

    Splits are cut from a random order, because samples often come sorted by class.

    Raises:
        ValueError: for fewer samples than splits.
    """
    _, _, mean_p, entropies = _splits(logits, splits, seed)
    return float(_divergence(mean_p, entropies).exp().mean())


def inception_score_influence(logits: Features, *, splits: int = SPLITS, seed: int = 0) -> Tensor:
    r"""(n,) float64, of mean 0: drawing sample i $w_i$ times moves the score by $\frac1n \sum_i w_i h_i$ to first order.

    In a split of k of the n samples, $h_i = \frac{n}{k S} e^D (KL(p_i || m) - D)$, with S splits and D the mean of KL.
    """
    split_of, members, mean_p, entropies = _splits(logits, splits, seed)
    divergence = _divergence(mean_p, entropies)
    slope = len(logits) / len(members) * divergence.exp() / members
    parts, start = [], 0
    for chunk in logits.chunks():
        mine = split_of[start : start + len(chunk)]
        log_p = chunk.double().log_softmax(1)
        own = (log_p.exp() * log_p).sum(1) - torch.xlogy(log_p.exp(), mean_p[mine]).sum(1)
        parts.append(slope[mine] * (own - divergence[mine]))
        start += len(chunk)
    return torch.cat(parts)


def _splits(logits: Features, splits: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n,) the split of each sample; of each split that is not empty its size, mean p and mean of sum p log p."""
    count = len(logits)
    if count < splits:
        raise ValueError(f"the Inception score needs at least {splits} images, got {count}; give more")
    size = -(-count // splits)
    filled = -(-count // size)  # few samples may fill fewer splits
    split_of = torch.empty(count, dtype=torch.long)
    split_of[torch.randperm(count, generator=torch.Generator().manual_seed(seed))] = torch.arange(count) // size
    members = split_of.bincount(minlength=filled)
    probabilities, entropies, start = None, torch.zeros(filled, dtype=torch.float64), 0
    for chunk in logits.chunks():
        log_p = chunk.double().log_softmax(1)
        p = log_p.exp()
        if probabilities is None:
            probabilities = torch.zeros(filled, p.shape[1], dtype=torch.float64)
        mine = split_of[start : start + len(chunk)]
        probabilities.index_add_(0, mine, p)
        entropies.index_add_(0, mine, (p * log_p).sum(1))
        start += len(chunk)
    return split_of, members, probabilities / members[:, None], entropies / members


def _divergence(mean_p: Tensor, entropies: Tensor) -> Tensor:
    """(splits,) mean KL(p || m)."""
    return entropies - torch.xlogy(mean_p, mean_p).sum(1)
