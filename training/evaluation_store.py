# SPDX-License-Identifier: Apache-2.0
"""What an evaluation has measured so far, on disk, so that it can be stopped, continued and extended.

    work/<key>/part-000012.safetensors    columns of the samples of one batch: metrics (n,) float64, features (n, d) float32, ...
    work/<key>/score-<digest>.json        a number that follows from all parts

`key` names what was sampled, whatever it is called in tables. A file is written whole or not at all, and by one process.
"""

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .features import CHUNK_SIZE
from .whole_files import write_whole


class Store:
    """Columns of samples, in parts of `part_size` consecutive ones."""

    def __init__(self, folder: str | Path, samples: int, part_size: int):
        self.folder, self.samples, self.part_size = Path(folder), samples, part_size

    def __len__(self) -> int:
        return self.samples

    @property
    def num_parts(self) -> int:
        return -(-self.samples // self.part_size)

    def positions(self, part: int) -> range:
        return range(part * self.part_size, min((part + 1) * self.part_size, self.samples))

    def _file(self, key: str, part: int) -> Path:
        return self.folder / key / f"part-{part:06d}.safetensors"

    def columns(self, key: str, part: int) -> set[str]:
        """Names of the columns that are there; of a damaged file none."""
        try:
            with safe_open(self._file(key, part), "pt") as file:
                return set(file.keys())
        except (OSError, SafetensorError):
            return set()

    def read(self, key: str, part: int, column: str) -> Tensor:
        with safe_open(self._file(key, part), "pt") as file:
            return file.get_tensor(column)

    def write(self, key: str, part: int, columns: dict[str, Tensor]) -> None:
        """Add columns to a part; those of the same name are replaced."""
        file = self._file(key, part)
        known = load_file(file) if self.columns(key, part) else {}
        tensors = {name: value.contiguous().clone() for name, value in {**known, **columns}.items()}
        write_whole(file, lambda path: save_file(tensors, path))

    def column(self, key: str, name: str) -> Tensor:
        """A column of all samples, in their order."""
        return torch.cat([self.read(key, part, name) for part in range(self.num_parts)])

    def score(self, key: str, name: str) -> Any | None:
        """What [`write_score`] wrote; None if nothing, or the file is damaged."""
        try:
            return json.loads((self.folder / key / f"score-{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_score(self, key: str, name: str, value: Any) -> None:
        text = json.dumps(value)
        write_whole(self.folder / key / f"score-{name}.json", lambda file: file.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class PartFeatures:
    """A matrix column of the samples `positions`, read from its parts as it is asked for: `CHUNK_SIZE` rows or one part at a time."""

    store: Store
    key: str
    name: str
    positions: range

    def __len__(self) -> int:
        return len(self.positions)

    def chunks(self) -> Iterator[Tensor]:
        # Parts may be of few rows, and what is done with a chunk costs much however few it has.
        size = self.store.part_size
        together = max(1, CHUNK_SIZE // size)
        parts = range(self.positions.start // size, -(-self.positions.stop // size))
        for k in range(0, len(parts), together):
            block = parts[k : k + together]
            rows = torch.cat([self.store.read(self.key, part, self.name) for part in block])
            start = block[0] * size
            yield rows[max(self.positions.start - start, 0) : self.positions.stop - start]

    def select(self, indices: Sequence[int]) -> Tensor:
        """Rows `indices`, in that order, however often each; each part is read once."""
        wanted = [self.positions[int(k)] for k in indices]
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        ordered = [wanted[k] for k in order]
        found: list[Tensor] = []
        for part in range(self.store.num_parts):
            rows = self.store.positions(part)
            inside = ordered[bisect.bisect_left(ordered, rows.start) : bisect.bisect_left(ordered, rows.stop)]
            if inside:
                found.append(self.store.read(self.key, part, self.name)[[k - rows.start for k in inside]])
        selected = torch.cat(found)
        result = torch.empty_like(selected)
        result[order] = selected
        return result
