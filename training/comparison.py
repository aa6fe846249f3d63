# SPDX-License-Identifier: Apache-2.0
"""Schedulers side by side: the same starting noises and prompts through the same pipeline, compared with the teacher's end points."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ld3_diffusers import LD3Scheduler

from .denoisers import denoisers, replaced
from .teacher_set import TeacherSet


SPACINGS = ("linspace", "leading", "trailing")


@dataclass
class Contender:
    """A scheduler with a number of steps, and what it did.

    Attributes:
        name: as printed.
        scheduler: ready to be given to the pipeline.
        num_inference_steps: what the pipeline is asked for.
        setting: e.g. the timestep spacing.
        evaluations: network evaluations that were counted.
        distances: (samples,) mean squared distance of each end state to the teacher's.
        ends: end states.
    """

    name: str
    scheduler: SchedulerMixin
    num_inference_steps: int
    setting: str = ""
    evaluations: int = 0
    distances: Tensor = field(default_factory=lambda: torch.empty(0))
    ends: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def mean(self) -> float:
        """Mean distance; infinite where a sample came out NaN."""
        mean = float(self.distances.mean())
        return mean if math.isfinite(mean) else math.inf


def stock_contenders(config, nfe: int) -> Iterator[Contender]:
    """Stock schedulers made from a pipeline's own scheduler config for `nfe` evaluations, in each timestep spacing that they have.

    Stock Heun makes 2n - 1 evaluations; where `nfe` is even it gets one more.
    """
    heun_steps = nfe // 2 + 1
    if LD3Scheduler.from_config(config).path.kind == "flow":
        yield Contender("FlowMatchEuler", FlowMatchEulerDiscreteScheduler.from_config(config), nfe)
        yield Contender("FlowMatchHeun", FlowMatchHeunDiscreteScheduler.from_config(config), heun_steps)
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config.get("shift", 1.0)}
        yield Contender("UniPC", UniPCMultistepScheduler.from_config(config, **flow), nfe)
        yield Contender("DPM++ 2M", DPMSolverMultistepScheduler.from_config(config, **flow), nfe)
        return
    for spacing in SPACINGS:
        for name, kind, steps in (
            ("UniPC", UniPCMultistepScheduler, nfe),
            ("DPM++ 2M", DPMSolverMultistepScheduler, nfe),
            ("DEIS", DEISMultistepScheduler, nfe),
            ("Euler", EulerDiscreteScheduler, nfe),
            ("DDIM", DDIMScheduler, nfe),
            ("Heun", HeunDiscreteScheduler, heun_steps),
        ):
            yield Contender(name, kind.from_config(config, timestep_spacing=spacing), steps, spacing)
    karras = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    yield Contender("DPM++ 2M Karras", karras, nfe)


@torch.no_grad()
def sample(
    pipe, contender: Contender, pairs: TeacherSet, *, guidance_scale: float | None, batch_size: int = 32, **call
) -> None:
    """Run the pipeline with this scheduler from the set's noises; fills in ends, distances and evaluations."""
    calls = 0
    networks = denoisers(pipe)

    def counted(forward):
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            return forward(*args, **kwargs)

        return run

    if guidance_scale is not None:
        call["guidance_scale"] = guidance_scale
    distances, ends, batches = [], [], 0
    with ExitStack() as stack:
        stack.enter_context(replaced(pipe, "_progress_bar_config", {"disable": True}))
        for network in networks.values():
            stack.enter_context(replaced(network, "forward", counted(network.forward)))
        previous, pipe.scheduler = pipe.scheduler, contender.scheduler
        try:
            for start in range(0, len(pairs), batch_size):
                noise, target, conditioning = pairs.batch(range(start, min(start + batch_size, len(pairs))))
                end = pipe(
                    latents=noise,
                    num_inference_steps=contender.num_inference_steps,
                    output_type="latent",
                    return_dict=False,
                    **conditioning,
                    **call,
                )[0]
                ends.append(end.float().cpu())
                distances.append((ends[-1] - target).square().flatten(1).mean(1))
                batches += 1
        finally:
            pipe.scheduler = previous
    contender.evaluations = calls // batches
    contender.distances, contender.ends = torch.cat(distances), torch.cat(ends)


def best_by_name(contenders: list[Contender]) -> list[Contender]:
    """Of the contenders of one name, the one nearest to the teacher, chosen on these very samples: no handicap for stock."""
    best: dict[str, Contender] = {}
    for contender in contenders:
        if contender.name not in best or contender.mean < best[contender.name].mean:
            best[contender.name] = contender
    return sorted(best.values(), key=lambda contender: contender.mean)


def paired_interval(other: Tensor, own: Tensor, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of other - own over the samples and its Student-t confidence interval.

    Raises:
        ValueError: if the two were not measured on the same number of samples, at least two.
    """
    from scipy.stats import ttest_rel

    if other.shape != own.shape or len(own) < 2:
        raise ValueError("a paired interval needs the same two or more samples for both; compare on one set")
    difference = (other - own).double()
    if not bool((difference != 0).any()):
        return 0.0, 0.0, 0.0
    interval = ttest_rel(other.double().numpy(), own.double().numpy()).confidence_interval(confidence)
    low, high = float(interval.low), float(interval.high)
    if not math.isfinite(low + high):
        raise ValueError("some distances are not finite; look at the schedulers' samples before comparing them")
    return float(difference.mean()), low, high
