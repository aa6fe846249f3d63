# SPDX-License-Identifier: Apache-2.0
"""Tables of an evaluation: who takes part in them, in which order, and what a cell says. All of it follows from `results.json`.

Of one name the setting shown at each NFE is the best by the leading metric on these very samples, as
[`training.comparison.best_by_name`] chooses it. Differences are paired, a contender minus the subject on the same seeds.
"""

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from scipy.stats import rankdata

from .comparison import CONFIDENCE


LARGER, SMALLER, ALIKE = "▲", "▼", "≈"
NOT_FINITE = "not finite"
WIDTH = 100  # of the terminal's table
NAME_WIDTH = 24
HUGE = 1e6  # from here on in powers of ten
PERCENT = f"{100 * CONFIDENCE:g} %"

Rows = dict[str, dict[int | None, dict]]  # by name and NFE; image files have no NFE


# ---------------------------------------------------------------------- who is shown


def leading_metric(results: dict) -> str:
    """The first metric with a value for each sample, by which settings are chosen; without one the first.

    Raises:
        ValueError: if the results hold no metric.
    """
    metrics = results["metrics"]
    if not metrics:
        raise ValueError("the results hold no metric; evaluate again with --metrics")
    return next((name for name, metric in metrics.items() if metric.get("per_sample")), next(iter(metrics)))


def value(row: dict, metric: str) -> float | None:
    """In the metric's own unit; infinite where it is not finite (null in JSON), None where it was not measured."""
    if metric not in row["values"]:
        return None
    found = row["values"][metric]["value"]
    return found if found is not None and math.isfinite(found) else math.inf


def cost(results: dict, row: dict, metric: str) -> float:
    """Smaller is better; infinite for what is not finite or was not measured."""
    found = value(row, metric)
    if found is None or found == math.inf:
        return math.inf
    return -found if results["metrics"][metric]["higher_is_better"] else found


def teacher_value(results: dict, metric: str) -> float | None:
    """What the teacher's own samples score; None where that is not known or not finite."""
    found = (results["facts"].get("teacher_values") or {}).get(metric)
    return found if found is not None and math.isfinite(found) else None


def shown(results: dict) -> Rows:
    """The row of each name at each NFE, of several settings the best one; the subject first, names that are absent empty."""
    leading = leading_metric(results)
    best: Rows = {results["subject"]: {}}
    for row in results["rows"]:
        of_name = best.setdefault(row["name"], {})
        known = of_name.get(row["nfe"])
        if known is None or cost(results, row, leading) < cost(results, known, leading):
            of_name[row["nfe"]] = row
    for entry in results["absent"]:
        best.setdefault(entry["name"], {})
    return best


def columns(rows: Rows) -> list[int | None]:
    """Every NFE, in order."""
    return sorted({nfe for of_name in rows.values() for nfe in of_name}, key=lambda nfe: -1 if nfe is None else nfe)


def ranked(results: dict, rows: Rows, metric: str) -> list[str]:
    """Names: the subject, then by the mean of the ranks over the columns in which they stand; equal values share a rank."""
    ranks: dict[str, list[float]] = {name: [] for name in rows}
    for nfe in columns(rows):
        there = [name for name, of_name in rows.items() if nfe in of_name and metric in of_name[nfe]["values"]]
        costs = [cost(results, rows[name][nfe], metric) for name in there]
        for name, rank in zip(there, rankdata(costs)):
            ranks[name].append(float(rank))
    mean = {name: statistics.mean(found) if found else math.inf for name, found in ranks.items()}
    return sorted(rows, key=lambda name: (name != results["subject"], mean[name]))


# ---------------------------------------------------------------------- what a cell says


def unit(metric: dict) -> str:
    """The metric's label with the unit of its scaled values: a scale of 1000 is `x 1e-3`."""
    scale = metric["scale"]
    if scale == 1:
        return metric["label"]
    power = round(math.log10(scale))
    factor = f"1e{-power}" if math.isclose(scale, 10.0**power) else f"1/{scale:g}"
    return f"{metric['label']} x {factor}"


def sense(metric: dict) -> str:
    return "higher is better" if metric["higher_is_better"] else "lower is better"


def decimals(values: Iterable[float], digits: int) -> int:
    """So many that the smallest has its digits, unless it is next to nothing beside the others."""
    sizes = sorted(abs(v) for v in values if v != 0 and math.isfinite(v))
    if not sizes:
        return 2
    smallest = max(sizes[0], 1e-3 * statistics.median(sizes))
    return min(max(digits - 1 - math.floor(math.log10(smallest)), 0), 8)


def number(value: float, places: int, sign: str = "") -> str:
    return f"{value:{sign}.3g}" if abs(value) >= HUGE else f"{value:{sign}.{places}f}"


def difference(row: dict, metric: str) -> tuple[float, float, float] | None:
    """Mean, lower and upper end of this minus the subject; None where there is no finite one."""
    found = row["values"].get(metric, {}).get("difference")
    return tuple(found) if found and all(v is not None and math.isfinite(v) for v in found) else None


def mark(row: dict, metric: str) -> str:
    """Whether the interval of the difference from the subject lies above 0, below it, or holds it; empty without one."""
    found = difference(row, metric)
    if found is None:
        return ""
    _, low, high = found
    return LARGER if low > 0 else SMALLER if high < 0 else ALIKE


class Cell(NamedTuple):
    """What the tables say of one contender at one NFE; as it is made, of one that was not measured."""

    value: str = "-"
    mark: str = ""
    evaluations: str = ""  # a dagger and the real number, where it is not the column's
    best: bool = False
    difference: str = "-"  # from the subject, with its interval; of the subject its own value and interval


def cells(results: dict, rows: Rows, metric: str, digits: int = 4) -> dict[tuple[str, int | None], Cell]:
    """By name and NFE. All of a column have the same decimals, by which its smallest value has `digits` digits."""
    scale, subject, found = results["metrics"][metric]["scale"], results["subject"], {}
    for nfe in columns(rows):
        there = {name: of_name[nfe] for name, of_name in rows.items() if nfe in of_name}
        values = {name: value(row, metric) for name, row in there.items()}
        lowest = min(cost(results, row, metric) for row in there.values())
        places = decimals((scale * v for v in values.values() if v is not None), digits)
        for name in rows:
            if values.get(name) is None:
                found[name, nfe] = Cell()
                continue
            row, finite = there[name], values[name] < math.inf
            numbers, sign = difference(row, metric), "+"
            if name == subject:
                numbers, sign = (values[name], *(row["values"][metric].get("interval") or ())), ""
            found[name, nfe] = Cell(
                value=number(scale * values[name], places) if finite else NOT_FINITE,
                mark=mark(row, metric) if finite and name != subject else "",
                evaluations="" if nfe in (None, row["evaluations"]) else f"†{row['evaluations']}",
                best=finite and cost(results, row, metric) == lowest,
                difference=_interval([number(scale * v, places, sign) for v in numbers or ()])
                if finite
                else NOT_FINITE,
            )
    return found


def _interval(numbers: Sequence[str]) -> str:
    if not numbers:
        return "-"
    middle, *ends = numbers
    return f"{middle} [{', '.join(ends)}]" if ends else middle


# ---------------------------------------------------------------------- Markdown


def escaped(text: str) -> str:
    """A name as it stands in a cell of Markdown."""
    for character in "\\|*<":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _grid(corner: str, header: list[str], lines: Iterable[list[str]]) -> list[str]:
    start = [f"| {' | '.join([corner, *header])} |", "|---" + "|---:" * len(header) + "|"]
    return start + [f"| {' | '.join(line)} |" for line in lines]


def _headings(nfes: list[int | None]) -> list[str]:
    return ["images" if nfe is None else f"{nfe} NFE" for nfe in nfes]


def _metric_section(results: dict, rows: Rows, metric: str) -> list[str]:
    info, nfes, found = results["metrics"][metric], columns(rows), cells(results, rows, metric)
    names, subject = ranked(results, rows, metric), escaped(results["subject"])

    def table(text: Callable[[Cell], str]) -> list[str]:
        lines = ([escaped(name), *(text(found[name, nfe]) for nfe in nfes)] for name in names)
        return _grid("contender", _headings(nfes), lines)

    def marked(cell: Cell) -> str:
        return " ".join(filter(None, [f"**{cell.value}**" if cell.best else cell.value, cell.mark, cell.evaluations]))

    key = "Bold: the best of its column."
    compared = any(cell.mark for cell in found.values())
    if compared:
        larger, smaller = ("better", "worse") if info["higher_is_better"] else ("worse", "better")
        key += (
            f" {LARGER} surely larger than {subject}'s ({larger}), {SMALLER} surely smaller ({smaller}), {ALIKE} not "
            f"distinguishable: by the {PERCENT} interval of the paired difference."
        )
    if any(cell.evaluations for cell in found.values()):
        key += " †n: makes n evaluations, not the number of its column."
    lines = [f"## {unit(info)}, {sense(info)}", "", *table(marked), "", key, ""]
    own = teacher_value(results, metric)
    if own is not None:
        own *= info["scale"]
        lines += [f"The teacher's own samples: {number(own, decimals([own], 4))}.", ""]
    if compared:
        lines += [f"Difference from {subject}, with its {PERCENT} interval; of {subject} its own value.", ""]
        lines += [*table(lambda cell: cell.difference), ""]
    return lines + _blocks(results, rows, metric)


def _blocks(results: dict, rows: Rows, metric: str) -> list[str]:
    """How much the subject's value varies from one block of seeds to another."""
    scale, of_subject = results["metrics"][metric]["scale"], rows[results["subject"]]
    deviations, count = {}, 0
    for nfe in columns({"": of_subject}):
        blocks = of_subject[nfe]["values"].get(metric, {}).get("blocks") or []
        if len(blocks) > 1 and all(v is not None and math.isfinite(v) for v in blocks):
            deviations[nfe], count = scale * statistics.stdev(blocks), len(blocks)
    if not deviations:
        return []
    places = decimals(deviations.values(), 2)
    texts = [number(d, places) + ("" if nfe is None else f" at {nfe} NFE") for nfe, d in deviations.items()]
    subject = escaped(results["subject"])
    return [f"Standard deviation of {subject}'s value over {count} blocks of seeds: {', '.join(texts)}.", ""]


def _settings(results: dict, rows: Rows) -> list[str]:
    """Which settings are shown, of the names that have several."""
    settings: dict[str, set[str]] = {}
    for row in results["rows"]:
        settings.setdefault(row["name"], set()).add(row["setting"] or "")
    several = [name for name in rows if len(settings.get(name, ())) > 1]
    if not several:
        return []
    label, nfes = results["metrics"][leading_metric(results)]["label"], columns(rows)
    lines = ["## Settings shown", ""]
    lines += [
        f"Of a name with several settings the one with the best {escaped(label)} at each NFE is shown, chosen on these very "
        "samples. This favours the names with many settings, which are the stock ones.",
        "",
    ]
    chosen = (
        [escaped(rows[name][nfe]["setting"] or "-") if nfe in rows[name] else "-" for nfe in nfes] for name in several
    )
    return lines + _grid("contender", _headings(nfes), ([escaped(n), *line] for n, line in zip(several, chosen)))


def absences(results: dict, rows: Rows) -> list[str]:
    """One line for each name and reason: at which NFE it does not take part, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in results["absent"]:
        reasons.setdefault((entry["name"], entry["reason"]), []).append(str(entry["nfe"]))
    told = {(entry["name"], entry["nfe"]) for entry in results["absent"]}
    for name, of_name in rows.items():
        for nfe in columns(rows):
            if nfe not in of_name and (name, nfe) not in told:
                reasons.setdefault((name, "not measured"), []).append("images" if nfe is None else str(nfe))
    return [f"{name} at {', '.join(dict.fromkeys(nfes))} NFE: {reason}" for (name, reason), nfes in reasons.items()]


def markdown(results: dict) -> str:
    """The whole report: facts, for each metric its values and their differences from the subject, settings, absences, warnings."""
    rows = shown(results)
    facts = {key: fact for key, fact in results["facts"].items() if isinstance(fact, str | int | float)}
    command = facts.pop("command", None)
    lines = ["# Evaluation", ""]
    lines += [escaped("; ".join(f"{key}: {fact}" for key, fact in facts.items())) + ".", ""] if facts else []
    lines += ["```bash", str(command), "```", ""] if command else []
    if not results["rows"]:
        return "\n".join([*lines, "Nothing is measured.", ""])
    for metric in results["metrics"]:
        lines += _metric_section(results, rows, metric)
    settings = _settings(results, rows)
    lines += [*settings, ""] if settings else []
    for title, entries in (("Not taking part (-)", absences(results, rows)), ("Warnings", results["warnings"])):
        if entries:
            lines += [f"## {title}", "", *(f"- {escaped(entry)}" for entry in entries), ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------- terminal


def short_table(results: dict) -> str:
    """The first metric as plain text of at most 100 columns; NFE that do not fit are left out and named."""
    if not results["rows"]:
        return "nothing is measured yet"
    rows, metric = shown(results), next(iter(results["metrics"]))
    info, names, found = results["metrics"][metric], ranked(results, rows, metric), cells(results, rows, metric, 3)
    width = min(max(map(len, names)), NAME_WIDTH)
    kept, left_out, room = [], [], WIDTH - width
    for nfe in columns(rows):
        column = [found[name, nfe] for name in names]
        texts = [
            "*" * cell.best + cell.value.replace(NOT_FINITE, "inf") + cell.mark + cell.evaluations for cell in column
        ]
        texts = [*_headings([nfe]), *texts]
        needed = max(map(len, texts)) + 2
        if needed > room:
            left_out.append(str(nfe))
            continue
        room -= needed
        kept.append([text.rjust(needed) for text in texts])
    labels = ["", *(name if len(name) <= width else name[: width - 1] + "…" for name in names)]
    key = f"{unit(info)}, {sense(info)}; * best; beside {results['subject']}: {LARGER} larger, {SMALLER} smaller, {ALIKE} alike"
    if any(cell.evaluations for cell in found.values()):
        key += "; †n: n evaluations"
    if left_out:
        key += f"; not shown: {', '.join(left_out)} NFE"
    lines = [label.ljust(width) + "".join(column[k] for column in kept) for k, label in enumerate(labels)]
    return "\n".join([*textwrap.wrap(key, WIDTH), *(line.rstrip() for line in lines)])
