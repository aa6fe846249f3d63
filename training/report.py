# SPDX-License-Identifier: Apache-2.0
"""What one looks at after a comparison: a table, sample pictures, a plot of the schedules. Every file is written whole."""

import json
import math
from pathlib import Path

from torch import Tensor

from ld3_diffusers import LD3Scheduler

from .comparison import Contender, paired_interval
from .whole_files import write_whole


def table(learned: Contender, others: list[Contender]) -> str:
    """Markdown: distance to the teacher of each, and by how much it exceeds that of `learned`, with its 95 % interval.

    The interval is [`paired_interval`]'s.
    """
    lines = [
        f"Mean squared distance to the teacher's end point, {len(learned.distances)} unseen samples (x 1e-3)",
        "",
        f"| scheduler | setting | evaluations | distance | more than {learned.name}, 95 % interval | ratio |",
        "|---|---|---|---|---|---|",
        f"| **{learned.name}** | {learned.setting} | {learned.evaluations} | **{1e3 * learned.mean:.3f}** | | 1.00 |",
    ]
    for other in others:
        start = f"| {other.name} | {other.setting} | {other.evaluations} |"
        if other.mean == math.inf:
            lines.append(f"{start} not finite | | |")
            continue
        mean, low, high = paired_interval(other.distances, learned.distances)
        lines.append(
            f"{start} {1e3 * other.mean:.3f} "
            f"| {1e3 * mean:+.3f} [{1e3 * low:+.3f}, {1e3 * high:+.3f}] | {other.mean / learned.mean:.2f} |"
        )
    return "\n".join(lines)


def save_results(path: Path, learned: Contender, others: list[Contender], facts: dict) -> None:
    """The numbers behind the table as JSON."""
    rows = []
    for c in [learned, *others]:
        compared = c is not learned and c.mean < math.inf
        rows.append(
            {
                "scheduler": c.name,
                "setting": c.setting,
                "evaluations": c.evaluations,
                "distance": c.mean if c.mean < math.inf else None,
                "difference": paired_interval(c.distances, learned.distances) if compared else None,
            }
        )
    content = json.dumps({**facts, "samples": len(learned.distances), "rows": rows}, indent=2) + "\n"
    write_whole(path, lambda file: file.write_text(content))


def save_grid(path: Path, rows: dict[str, Tensor], columns: list[str]) -> None:
    """One row of pictures for each entry of `rows`, (n, 3, height, width) in [-1, 1]; `columns` are their captions."""
    from matplotlib.figure import Figure

    count = len(columns)
    figure = Figure(figsize=(1.0 * count + 1.8, 1.0 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[0], columns):
        axis.set_title(caption, fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, dpi=120))


def save_schedules(path: Path, contenders: list[Contender]) -> None:
    """Noise level and network time at every evaluation, as each scheduler was last run: with the pipeline's resolution shift.

    Of two-stage stock schedulers only the steps are shown.

    Raises:
        ValueError: for a scheduler that was not run.
    """
    from matplotlib.figure import Figure

    for contender in contenders:
        if getattr(contender.scheduler, "num_inference_steps", None) is None:
            raise ValueError(f"{contender.name} was not run, so its times are not known; run it on a sample first")

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    levels, offsets = figure.subplots(1, 2)
    flow = False
    for k, contender in enumerate(contenders):
        scheduler = contender.scheduler
        learned = isinstance(scheduler, LD3Scheduler)
        sigmas = _sigmas(scheduler)
        style = {"color": f"C{k}", "lw": 2.4 if learned else 1.0, "marker": "o", "ms": 4, "label": contender.name}
        positive = sigmas[sigmas > 0]
        levels.plot(range(len(positive)), positive, **style)
        if learned:
            noise_path, stands = scheduler.path, sigmas[: len(scheduler.timesteps)]
            flow = noise_path.kind == "flow"
            times = stands if flow else noise_path.inverse_sigma_edm(stands)
            own = noise_path.timestep(times)
            offsets.plot(range(len(own)), scheduler.timesteps.detach().double() - own, **style)
    level = "s" if flow else "sigma / alpha"
    levels.set(yscale="log", xlabel="evaluation", ylabel=f"noise level {level}", title="where the solver stands")
    offsets.set(xlabel="evaluation", ylabel="timestep told - timestep of the level", title="what the network is told")
    offsets.axhline(0, color="0.6", lw=0.8)
    for axes in (levels, offsets):
        axes.xaxis.get_major_locator().set_params(integer=True)
    levels.legend(fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, dpi=120))


def _sigmas(scheduler) -> Tensor:
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.detach().double()
    alphas_cumprod = scheduler.alphas_cumprod[scheduler.timesteps].double()  # DDIM
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def pick_columns(prompt_indices: list[int], count: int) -> list[int]:
    """Samples to show: the first of each of the first `count` different prompts."""
    first: dict[int, int] = {}
    for sample, prompt in enumerate(prompt_indices):
        first.setdefault(prompt, sample)
    return list(first.values())[:count]
