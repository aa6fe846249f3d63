# SPDX-License-Identifier: Apache-2.0
"""Whether gradients reach the times of a schedule, before anything is learned."""

from dataclasses import replace

import torch
from torch import Tensor

from ld3_diffusers import Schedule

from .conditioning import Conditioning
from .rollout import PipelineRollout


def check_gradients(
    rollout: PipelineRollout, schedule: Schedule, noise: Tensor, conditioning: Conditioning | None = None
) -> None:
    """One backward pass of a random linear function of the end state.

    Raises:
        ValueError: naming every inner level and every network time but the first whose gradient is absent, zero or not
            finite, and where it is usually lost; or if the network itself was not differentiated.
    """
    times = schedule.times.detach().clone().requires_grad_()
    network_times = schedule.network_times.detach().clone().requires_grad_()
    differentiated = rollout.evaluations.backward
    with torch.enable_grad():
        end = rollout(replace(schedule, times=times, network_times=network_times), noise, conditioning)
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(end.shape, generator=generator, dtype=torch.float32).to(end.device)
        loss = (end.float() * cotangent).sum()
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, [times, network_times], allow_unused=True)
        else:
            gradients = (None, None)
    lost = []
    # The last level ends the path and the first is where noise starts: neither is free.
    for name, values, gradient, free in (
        ("times", times, gradients[0], range(1, len(times) - 1)),
        ("network_times", network_times, gradients[1], range(1, len(network_times))),
    ):
        for i in free:
            # Repeated entries, of a two-stage solver, are one free time.
            total = None if gradient is None else gradient[values.detach() == values.detach()[i]]
            if total is None or not bool(torch.isfinite(total).all()) or not bool((total != 0).any()):
                lost.append(f"{name}[{i}]")
    if not lost and rollout.evaluations.backward == differentiated:
        lost = ["the network"]
    if lost:
        raise ValueError(
            f"no gradient reaches {', '.join(lost)}; {type(rollout.pipe).__name__} or its network cuts the graph: look for "
            "t.item(), .detach() or an integer cast of the timestep, feature caching, sequential offload or quantised "
            "kernels, or learn by the default recipe, which differentiates nothing"
        )
