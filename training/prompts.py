# SPDX-License-Identifier: Apache-2.0
"""Prompts: from a file, or from a data set on the Hub or in a folder."""

import csv
import io
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets

from .seeds import parse_seeds


PROMPT_ARGUMENTS = (
    *("prompts_file", "dataset_name", "dataset_config_name", "dataset_split"),
    *("caption_column", "max_prompts", "class_labels"),
)
USUAL_COLUMNS = ("caption", "text", "prompt")


def add_prompt_arguments(parser) -> None:
    """`--prompts_file`, `--dataset_name` and the others, to a parser or a group of one; what is not given is None."""
    parser.add_argument(
        "--prompts_file",
        help="text, one prompt (or class label) a line; .csv or .tsv; .jsonl; .json, also COCO captions",
    )
    parser.add_argument("--class_labels", help="of class-conditional pipelines, in place of prompts: 0-9,20")
    parser.add_argument("--dataset_name", help="instead: Hub id or folder of a data set with captions; '' is none")
    parser.add_argument("--dataset_config_name", help="of the data set; default: its only or default one")
    parser.add_argument("--dataset_split", help="of the data set (default: train)")
    parser.add_argument(
        "--caption_column",
        help=f"column of the table or data set (default: {', '.join(USUAL_COLUMNS)}, or the only one)",
    )
    parser.add_argument(
        "--max_prompts",
        type=int,
        help="use only the first so many (default: all; of a data set, as many as are needed)",
    )


def prompts_of(args: Namespace, needed: int | None) -> list[str] | None:
    """The prompts or class labels that parsed arguments name, or None if they name none.

    Args:
        needed: of a data set, read so many prompts if `--max_prompts` says nothing else; None: all.

    Raises:
        ValueError: if more than one source is given, or as in [`read_prompts`], [`read_dataset`] and [`parse_seeds`].
    """
    if args.max_prompts is not None and args.max_prompts < 1:
        raise ValueError(f"--max_prompts must be at least 1, got {args.max_prompts}")
    if args.prompts_file and args.dataset_name:
        raise ValueError(
            "--prompts_file and --dataset_name are both given; drop one of them (--dataset_name= takes a recipe's away)"
        )
    if args.class_labels is not None:
        if args.prompts_file or args.dataset_name:
            raise ValueError("--class_labels and prompts are both given; drop one of them")
        return [str(label) for label in parse_seeds(args.class_labels, "class_labels")]
    if args.prompts_file:
        return read_prompts(args.prompts_file, caption_column=args.caption_column, max_prompts=args.max_prompts)
    if args.dataset_name:
        return read_dataset(
            args.dataset_name,
            config_name=args.dataset_config_name,
            split=args.dataset_split or "train",
            caption_column=args.caption_column,
            max_prompts=needed if args.max_prompts is None else args.max_prompts,
        )
    return None


def read_dataset(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    caption_column: str | None = None,
    max_prompts: int | None = None,
) -> list[str]:
    """Prompts of a data set that `datasets.load_dataset` knows, in its order; empty ones are skipped.

    Rows are streamed and reading ends with the last prompt, so that a large set is not fetched whole. Only the captions are
    decoded, no images. Of a list of captions the first is taken.

    Raises:
        ValueError: if the data set cannot be read, has no such column, or holds no prompt.
    """
    place = f"the split {split!r} of the data set {name!r}"
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(
            f"the data set {name!r} is neither an existing folder nor a Hub id of the form owner/name; check --dataset_name"
        )
    try:
        rows = datasets.load_dataset(name, config_name, split=split, streaming=True)
        # The columns of some kinds of files are known with the first row only. Those kinds hold no images to decode.
        columns = list(rows.column_names or next(iter(rows), {}))
    except Exception as error:  # its own kinds, pyarrow's, the Hub client's
        raise _unreadable(place, error) from error
    if not columns:
        raise ValueError(f"{place} holds no row; name another --dataset_split or --dataset_name")
    column = _column(place, columns, caption_column)
    prompts = []
    cells = (row[column] for row in rows.select_columns(column))
    while max_prompts is None or len(prompts) < max_prompts:
        try:
            cell = next(cells)
        except StopIteration:
            break
        except Exception as error:
            raise _unreadable(place, error) from error
        prompts += _captions(place, column, cell)
    if not prompts:
        raise ValueError(f"the column {column!r} of {place} holds no prompt; name another --caption_column")
    return prompts


def _unreadable(place: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(
        f"cannot read {place}: {reason}; check --dataset_name, --dataset_config_name, --dataset_split and the connection"
    )


def read_prompts(path: str | Path, *, caption_column: str | None = None, max_prompts: int | None = None) -> list[str]:
    """Prompts of a file, in its order.

    Args:
        path: `.json`: a list of strings, a mapping from names to one or several captions, or COCO's annotations; `.jsonl`:
            strings, or objects with a `caption_column`; `.csv` and `.tsv`: `caption_column`; anything else: text, one prompt
            a line. Empty prompts are dropped.
        caption_column: defaults to "caption", else "text" or "prompt", else the only column.
        max_prompts: keep the first so many.

    Raises:
        ValueError: if the file cannot be read, is of none of these forms, or holds no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts file {str(path)!r}: {error}") from error
    suffix = path.suffix.lower()
    if suffix == ".json":
        prompts = _from_json(path, text)
    elif suffix == ".jsonl":
        prompts = _from_json_lines(path, text, caption_column)
    elif suffix in (".csv", ".tsv"):
        prompts = _from_table(path, text, "\t" if suffix == ".tsv" else ",", caption_column)
    else:
        prompts = text.split("\n")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if max_prompts is not None:
        if max_prompts < 1:
            raise ValueError(f"max_prompts must be at least 1, got {max_prompts}")
        prompts = prompts[:max_prompts]
    if not prompts:
        raise ValueError(f"the prompts file {str(path)!r} holds no prompt; give one a line")
    return prompts


def _from_json(path: Path, text: str) -> list[str]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the prompts file {str(path)!r} is not valid JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = [
            annotation.get("caption") if isinstance(annotation, dict) else None
            for annotation in content["annotations"]
        ]
    elif isinstance(content, dict):
        content = [
            caption for value in content.values() for caption in (value if isinstance(value, list) else [value])
        ]
    if not isinstance(content, list) or not all(isinstance(prompt, str) for prompt in content):
        raise ValueError(
            f"the prompts file {str(path)!r} is none of: a list of strings, a mapping from names to captions, "
            'COCO\'s {"annotations": [{"caption": ...}]}; write one of these'
        )
    return content


def _from_json_lines(path: Path, text: str, column: str | None) -> list[str]:
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"the prompts file {str(path)!r} has a line that is not valid JSON: {error}") from error
    place = f"the prompts file {str(path)!r}"
    if all(isinstance(row, str) for row in rows):
        return rows
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{place} has lines that are neither all strings nor all objects; write one of these")
    column = _column(place, list(rows[0]), column)
    return [prompt for row in rows for prompt in _captions(place, column, row.get(column))]


def _from_table(path: Path, text: str, delimiter: str, column: str | None) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    column = _column(f"the prompts file {str(path)!r}", list(rows.fieldnames or []), column)
    return [row[column] or "" for row in rows]


def _column(place: str, columns: list[str], column: str | None) -> str:
    if column is None:
        usual = [name for name in USUAL_COLUMNS if name in columns]
        column = usual[0] if usual else columns[0] if len(columns) == 1 else None
    if column not in columns:
        wanted = "--caption_column" if column is None else f"the --caption_column {column!r}"
        raise ValueError(f"{place} has the columns {columns}; {wanted} must name one of them")
    return column


def _captions(place: str, column: str, cell: Any) -> list[str]:
    """The caption of a cell, or the first of its captions; none if there is none."""
    if isinstance(cell, list):
        cell = cell[0] if cell else None
    if cell is not None and not isinstance(cell, str):
        raise ValueError(
            f"the column {column!r} of {place} holds {type(cell).__name__}, not text; name another --caption_column"
        )
    return [cell.strip()] if cell and cell.strip() else []
