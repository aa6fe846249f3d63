# SPDX-License-Identifier: Apache-2.0
"""Measuring contenders: sampled batch by batch beside the teacher, and what each metric needs of the samples stored.

All contenders progress together, so that what the teacher made of a batch is decoded once, and an evaluation that is stopped has
compared them on equal terms.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ld3_diffusers import LD3Scheduler

from .comparison import Comparison, Contender
from .contenders import is_stochastic, sampler_key
from .evaluation_store import Store
from .metrics import Metric, SampleMetric, Samples, SetMetric
from .processes import is_sharded, turns
from .rendering import rendered
from .request_file import digest
from .seeded_samples import SeededSamples


TEACHER = "teacher"
EVALUATIONS, ENDS, IMAGES, FINITE = "evaluations", "ends", "images", "finite"
LEVELS, TOLD = "levels", "told"


@dataclass(frozen=True)
class Entrant:
    """A contender, the number of evaluations that it stands for, and the key under which its samples are stored."""

    contender: Contender
    nfe: int
    key: str

    @classmethod
    def of(cls, contender: Contender, nfe: int) -> "Entrant":
        """Before it runs: stock schedulers may write a pipeline's shift into their config."""
        return cls(contender, nfe, sampler_key(contender))


def column_of(metric: Metric, models: dict[str, str]) -> str:
    """The column that a metric is computed from: its values, or the outputs of its network, told from those of other weights.

    Args:
        models: for metrics with a model of their own that has no record, its name.
    """
    if isinstance(metric, SetMetric):
        return f"{metric.outputs}.{digest(metric.network.record)}"
    return f"{metric.name}.{digest(models[metric.name])}" if metric.name in models else metric.name


@dataclass(frozen=True)
class Measurement:
    """What is measured on which samples.

    Args:
        models: see [`column_of`].
        shown: of the first so many samples the pictures are kept.
    """

    comparison: Comparison
    teacher: Contender
    samples: SeededSamples
    metrics: Sequence[Metric]
    models: dict[str, str]
    store: Store
    shape: tuple[int, ...]
    shown: int = 0
    decode_batch_size: int = 8

    @property
    def needs_pictures(self) -> bool:
        """Whether metrics look at any: only the mean squared difference of end states does without."""
        return any(metric.name != "mse" for metric in self.metrics)

    @property
    def needs_teacher(self) -> bool:
        return any(metric.needs_teacher for metric in self.metrics)

    def wanted(self, part: int) -> set[str]:
        """Columns of a contender."""
        columns = {column_of(metric, self.models) for metric in self.metrics} | {EVALUATIONS, FINITE}
        return columns | ({IMAGES} if self._shows(part) else set())

    def wanted_of_teacher(self, part: int) -> set[str]:
        """Its end states, where something is compared with them, what makes its own scores, and the pictures."""
        if not self.needs_teacher and not self._shows(part):
            return set()
        columns: set[str] = {ENDS} | ({IMAGES} if self._shows(part) else set())
        if self.needs_teacher:
            columns |= {column_of(metric, self.models) for metric in self.metrics if isinstance(metric, SetMetric)}
        return columns

    def _lacking(self, each: Entrant, part: int) -> set[str]:
        return self.wanted(part) - self.store.columns(each.key, part)

    def _shows(self, part: int) -> bool:
        return self.store.positions(part).start < self.shown

    def missing(self, entrants: Sequence[Entrant], accelerator) -> dict[int, list[Entrant | None]]:
        """For each unfinished part who is missing there; None is the teacher.

        Processes that share a sharded network must call it equally often, so they all do what any part is missing.
        """
        found: dict[int, list[Entrant | None]] = {}
        for part in range(self.store.num_parts):
            lacking: list[Entrant | None] = []
            if self.wanted_of_teacher(part) - self.store.columns(TEACHER, part):
                lacking.append(None)
            # Two that sample the same, as Heun's schedules for 4 and for 5 evaluations, are measured once.
            distinct = {each.key: each for each in reversed(entrants)}
            lacking += [each for each in entrants if distinct[each.key] is each and self._lacking(each, part)]
            if lacking:
                found[part] = lacking
        if is_sharded(accelerator):
            everyone = [each for each in (None, *entrants) if any(each in lacking for lacking in found.values())]
            return dict.fromkeys(found, everyone)
        return found

    def run(
        self, entrants: Sequence[Entrant], accelerator, on_measured: Callable[[Entrant | None, dict], None]
    ) -> None:
        """Measure what is missing; `on_measured(entrant, columns)` after each batch of each, the teacher's with None."""
        missing = self.missing(entrants, accelerator)
        accelerator.wait_for_everyone()  # nobody writes before all have seen what is missing
        for part, own in turns(list(missing), accelerator):
            for each, columns in self._measured(part, missing[part], resample=is_sharded(accelerator)):
                if own:
                    self.store.write(TEACHER if each is None else each.key, part, columns)
                    on_measured(each, columns)
        accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ one part

    def _measured(
        self, part: int, who: Sequence[Entrant | None], resample: bool
    ) -> Iterator[tuple[Entrant | None, dict[str, Tensor]]]:
        positions = self.store.positions(part)
        conditioning = self.samples.conditioning(positions, self.comparison.device)
        noise = self.samples.noise(positions, self.shape)

        def follow(contender: Contender) -> Tensor:
            stochastic = is_stochastic(contender.scheduler)
            generators = self.samples.generators(positions, self.shape) if stochastic else None
            return self.comparison.follow(contender, noise, conditioning, generators)

        teacher = None
        if who[0] is None:
            known = not resample and ENDS in self.store.columns(TEACHER, part)
            ends = self.store.read(TEACHER, part, ENDS) if known else follow(self.teacher)
            if not bool(torch.isfinite(ends).all()):
                raise ValueError("samples of the teacher are not finite; use --mixed_precision no or bf16")
            teacher = self._seen(ends, positions)
            yield None, self._columns(teacher, None, self.wanted_of_teacher(part)) | {ENDS: teacher.ends}
        elif self.needs_teacher:
            teacher = self._seen(self.store.read(TEACHER, part, ENDS), positions)
        for each in who:
            if each is None:
                continue
            own = self._seen(follow(each.contender), positions)
            columns = self._columns(own, teacher, self._lacking(each, part))
            columns[EVALUATIONS] = torch.tensor([each.contender.evaluations])
            columns[FINITE] = torch.isfinite(own.ends.flatten(1)).all(1)
            if part == 0 and isinstance(each.contender.scheduler, LD3Scheduler):
                columns |= schedule_columns(each.contender.scheduler)
            yield each, columns

    def _seen(self, ends: Tensor, positions: range) -> Samples:
        images = torch.empty(len(ends), 3, 0, 0, dtype=torch.uint8)
        if self.needs_pictures or positions.start < self.shown:
            images = rendered(self.comparison, ends, self.decode_batch_size)
        return Samples(ends, images, self.samples.prompts_of(positions))

    def _columns(self, own: Samples, teacher: Samples | None, wanted: set[str]) -> dict[str, Tensor]:
        columns = measured_columns(self.metrics, self.models, own, teacher, wanted)
        if IMAGES in wanted:
            columns[IMAGES] = own.images
        return columns


def measured_columns(
    metrics: Sequence[Metric], models: dict[str, str], own: Samples, teacher: Samples | None, wanted: set[str]
) -> dict[str, Tensor]:
    """Each wanted column that metrics are computed from, once."""
    columns: dict[str, Tensor] = {}
    for metric in metrics:
        name = column_of(metric, models)
        if name not in wanted or name in columns:
            continue
        if isinstance(metric, SampleMetric):
            columns[name] = metric.measure(own, teacher)
        else:
            look = metric.network.logits if metric.outputs == "logits" else metric.network
            columns[name] = look(own.images)
    return columns


def schedule_columns(scheduler: LD3Scheduler) -> dict[str, Tensor]:
    """Levels of the steps' ends and of what the network was told, both z of the path, as it was last run."""
    path = scheduler.path
    told = path.levels(path.time(scheduler.timesteps.detach().double().cpu())).z
    return {LEVELS: scheduler.sigmas.detach().double().cpu(), TOLD: told}


class RunningMeans:
    """Means of the first metric with a value for each sample, over what this process measured; to look at while it runs."""

    def __init__(self, metrics: Sequence[Metric], models: dict[str, str], every: float = 180.0):
        self.metric = next((metric for metric in metrics if isinstance(metric, SampleMetric)), None)
        self.column = self.metric and column_of(self.metric, models)
        self.sums: dict[tuple[str, str, int], list[float]] = {}
        self.every, self.said = every, time.monotonic()

    def add(self, each: Entrant | None, columns: dict[str, Tensor]) -> None:
        if self.column in columns and each is not None:
            total = self.sums.setdefault((each.contender.name, each.contender.setting, each.nfe), [0.0, 0])
            total[0] += float(columns[self.column].sum())
            total[1] += len(columns[self.column])

    def due(self) -> bool:
        """Whether it is time to look again."""
        if not self.sums or time.monotonic() - self.said < self.every:
            return False
        self.said = time.monotonic()
        return True

    def results(self, subject: str) -> dict[str, Any]:
        """In the form of an evaluation's results, means only."""
        rows = [
            {
                "name": name,
                "setting": setting,
                "nfe": nfe,
                "evaluations": nfe,
                "values": {self.metric.name: {"value": total / count}},
            }
            for (name, setting, nfe), (total, count) in self.sums.items()
        ]
        return {"metrics": metric_facts([self.metric]), "subject": subject, "absent": [], "warnings": [], "rows": rows}


def metric_facts(metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    return {
        metric.name: {
            "label": metric.label,
            "higher_is_better": metric.higher_is_better,
            "scale": metric.scale,
            "per_sample": isinstance(metric, SampleMetric),
        }
        for metric in metrics
    }


def check_names(entrants: Sequence[Entrant]) -> None:
    """Raises a `ValueError` if two would be one in tables."""
    seen: set[tuple[str, str, int]] = set()
    for each in entrants:
        identity = (each.contender.name, each.contender.setting, each.nfe)
        if identity in seen:
            raise ValueError(f"two schedulers are called {each.contender.label!r}; tell them apart by name=")
        seen.add(identity)
