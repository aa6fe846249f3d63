# SPDX-License-Identifier: Apache-2.0
"""Hooks on a pipeline's networks: what the denoiser's bottleneck says, and network times of their own for all samples.

A scheduler sees neither: a pipeline hands its networks one time for the whole batch, and shows its scheduler their output alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


DENOISERS = ("unet", "denoiser", "model", "transformer")
COMPANIONS = ("controlnet",)  # called beside the denoiser, with the same time
BOTTLENECK = "mid_block"
GUIDANCE = (1, 2)  # batch of the network over that of the samples


def bottleneck_of(pipe) -> tuple[nn.Module, nn.Module]:
    """A pipeline's denoiser, and the module whose output is its bottleneck.

    Raises:
        ValueError: if it has none.
    """
    networks = [getattr(pipe, name, None) for name in DENOISERS]
    networks = [network for network in networks if isinstance(network, nn.Module)]
    for network in networks:
        if isinstance(getattr(network, BOTTLENECK, None), nn.Module):
            return network, getattr(network, BOTTLENECK)
    name = type(networks[0]).__name__ if networks else "no denoiser"
    raise ValueError(
        f"{type(pipe).__name__} has {name}, without a bottleneck ({BOTTLENECK}) to predict stages from; use static schedules, which "
        "training.train_amed learns with --form static"
    )


class Attachment:
    """Watches the bottleneck of a pipeline's denoiser, and replaces the time given to it and to every ControlNet.

    Each network gets a vector of times in every call, so that a compiled one sees one shape.

    Args:
        timesteps: (batch,) or (1,) times for a network call that was given this one; the samples' batch is theirs, and guidance's
            copies of it get them again.

    Raises:
        ValueError: for a pipeline without a bottleneck.
    """

    def __init__(self, pipe, timesteps: Callable[[Tensor], Tensor]):
        self.network, bottleneck = bottleneck_of(pipe)
        self.calls = 0  # of the denoiser since the last step
        self._samples = 0  # in the last of these
        self._companions = 0  # calls of ControlNets since
        self._foreign = False  # whether it got what a ControlNet that is not attached returned
        self._pipe, self._scheduler = pipe, pipe.scheduler
        self._timesteps = timesteps
        self._means: Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        companions = [getattr(pipe, name, None) for name in COMPANIONS]
        # Not compiled with the network, which would be compiled again whenever what the scheduler knows has changed.
        tell = torch.compiler.disable(self._tell)
        try:
            self._undo.append(bottleneck.register_forward_hook(self._see).remove)
            for module in (self.network, *(part for part in companions if isinstance(part, nn.Module))):
                self._undo.append(module.register_forward_pre_hook(tell, with_kwargs=True).remove)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the networks back as they were."""
        while self._undo:
            self._undo.pop()()
        self._means = None

    def _see(self, _module, _arguments, output) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(
                f"the bottleneck of {type(self.network).__name__} is no (batch, channels, height, width) tensor; use static schedules"
            )
        # No condition and no counter: this is compiled with the network.
        self._means = output.detach().mean(1)

    def _tell(self, module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        if self._pipe.scheduler is not self._scheduler:  # exchanged without detaching; this one's times are not for it
            return arguments, keywords
        sample = keywords["sample"] if "sample" in keywords else arguments[0]
        if module is self.network:
            self.calls, self._samples = self.calls + 1, len(sample)
            self._foreign = keywords.get("mid_block_additional_residual") is not None and not self._companions
            self._companions = 0
        else:
            self._companions += 1
        given = keywords["timestep"] if "timestep" in keywords else arguments[1]
        given = given if isinstance(given, Tensor) else torch.tensor(float(given))
        times = self._timesteps(given)
        copies, rest = divmod(len(sample), len(times))
        if rest:
            raise ValueError(
                f"{type(module).__name__} is called with {len(sample)} samples where {len(times)} are sampled; AMED's stages for "
                "each sample allow guidance by a doubled batch only, use static schedules"
            )
        times = times.repeat(copies).to(sample.device)
        if "timestep" in keywords:
            return arguments, {**keywords, "timestep": times}
        return (arguments[0], times, *arguments[2:]), keywords

    def features(self, batch: int) -> Tensor:
        """(batch, height, width): the bottleneck's means over channels in the last call, under guidance of the conditional half.

        Raises:
            ValueError: if the bottleneck was not seen, or the pipeline guides in another way than by a doubled batch.
        """
        means, calls = self._means, self.calls
        self._means, self.calls = None, 0
        if means is None:
            raise ValueError(
                "the denoiser's bottleneck was not seen; attach again after exchanging networks, and before the first call of a "
                "compiled one (or call torch.compiler.reset() then)"
            )
        if len(means) != self._samples:
            raise ValueError(
                f"the bottleneck of {type(self.network).__name__} has {len(means)} entries for {self._samples} samples, such as "
                "frames of a video; use static schedules"
            )
        if self._foreign:
            raise ValueError(
                "the denoiser is called with a ControlNet that is not attached; call scheduler.attach(pipe) with the pipeline that has it"
            )
        if getattr(self._pipe, "do_perturbed_attention_guidance", False):
            raise ValueError(
                "the pipeline guides by perturbed attention, which AMED's stages for each sample do not allow; set pag_scale=0, or "
                "use static schedules"
            )
        copies, rest = divmod(len(means), batch)
        if rest or copies not in GUIDANCE or calls > 1:
            how = (
                f"calls its network {calls} times a step" if calls > 1 else f"has {len(means)} samples in its network"
            )
            raise ValueError(
                f"the pipeline {how} for {batch} samples; AMED's stages for each sample allow no guidance, or guidance by one call "
                "with a doubled batch: use static schedules"
            )
        return means[-batch:]
