# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation, each built from `results.json`: quality, schedules, errors of single steps, samples.

Contenders with a schedule of ours are coloured, stock ones gray; colour and marker together name a contender in every figure
(colours after P. Tol's schemes for colour-blind readers). The subject is the thick one.
"""

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from .evaluation_table import Rows, columns, cost, leading_metric, ranked, sense, shown, teacher_value, unit, value


SUBJECT = "#d62f00"
COLOURS = ("#332288", "#44AA99", "#AA4499", "#117733", "#88CCEE", "#882255", "#999933", "#4477AA", "#DDAA33")
GRAYS = ("0.35", "0.5", "0.62", "0.73")
TEACHER = {"color": "black", "ls": "--", "lw": 1.2, "zorder": 1}
MARKERS = "sD^vPX<>p*hd"
PANELS = 4  # numbers of evaluations that get a panel of their own
TOLD_APART = 0.02  # in half log-SNR: a told time nearer to its level than this is not seen beside it
OFF_SCALE = 100  # a value so many times the median would flatten all others
SAMPLE = 1.2  # inches of an image's side
RUG_KEYS = (
    ("|", 2, "level"),
    ("x", 1.2, "told to the network"),
    ("<", 0, "pure noise, s = 1"),
    (">", 0, "clean data"),
)


def styles(results: dict, rows: Rows) -> dict[str, dict]:
    """Colour, marker and weight of each name; no two are alike."""
    found = {}
    coloured = zip(cycle(COLOURS), cycle(MARKERS))
    gray = zip(cycle(GRAYS), cycle(MARKERS[::-1] + "o"))
    for name, of_name in rows.items():
        if name == results["subject"]:
            found[name] = {"color": SUBJECT, "marker": "o", "lw": 3.0, "ms": 8, "zorder": 4}
            continue
        ours = any(row.get("schedule") for row in of_name.values())
        colour, marker = next(coloured if ours else gray)
        weight = {"lw": 1.6, "ms": 6, "zorder": 3} if ours else {"lw": 0.8, "ms": 5, "zorder": 2}
        found[name] = {"color": colour, "marker": marker, **weight}
    return found


def evenly(values: Sequence, count: int = PANELS) -> list:
    """At most `count` of the values, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def _panels(count: int, across: int, width: float, height: float, **shared) -> tuple[Figure, list]:
    down = -(-count // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **shared)
    for empty in axes.flat[count:]:
        empty.set_visible(False)
    return figure, list(axes.flat[:count])


def _legend(figure: Figure, names: Sequence[str], style: dict[str, dict]) -> None:
    handles = [Line2D([], [], label=name, **{**style[name], "zorder": 2}) for name in names]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False, ncols=-(-len(handles) // 30))


def _readable_log(axis, low: float, high: float) -> None:
    """Plain numbers at 1, 2, 5, or where these are too few evenly in the number itself."""
    axis.set_major_locator(MaxNLocator(6) if high < 8 * low else LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------------- quality


def quality_figure(results: dict) -> Figure | None:
    """One panel a metric: its value by the evaluations really made, a line a contender; None without any number of evaluations.

    Distances have a logarithmic axis, scores and what may be negative a linear one. What lies far off the others is cut off
    by the axis and counted above it.
    """
    rows = shown(results)
    if not any(nfe is not None for nfe in columns(rows)):
        return None
    style, metrics = styles(results, rows), list(results["metrics"])
    across = min(3, len(metrics))
    figure, axes = _panels(len(metrics), across, 5.2 if across > 1 else 6.4, 4.6)
    figure.set_figwidth(figure.get_figwidth() + 2.6)
    height = 0.19 * min(len(rows), 30) + 0.6
    figure.set_figheight(max(figure.get_figheight(), height))
    for panel, metric in zip(axes, metrics):
        _quality_panel(panel, results, rows, style, metric)
    names = [name for name in ranked(results, rows, leading_metric(results)) if rows[name]]
    teacher = any(teacher_value(results, metric) is not None for metric in metrics)
    _legend(figure, names + ["teacher"] * teacher, {**style, "teacher": TEACHER})
    return figure


def _quality_panel(axes, results: dict, rows: Rows, style: dict, metric: str) -> None:
    info = results["metrics"][metric]
    scale, drawn, band = info["scale"], [], []
    for name, of_name in rows.items():
        there = _by_evaluations(results, of_name, metric)
        values = [scale * value(row, metric) for row in there.values()]
        drawn += values
        axes.plot(list(there), values, label=name, **style[name])
        intervals = [row["values"][metric].get("interval") for row in there.values()]
        if name == results["subject"] and intervals and all(intervals):
            lower, upper = ([scale * interval[k] for interval in intervals] for k in (0, 1))
            axes.fill_between(list(there), lower, upper, color=SUBJECT, alpha=0.2, lw=0, zorder=1)
            axes.vlines(list(there), lower, upper, color=SUBJECT, alpha=0.4, lw=1.5, zorder=1)
            band = [*lower, *upper]
    own = teacher_value(results, metric)
    if own is not None:
        axes.axhline(scale * own, label="teacher", **TEACHER)
        band.append(scale * own)
    axes.set_xlabel("network evaluations", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    title = f"{unit(info)}\n{sense(info)}"
    if not drawn:
        axes.set_title(f"{title}, nothing finite", fontsize=11)
        return
    logarithmic = not info["higher_is_better"] and min(drawn + band) > 0
    low, high = _range(drawn, info["higher_is_better"], logarithmic)
    cut = sum(not low <= v <= high for v in drawn)
    low, high = min([low, *band]), max([high, *band])
    if logarithmic:
        axes.set_yscale("log")
        _readable_log(axes.yaxis, low, high)
        margin = max((high / low) ** 0.04, 1.02)
        axes.set_ylim(low / margin, high * margin)
    else:
        margin = 0.04 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
    if cut:
        where = "below" if info["higher_is_better"] else "above"
        title += f", {cut} {where} the scale"
    axes.set_title(title, fontsize=11)


def _by_evaluations(results: dict, of_name: dict, metric: str) -> dict[int, dict]:
    """Rows with a finite value by the evaluations really made: Heun asked for 4 and for 5 makes 5, the better one stands."""
    found: dict[int, dict] = {}
    for row in of_name.values():
        known = found.get(row["evaluations"])
        if row["nfe"] is not None and cost(results, row, metric) < math.inf:
            if known is None or cost(results, row, metric) < cost(results, known, metric):
                found[row["evaluations"]] = row
    return dict(sorted(found.items()))


def _range(values: list[float], higher_is_better: bool, logarithmic: bool) -> tuple[float, float]:
    """Of the axis: up to the worst value that still lets the others be told apart."""
    ordered = sorted(values, reverse=higher_is_better)
    best, median = ordered[0], ordered[len(ordered) // 2]
    limit = OFF_SCALE * median if logarithmic else median + 4 * (median - best)
    inside = [v for v in ordered if (v >= limit if higher_is_better else v <= limit)]
    return min(inside), max(inside)


# ---------------------------------------------------------------------- schedules


def half_log_snr(level: float, flow: bool) -> float:
    """lambda of a level z: log((1 - s) / s) on rectified flow, where z is s, else -log z; infinite at the ends."""
    if level <= 0:
        return math.inf
    if not flow:
        return -math.log(level)
    return math.log((1 - level) / level) if level < 1 else -math.inf


def schedules_figure(results: dict) -> Figure | None:
    """The levels of each schedule, in rows on an axis of half log-SNR; below each the told times that differ from their levels.

    One panel for each of up to four NFE. Infinite ends, pure noise (s = 1) and clean data, stand at the edges. None where
    there is no schedule.

    Raises:
        ValueError: if the facts do not name the kind of the noise path.
    """
    rows = shown(results)
    style, path = styles(results, rows), results["facts"].get("path")
    names = [name for name in ranked(results, rows, leading_metric(results)) if _scheduled(rows[name])]
    nfes = evenly(sorted({nfe for name in names for nfe in _scheduled(rows[name])}))
    if not nfes:
        return None
    if path is None:
        raise ValueError("the results' facts name no noise path (`path`), by which levels are read; evaluate again")
    lam = {
        (name, nfe, key): [half_log_snr(z, path == "flow") for z in rows[name][nfe]["schedule"].get(key) or []]
        for name in names
        for nfe in nfes
        if nfe in _scheduled(rows[name])
        for key in ("levels", "told")
    }
    finite = [v for values in lam.values() for v in values if math.isfinite(v)]
    margin = 0.05 * (max(finite) - min(finite)) or 0.5 if finite else 0.5
    edges = (min(finite, default=0) - margin, max(finite, default=0) + margin)
    across = 1 if len(nfes) == 1 else 2
    figure, axes = _panels(len(nfes), across, 6.4, 0.3 * len(names) + 1.3, sharex=True, sharey=True)
    used = set()
    for panel, nfe in zip(axes, nfes):
        for height, name in enumerate(names):
            panel.axhline(height, color="0.93", lw=0.8, zorder=0)
            if (name, nfe, "levels") in lam:
                colour = style[name]["color"]
                used |= _rug(panel, height, lam[name, nfe, "levels"], lam[name, nfe, "told"], edges, colour)
            else:
                panel.text(sum(edges) / 2, height, "absent", color="0.6", fontsize=8, ha="center", va="center")
        panel.set_title(f"{nfe} NFE", fontsize=11)
        panel.set_yticks(range(len(names)), names, fontsize=9)
        panel.set(xlim=(edges[0] - margin / 2, edges[1] + margin / 2), ylim=(len(names) - 0.4, -0.6))
    figure.supxlabel("half log-SNR: from noise to data", fontsize=10)
    handles = [
        Line2D([], [], ls="", color="0.2", ms=8, marker=m, mew=mew, label=label)
        for m, mew, label in RUG_KEYS
        if m in used
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def _scheduled(of_name: dict) -> dict:
    return {nfe: row for nfe, row in of_name.items() if row.get("schedule") and nfe is not None}


def _rug(axes, height: float, levels: list, told: list, edges: tuple[float, float], colour) -> set[str]:
    """Draws one schedule; returns the markers used."""
    differing = [t for t, level in zip(told, levels) if t != level and not abs(t - level) < TOLD_APART]
    used = set()
    for marker, size, width, offset, places in (
        ("|", 11, 2.2, 0, [v for v in levels if math.isfinite(v)]),
        ("x", 4.5, 1.2, 0.3, [min(max(v, edges[0]), edges[1]) for v in differing]),
        ("<", 6, 0, 0, [edges[0] for v in levels if v == -math.inf]),
        (">", 6, 0, 0, [edges[1] for v in levels if v == math.inf]),
    ):
        if places:
            line = {"marker": marker, "ms": size, "mew": width, "ls": "", "color": colour, "clip_on": False}
            axes.plot(places, [height + offset] * len(places), **line)
            used.add(marker)
    return used


# ---------------------------------------------------------------------- errors of single steps


def local_errors_figure(results: dict) -> Figure | None:
    """The error that each step makes by itself, one panel for each of up to four NFE; None where it was not measured."""
    rows = shown(results)
    style = styles(results, rows)
    measured = {
        name: {nfe: row["local_errors"] for nfe, row in of_name.items() if row.get("local_errors")}
        for name, of_name in rows.items()
    }
    nfes = evenly(sorted({nfe for of_name in measured.values() for nfe in of_name}))
    if not nfes:
        return None
    figure, axes = _panels(len(nfes), min(2, len(nfes)), 5.2, 3.8, sharey=True)
    figure.set_figwidth(figure.get_figwidth() + 2.6)
    for panel, nfe in zip(axes, nfes):
        for name, of_name in measured.items():
            points = [(k, e) for k, e in enumerate(of_name.get(nfe, ()), 1) if e is not None and 0 < e < math.inf]
            if points:
                panel.plot(*zip(*points), label=name, **style[name])
        panel.set_yscale("log")
        panel.set_title(f"{nfe} NFE", fontsize=11)
        panel.set_xticks(range(1, nfe + 1))
        panel.grid(color="0.92", lw=0.8)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("squared error of the step by itself", fontsize=10)
    _legend(figure, [n for n in ranked(results, rows, leading_metric(results)) if measured[n]], style)
    return figure


# ---------------------------------------------------------------------- samples


def image_folder(name: str, nfe: int | None = None) -> str:
    """Of a contender's images beside `results.json`; of the teacher's for the name "teacher". A name may hold any characters."""
    plain = "".join(c if c.isalnum() or c in " .+-_=,()" else "_" for c in name)
    return f"images/{plain}" if nfe is None else f"images/{plain}-{nfe}"


def samples_figure(folder: Path, results: dict, nfe: int | None = None) -> Figure | None:
    """Kept images: the teacher's in the first row, then each contender's at `nfe` evaluations, fixed seeds in the columns.

    Without `nfe` the second smallest that was evaluated. None where no images are kept.

    Raises:
        ValueError: if that `nfe` was not evaluated.
    """
    rows = shown(results)
    nfes = [n for n in columns(rows) if n is not None]
    if nfe is not None and nfe not in nfes:
        raise ValueError(f"{nfe} NFE was not evaluated; choose one of {', '.join(map(str, nfes))}")
    if not nfes:
        return None
    nfe = nfes[min(1, len(nfes) - 1)] if nfe is None else nfe
    places = {"teacher": folder / image_folder("teacher")}
    for name in ranked(results, rows, leading_metric(results)):
        if nfe in rows[name]:
            label = "\n".join([*textwrap.wrap(name, 24), f"{rows[name][nfe]['evaluations']} evaluations"])
            places[label] = folder / (rows[name][nfe].get("images") or image_folder(name, nfe))
    files = {label: {file.stem: file for file in place.glob("*.png")} for label, place in places.items()}
    files = {label: found for label, found in files.items() if found}
    if not files:
        return None
    captions = _captions(results["facts"], {seed for found in files.values() for seed in found})
    return _grid(files, captions)


def _captions(facts: dict, stems: set[str]) -> dict[str, str]:
    """By the files' stems, in order."""
    by_seed = {int(stem): stem for stem in stems if stem.isdecimal()}
    described = {sample["seed"]: sample.get("prompt") for sample in facts.get("shown") or ()}
    order = [seed for seed in described if seed in by_seed] + sorted(set(by_seed) - set(described))
    captions = {}
    for seed in order:
        prompt = described.get(seed)
        lines = textwrap.wrap(prompt or "", 18, max_lines=4, placeholder="…")
        captions[by_seed[seed]] = "\n".join([f"seed {seed}", *lines])
    return captions


def _grid(files: dict[str, dict[str, Path]], captions: dict[str, str]) -> Figure:
    names = 0.095 * max(len(line) for label in files for line in label.split("\n"))  # inches
    lines = max(caption.count("\n") for caption in captions.values()) + 1
    size = (SAMPLE * len(captions) + names + 0.3, SAMPLE * len(files) + 0.16 * lines + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for k, of_row in enumerate(files.values()):
        for j, seed in enumerate(captions):
            if seed in of_row:
                with Image.open(of_row[seed]) as image:
                    axes.imshow(image.convert("RGB"), extent=(j + 0.03, j + 0.97, k + 0.97, k + 0.03))
    axes.set(xlim=(0, len(captions)), ylim=(len(files), 0), aspect="equal")
    axes.set_xticks([j + 0.5 for j in range(len(captions))], list(captions.values()), fontsize=8)
    axes.set_yticks([k + 0.5 for k in range(len(files))], list(files), fontsize=9)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure
