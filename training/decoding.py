# SPDX-License-Identifier: Apache-2.0
"""From a pipeline's end state to pixels, differentiably: what its `__call__` does after the sampling loop."""

import inspect

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def decode(pipe, latents: Tensor, *, height: int | None = None, width: int | None = None) -> Tensor:
    r"""Pixels in about [-1, 1].

    With the autoencoder's constants $z = \mathrm{latents}\cdot\mathrm{std}/\mathrm{scaling} + \mathrm{mean} +
    \mathrm{shift}$, of which each has those that its config names. One in float16 whose config says `force_upcast` (SDXL's
    overflows) decodes in float32. A pipeline without an autoencoder samples pixels.

    Args:
        latents: end state, (batch, channels, ...), or packed tokens where the pipeline has an `_unpack_latents` that takes a size.
        height, width: pixels, only for packed tokens; default: the pipeline's own.

    Raises:
        ValueError: for packed tokens that cannot be unpacked from a size alone.
    """
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if vae is None:
        return latents
    latents = _unpacked(pipe, latents, height, width)
    config = vae.config
    if config.get("latents_std") is not None:
        latents = latents * _per_channel(config["latents_std"], latents)
    latents = latents / (config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is not None:
        latents = latents + _per_channel(config["latents_mean"], latents)
    latents = latents + (config.get("shift_factor") or 0.0)
    dtype = next(vae.parameters()).dtype
    upcast = dtype == torch.float16 and bool(config.get("force_upcast"))
    latents = latents.to(torch.float32 if upcast else dtype)
    decoded = _decoded_in_float32 if upcast else _decoded
    if torch.is_grad_enabled() and latents.requires_grad:
        images = checkpoint(decoded, vae, latents, use_reentrant=False, preserve_rng_state=False)
    else:
        images = decoded(vae, latents)
    # Image pipelines on a video autoencoder (Qwen-Image) keep its one frame.
    return images[:, :, 0] if images.ndim == 5 and images.shape[2] == 1 else images


def _decoded(vae, latents: Tensor) -> Tensor:
    if latents.ndim == 5 and isinstance(vae, AutoencoderKL):  # AnimateDiff: an image autoencoder, frame by frame
        frames = vae.decode(latents.transpose(1, 2).flatten(0, 1), return_dict=False)[0]
        return frames.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)
    return vae.decode(latents, return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return _decoded(self.vae, latents)


def _decoded_in_float32(vae, latents: Tensor) -> Tensor:
    # With copies of the weights. The backward pass recomputes this and needs its weights to stay as they were, so the
    # autoencoder itself is not changed and changed back.
    decoder = _Decoder(vae)
    weights = {name: weight.float() for name, weight in decoder.state_dict().items() if weight.is_floating_point()}
    return functional_call(decoder, weights, (latents,))


def _per_channel(values, like: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _unpacked(pipe, latents: Tensor, height: int | None, width: int | None) -> Tensor:
    if latents.ndim >= 4:
        return latents
    unpack = getattr(pipe, "_unpack_latents", None)
    arguments = list(inspect.signature(unpack).parameters) if unpack is not None else []
    if arguments != ["latents", "height", "width", "vae_scale_factor"]:
        raise ValueError(
            f"the end state of {type(pipe).__name__}, shape {tuple(latents.shape)}, cannot be unpacked from an image size; "
            "compare latents instead of pixels"
        )
    if height is None or width is None:
        if not hasattr(pipe, "default_sample_size"):
            raise ValueError(
                f"{type(pipe).__name__} packs its latents; give the rollout height and width to decode them"
            )
        default = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = height or default, width or default
    return unpack(latents, height, width, pipe.vae_scale_factor)
