# SPDX-License-Identifier: Apache-2.0
"""Lists of seeds, or of class labels, on a command line: `0-9,20,30-39`."""

import re

from .teacher_set import LARGEST_SEED


def parse_seeds(text: str, name: str = "seeds") -> list[int]:
    """The numbers of comma-separated ones and ranges, whose ends belong to them, in the order in which they are written.

    Args:
        name: of the argument, for messages.

    Raises:
        ValueError: for anything else, a range that runs backwards, a number beyond 2**63 - 1, or one that is given twice.
    """
    numbers: list[int] = []
    for part in str(text).split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None:
            raise ValueError(
                f"--{name} {text!r} cannot be read at {part!r}; write numbers and ranges as in 0-9,20,30-39"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"--{name}: the range {part.strip()} runs backwards; write {last}-{first}")
        if last > LARGEST_SEED:
            raise ValueError(f"--{name}: {last} is too large; the largest is {LARGEST_SEED}")
        if last - first >= 100_000_000:
            raise ValueError(f"--{name}: the range {part.strip()} holds more than 100 million; write fewer")
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        seen: set[int] = set()
        twice = next(number for number in numbers if number in seen or seen.add(number))
        raise ValueError(f"--{name} {text!r} gives {twice} more than once; give each once")
    return numbers


def written(numbers: list[int]) -> str:
    """The shortest text that [`parse_seeds`] reads as `numbers`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
