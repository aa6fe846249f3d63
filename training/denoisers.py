# SPDX-License-Identifier: Apache-2.0
"""The networks of a pipeline: finding them, recomputing them in the backward pass, counting their evaluations.

Networks are in inference mode and draw no random numbers, so that recomputation need not restore a random state.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


DENOISERS = ("unet", "transformer", "transformer_2", "denoiser", "model")
COMPANIONS = ("controlnet",)  # called beside a denoiser: part of the same evaluation
_MISSING = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set `owner.name` on the instance alone, and put back exactly what the instance held, or that it held nothing.

    Accelerate's offload hooks live in a module's instance-level `forward`; deleting ours would delete theirs.
    """
    before = owner.__dict__.get(name, _MISSING)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = before


def denoisers(pipe) -> dict[str, nn.Module]:
    """The networks that an evaluation calls, by component name, without companions such as a ControlNet.

    Raises:
        ValueError: if the pipeline has none under a known name.
    """
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    found = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no denoiser; its network must be a component named {' or '.join(DENOISERS)}"
        )
    return found


def companions(pipe) -> dict[str, nn.Module]:
    """The networks called beside a denoiser."""
    found = {name: getattr(pipe, name, None) for name in COMPANIONS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


@dataclass
class Evaluations:
    """Network evaluations since the rollout was made, times samples.

    One evaluation is all that one sampler step asks of the networks: guidance's doubled batch, or its two calls, and a
    ControlNet beside the U-Net count as one.

    Attributes:
        forward: in rollouts, with or without gradients.
        recomputed: forward again during a backward pass, because activations were not kept.
        backward: differentiated.
    """

    forward: float = 0
    recomputed: float = 0
    backward: float = 0


class Calls:
    """Denoiser calls of one rollout, converted into evaluations once it is known how many calls a step makes."""

    def __init__(self, evaluations: Evaluations, batch: int):
        self.evaluations = evaluations
        self.batch = batch
        self.forward = 0
        self.weight = 0.0  # evaluations (times samples) per call

    def finish(self, steps: int) -> None:
        """Book the forward calls of `steps` sampler steps; later calls are recomputations and backward passes."""
        self.evaluations.forward += steps * self.batch
        self.weight = steps * self.batch / max(self.forward, 1)  # compiled networks are not seen

    def recompute(self) -> None:
        self.evaluations.recomputed += self.weight

    def differentiate(self, _gradient: torch.Tensor) -> None:
        self.evaluations.backward += self.weight


def _tensors(output) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _instrumented(forward: Callable, calls: Calls | None, checkpointing: bool) -> Callable:
    """`forward`, recomputed in the backward pass and, unless `calls` is None, counted."""

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        runs = 0

        def run(*args, **kwargs):
            nonlocal runs
            runs += 1
            if runs > 1 and calls is not None:
                calls.recompute()
            return forward(*args, **kwargs)

        if calls is not None:
            calls.forward += 1
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if checkpointing:
            output = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        else:
            output = run(*args, **kwargs)
        first = next((t for t in _tensors(output) if t.requires_grad), None)
        if first is not None and calls is not None:
            first.register_hook(calls.differentiate)
        return output

    return wrapped


@contextmanager
def gradient_checkpointing(pipe) -> Iterator[None]:
    """Let the pipeline's networks recompute their blocks one by one, and put back what was set before.

    Within the recomputation of a whole call this leaves the activations of one block, and the inputs of the others. It has to
    last until the backward passes are done: recomputation must take the path that the forward pass took.

    Raises:
        ValueError: for networks without it.
    """
    networks = {**denoisers(pipe), **companions(pipe)}
    for name, network in networks.items():
        if not getattr(network, "_supports_gradient_checkpointing", False):
            raise ValueError(
                f"{type(network).__name__}, the pipeline's {name}, cannot checkpoint its blocks; drop gradient_checkpointing"
            )
    with ExitStack() as stack:
        for network in networks.values():
            for module in network.modules():
                if hasattr(module, "gradient_checkpointing"):
                    for setting in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                        # replaced by itself: what counts is that it is put back
                        stack.enter_context(replaced(module, setting, getattr(module, setting, None)))
            network.enable_gradient_checkpointing(_checkpointed_block)
        yield


def _checkpointed_block(block: Callable, *args):
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def instrumented(pipe, calls: Calls, checkpointing: bool) -> Iterator[None]:
    """Count the calls of the pipeline's networks and, with `checkpointing`, keep none of their activations.

    The recomputation runs the original `forward` after the patch is gone, so it need only last as long as the rollout.
    """
    with ExitStack() as stack:
        for module in denoisers(pipe).values():
            stack.enter_context(replaced(module, "forward", _instrumented(module.forward, calls, checkpointing)))
        for module in companions(pipe).values():
            stack.enter_context(replaced(module, "forward", _instrumented(module.forward, None, checkpointing)))
        yield
