# SPDX-License-Identifier: Apache-2.0
"""Files in the form of EDM's network pickles: genuine names, of modules that exist only while pickling, and golden weights."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.ld3_diffusers.amed_predictor_files import Persistent, foreign_modules


GOLDEN = Path(__file__).parent.parent / "golden" / "networks"
BUFFERS = ("resample_filter", "freqs", "u")


def golden(name: str) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as content:
        return {
            **{key: content[key] for key in content.files if key != "config"},
            "config": json.loads(str(content["config"])),
        }


def persistent(class_name: str, **attributes) -> nn.Module:
    module = type(class_name, (Persistent, nn.Module), {})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _class_name(name: str) -> str:
    if name.startswith("conv") or name in ("skip", "qkv", "proj", "out_conv") or name.endswith(("_conv", "_residual")):
        return "Conv2d"
    if name.startswith("norm") or name.endswith("_norm"):
        return "GroupNorm"
    return "Linear" if name == "affine" or name.startswith("map_") else "UNetBlock"


def make_wrapper(data: dict, wrapper: str = "EDMPrecond", **changes) -> nn.Module:
    """The wrapper around the network, as upstream's constructors would have left it; `changes` are of its arguments."""
    arguments = {**data["config"]["kwargs"], "use_fp16": False, **changes}
    arguments = {name: value for name, value in arguments.items() if value is not ...}
    own = ("img_resolution", "img_channels", "label_dim", "use_fp16")
    ends = {"sigma_min": 0.0, "sigma_max": float("inf")}
    root = persistent(wrapper, **{name: arguments.get(name) for name in own}, **ends, sigma_data=0.5)
    root._init_args, root._init_kwargs = (), arguments
    network = persistent(data["config"]["network_class"])
    network._init_args = ()
    network._init_kwargs = {
        name: value for name, value in arguments.items() if name not in (*own[1:2], *own[3:], "model_type")
    }
    network._init_kwargs |= {"in_channels": 3, "out_channels": 6 if wrapper == "iDDPMPrecond" else 3}
    root.model = network
    for key, array in data.items():
        if not key.startswith("param/"):
            continue
        *path, last = key.removeprefix("param/").split(".")
        module = root
        for depth, name in enumerate(path):
            if name not in module._modules:
                if name in ("enc", "dec"):
                    child = nn.ModuleDict()
                elif name == "map_noise":
                    child = persistent("FourierEmbedding")
                else:
                    child = persistent(_class_name(name))
                    child.bias = child.weight = None
                    if type(child).__name__ == "UNetBlock":
                        child.skip_scale, child.dropout = np.sqrt(0.5), 0.1
                module.add_module(name, child)
            module = module._modules[name]
        if last in BUFFERS:
            module.register_buffer(last, torch.tensor(array))
        else:
            if last in module.__dict__:
                delattr(module, last)
            module.register_parameter(last, nn.Parameter(torch.tensor(array)))
    for module in root.modules():
        if type(module).__name__ == "UNetBlock" and "norm2" not in module._modules:
            module.norm2 = None
    return root.eval().requires_grad_(False)


def snapshot_bytes(wrapper: nn.Module, protocol: int = 4) -> bytes:
    """What upstream's training program would have written."""
    with foreign_modules():
        return pickle.dumps({"ema": wrapper, "loss_fn": None, "dataset_kwargs": OrderedDict(path="x.zip")}, protocol)


def write_edm(file: Path, data: dict, wrapper: str = "EDMPrecond", **changes) -> Path:
    file.write_bytes(snapshot_bytes(make_wrapper(data, wrapper, **changes)))
    return file
