# SPDX-License-Identifier: Apache-2.0
"""Several processes under `accelerate launch`: who computes what, what all get to know, and how a run ends that lost one.

The result of a run does not depend on how many processes it had: work is cut into parts by the samples alone, part k goes to
process k modulo their number, and what comes back is put together in the order of the parts. `accelerator` may be None where
there is one process.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, fsdp2_prepare_model, gather_object
from torch import nn

from .checkpoint import checkpoint_folders
from .denoisers import denoisers


Part = TypeVar("Part")
Result = TypeVar("Result")

# For Accelerator(kwargs_handlers=[...]). Longer than a process may work alone while the others wait (encoding of prompts, a last
# shard of videos), and short enough that a hung process ends the run.
COLLECTIVE_TIMEOUT = InitProcessGroupKwargs(timeout=timedelta(minutes=30))
# What gloo, NCCL and the store say when a process is gone or silent; all of them may raise a bare RuntimeError.
_OF_A_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|timed out", re.IGNORECASE)


def num_processes(accelerator) -> int:
    return 1 if accelerator is None else accelerator.num_processes


def is_main(accelerator) -> bool:
    """Whether this is the process that writes files."""
    return accelerator is None or accelerator.is_main_process


def is_sharded(accelerator) -> bool:
    """Whether the teacher's weights are spread over the processes; see [`shard`]."""
    # Not by `distributed_type`: it forgets FSDP as soon as a second Accelerator is made.
    return accelerator is not None and getattr(accelerator.state, "fsdp_plugin", None) is not None


# ---------------------------------------------------------------------- sharing work


def turns(parts: list[Part], accelerator) -> list[tuple[Part, bool]]:
    """This process's parts, in order, and whether each is its own.

    A sharded network gathers weights inside its forward pass, so all processes must call it equally often. Those that are
    through then do the last part once more, and must drop what comes out of it: it is not their own.
    """
    processes = num_processes(accelerator)
    own = parts[0 if accelerator is None else accelerator.process_index :: processes]
    missing = -(-len(parts) // processes) - len(own) if is_sharded(accelerator) else 0
    return [(part, True) for part in own] + [(part, False) for part in parts[-1:] * missing]


def share(parts: list[Part], compute: Callable[[Part], Result], accelerator) -> list[Result]:
    """`[compute(part) for part in parts]`, each computed by one process and known to all, bit for bit.

    `compute` must change nothing that a later part, or another process, would have to know, and return tensors on the CPU.
    """
    mine = [(compute(part), own) for part, own in turns(parts, accelerator)]
    everyones = [[result for result, own in mine if own]]
    processes = num_processes(accelerator)
    if processes > 1:
        everyones = gather_object(everyones)
    return [everyones[k % processes][k // processes] for k in range(len(parts))]


def on_main(function: Callable[[], Result], accelerator) -> Result:
    """What `function()` returns, called by the main process alone and known to all; a `ValueError` is raised by all."""
    if num_processes(accelerator) == 1:
        return function()
    result = [None, None]
    if is_main(accelerator):
        try:
            result[0] = function()
        except ValueError as error:
            result[1] = str(error)
    value, failure = broadcast_object_list(result)
    if failure is not None:
        raise ValueError(failure)
    return value


# ---------------------------------------------------------------------- losing a process


@contextmanager
def lost_process_message(folder: str | Path) -> Iterator[None]:
    """End with one sentence and a nonzero exit code, not with a traceback, when another process is gone or silent.

    Such a loss shows as an error in a collective or, where a process waits in one for ever, as the SIGTERM with which the
    launcher ends the survivors. Without a launcher that started several processes nothing is changed.

    Args:
        folder: where checkpoints are looked for, at any depth.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    said = threading.Lock()

    def say(reason: str) -> None:
        if said.acquire(blocking=False):
            print(f"another process was lost{reason}; {_what_is_left(Path(folder))}", file=sys.stderr, flush=True)

    with _sigterm(lambda: say(", or all were told to end")):
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or _OF_A_COLLECTIVE.search(str(error))):
                raise
            say(f" ({str(error).partition(chr(10))[0]})")
            raise SystemExit(1) from None


def _what_is_left(folder: Path) -> str:
    places = {file.parent for file in folder.rglob("checkpoint-*")}
    last = [checkpoint_folders(place)[-1:] for place in places]
    newest = max((path for found in last for path in found), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return f"there is no checkpoint in {folder}: start again with the same arguments"
    step = newest.name.removeprefix("checkpoint-")
    return f"checkpoints up to step {step} are in {newest.parent}: start again with --resume_from_checkpoint latest"


@contextmanager
def _sigterm(say: Callable[[], None]) -> Iterator[None]:
    """On SIGTERM, `say()` and end at once.

    Python's handlers run between two instructions of the main thread, never while that waits inside a collective. So a
    thread waits for the number of the signal, which Python's C code writes to the wake-up descriptor without delay.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                say()
                os._exit(128 + signal.SIGTERM)
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)


# ---------------------------------------------------------------------- a teacher larger than one device


def shard(pipe: Any, accelerator) -> None:
    """Under FSDP, spread the denoisers' weights over the processes' devices, in place; all else moves whole to this one's.

    Load the pipeline to the CPU before (with `is_sharded`). Weights are frozen here, and each block's are gathered while it is
    evaluated or differentiated. `Accelerator.prepare` wants an optimizer of the weights, which there is none of; this is what
    it calls.

    Raises:
        ValueError: for the first version of FSDP, or a network whose blocks are not known.
    """
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            "frozen weights are sharded by FSDP2 only; set fsdp_version: 2, as training/accelerate/fsdp.yaml"
        )
    # The pipeline has its dtype. Accelerate's policy would also round what networks are told, their time for one, to bfloat16.
    plugin.mixed_precision_policy = None
    networks = denoisers(pipe)
    for component in pipe.components.values():
        if isinstance(component, nn.Module) and not any(component is network for network in networks.values()):
            component.to(accelerator.device)
    given = plugin.transformer_cls_names_to_wrap
    for name, network in networks.items():
        network.requires_grad_(False)
        kinds = {type(part).__name__ for part in network.modules()}
        blocks = (
            given or getattr(network, "_no_split_modules", None) or getattr(network, "_repeated_blocks", None) or ()
        )
        plugin.transformer_cls_names_to_wrap = [kind for kind in blocks if kind in kinds]
        if not plugin.transformer_cls_names_to_wrap:
            raise ValueError(
                f"it is not known into which blocks {name} can be split; name their classes as "
                "fsdp_transformer_layer_cls_to_wrap in the config file of accelerate launch"
            )
        fsdp2_prepare_model(accelerator, network)
    plugin.transformer_cls_names_to_wrap = given
