# SPDX-License-Identifier: Apache-2.0
"""The predictor files of AMED's authors, `network-snapshot-*.pkl`, read without running the source text in them.

A file is `{"model": AMED_predictor, "loss_fn": AMED_loss}`, pickled by NVIDIA's persistence (see [`inert_pickle`]).
Settings are attributes of the model; the range of noise levels is one of the loss, whose buffers make files of
multistep students megabytes large.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .inert_pickle import PERSISTENCE, Instance, Refused, StoredTensor, instances, load_pickle
from .schedule import MAX_NFE, is_number


if TYPE_CHECKING:  # Diffusers' models import accelerate and transformers
    from .amed_predictor import AMEDPredictor

WANTED = "a network-snapshot-*.pkl of AMED's training"
MAX_BYTES = 256 * 2**20  # three directions of 512 images of 64 x 64 are 75 MB
MOST_WEIGHTS = 4096**2  # of a layer
MAX_OPCODES = 50_000  # a genuine file has about 1,700
NAMES = {
    **PERSISTENCE,
    **instances("torch.nn.modules.activation.Sigmoid"),
    # Attributes of the loss, of no use here.
    **dict.fromkeys(f"solvers_amed.{name}_sampler" for name in ("amed", "euler", "ipndm", "dpm_2", "dpm_pp", "heun")),
}

STUDENTS = {"amed": "amed", "dpm": "dpm2", "euler": "euler", "ipndm": "ipndm", "dpmpp": "dpmpp"}
DISCRETIZATIONS = {
    "polynomial": "polynomial",
    "logsnr": "logsnr",
    "time_uniform": "time_uniform_vp",
    "discrete": "discrete",
}
LAYERS = ("map_layer0", "enc_layer0", "enc_layer1", "fc_r")
HEADS = {"fc_scale_dir": "scale_dir", "fc_scale_time": "scale_time"}
EMBEDDING = {"max_positions": 10000, "endpoint": True}


def _is_text(value) -> bool:
    return type(value) is str and len(value) <= 200


# What the attributes must be: kind -> (test, names).
SETTINGS = {
    f"an integer from 2 to {MAX_NFE // 2 + 1}": (  # times of the steps' ends
        lambda value: type(value) is int and 2 <= value <= MAX_NFE // 2 + 1,
        ("num_steps",),
    ),
    "an integer": (lambda value: type(value) is int, ("M",)),
    "an integer or None": (lambda value: value is None or type(value) is int, ("max_order",)),
    "true or false": (lambda value: type(value) is bool, ("afs", "predict_x0", "lower_order_final")),
    "a number": (is_number, ("schedule_rho", "scale_dir", "scale_time")),
    "text": (_is_text, ("sampler_tea",)),
    f"one of {', '.join(STUDENTS)}": (lambda value: _is_text(value) and value in STUDENTS, ("sampler_stu",)),
    f"one of {', '.join(DISCRETIZATIONS)}": (
        lambda value: _is_text(value) and value in DISCRETIZATIONS,
        ("schedule_type",),
    ),
    "text or None": (lambda value: value is None or _is_text(value), ("dataset_name", "guidance_type")),
    "a number or None": (lambda value: value is None or is_number(value), ("img_resolution", "guidance_rate")),
}


class PredictorFile(NamedTuple):
    """What is in a file."""

    predictor: "AMEDPredictor"
    settings: dict[str, Any]  # plain JSON, under the names of the original


def read_predictor_file(file: str | Path) -> PredictorFile:
    """The predictor in a file, and the settings that it was trained with.

    Raises:
        ValueError: if it is missing, damaged, no such file, or holds anything else; nothing in it is executed.
    """
    from .amed_predictor import AMEDPredictor

    content = load_pickle(file, NAMES, wanted=WANTED, max_bytes=MAX_BYTES, max_opcodes=MAX_OPCODES)
    try:
        if not isinstance(content, dict) or not _is_a("AMED_predictor", content.get("model")):
            raise Refused("holds no AMED_predictor as its 'model'")
        model = content["model"].state
        settings = _settings(model)
        weights = _weights(model, settings)
        predictor = AMEDPredictor(**_sizes(weights), **_student(settings), **_range(content.get("loss_fn")))
        _load(predictor, weights)
    except ValueError as reason:
        why = reason if isinstance(reason, Refused) else f"makes no predictor: {reason}"
        raise ValueError(f"{str(file)!r} {why}; pass {WANTED}") from None
    return PredictorFile(predictor.eval().requires_grad_(False), settings)


def _is_a(class_name: str, value) -> bool:
    return isinstance(value, Instance) and value.class_name == class_name


def _settings(model: dict) -> dict[str, Any]:
    model = {**model}
    # Before their scales were options, directions were always scaled and times if `scale_time` said so.
    if "scale_dir" not in model:
        model["scale_dir"] = 0.05 if model.get("sampler_stu") == "dpmpp" and model.get("predict_x0") is True else 0.01
    if type(model.get("scale_time")) is bool:
        model["scale_time"] = 0.2 if model["scale_time"] else 0.0
    settings = {}
    for what, (is_right, names) in SETTINGS.items():
        for name in names:
            if name not in model:
                raise Refused(f"has no setting {name!r}")
            value = model[name]
            if not is_right(value):
                shown = f"{value!r:.60}" if _is_text(value) or is_number(value) else f"a {type(value).__name__}"
                raise Refused(f"has {name} = {shown}, which must be {what}")
            settings[name] = value
    return settings


def _parts(module: Instance) -> tuple[dict, dict, dict]:
    parts = tuple(module.state.get(kind) for kind in ("_parameters", "_buffers", "_modules"))
    if not all(isinstance(part, dict) for part in parts):
        raise Refused(f"has a {module.class_name!r:.60} that is no PyTorch module")
    return parts


def _weights(model: dict, settings: dict) -> dict[str, Tensor]:
    """State dict of the layers, whose shapes are not yet known to fit."""
    parameters, buffers, modules = _parts(Instance("AMED_predictor", model))
    layers = (*LAYERS, *(name for name, scale in HEADS.items() if settings[scale] != 0))
    missing, extra = set(layers) - set(modules), set(modules) - {*layers, "map_noise", "sigmoid"}
    for what, names in (("lacks the layer", missing), ("has the unknown layer", extra)):
        if names:
            raise Refused(f"{what} {sorted(names)[0]!r:.60}")
    if parameters or buffers:
        raise Refused(f"has the unknown weight {sorted({*parameters, *buffers})[0]!r:.60}")
    embedding = modules.get("map_noise")
    if not _is_a("PositionalEmbedding", embedding) or any(
        type(embedding.state.get(name)) is not type(value) or embedding.state[name] != value
        for name, value in EMBEDDING.items()
    ):
        raise Refused("embeds its times in another way than AMED")
    return {f"{layer}.{name}": tensor for layer in layers for name, tensor in _linear(modules[layer], layer).items()}


def _linear(module, layer: str) -> dict[str, Tensor]:
    if not _is_a("Linear", module):
        raise Refused(f"has a {layer} that is no linear layer")
    parameters, buffers, modules = _parts(module)
    if set(parameters) != {"weight", "bias"} or buffers or modules:
        raise Refused(f"has a {layer} with other weights than weight and bias")
    found = {}
    for name, dimensions in (("weight", 2), ("bias", 1)):
        if not isinstance(parameters[name], StoredTensor):
            raise Refused(f"has no tensor as {layer}.{name}")
        tensor = parameters[name].tensor(MOST_WEIGHTS)
        if tensor.dtype != torch.float32 or tensor.ndim != dimensions or not bool(tensor.isfinite().all()):
            raise Refused(f"has a {layer}.{name} that is no {dimensions}-dimensional float32 tensor of finite numbers")
        found[name] = tensor
    return found


def _sizes(weights: dict[str, Tensor]) -> dict[str, int]:
    hidden, features = weights["enc_layer0.weight"].shape
    return {
        "hidden_dim": hidden,
        "bottleneck_input_dim": features,
        "bottleneck_output_dim": len(weights["enc_layer1.weight"]),
        "noise_channels": len(weights["map_layer0.weight"]),
    }


def _student(settings: dict) -> dict[str, Any]:
    """Options of an [`AMEDPredictor`]; those that its solver does not have stay at their defaults."""
    student = {
        "solver": STUDENTS[settings["sampler_stu"]],
        "num_steps": settings["num_steps"] - 1,
        "scale_dir": float(settings["scale_dir"]),
        "scale_time": float(settings["scale_time"]),
        "afs": settings["afs"],
    }
    if student["solver"] in ("ipndm", "dpmpp"):
        student["solver_order"] = settings["max_order"]
    if student["solver"] == "dpmpp":
        student |= {name: settings[name] for name in ("predict_x0", "lower_order_final")}
    return student


def _range(loss) -> dict[str, float]:
    """Noise levels of the training's ends, where the loss has them."""
    state = loss.state if _is_a("AMED_loss", loss) else {}
    ends = [state.get(name) for name in ("sigma_max", "sigma_min")]
    if not all(map(is_number, ends)):
        return {}
    if not 0 < ends[1] < ends[0]:
        raise Refused(f"has noise levels from {ends[0]!r:.30} to {ends[1]!r:.30}, which is no range")
    return {"z_max": float(ends[0]), "z_min": float(ends[1])}


def _load(predictor: "AMEDPredictor", weights: dict[str, Tensor]) -> None:
    for name, own in predictor.state_dict().items():
        if weights[name].shape != own.shape:
            raise Refused(f"has a {name} of shape {tuple(weights[name].shape)}, which must be {tuple(own.shape)}")
    predictor.load_state_dict(weights)
