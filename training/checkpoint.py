# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of learning: folders `checkpoint-<step>` that are whole or absent."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch


STATE = "learner.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(folder: Path) -> list[Path]:
    """All finished checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


class Checkpoints:
    """Writes, prunes and reads them, in one process: what it reads, others must be told.

    Args:
        folder: where the folders lie; None: nothing is written.
        total_limit: how many are kept, the newest; None: all.
    """

    def __init__(self, folder: str | Path | None, total_limit: int | None):
        self.folder = None if folder is None else Path(folder)
        self.total_limit = total_limit
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be at least 1, got {total_limit}")

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run, which would be taken for the newest of this one."""
        for old in [] if self.folder is None else checkpoint_folders(self.folder):
            shutil.rmtree(old)

    def save(self, step: int, state: dict[str, Any]) -> None:
        if self.folder is None:
            return
        final, partial = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        torch.save(state, partial / STATE)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if self.total_limit is not None:
            for old in checkpoint_folders(self.folder)[: -self.total_limit]:
                shutil.rmtree(old)

    def find(self, name: str | Path | None) -> Path | None:
        """The folder meant by `--resume_from_checkpoint`; "latest" without any is a fresh start.

        Raises:
            ValueError: if there is no such checkpoint.
        """
        if name is None:
            return None
        if str(name) == "latest":
            found = [] if self.folder is None else checkpoint_folders(self.folder)
            return found[-1] if found else None
        candidates = [Path(name)] + ([self.folder / name] if self.folder is not None else [])
        for candidate in candidates:
            if (candidate / STATE).is_file():
                return candidate
        raise ValueError(f"{name} is no checkpoint of learning; give a checkpoint-<step> folder or 'latest'")

    def load(self, name: str | Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The state saved there, after checking that it is of the same run; a `ValueError` otherwise."""
        folder = self.find(name)
        if folder is None:
            return None
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        for key, value in identity.items():
            if state["identity"].get(key) != value:
                raise ValueError(
                    f"{folder} belongs to another run: its {key} is {state['identity'].get(key)}, this run's {value}; resume "
                    "with the arguments of the first run, or start anew without resume_from_checkpoint"
                )
        return state
