# SPDX-License-Identifier: Apache-2.0
"""Reading prompts from files."""

import csv
import json
from pathlib import Path


def read_prompts(path: str | Path, *, caption_column: str | None = None, max_prompts: int | None = None) -> list[str]:
    """Prompts of a file, in its order.

    Args:
        path: `.json`: a list of strings, a mapping from names to one or several captions, or COCO's annotations;
            `.csv` and `.tsv`: `caption_column`; anything else: text, one prompt a line. Empty prompts are dropped.
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
    elif suffix in (".csv", ".tsv"):
        prompts = _from_table(path, text, "\t" if suffix == ".tsv" else ",", caption_column)
    else:
        prompts = text.splitlines()
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


def _from_table(path: Path, text: str, delimiter: str, column: str | None) -> list[str]:
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    columns = list(rows.fieldnames or [])
    if column is None:
        usual = [name for name in ("caption", "text", "prompt") if name in columns]
        column = usual[0] if usual else columns[0] if len(columns) == 1 else None
    if column not in columns:
        wanted = "--caption_column" if column is None else f"the column {column!r}"
        raise ValueError(f"the prompts file {str(path)!r} has the columns {columns}; {wanted} must name one of them")
    return [row[column] or "" for row in rows]
