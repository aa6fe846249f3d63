# SPDX-License-Identifier: Apache-2.0
"""Rollouts of the tiny pipelines, for several tests."""

import torch

from ld3_diffusers import Schedule, SolverSpec
from tests.tiny_pipelines import PIPELINES
from training.rollout import OWN_ARGUMENTS, PipelineRollout


def make(name: str, **options) -> tuple[PipelineRollout, dict]:
    pipe, call = PIPELINES[name]()
    return PipelineRollout(pipe, **{k: v for k, v in call.items() if k not in OWN_ARGUMENTS}, **options), call


def schedule_for(rollout: PipelineRollout, nfe: int = 3, solver: str = "dpmpp", shift: float = 0.01) -> Schedule:
    """Uneven times that end a little above zero, network times a little below them."""
    first, last = (1.0, 0.02) if rollout.path.kind == "flow" else (0.98, 0.02)
    times = first + (last - first) * torch.linspace(0, 1, nfe + 1, dtype=torch.float64) ** 1.2
    network_times = times[:-1] - shift * torch.arange(nfe) / nfe
    config = rollout.scheduler.config
    return Schedule(
        times,
        network_times,
        SolverSpec(solver),
        rollout.path.kind,
        config.prediction_type,
        final=bool(config.shift_terminal),
    )


def noise_for(rollout: PipelineRollout, conditioning: dict, batch: int = 1) -> torch.Tensor:
    if not rollout.moves_noise:
        return torch.arange(batch) + 5
    return torch.randn(batch, *rollout.state_shape(conditioning), generator=torch.Generator().manual_seed(3))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for rounding, on the scale of the largest entry: the networks are random and amplify."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
