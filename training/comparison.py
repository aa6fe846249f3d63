# SPDX-License-Identifier: Apache-2.0
"""Schedulers side by side: the same starting noises and embeddings through the same pipeline, and how far from the teacher's end points."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ld3_diffusers import LD3Scheduler

from .conditioning import Conditioning
from .processes import share
from .rollout import PipelineRollout
from .teacher_set import TeacherSet


RESAMPLES = 9999
MOST_RESAMPLED = 4096  # samples; of more the interval has a formula, and resampling takes minutes
CONFIDENCE = 0.95


@dataclass
class Contender:
    """A scheduler with a number of steps, and what it did.

    Attributes:
        name: as printed.
        scheduler: ready to be given to the pipeline; None for what was read from a file.
        num_inference_steps: what the pipeline is asked for.
        setting: e.g. the timestep spacing.
        evaluations: network evaluations of one sample, guidance's doubling apart.
        distances: (samples,) float64, mean squared difference of each end state from the teacher's.
        spec: what a user typed to name it.
    """

    name: str
    scheduler: SchedulerMixin | None
    num_inference_steps: int
    setting: str = ""
    evaluations: int = 0
    distances: Tensor = field(default_factory=lambda: torch.empty(0))
    spec: str = ""

    @property
    def mean(self) -> float:
        """Mean distance; infinite where a sample came out NaN."""
        mean = float(self.distances.mean())
        return mean if math.isfinite(mean) else math.inf

    @property
    def label(self) -> str:
        return f"{self.name} ({self.setting})" if self.setting else self.name

    @property
    def stages(self) -> str | None:
        """How AMED's stages are placed in its schedule, see [`Schedule.stages`]; None for one without, or none of ours."""
        ours = isinstance(self.scheduler, LD3Scheduler)
        learned = self.scheduler.learned_schedule(self.num_inference_steps) if ours else None
        return None if learned is None else learned.stages


# ---------------------------------------------------------------------- what they do


class Comparison(PipelineRollout):
    """A pipeline that any scheduler may drive, from given noises and embeddings, as [`PipelineRollout`] drives learned schedules.

    Args:
        call: settings of the pipeline's call, such as `TeacherSet.call_settings`.
    """

    def __init__(self, pipe, **call):
        super().__init__(pipe, checkpointing=False, **call)

    @torch.no_grad()
    def follow(
        self,
        contender: Contender,
        noise: Tensor,
        conditioning: Conditioning,
        generators: list[torch.Generator] | None = None,
    ) -> Tensor:
        """End states, (batch, ...) float32 on the host; `contender.evaluations` are counted.

        A stock scheduler's step takes one evaluation, Heun's too; calls of the network would count guidance twice where a
        pipeline calls it twice.

        Args:
            generators: one a sample, for the noise that a stochastic scheduler adds at each step.
        """
        arguments = self._starting_arguments(noise, conditioning)
        if generators is not None and self.moves_noise and "generator" in self.parameters:
            arguments["generator"] = generators
        last, steps = noise, 0

        def on_step(_state: Tensor, _output: Tensor, result: Tensor) -> None:
            nonlocal last, steps
            last, steps = result, steps + 1

        shifts = self.scheduler.config.use_dynamic_shifting
        with self._driven_by(contender):
            if not shifts:
                # Some pipelines scale their starting noise before they set the timesteps.
                contender.scheduler.set_timesteps(contender.num_inference_steps, device=self.device)
            self._run(contender.num_inference_steps, arguments, on_step)
        contender.evaluations = steps
        # DiT carries guidance's doubled batch through its scheduler; the halves are equal.
        return last[: len(noise)].float().cpu()

    @contextmanager
    def _driven_by(self, contender: Contender) -> Iterator[None]:
        """The pipeline with a contender's scheduler, attached where that predicts stages for each sample."""
        own, scheduler = self.scheduler, contender.scheduler
        attaches = contender.stages == "per sample"
        self.pipe.scheduler = self.scheduler = scheduler
        try:
            if attaches:
                scheduler.attach(self.pipe)
            yield
        finally:
            if attaches:
                scheduler.detach()
            self.pipe.scheduler = self.scheduler = own

    def ends(self, contender: Contender, pairs: TeacherSet, indices: Sequence[int]) -> Tensor:
        """End states from the noises of some pairs."""
        noise, _, conditioning = pairs.batch(indices)
        return self.follow(contender, noise, conditioning)

    def measure(
        self,
        contender: Contender,
        pairs: TeacherSet,
        *,
        batch_size: int = 32,
        accelerator=None,
        on_batch: Callable[[], None] | None = None,
    ) -> None:
        """Fill in the distances to the pairs' end states, and the evaluations.

        Batches are shared among processes. They are cut by the samples alone, so that the result does not depend on how many
        processes there are.
        """

        def measured(indices: range) -> tuple[Tensor, int]:
            noise, target, conditioning = pairs.batch(indices)
            end = self.follow(contender, noise, conditioning)
            if on_batch is not None:
                on_batch()
            return (end - target).square().flatten(1).mean(1), contender.evaluations

        starts = range(0, len(pairs), batch_size)
        results = share([range(k, min(k + batch_size, len(pairs))) for k in starts], measured, accelerator)
        distances = torch.cat([distances for distances, _ in results])
        # Nine digits name a float32 exactly, and are what is written down: all later numbers follow from these.
        contender.distances = torch.tensor([float(f"{d:.9g}") for d in distances.tolist()], dtype=torch.float64)
        contender.evaluations = results[0][1]


# ---------------------------------------------------------------------- who is ahead


def best_by_name(contenders: list[Contender]) -> list[Contender]:
    """Of the contenders of one name, the one nearest to the teacher, chosen on these very samples: no handicap for stock."""
    best: dict[str, Contender] = {}
    for contender in contenders:
        if contender.name not in best or contender.mean < best[contender.name].mean:
            best[contender.name] = contender
    return sorted(best.values(), key=lambda contender: contender.mean)


def paired_interval(other: Tensor, own: Tensor, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean of other - own over the samples, and its bias-corrected and accelerated bootstrap interval (Efron 1987).

    The resamples are drawn from a fixed seed: the same distances have the same interval everywhere. Of more than
    `MOST_RESAMPLED` samples, the interval to which it tends is taken, [`second_order_interval`].

    Raises:
        ValueError: if the two were not measured on the same number of samples, at least two, or are not finite.
    """
    from scipy.stats import bootstrap

    if other.shape != own.shape or len(own) < 2:
        raise ValueError("a paired interval needs the same two or more samples for both; compare on one set")
    difference = (other.double() - own.double()).numpy()
    if not numpy.isfinite(difference).all():
        raise ValueError("some distances are not finite; look at the schedulers' samples before comparing them")
    mean = float(difference.mean())
    if difference.max() - difference.min() <= 1e-12 * abs(mean):
        return mean, mean, mean
    if len(difference) > MOST_RESAMPLED:
        return mean, *second_order_interval(difference, confidence)
    interval = bootstrap(
        (difference,),
        numpy.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="BCa",
        batch=100,  # bounds the memory
        rng=numpy.random.default_rng(0),
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if not low <= high:
        raise ValueError(f"{len(own)} samples are too few for an interval; compare on more")
    return mean, low, high


def second_order_interval(values: numpy.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    r"""The limits of the BCa interval of a mean of n values up to terms of order $n^{-3/2}$ (Hall 1988, Annals of Statistics 16).

    $\bar x + \frac{s}{\sqrt n} (z + \frac{\gamma}{6 \sqrt n} (2 z^2 + 1))$ with the normal quantiles z, and the values' deviation s
    and skewness $\gamma$.
    """
    mean, deviation, count = values.mean(), values.std(), len(values)
    skewness = (((values - mean) / deviation) ** 3).mean()
    quantile = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    shift = skewness / (6 * math.sqrt(count)) * (2 * quantile**2 + 1)
    return tuple(float(mean + deviation / math.sqrt(count) * (z + shift)) for z in (-quantile, quantile))


def unbeaten(learned: Contender, others: list[Contender]) -> list[tuple[Contender, tuple[float, float, float]]]:
    """The others that are not surely farther from the teacher, with the interval of their distance minus that of `learned`.

    One with samples that are not finite is farther.
    """
    intervals = [
        (other, paired_interval(other.distances, learned.distances)) for other in others if other.mean < math.inf
    ]
    return [(other, interval) for other, interval in intervals if not interval[1] > 0]
