# SPDX-License-Identifier: Apache-2.0
"""From what is stored of each contender to the results: means, scores, their intervals and the differences from the subject.

Intervals are [`paired_interval`]'s, of a metric of the whole set over value + influence of each sample: a bootstrap to first
order, which is paired over the samples as that of the others is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .comparison import paired_interval
from .evaluation import column_of
from .evaluation_store import PartFeatures, Store
from .metrics import Metric, SampleMetric, SetMetric
from .processes import share
from .request_file import digest


@dataclass(frozen=True)
class Entry:
    """What a row of the results is about.

    Attributes:
        key, store: where its samples are.
        facts: what goes into the row as it is.
        samples: what pairs them with others': equal for the same seeds and prompts, or files of the same names.
    """

    name: str
    nfe: int | None
    key: str
    store: Store
    facts: dict[str, Any]
    samples: str = ""


@dataclass(frozen=True)
class Scoring:
    """How scores are made of what is stored.

    Args:
        models: see [`column_of`].
        blocks: consecutive blocks of samples on which each value is made once more, to show how much it varies; 0: none.
    """

    metrics: Sequence[Metric]
    models: dict[str, str]
    blocks: int = 5

    # ------------------------------------------------------------------ one contender

    def value(self, entry: Entry, metric: Metric) -> float:
        if isinstance(metric, SetMetric):
            return self.set_score(entry, metric)["value"]
        return float(self.values(entry, metric).mean())

    def values(self, entry: Entry, metric: Metric) -> Tensor:
        """(n,) float64, one a sample, whose mean is the value."""
        if isinstance(metric, SetMetric):
            score = self.set_score(entry, metric)
            return score["value"] + torch.tensor(score["influence"], dtype=torch.float64)
        return entry.store.column(entry.key, column_of(metric, self.models))

    def set_score(self, entry: Entry, metric: SetMetric) -> dict[str, Any]:
        """`value`, `influence` and `blocks` of a metric of the whole set, made once and kept in the store."""
        name = digest(self._identity(metric))
        found = entry.store.score(entry.key, name)
        if found is not None:
            return found

        def features(positions: range) -> PartFeatures:
            return PartFeatures(entry.store, entry.key, column_of(metric, self.models), positions)

        everyone, parts = features(range(len(entry.store))), self.blocks_of(entry, metric)
        score = {
            "value": metric.score(everyone),
            "influence": metric.influence(everyone).tolist(),
            "blocks": [metric.score(features(block)) for block in parts] if parts else None,
        }
        entry.store.write_score(entry.key, name, score)
        return score

    def _identity(self, metric: Metric) -> list[Any]:
        """What a score depends on beside the samples."""
        reference = metric.reference.digest if isinstance(metric, SetMetric) and metric.reference else None
        return [column_of(metric, self.models), metric.name, reference, self.blocks]

    def blocks_of(self, entry: Entry, metric: Metric) -> list[range] | None:
        """Blocks of equally many samples; None where they are too few for the metric."""
        size = len(entry.store) // self.blocks if self.blocks else 0
        smallest = metric.minimum if isinstance(metric, SetMetric) else 2
        if size < smallest:
            return None
        return [range(k * size, (k + 1) * size) for k in range(self.blocks)]

    # ------------------------------------------------------------------ beside the subject

    def row_value(self, entry: Entry, metric: Metric, subject: Entry | None) -> dict[str, Any]:
        """`value`, `interval`, `difference` and `blocks`, plain JSON; null for what is not finite or cannot be known."""
        paired = subject is not None and subject is not entry and subject.samples == entry.samples
        name = digest([*self._identity(metric), subject.key if paired else None, "row"])
        found = entry.store.score(entry.key, name)
        if found is not None:
            return found
        values = self.values(entry, metric)
        score = {
            "value": self.value(entry, metric),
            "interval": _interval(values, torch.zeros_like(values), 1),
            "difference": _interval(values, self.values(subject, metric), 0) if paired else None,
            "blocks": self._of_blocks(entry, metric, values),
        }
        score = plain(score)
        entry.store.write_score(entry.key, name, score)
        return score

    def _of_blocks(self, entry: Entry, metric: Metric, values: Tensor) -> list[float] | None:
        if isinstance(metric, SetMetric):
            return self.set_score(entry, metric)["blocks"]
        blocks = self.blocks_of(entry, metric)
        return [float(values[block.start : block.stop].mean()) for block in blocks] if blocks else None


def _interval(values: Tensor, others: Tensor, first: int) -> list[float] | None:
    """[mean, low, high] of values - others from `first` on; None where there is none."""
    try:
        return list(paired_interval(values, others))[first:]
    except ValueError:  # not finite, or too few
        return None


def plain(score: dict[str, Any]) -> dict[str, Any]:
    """With null for numbers, and lists of numbers, that are not finite: JSON has none."""

    def finite(value):
        numbers = value if isinstance(value, list) else [value]
        return value if all(number is not None and math.isfinite(number) for number in numbers) else None

    return {name: None if value is None else finite(value) for name, value in score.items()}


# ---------------------------------------------------------------------- all of them


def leading(metrics: Sequence[Metric]) -> Metric:
    """The metric by which settings are chosen: the first with a value for each sample, else the first."""
    return next((metric for metric in metrics if isinstance(metric, SampleMetric)), metrics[0])


def subjects(entries: Sequence[Entry], subject: str, scoring: Scoring) -> dict[int | None, Entry]:
    """For each number of evaluations whom others are compared with: of several settings the best by the leading metric."""
    metric = leading(scoring.metrics)

    def cost(entry: Entry) -> float:
        value = scoring.value(entry, metric)
        return math.inf if not math.isfinite(value) else -value if metric.higher_is_better else value

    found: dict[int | None, Entry] = {}
    for entry in entries:
        if entry.name == subject and (entry.nfe not in found or cost(entry) < cost(found[entry.nfe])):
            found[entry.nfe] = entry
    return found


def result_rows(
    entries: Sequence[Entry], subject: str, scoring: Scoring, accelerator, teacher: Entry | None = None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each entry, in order, and the teacher's own scores; computed by all processes and known to all."""
    sets = [metric for metric in scoring.metrics if isinstance(metric, SetMetric)]
    scored = [*entries, *([teacher] if teacher else [])]
    jobs = list({(entry.key, metric.name): (entry, metric) for entry in scored for metric in sets}.values())
    share(jobs, lambda job: scoring.set_score(*job)["value"], accelerator)
    compared = subjects(entries, subject, scoring)

    def row(entry: Entry) -> dict[str, Any]:
        values = {metric.name: scoring.row_value(entry, metric, compared.get(entry.nfe)) for metric in scoring.metrics}
        return {"name": entry.name, "nfe": entry.nfe, **entry.facts, "values": values}

    scores = {metric.name: scoring.set_score(teacher, metric)["value"] for metric in sets} if teacher else {}
    return share(list(entries), row, accelerator), scores


def small_blocks(entries: Sequence[Entry], scoring: Scoring) -> list[str]:
    """A sentence for each metric that blocks are too small for."""
    return [
        f"{metric.label}: {len(entries[0].store)} samples make no {scoring.blocks} blocks that are large enough, so its spread over "
        "seeds is not shown"
        for metric in scoring.metrics
        if scoring.blocks and entries and scoring.blocks_of(entries[0], metric) is None
    ]
