# SPDX-License-Identifier: Apache-2.0
"""Samples that are decided by their seeds: starting noise, conditioning and, for stochastic schedulers, the noise of each step.

The sample at position k of a list of seeds starts from `starting_noise([seed])`, whatever is sampled beside it, and is conditioned
on prompt k modulo the number of prompts.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .conditioning import Conditioning, ConditioningStore
from .rollout import PipelineRollout
from .teacher_set import starting_noise


class SeededSamples:
    """Noise and conditioning of samples, batch by batch; prompts are encoded with the batch that needs them.

    Args:
        prompts: text, or labels of a class-conditional pipeline; None: of an unconditional one, or the pipeline's own.
        batch_size: batches are consecutive positions, the same ones whoever asks.
    """

    def __init__(self, rollout: PipelineRollout, seeds: list[int], prompts: list[str] | None, batch_size: int):
        self.rollout, self.seeds, self.prompts, self.batch_size = rollout, seeds, prompts, batch_size
        # Encoded together as often as asked for, so that no bit depends on which batches came before.
        self._encoded = lru_cache(maxsize=16)(self._encode)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def num_batches(self) -> int:
        return -(-len(self) // self.batch_size)

    def positions(self, batch: int) -> range:
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self)))

    def prompts_of(self, positions: range) -> list[str] | None:
        return None if self.prompts is None else [self.prompts[k % len(self.prompts)] for k in positions]

    def _encode(self, prompts: tuple[str, ...] | None) -> ConditioningStore:
        with torch.no_grad():
            return ConditioningStore.of([self.rollout.encode(None if prompts is None else list(prompts))])

    def conditioning(self, positions: range, device) -> Conditioning:
        prompts = self.prompts_of(positions)
        if prompts is None:
            return self._encoded(None).select([0] * len(positions), device)
        unique = tuple(dict.fromkeys(prompts))
        return self._encoded(unique).select([unique.index(prompt) for prompt in prompts], device)

    def noise(self, positions: range, shape: tuple[int, ...]) -> Tensor:
        """(batch, *shape) unit-normal float32, or (batch,) seeds for pipelines that draw their own noise."""
        seeds = [self.seeds[k] for k in positions]
        return starting_noise(seeds, shape) if self.rollout.moves_noise else torch.tensor(seeds)

    def generators(self, positions: range, shape: tuple[int, ...]) -> list[torch.Generator]:
        """For the noise of each step: those that have drawn the starting noise, and go on."""
        generators = [torch.Generator().manual_seed(self.seeds[k]) for k in positions]
        for generator in generators:
            torch.randn(shape, generator=generator, dtype=torch.float32)
        return generators
