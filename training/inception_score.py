# SPDX-License-Identifier: Apache-2.0
r"""The Inception score (Salimans et al., arXiv:1606.03498): exp E KL(p(y | x) || p(y)), averaged over random splits."""

import torch

from .features import Features


SPLITS = 10


def inception_score(logits: Features, *, splits: int = SPLITS, seed: int = 0) -> float:
    """The score, by one pass over the logits: KL averages to E sum p log p - sum m log m with m = E p.

    Splits are cut from a random order, because samples often come sorted by class.

    Raises:
        ValueError: for fewer samples than splits.
    """
    count = len(logits)
    if count < splits:
        raise ValueError(f"the Inception score needs at least {splits} images, got {count}; give more")
    size = -(-count // splits)
    split_of = torch.empty(count, dtype=torch.long)
    split_of[torch.randperm(count, generator=torch.Generator().manual_seed(seed))] = torch.arange(count) // size
    members = split_of.bincount(minlength=splits)
    probabilities, entropies, start = None, torch.zeros(splits, dtype=torch.float64), 0
    for chunk in logits.chunks():
        log_p = chunk.double().log_softmax(1)
        p = log_p.exp()
        if probabilities is None:
            probabilities = torch.zeros(splits, p.shape[1], dtype=torch.float64)
        mine = split_of[start : start + len(chunk)]
        probabilities.index_add_(0, mine, p)
        entropies.index_add_(0, mine, (p * log_p).sum(1))
        start += len(chunk)
    # Few samples may fill fewer splits.
    filled = members > 0
    members = members[filled]
    mean_p = probabilities[filled] / members[:, None]
    divergence = entropies[filled] / members - torch.xlogy(mean_p, mean_p).sum(1)
    return float(divergence.exp().mean())
