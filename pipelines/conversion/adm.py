# SPDX-License-Identifier: Apache-2.0
"""Networks from the state dicts of guided-diffusion (ADM, its classifiers) and of consistency models, whose U-Net is nearly the same.

The architecture is read off names and shapes, except what leaves no trace there: the size of images, the width of attention heads and
the order in which an attention's q, k and v lie in its projection's rows:

| rows of `qkv` | |
|---|---|
| head by head, each with its q, k and v | guided-diffusion's default |
| all heads' q, then k, then v | its "new attention order", its classifiers' pool, and consistency models |
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from pipelines.adm import ADMClassifier, ADMUNet2DModel

from .files import Unfit, finite_float32


COARSEST_SIZE = 8  # of feature maps, in all of guided-diffusion's presets
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


class Place(NamedTuple):
    """Where the parameters of a public module go.

    Attributes:
        modules: the module; or the three that its rows are split between.
        axes: trailing axes of length one that the public weight has in excess.
        heads: of rows that lie head by head, see the module's docstring; None: one module after the other.
    """

    modules: tuple[str, ...]
    axes: int = 0
    heads: int | None = None


class Encoder(NamedTuple):
    """What the first half of a U-Net, or a classifier, is made of.

    Attributes:
        in_channels: of images.
        widths: channels of each level, fine to coarse.
        layers: residual blocks a level.
        attended: whether a level has attention.
        resnet_resampling: whether residual blocks change the resolution; else convolutions.
        scale_shift: whether the time embedding scales and shifts normalised features; else it is added before.
    """

    in_channels: int
    widths: tuple[int, ...]
    layers: int
    attended: tuple[bool, ...]
    resnet_resampling: bool
    scale_shift: bool

    @property
    def config(self) -> dict:
        """The arguments by which Diffusers' classes make it."""
        plain = "ResnetDownsampleBlock2D" if self.resnet_resampling else "DownBlock2D"
        return {
            "in_channels": self.in_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.layers,
            "down_block_types": tuple("AttnDownBlock2D" if attended else plain for attended in self.attended),
            "downsample_type": "resnet" if self.resnet_resampling else "conv",
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
        }


# ---------------------------------------------------------------------- the three kinds of network


def adm_unet(
    state_dict: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    num_head_channels: int = 64,
    num_heads: int | None = None,
    use_new_attention_order: bool = False,
) -> ADMUNet2DModel:
    """The U-Net of a guided-diffusion checkpoint, which takes over the tensors.

    Args:
        state_dict: as published; tensors may be on the meta device.
        image_size: height and width in pixels; None: that of guided-diffusion's presets, whose coarsest feature maps are 8 x 8.
        num_head_channels: channels of an attention head.
        num_heads: heads of each attention, in place of `num_head_channels`.
        use_new_attention_order: see the module's docstring.

    Raises:
        ValueError: for names or shapes that are not those of such a network, numbers that are not finite, or options
        ([`Unfit`]) that do not go with it.
    """
    encoder = _read_encoder(state_dict)
    heads = _heads(encoder, num_head_channels, num_heads)
    fixed = {"num_attention_heads": num_heads, "attention_head_dim": None if num_heads else num_head_channels}
    network = _unet(ADMUNet2DModel, state_dict, encoder, image_size, **fixed)
    return _filled(network, _unet_places(encoder, 1, {} if use_new_attention_order else heads), state_dict)


def consistency_unet(
    state_dict: Mapping[str, Tensor], *, image_size: int | None = None, num_head_channels: int = 64
) -> UNet2DModel:
    """The U-Net of a checkpoint of consistency models, such as the EDM teachers they were distilled from.

    Arguments and errors as [`adm_unet`].
    """
    encoder = _read_encoder(state_dict)
    _heads(encoder, num_head_channels, None)
    network = _unet(UNet2DModel, state_dict, encoder, image_size, attention_head_dim=num_head_channels)
    return _filled(network, _unet_places(encoder, 2, {}), state_dict)


def adm_classifier(
    state_dict: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    num_head_channels: int = 64,
    use_new_attention_order: bool = False,
) -> ADMClassifier:
    """A classifier of guided-diffusion, which takes over the tensors.

    Arguments and errors as [`adm_unet`]; the size of images is read off the attention pool, where there is one.
    """
    encoder = _read_encoder(state_dict)
    heads = _heads(encoder, num_head_channels, None)
    places = _encoder_places(encoder, 1, {} if use_new_attention_order else heads)
    if "out.2.positional_embedding" in state_dict:
        pool, last = "attention", "out.2.c_proj.bias"
        side = math.isqrt(_shape(state_dict, "out.2.positional_embedding", 2)[1] - 1)
        finest = side << (len(encoder.widths) - 1)
        if image_size not in (None, finest):
            raise Unfit(f"the classifier's attention pool is made for {finest} pixels, not {image_size}")
        image_size = finest
        split = tuple(f"head.to_{name}" for name in "qkv")
        places |= {"out.0": Place(("norm_out",)), "out.2": Place(("head",))}
        places |= {"out.2.qkv_proj": Place(split, 1), "out.2.c_proj": Place(("head.to_out",), 1)}
    elif "out.3.bias" in state_dict:
        pool, last = "adaptive", "out.3.bias"
        places |= {"out.0": Place(("norm_out",)), "out.3": Place(("head",), 2)}
    else:
        pool, last = "spatial", "out.2.bias"
        places |= {"out.0": Place(("head.0",)), "out.2": Place(("head.2",))}
    with torch.device("meta"):
        network = ADMClassifier(
            sample_size=_size(encoder, image_size),
            num_classes=_shape(state_dict, last, 1)[0],
            attention_head_dim=num_head_channels,
            pool=pool,
            **encoder.config,
        )
    return _filled(network, places, state_dict)


def _unet(kind: type, state_dict, encoder: Encoder, image_size: int | None, **heads) -> UNet2DModel:
    labels = "label_emb.weight" in state_dict
    plain = "ResnetUpsampleBlock2D" if encoder.resnet_resampling else "UpBlock2D"
    with torch.device("meta"):
        return kind(
            sample_size=_size(encoder, image_size),
            out_channels=_shape(state_dict, "out.2.weight", 4)[0],
            num_class_embeds=_shape(state_dict, "label_emb.weight", 2)[0] if labels else None,
            up_block_types=tuple("AttnUpBlock2D" if attended else plain for attended in reversed(encoder.attended)),
            upsample_type="resnet" if encoder.resnet_resampling else "conv",
            attn_norm_num_groups=32,
            **encoder.config,
            **heads,
        )


def _size(encoder: Encoder, image_size: int | None) -> int:
    """The given size of images, checked, or that of guided-diffusion's presets."""
    halvings = len(encoder.widths) - 1
    if image_size is not None:
        check_image_size(image_size, halvings)
    return image_size or COARSEST_SIZE << halvings


def check_image_size(image_size: int, halvings: int) -> None:
    """Raises [`Unfit`] unless a network can halve the size of images that often."""
    if image_size < 1 or image_size % 2**halvings:
        raise Unfit(
            f"image_size {image_size} is not divisible by {2**halvings}, and the network halves it {halvings} times"
        )


def check_divides(name: str, divisor: int, width: int) -> None:
    """Raises [`Unfit`] unless the channels of an attention make equal heads."""
    if divisor < 1:
        raise Unfit(f"{name} must be at least 1, got {divisor}")
    if width % divisor:
        raise Unfit(f"{name} {divisor} does not divide the {width} channels of an attention; give another")


# ---------------------------------------------------------------------- reading the architecture


def _shape(state_dict: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    tensor = state_dict.get(name)
    if not isinstance(tensor, Tensor) or tensor.ndim != ndim or 0 in tensor.shape:
        found = "missing" if tensor is None else f"no tensor with {ndim} axes"
        raise ValueError(f"this is no checkpoint of guided-diffusion or consistency models: {name} is {found}")
    return tuple(tensor.shape)


def _read_encoder(state_dict: Mapping[str, Tensor]) -> Encoder:
    matches = (re.match(r"input_blocks\.(\d{1,3})\.", name) for name in state_dict)
    blocks = len({match[1] for match in matches if match})
    stem = _shape(state_dict, "input_blocks.0.0.weight", 4)
    attended = {i for i in range(blocks) if f"input_blocks.{i}.1.qkv.weight" in state_dict}
    strided = [i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in state_dict]
    # A residual block that halves the resolution looks like any other, but has no attention after it.
    if strided:
        layers = strided[0] - 1
    elif attended:
        layers = next(i for i in range(min(attended), blocks + 1) if i not in attended) - min(attended)
    else:
        raise ValueError(
            "the checkpoint has neither strided convolutions nor attention in input_blocks, so its number of residual blocks a "
            "level cannot be told; such networks are not supported"
        )
    if layers < 1 or blocks % (layers + 1):
        raise ValueError(
            f"{blocks} input_blocks do not make levels of {layers} residual blocks; the file is incomplete"
        )
    firsts = range(1, blocks + 1, layers + 1)
    widths = tuple(_shape(state_dict, f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in firsts)
    if _shape(state_dict, "time_embed.0.weight", 2)[1] != widths[0]:
        raise ValueError(
            "the checkpoint's timestep embedding is not as wide as its finest level; such networks are not supported"
        )
    return Encoder(
        in_channels=stem[1],
        widths=widths,
        layers=layers,
        attended=tuple(i in attended for i in firsts),
        resnet_resampling=not strided,
        scale_shift=_shape(state_dict, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
    )


def _heads(encoder: Encoder, num_head_channels: int, num_heads: int | None) -> dict[int, int]:
    """Attention heads of a level with that many channels, where it has attention."""
    name, divisor = ("num_heads", num_heads) if num_heads else ("num_head_channels", num_head_channels)
    heads = {}
    for width, attended in zip(encoder.widths, (*encoder.attended[:-1], True)):  # the middle always has attention
        if width % 32:
            raise ValueError(
                f"a level has {width} channels, which do not make 32 normalisation groups; the file is damaged"
            )
        if attended:
            check_divides(name, divisor, width)
            heads[width] = num_heads or width // num_head_channels
    return heads


# ---------------------------------------------------------------------- names


def _resnet(public: str, ours: str) -> dict[str, Place]:
    return {f"{public}.{theirs}": Place((f"{ours}.{name}",)) for theirs, name in _RESNET.items()}


def _attention(public: str, ours: str, axes: int, heads: int | None) -> dict[str, Place]:
    split = tuple(f"{ours}.to_{name}" for name in "qkv")
    return {
        f"{public}.norm": Place((f"{ours}.group_norm",)),
        f"{public}.qkv": Place(split, axes, heads),
        f"{public}.proj_out": Place((f"{ours}.to_out.0",), axes),
    }


def _resampling(encoder: Encoder, public: str, ours: str, convolution: str) -> dict[str, Place]:
    if encoder.resnet_resampling:
        return _resnet(public, ours)
    return {f"{public}.{convolution}": Place((f"{ours}.conv",))}


def _encoder_places(encoder: Encoder, axes: int, heads: Mapping[int, int]) -> dict[str, Place]:
    """With `heads` by width where rows lie head by head; else {}."""
    places = {
        "time_embed.0": Place(("time_embedding.linear_1",)),
        "time_embed.2": Place(("time_embedding.linear_2",)),
        "input_blocks.0.0": Place(("conv_in",)),
    }
    last = len(encoder.widths) - 1
    for level, width in enumerate(encoder.widths):
        first, ours = 1 + level * (encoder.layers + 1), f"down_blocks.{level}"
        for layer in range(encoder.layers):
            public = f"input_blocks.{first + layer}"
            places |= _resnet(f"{public}.0", f"{ours}.resnets.{layer}")
            if encoder.attended[level]:
                places |= _attention(f"{public}.1", f"{ours}.attentions.{layer}", axes, heads.get(width))
        if level < last:
            public = f"input_blocks.{first + encoder.layers}.0"
            places |= _resampling(encoder, public, f"{ours}.downsamplers.0", "op")
    places |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    return places | _attention("middle_block.1", "mid_block.attentions.0", axes, heads.get(encoder.widths[-1]))


def _unet_places(encoder: Encoder, axes: int, heads: Mapping[int, int]) -> dict[str, Place]:
    places = _encoder_places(encoder, axes, heads)
    places |= {
        "label_emb": Place(("class_embedding",)),
        "out.0": Place(("conv_norm_out",)),
        "out.2": Place(("conv_out",)),
    }
    last = len(encoder.widths) - 1
    for position, level in enumerate(range(last, -1, -1)):
        ours, width = f"up_blocks.{position}", encoder.widths[level]
        for layer in range(encoder.layers + 1):
            public = f"output_blocks.{position * (encoder.layers + 1) + layer}"
            places |= _resnet(f"{public}.0", f"{ours}.resnets.{layer}")
            if encoder.attended[level]:
                places |= _attention(f"{public}.1", f"{ours}.attentions.{layer}", axes, heads.get(width))
        if level > 0:
            public += ".2" if encoder.attended[level] else ".1"
            places |= _resampling(encoder, public, f"{ours}.upsamplers.0", "conv")
    return places


# ---------------------------------------------------------------------- moving the tensors


def _filled(network: nn.Module, places: dict[str, Place], state_dict: Mapping[str, Tensor]):
    """`network`, made on the meta device, with the tensors of `state_dict`, each used once.

    Raises:
        ValueError: naming the first few that are missing, unexpected, of another shape or not finite.
    """
    wanted = network.state_dict()
    sources = {
        f"{public}.{kind}": (place, kind)
        for public, place in places.items()
        for kind in ("weight", "bias", "positional_embedding")
        if f"{place.modules[0]}.{kind}" in wanted
    }
    _refuse("missing", sources.keys() - state_dict.keys())
    _refuse("unexpected", state_dict.keys() - sources.keys())
    misshapen, not_floating, not_finite, ours = set(), set(), set(), {}
    for name, (place, kind) in sources.items():
        tensor, targets = state_dict[name], [f"{module}.{kind}" for module in place.modules]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            not_floating.add(name)
            continue
        rows, *others = wanted[targets[0]].shape
        shape = (rows * len(targets), *others)
        if tuple(tensor.shape) != shape + (1,) * (place.axes if kind == "weight" else 0):
            misshapen.add(name)
            continue
        values = finite_float32(tensor)
        if values is None:
            not_finite.add(name)
            continue
        parts = _split(values.reshape(shape), len(targets), place.heads)
        ours.update(zip(targets, parts))
    _refuse("not of floating point", not_floating)
    _refuse("of another shape than the rest implies", misshapen)
    _refuse("not of finite numbers", not_finite)
    network.load_state_dict(ours, strict=True, assign=True)
    return network.eval()


def _split(tensor: Tensor, count: int, heads: int | None) -> list[Tensor]:
    if count == 1:
        return [tensor]
    others = tensor.shape[1:]
    grouped = tensor.reshape(heads or 1, count, -1, *others)
    # tensors that share memory cannot be saved as safetensors
    return [part.reshape(-1, *others).clone() for part in grouped.unbind(1)]


def _refuse(fault: str, names: set[str]) -> None:
    if names:
        few = ", ".join(f"{name:.100}" for name in sorted(names)[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"the checkpoint is not a network of this kind: {fault}: {few}{more}")
