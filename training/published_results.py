# SPDX-License-Identifier: Apache-2.0
"""FIDs that the methods' papers report, to stand beside those measured here.

    FID = |mu - mu_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2))          (Heusel et al., arXiv:1706.08500)

of means mu and covariances S of a network's features depends on the number of samples, the network and the real images: what is known
to differ from the published measurement is said beside the numbers. The values are data, in published_results.yaml.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .evaluation_table import Cell, cells, columns, escaped, ranked, shown
from .metrics import SetMetric
from .references import Reference


METRIC = "fid"
FILE = Path(__file__).with_suffix(".yaml")
SECOND_HAND = "*"


@dataclass(frozen=True)
class PublishedTable:
    """Values of one paper.

    Attributes:
        source: the method and its paper.
        methods: FID by number of network evaluations, by method.
        second_hand: whether others quote them.
    """

    source: str
    methods: dict[str, dict[int, float]]
    second_hand: bool = False


@dataclass(frozen=True)
class PublishedResults:
    """What is published for one data set, and how it was measured.

    Attributes:
        samples: of a FID.
        feature_network: by the names of training/features.py.
        reference: the file of EDM's form, or what is known of it.
        guidance_scale: None: without.
        teacher: FID of the long schedule.
        notes: sentences for the reader.
    """

    data_set: str
    samples: int
    feature_network: str
    reference: str
    tables: Sequence[PublishedTable]
    guidance_scale: float | None = None
    teacher: float | None = None
    notes: Sequence[str] = ()


@cache
def data_sets() -> dict[str, PublishedResults]:
    """Everything that is known, by data set; the recipes have the same names."""
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: _read(name, facts) for name, facts in found.items()}


def _read(name: str, facts: dict[str, Any]) -> PublishedResults:
    tables = [PublishedTable(**table) for table in facts.pop("tables")]
    return PublishedResults(data_set=name, tables=tables, **facts)


def published_results(name: str) -> PublishedResults:
    """What is published for the data set of that name.

    Raises:
        ValueError: for a name for which nothing is.
    """
    if name not in data_sets():
        raise ValueError(
            f"no published results are known for {name!r}; --published_results names one of {', '.join(data_sets())}"
        )
    return data_sets()[name]


def check_published(name: str | None, metrics: Sequence[str]) -> None:
    """Raises a `ValueError` for a data set without published results, or where their metric is not measured."""
    if name is None:
        return
    published_results(name)
    if METRIC not in metrics:
        raise ValueError(
            f"--published_results {name} are FIDs, which are not measured here; add {METRIC} to --metrics"
        )


# ---------------------------------------------------------------------- how the two measurements differ


def record(published: PublishedResults, metric: SetMetric, facts: Mapping[str, Any]) -> dict[str, Any]:
    """For `results.json`: the published values, and what keeps these results from being compared with them.

    Args:
        metric: the FID that was measured.
        facts: of the results.
    """
    return {**asdict(published), "differences": differences(published, metric, facts)}


def differences(published: PublishedResults, metric: SetMetric, facts: Mapping[str, Any]) -> list[str]:
    """Sentences, one for each way in which this measurement is known not to be the published one, or cannot be known to be."""
    found, samples = [], facts["samples"]
    if samples != published.samples:
        effect = ": a FID of fewer samples is larger" if samples < published.samples else ""
        found.append(f"{samples} samples here, {published.samples} there{effect}")
    if metric.network.name != published.feature_network:
        found.append(
            f"features of {metric.network.name} here, of {published.feature_network} there: the two have different scales"
        )
    if metric.reference is not None:
        found += _of_reference(published, metric.reference)
    if "guidance_scale" in facts and _differ(facts["guidance_scale"], published.guidance_scale):
        found.append(f"guidance scale {facts['guidance_scale']:g} here, {published.guidance_scale or 1:g} there")
    return found


def _of_reference(published: PublishedResults, reference: Reference) -> list[str]:
    name = Path(reference.path).name
    if reference.network is not None:
        return [f"a reference of {reference.images} images ({name}) here, {published.reference} there"]
    found = [
        f"the reference {name} records neither its network nor its images: that it fits is --reference_network's word"
    ]
    if name != published.reference:
        found.append(f"the reference {name} here, {published.reference} there")
    return found


def _differ(here: float | None, there: float | None) -> bool:
    """Whether two scales guide otherwise; without guidance is a scale of 1, and an unknown one is left alone."""
    return here is not None and abs(here - (1.0 if there is None else there)) > 1e-9


# ---------------------------------------------------------------------- what is printed


def published_section(results: dict) -> list[str]:
    """Lines of Markdown: this evaluation's FIDs above the published ones, in the same columns; none without published ones."""
    found = results.get("published")
    if not found or not results["rows"]:
        return []
    counts = _counts(results)
    lines = [f"## Published FIDs of {escaped(found['data_set'])} beside these", ""]
    lines += [f"| | {' | '.join(f'{nfe} NFE' for nfe in counts)} | source |", "|---" + "|---:" * len(counts) + "|---|"]
    rows = shown(results)
    measured = cells(results, rows, METRIC)
    for name in ranked(results, rows, METRIC):
        own = [_own(measured.get((name, nfe), Cell())) for nfe in counts]
        # Pictures from files have no count.
        source = f"here: {_own(measured[name, None])}, at an unknown NFE" if (name, None) in measured else "here"
        lines.append(f"| **{escaped(name)}** | {' | '.join(own)} | {source} |")
    for table in found["tables"]:
        mark = SECOND_HAND if table["second_hand"] else ""
        for method, values in _of_counts(table, counts).items():
            theirs = [f"{values[nfe]:.2f}{escaped(mark)}" if nfe in values else "-" for nfe in counts]
            lines.append(f"| {escaped(method)} | {' | '.join(theirs)} | {escaped(table['source'])} |")
    lines += ["", f"{escaped(comparability(found))}", ""]
    if any(table["second_hand"] for table in found["tables"]):
        lines += [f"{escaped(SECOND_HAND)} second-hand: the paper's table as others quote it.", ""]
    if found["teacher"] is not None:
        lines += [f"The teacher's long schedule, published: {found['teacher']:.2f}.", ""]
    return lines + [f"- {escaped(note)}" for note in found["notes"]] + [""] * bool(found["notes"])


def published_lines(results: dict) -> list[str]:
    """Plain sentences for the terminal: the best published FID at each number of evaluations, and whether the two are alike."""
    found = results.get("published")
    if not found or not results["rows"]:
        return []
    lines = []
    for nfe in _counts(results):
        candidates = [
            (values[nfe], method, table)
            for table in found["tables"]
            for method, values in _of_counts(table, [nfe]).items()
        ]
        if candidates:
            best, method, table = min(candidates, key=lambda candidate: candidate[0])
            second_hand = ", second-hand" if table["second_hand"] else ""
            lines.append(f"published: {best:.2f} at {nfe} NFE ({method}; {table['source']}{second_hand})")
    lines = lines or [f"published: nothing for {found['data_set']} at these NFE"]
    return [*lines, comparability(found)]


def _own(cell: Cell) -> str:
    if cell == Cell():
        return cell.value
    return f"**{cell.value}** {cell.evaluations}".rstrip()


def comparability(found: Mapping[str, Any]) -> str:
    """Whether the published values may be compared with these, in a sentence."""
    if not found["differences"]:
        return "Samples, features and reference are as published, as far as they are recorded."
    return f"Not like for like: {'; '.join(found['differences'])}."


def _counts(results: dict) -> list[int]:
    """The columns: those that were evaluated; of pictures from files, whose count nobody knows, all published ones."""
    evaluated = [nfe for nfe in columns(shown(results)) if nfe is not None]
    tables = results["published"]["tables"]
    return evaluated or sorted(
        {int(nfe) for table in tables for values in table["methods"].values() for nfe in values}
    )


def _of_counts(table: Mapping[str, Any], counts: Sequence[int]) -> dict[str, dict[int, float]]:
    """By method and number of evaluations, without methods that have none of these; JSON's keys are strings."""
    methods = {
        method: {int(nfe): fid for nfe, fid in values.items() if int(nfe) in counts}
        for method, values in table["methods"].items()
    }
    return {method: values for method, values in methods.items() if values}
