# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's EDM checkpoints to [`pipelines.edm`]: constructor arguments and tensors, never the source code that the
files carry.

A file has the network as it was constructed, `EDMPrecond` (or `VPPrecond`, `VEPrecond`, `iDDPMPrecond`) around a
`SongUNet` or a `DhariwalUNet`, each with its keyword arguments. What these leave out has the defaults of
arXiv:2206.00364's networks. Names of parameters stay.

The public files were not at hand: everything here was run on files of their documented form with random weights.
"""

import math
from collections.abc import Iterator

import torch
from diffusers import EDMDPMSolverMultistepScheduler
from torch import Tensor

from ld3_diffusers.inert_pickle import Instance, Refused, StoredTensor, quoted

from ..edm import SIGMA_DATA, EDMPipeline, EDMUNet2DModel, iddpm_sigmas
from .files import UNBUILDABLE, finite_float32, read_edm_pickle


PRECONDITIONINGS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
ARCHITECTURES = {  # and the defaults of their arguments
    "SongUNet": (
        "song",
        {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)},
    ),
    "DhariwalUNet": (
        "dhariwal",
        {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)},
    ),
}
DEFAULTS = {
    "augment_dim": 0,
    "channel_mult_emb": 4,
    "dropout": 0.1,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "resample_filter": (1, 1),
}
# Of arguments that EDMUNet2DModel has no use for: the only values with which it is the same network; None: any.
FIXED = {
    "decoder_type": ("standard",),
    "beta_d": (19.9,),
    "beta_min": (0.1,),
    "M": (1000,),
    "epsilon_t": (1e-5,),
    "C_1": (0.001,),
    "C_2": (0.008,),
    **dict.fromkeys(("use_fp16", "sigma_min", "sigma_max", "label_dropout", "model_type"), None),
}
ELSEWHERE = ("img_resolution", "img_channels", "in_channels", "out_channels", "label_dim", "sigma_data")
INTEGERS = ("model_channels", "channel_mult_emb", "num_blocks", "augment_dim", "channel_mult_noise")
TEXTS = ("embedding_type", "encoder_type")
LISTS = ("channel_mult", "attn_resolutions", "resample_filter")
MOST, MOST_BLOCKS, MOST_LEVELS = 4096, 64, 12  # of what a configuration counts: what it asks for must not take forever
MOST_DEPTH, MOST_MODULES = 8, 10_000  # of modules in modules; the networks have 5 and some 1,500


def edm_pipeline(file: str) -> EDMPipeline:
    """The pipeline of a `.pkl` file, on the range of noise levels that its network was trained with, or samples with.

    Raises:
        ValueError: if the file is refused, or is another network.
    """
    wrapper = read_edm_pickle(file)
    try:
        unet = edm_network(wrapper)
    except Refused as reason:
        raise ValueError(f"{str(file)!r} {reason}; nothing of it was executed, pass a network .pkl of EDM") from None
    sigma_min, sigma_max = unet.sigma_range
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=unet.config.sigma_data
    )
    return EDMPipeline(unet, scheduler)


def edm_network(wrapper: Instance) -> EDMUNet2DModel:
    """The network of a checkpoint's object; its tensors leave the object as they are read, so that they are in memory
    once.

    Raises:
        Refused: if it is another network, or names or shapes of its tensors are not exactly the network's.
    """
    config = network_config(wrapper)
    try:
        with torch.device("meta"):  # nothing is initialised: the checkpoint's tensors become the network's
            network = EDMUNet2DModel(**config)
    except UNBUILDABLE as error:
        raise Refused(f"was constructed with arguments that make no network ({error!s:.200})") from None
    expected = network.state_dict()
    stored = {name.removeprefix("model."): tensor for name, tensor in stored_tensors(wrapper)}
    levels = stored.pop("u", None) if config["preconditioning"] == "iddpm" else None
    check_names(stored, expected)
    for name, like in expected.items():
        if stored[name].size != tuple(like.shape):
            raise Refused(f"has a {name} of shape {quoted(stored[name].size)}, which must be {tuple(like.shape)}")
    storages = {id(tensor.storage): len(tensor.storage) for tensor in stored.values()}
    if 2 * sum(like.numel() for like in expected.values()) > sum(storages.values()):  # of float16, at least
        raise Refused("has tensors that share their bytes")
    tensors = {name: _tensor(name, stored.pop(name), like.numel()) for name, like in expected.items()}
    if config["architecture"] == "song":
        _check_filters(tensors, config["resample_filter"])
    else:
        _check_filters(tensors, (1, 1))
    network.load_state_dict(tensors, assign=True)
    if config["preconditioning"] == "iddpm":
        _check_noise_levels(levels)
    return network.eval().requires_grad_(False)


# ---------------------------------------------------------------------- configuration


def network_config(wrapper: Instance) -> dict:
    """Arguments of [`EDMUNet2DModel`] for the network that the wrapper's and the network's own constructor arguments
    describe.

    Raises:
        Refused: for classes or arguments that no EDM checkpoint has.
    """
    network = _modules(wrapper).get("model")
    if wrapper.class_name not in PRECONDITIONINGS:
        raise Refused(f"holds a {quoted(wrapper.class_name)}, which is none of {', '.join(PRECONDITIONINGS)}")
    if not isinstance(network, Instance) or network.class_name not in ARCHITECTURES:
        what = network.class_name if isinstance(network, Instance) else type(network).__name__
        raise Refused(f"holds a network {quoted(what)}, which is none of {', '.join(ARCHITECTURES)}")
    architecture, own_defaults = ARCHITECTURES[network.class_name]
    given = {**_arguments(wrapper), **_arguments(network)}
    defaults = {**DEFAULTS, **own_defaults}
    for name, value in given.items():
        if name not in (*defaults, *ELSEWHERE, *FIXED):
            raise Refused(f"was constructed with the unknown argument {quoted(name)}")
        if FIXED.get(name) is not None and value not in FIXED[name]:
            raise Refused(f"was constructed with {name} = {quoted(value)}; only {FIXED[name][0]!r} is supported")
    config = {name: given.get(name, default) for name, default in defaults.items()}
    for name in INTEGERS:
        _check_count(name, config[name], least=0 if name == "augment_dim" else 1)
    if config["num_blocks"] > MOST_BLOCKS:
        raise Refused(f"was constructed with {config['num_blocks']} blocks a level, more than {MOST_BLOCKS}")
    for name in TEXTS:
        if type(config[name]) is not str:
            raise Refused(f"was constructed with {name} = {quoted(config[name])}, which must be text")
    for name in LISTS:
        config[name] = _counts(name, config[name])
    if type(config["dropout"]) not in (int, float) or not 0 <= config["dropout"] < 1:
        raise Refused("was constructed with a dropout that is no probability")
    channels = _count(given, "img_channels", given.get("in_channels"), least=1)
    learned_variance = 2 if wrapper.class_name == "iDDPMPrecond" else 1
    return {
        **config,
        "sample_size": _count(given, "img_resolution", None, least=1),
        "in_channels": channels,
        "out_channels": _count(given, "out_channels", channels * learned_variance, least=1),
        "num_class_embeds": _count(given, "label_dim", 0, least=0) or None,
        "architecture": architecture,
        "preconditioning": PRECONDITIONINGS[wrapper.class_name],
        "sigma_data": _positive("sigma_data", given.get("sigma_data", wrapper.state.get("sigma_data", SIGMA_DATA))),
    }


def _arguments(module: Instance) -> dict:
    positional, named = module.state.get("_init_args", ()), module.state.get("_init_kwargs", {})
    if positional not in ((), []) or type(named) is not dict:
        raise Refused(f"has a {quoted(module.class_name)} constructed in another way than EDM's")
    return named


def _count(given: dict, name: str, default, *, least: int) -> int:
    return _check_count(name, given.get(name, default), least=least)


def _check_count(name: str, value, *, least: int) -> int:
    if type(value) is not int or not least <= value <= MOST:
        raise Refused(
            f"was constructed with {name} = {quoted(value)}, which must be an integer from {least} to {MOST}"
        )
    return value


def _counts(name: str, values) -> tuple[int, ...]:
    if type(values) not in (list, tuple) or not 1 <= len(values) <= MOST_LEVELS:
        raise Refused(f"was constructed with {name} = {quoted(values)}, which must be a short list of integers")
    return tuple(_check_count(name, value, least=1) for value in values)


def _positive(name: str, value) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise Refused(f"was constructed with {name} = {quoted(value)}, which must be a positive number")
    return float(value)


# ---------------------------------------------------------------------- tensors


def _modules(module: Instance) -> dict:
    modules = module.state.get("_modules")
    if type(modules) is not dict:
        raise Refused(f"has a {quoted(module.class_name)} that is no PyTorch module")
    return modules


def stored_tensors(module: Instance) -> Iterator[tuple[str, StoredTensor]]:
    """Names and tensors in the order of a state dict. Modules that were walked have none any more.

    Raises:
        Refused: for what is no tree of modules with tensors.
    """
    waiting, seen = [("", module, 0)], 0
    while waiting:
        prefix, current, depth = waiting.pop()
        seen += 1
        if depth > MOST_DEPTH or seen > MOST_MODULES:
            raise Refused("has more modules in modules than any EDM network")
        for kind in ("_parameters", "_buffers"):
            tensors = current.state.get(kind)
            if type(tensors) is not dict:
                raise Refused(f"has a {quoted(current.class_name)} that is no PyTorch module")
            for name in list(tensors):
                tensor = tensors.pop(name)
                if tensor is not None and not isinstance(tensor, StoredTensor):
                    raise Refused(f"has a {type(tensor).__name__} as {quoted(prefix + name)}, where a tensor must be")
                if tensor is not None:
                    yield prefix + name, tensor
        children = _modules(current).items()
        for name, child in reversed(children):
            if child is not None and not isinstance(child, Instance):
                raise Refused(f"has a {type(child).__name__} as {quoted(prefix + name)}, where a module must be")
            if child is not None:
                waiting.append((f"{prefix}{name}.", child, depth + 1))


def check_names(found, expected) -> None:
    """Raises `Refused` unless both have the same names, naming the first of those that differ."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    for what, names in (("lacks", missing), ("has the unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise Refused(f"{what} {', '.join(map(quoted, names[:3]))}{more}")


def _tensor(name: str, stored: StoredTensor, numel: int) -> Tensor:
    tensor = finite_float32(stored.tensor(numel))
    if tensor is None:
        raise Refused(f"has a {name} that is not of finite numbers")
    return tensor


def _check_filters(tensors: dict[str, Tensor], taps: tuple[int, ...]) -> None:
    taps = torch.tensor(taps, dtype=torch.float32)
    made = taps.outer(taps) / taps.sum() ** 2
    for name, tensor in tensors.items():
        if name.endswith("resample_filter") and not torch.allclose(tensor[0, 0], made, rtol=1e-6, atol=0):
            raise Refused(f"has a {name} that is not the filter it was constructed with")


def _check_noise_levels(stored: StoredTensor | None) -> None:
    """Refuses a table that is not iDDPM's. Upstream's own, computed in float32, drifts by 5e-4."""
    levels = iddpm_sigmas()
    if stored is None:
        raise Refused("lacks 'u', the noise levels of iDDPM")
    found = stored.tensor(levels.numel()).double()
    if found.shape != levels.shape or not torch.allclose(found, levels, rtol=1e-3, atol=0):
        raise Refused("has other noise levels than iDDPM's")
