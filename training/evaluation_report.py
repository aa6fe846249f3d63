# SPDX-License-Identifier: Apache-2.0
"""What one looks at after an evaluation: `table.md` and pictures, drawn from `results.json` alone (and the images beside it).

    python -m training.evaluation_report FOLDER

The results, as [`training.evaluate`] writes them:

    facts       plain facts; those read here:
                path             kind of the noise path ("flow", "vp_discrete", ...): what a level of a schedule is
                shown            [{"seed": 0, "prompt": "a fox" or null}, ...]: the samples whose images are kept, in order
    metrics     {name: {"label", "higher_is_better", "scale", "per_sample"}}; values are multiplied by `scale` where they are shown
    subject     the name that the others are compared with
                teacher_values   {metric: value} of the teacher's own samples, for metrics that compare with no teacher
                command          how it was made
    warnings    sentences
    published   what papers report for the same data set, and how their measurement differs, where that was asked for;
                as [`training.published_results.record`] makes it
    absent      [{"name", "nfe", "reason"}]
    rows        [{"name", "setting", "nfe", "evaluations", "schedule", "values", "local_errors", ...}]; `nfe` is null for image files
      schedule      {"levels": z at the nfe + 1 ends of the steps, "told": z at the nfe times told to the network} or null
      values        {metric: {"value", "interval", "difference", "blocks"}}; a null value is one that is not finite
      local_errors  one for each step, or null

Images lie in images/teacher/<seed>.png and images/<name>-<nfe>/<seed>.png, or in the folder that a row's "images" names.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .arguments import usage_errors
from .evaluation_plots import local_errors_figure, quality_figure, samples_figure, schedules_figure
from .evaluation_table import markdown, short_table
from .published_results import published_lines, published_section
from .whole_files import write_whole


__all__ = ["short_table", "write_report"]

RESULTS = "results.json"
NEEDED = ("facts", "metrics", "subject", "warnings", "absent", "rows")
DPI = 130


def write_report(folder: Path, results: dict, nfe: int | None = None) -> str:
    """Writes `table.md` and what there is to draw of `quality`, `schedules`, `local_errors` and `samples` (.png); returns the table.

    A picture for which the results hold nothing is removed if it is there from before.

    Args:
        nfe: whose samples are shown; without, the second smallest.

    Raises:
        ValueError: if `nfe` was not evaluated, or there are no metrics.
    """
    text = "\n".join([markdown(results), *published_section(results)])
    figures = {
        "quality": quality_figure(results),
        "schedules": schedules_figure(results),
        "local_errors": local_errors_figure(results),
        "samples": samples_figure(folder, results, nfe),
    }
    write_whole(folder / "table.md", lambda file: file.write_text(text, encoding="utf-8"))
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, partial(figure.savefig, dpi=DPI))
    return text


def read_results(folder: Path) -> dict:
    """The content of a folder's `results.json`.

    Raises:
        ValueError: if there is none, or it is no evaluation's.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}; name the --output_dir of an evaluation") from error
    missing = [key for key in NEEDED if not isinstance(results, dict) or key not in results]
    if missing:
        raise ValueError(f"{str(path)!r} is not of an evaluation: it has no {', '.join(missing)}")
    return results


def parser() -> argparse.ArgumentParser:
    command_line = argparse.ArgumentParser("evaluation_report", description="Draw an evaluation's report again.")
    command_line.add_argument("folder", type=Path, help=f"an evaluation's --output_dir, which holds {RESULTS}")
    command_line.add_argument("--nfe", type=int, help="whose samples are shown; default: the second smallest")
    return command_line


def main(argv: Sequence[str] | None = None) -> None:
    command_line = parser()
    args = command_line.parse_args(argv)
    with usage_errors(command_line):
        results = read_results(args.folder)
        write_report(args.folder, results, args.nfe)
    print("\n".join([short_table(results), *published_lines(results)]))


if __name__ == "__main__":
    main()
