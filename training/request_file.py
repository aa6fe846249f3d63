# SPDX-License-Identifier: Apache-2.0
"""What decides the content of a folder that is filled bit by bit: written first, and compared when a run continues."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .whole_files import write_whole


YOUNGER = ("scheduler_digest", "encoders_digest")  # entries that earlier versions did not write


def digest(value) -> str:
    """Sixteen hexadecimal digits of plain JSON; what JSON has not goes in as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differing(made: dict[str, Any], request: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """Which of these entries differ, but for those that a folder made by an earlier version does not record."""
    unrecorded = [key for key in YOUNGER if key not in made]
    return sorted(key for key in keys if made.get(key) != request.get(key) and key not in unrecorded)


def begin(folder: Path, request: dict[str, Any]) -> None:
    """Write `request.json`, or find it the same.

    Raises:
        ValueError: if the folder was made with another request, naming what differs, or cannot be written.
    """
    file, request = folder / "request.json", json.loads(json.dumps(request))
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        made = None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(file)!r} ({error}); delete it, or choose another --output_dir") from error
    if made is None:
        text = json.dumps(request, indent=2, ensure_ascii=False) + "\n"
        try:
            write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"cannot write to {str(folder)!r}: {error.strerror or error}; choose another --output_dir"
            ) from error
        return
    different = differing(made, request, {*made, *request})
    if different:
        key = different[0]
        raise ValueError(
            f"{str(folder)!r} was made with another {key}: {made.get(key)!r}, now {request.get(key)!r}; repeat its arguments to "
            "continue it, or choose another --output_dir"
        )
