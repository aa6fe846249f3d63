# SPDX-License-Identifier: Apache-2.0
"""Latent-diffusion networks of random weights, and their names in CompVis's checkpoints, written from the layout of its U-Net and autoencoder."""

import re

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor

from pipelines.adm import ADMUNet2DModel


LAYERS = 2


def vq() -> VQModel:
    return VQModel(
        block_out_channels=(32, 64), layers_per_block=LAYERS, latent_channels=3, num_vq_embeddings=16, vq_embed_dim=3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        scaling_factor=1.0,
    )  # fmt: skip


def kl() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=LAYERS, latent_channels=4, sample_size=16, scaling_factor=0.25,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def conditional() -> UNet2DConditionModel:
    """As that of ImageNet: attention on all levels but the finest."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=LAYERS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=1,
    )  # fmt: skip


def unconditional() -> UNet2DModel:
    """As those of FFHQ and LSUN bedrooms: heads of 32 channels."""
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=LAYERS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )  # fmt: skip


def counted_heads() -> ADMUNet2DModel:
    """As that of LSUN churches: 8 heads everywhere, and residual blocks that resample."""
    return ADMUNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=LAYERS,
        down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"), num_attention_heads=8, attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
    )  # fmt: skip


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_place(name: str, attended: list[bool]) -> str:
    """Where CompVis's UNetModel has a part of Diffusers'; `attended`: levels with attention, fine to coarse."""
    simple = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    for ours, theirs in simple.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    levels = len(attended)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        block = "middle_block.1" if match[1] == "attentions" else f"middle_block.{2 * int(match[2])}"
        return f"{block}.{match[3]}"
    side, level, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    level, index = int(level), int(index)
    if side == "down":
        first = 1 + level * (LAYERS + 1)
        if kind == "downsamplers":
            return (
                f"input_blocks.{first + LAYERS}.0.{rest.replace('conv.', 'op.') if rest.startswith('conv.') else rest}"
            )
        return f"input_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"
    first = level * (LAYERS + 1)
    if kind == "upsamplers":
        place = 2 if attended[levels - 1 - level] else 1
        return f"output_blocks.{first + LAYERS}.{place}.{rest}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"


def compvis_unet(unet, attended: list[bool], heads: dict[int, int] | None = None) -> dict[str, Tensor]:
    """State dict under CompVis's names; `heads`: by channels, where attention has no transformer and q, k and v are one."""
    found, split = {}, {}
    for name, tensor in unet.state_dict().items():
        place = unet_place(name, attended)
        stem, _, kind = place.rpartition(".")
        block, _, layer = stem.rpartition(".")
        if layer in RESNET and "transformer" not in stem:
            place = f"{block}.{RESNET[layer]}.{kind}"
        elif heads is not None and layer == "group_norm":
            place = f"{block}.norm.{kind}"
        elif heads is not None and stem.endswith(".to_out.0"):
            place = f"{stem.removesuffix('.to_out.0')}.proj_out.{kind}"
            tensor = tensor[:, :, None] if kind == "weight" else tensor
        elif heads is not None and layer in ("to_q", "to_k", "to_v"):
            split.setdefault((block, kind), {})[layer[-1]] = tensor
            continue
        found[place] = tensor
    for (block, kind), parts in split.items():
        channels = len(parts["q"])
        rows = []
        for head in parts["q"].chunk(1) if heads is None else range(heads[channels]):
            width = channels // heads[channels]
            rows += [parts[part][head * width : (head + 1) * width] for part in "qkv"]
        joined = torch.cat(rows)
        found[f"{block}.qkv.{kind}"] = joined[:, :, None] if kind == "weight" else joined
    return found


def compvis_vae(vae) -> dict[str, Tensor]:
    """State dict under CompVis's names."""
    levels, found = 2, {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for name, tensor in vae.state_dict().items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            layer = attention[match[2]]
            name = f"{match[1]}.mid.attn_1.{layer}.{match[3]}"
            tensor = tensor[:, :, None, None] if layer != "norm" and match[3] == "weight" else tensor
        elif match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
            name = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        elif match := re.fullmatch(r"encoder\.down_blocks\.(\d)\.(resnets|downsamplers)\.(\d)\.(.+)", name):
            part = f"block.{match[3]}" if match[2] == "resnets" else "downsample"
            name = f"encoder.down.{match[1]}.{part}.{match[4]}"
        elif match := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.+)", name):
            part = f"block.{match[3]}" if match[2] == "resnets" else "upsample"
            name = f"decoder.up.{levels - 1 - int(match[1])}.{part}.{match[4]}"
        found[name] = tensor
    return found
