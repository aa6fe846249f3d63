# SPDX-License-Identifier: Apache-2.0
"""Small EDM networks with the weights, inputs and outputs that the original code had."""

import json
from pathlib import Path

import numpy as np
import torch

from pipelines.edm import EDMUNet2DModel


GOLDEN = Path(__file__).parent.parent / "golden" / "networks"
ARCHITECTURES = {"SongUNet": "song", "DhariwalUNet": "dhariwal"}
DEFAULTS = {
    "SongUNet": {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]},
    "DhariwalUNet": {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]},
}  # fmt: skip
RENAMED = {"img_resolution": "sample_size", "img_channels": "in_channels"}
DROPPED = ("model_type", "decoder_type", "label_dim", "use_fp16")


def golden(name: str) -> dict:
    """Tensors by key, and under "config" how the network was made."""
    with np.load(GOLDEN / f"{name}.npz") as content:
        tensors = {key: torch.from_numpy(content[key]) for key in content.files if key != "config"}
        return {**tensors, "config": json.loads(str(content["config"]))}


def network_of(data: dict, wrapper: str = "EDMPrecond", load: bool = True) -> EDMUNet2DModel:
    config = data["config"]
    kwargs = {**DEFAULTS[config["network_class"]], "augment_dim": 0, **config["kwargs"]}
    channels = kwargs["img_channels"]
    unet = EDMUNet2DModel(
        **{RENAMED.get(key, key): value for key, value in kwargs.items() if key not in DROPPED},
        out_channels=len(data["raw/out_f32"][0]) if load else channels,
        num_class_embeds=kwargs["label_dim"] or None,
        architecture=ARCHITECTURES[config["network_class"]],
        preconditioning=wrapper.removesuffix("Precond").lower(),
    )
    if load:
        weights = {
            key.removeprefix("param/model."): value for key, value in data.items() if key.startswith("param/model.")
        }
        unet.load_state_dict(weights)
    return unet.eval()
