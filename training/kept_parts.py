# SPDX-License-Identifier: Apache-2.0
"""Tensors computed from all training pairs, and kept on disk.

The work is cut into parts by the samples alone, each part kept in a file as soon as it is there, and put together in the order of the
samples. So a run that was killed continues, and the number of processes does not matter.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .learner import Problem, split
from .processes import on_main, turns
from .whole_files import write_whole


def kept(
    file: Path,
    request: dict,
    problem: Problem,
    batch_size: int,
    compute: Callable[[Tensor, dict], dict[str, Tensor]],
    together: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
    description: str,
) -> dict[str, Tensor]:
    """What `file` holds if the same was requested, else `together` of what `compute` returns for all parts of the training pairs.

    Args:
        request: what decides the result, as plain JSON.
        batch_size: training pairs of a part.
        compute: tensors of a part, from its noise and conditioning.
    """
    accelerator, text = problem.accelerator, json.dumps(request, sort_keys=True)
    found = on_main(lambda: _read(file, text), accelerator)
    if found is not None:
        return found
    work = file.with_name(f".parts-{hashlib.sha256(text.encode()).hexdigest()[:12]}")
    parts = split(range(len(problem.train)), batch_size)
    part_file = [work / f"{k:06d}.safetensors" for k in range(len(parts))]
    missing = on_main(lambda: [k for k, part in enumerate(part_file) if not part.is_file()], accelerator)
    progress = tqdm(
        turns(missing, accelerator), desc=description, unit="batch", disable=not accelerator.is_local_main_process
    )
    for k, own in progress:
        noise, _, conditioning = problem.train.batch(list(parts[k]), problem.device)
        tensors = {name: value.contiguous() for name, value in compute(noise, conditioning).items()}
        if own:
            write_whole(part_file[k], lambda temporary: save_file(tensors, temporary))
    accelerator.wait_for_everyone()

    def finish() -> dict[str, Tensor]:
        if (by_another := _read(file, text)) is not None:  # another run has been faster, and removed the parts
            return by_another
        result = together([load_file(part) for part in part_file])
        write_whole(file, lambda temporary: save_file(result, temporary, metadata={"request": text}))
        for stale in file.parent.glob(".parts-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return result

    return on_main(finish, accelerator)


def _read(file: Path, request: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("request") != request:
                return None
            return {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (OSError, SafetensorError):  # none, or a damaged one
        return None
