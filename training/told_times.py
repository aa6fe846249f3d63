# SPDX-License-Identifier: Apache-2.0
"""What a pipeline makes of a timestep before its network embeds it.

Pipelines of the Flux family cast the time to the dtype of their latents, divide by 1000, and the network multiplies again, all in
bfloat16, which keeps 8 bits: of the times between 512 and 1000 every fourth. Others cast only once, or divide first, or keep
float32. Which it is, is read off a few evaluations.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from .denoisers import replaced


Told = Callable[[Tensor], Tensor]
LOW = (torch.bfloat16, torch.float16)


def _ways(dtype: torch.dtype) -> tuple[dict[str, Told], dict[str, Told]]:
    """From timesteps, float64, to what is embedded, where the network is given t, and where it is given t / 1000."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype)

    # 1000 is a Python number there, too: the quotient and the product are rounded to the tensor's dtype.
    whole = {"cast": lambda t: cast(t)}
    parts = {
        "cast, / 1000, * 1000": lambda t: cast(t) / 1000 * 1000,
        "cast, / 1000": lambda t: (cast(t) / 1000).double() * 1000,
        "/ 1000, cast, * 1000": lambda t: cast(t.float() / 1000) * 1000,
        "/ 1000, cast": lambda t: cast(t.float() / 1000).double() * 1000,
    }
    return tuple({name: lambda t, way=way: way(t).double() for name, way in ways.items()} for ways in (whole, parts))


def find_told(timesteps: Tensor, given: list[Tensor], embedded: list[float]) -> Told | None:
    """The rounding of timesteps that explains what was seen, applied until it changes nothing; None if there is none, or it is unknown.

    Args:
        timesteps: (evaluations,) of the scheduler.
        given: the network's `timestep` argument at each evaluation.
        embedded: input of its sinusoidal embedding, if there is one; else empty.
    """
    if len(given) != len(timesteps) or given[0].dtype not in LOW:
        return None
    timesteps = timesteps.detach().double().cpu()
    arguments = torch.tensor([float(value.flatten()[0]) for value in given], dtype=torch.float64)
    whole, parts = _ways(given[0].dtype)
    is_whole = bool((arguments - timesteps).abs().max() < 0.02 * timesteps.max())
    seen = arguments if is_whole else 1000 * arguments
    if len(embedded) == len(timesteps):
        seen = torch.tensor(embedded, dtype=torch.float64)
    for way in (whole if is_whole else parts).values():
        if torch.allclose(way(timesteps), seen, rtol=1e-6, atol=1e-9):
            return lambda t, way=way: way(way(way(t)))  # 502 becomes 504, which stays
    return None


@contextmanager
def watched(networks: list[nn.Module], stop: type[Exception]) -> Iterator[tuple[list[Tensor], list[float]]]:
    """What [`find_told`] wants: the networks' `timestep` and the input of their first sinusoidal embedding, from call to call.

    `stop` is raised in place of a call whose time is in high precision: nothing is rounded there.
    """
    given: list[Tensor] = []
    embedded: list[float] = []
    seen: list[float] = []

    def watching(forward):
        def run(*args, **kwargs):
            time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            if not isinstance(time, Tensor) or time.dtype not in LOW:
                raise stop
            given.append(time.detach())
            seen.clear()
            result = forward(*args, **kwargs)
            embedded.extend(seen[:1])
            return result

        return run

    hooks = [
        part.register_forward_pre_hook(lambda _part, inputs: seen.append(float(inputs[0].flatten()[0])))
        for network in networks
        for part in network.modules()
        if isinstance(part, Timesteps)
    ]
    try:
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(replaced(network, "forward", watching(network.forward)))
            yield given, embedded
    finally:
        for hook in hooks:
            hook.remove()
