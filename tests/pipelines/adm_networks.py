# SPDX-License-Identifier: Apache-2.0
"""Networks of guided-diffusion and consistency models on which the original code was run, for several tests.

In float64 the golden outputs have phases from stored float32 frequencies, hence [`StoredFrequencies`].
"""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


GOLDEN = Path(__file__).parents[1] / "golden" / "networks"
OPTIONS = {
    "guided_unet_cond": {"num_head_channels": 32},
    "guided_unet_plain": {"num_heads": 2, "image_size": 8},
    "guided_unet_neworder": {"num_heads": 2, "image_size": 8, "use_new_attention_order": True},
    "cm_unet_uncond": {"num_head_channels": 32},
    "cm_unet_cond": {"num_head_channels": 32},
    "guided_classifier_attention": {"num_head_channels": 32},
    "guided_classifier_adaptive": {"num_head_channels": 32, "image_size": 8},
    "guided_classifier_spatial": {"num_head_channels": 32, "image_size": 8},
}


@cache
def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays if key != "config"}


def parameters(name: str) -> dict[str, Tensor]:
    """The state dict as the original code has it."""
    return {key.removeprefix("param/"): v.clone() for key, v in golden(name).items() if key.startswith("param/")}


@cache
def layouts() -> dict[str, dict]:
    """Names and shapes of the public checkpoints."""
    return json.loads(gzip.decompress((GOLDEN / "adm_layouts.json.gz").read_bytes()))


class StoredFrequencies(nn.Module):
    """[cos, sin] of timesteps times frequencies, in the frequencies' dtype."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.register_buffer("frequencies", frequencies)

    def forward(self, timesteps: Tensor) -> Tensor:
        phase = timesteps.to(self.frequencies)[:, None] * self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def in_float64(network: nn.Module, name: str) -> nn.Module:
    network.time_proj = StoredFrequencies(golden(name)["raw/freqs"])
    return network.double()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, in parts of b's largest entry."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a.detach() - b).abs().max() / b.abs().max())
