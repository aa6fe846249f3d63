# SPDX-License-Identifier: Apache-2.0
"""CompVis latent-diffusion checkpoints (a `.ckpt` with `state_dict`) to [`pipelines.ldm`].

| names in the checkpoint | become |
|---|---|
| `model.diffusion_model.` with transformers | `UNet2DConditionModel` |
| `model.diffusion_model.` without | `UNet2DModel`, or `ADMUNet2DModel` where heads are counted, as of LSUN churches |
| `first_stage_model.` | `VQModel`, or `AutoencoderKL` without a codebook |
| `cond_stage_model.embedding.weight` | `LDMClassEmbedder`; its last row is no class |
| `betas`, `scale_factor` | the noise schedule and the latents' scale, where they are there |

Widths and depths follow from shapes. What does not is as published: images of 256 pixels, heads (see
[`published_heads`]) and, without `betas`, .0015 to .0195, linear in their square root.

The public files were not at hand, nor the authors' code: the names are those that Diffusers' own conversion of Stable
Diffusion knows, and everything was run on random weights under these names only.
"""

import inspect
import itertools

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from ..ldm import LatentDiffusionPipeline, LDMClassEmbedder
from .adm import adm_unet, check_divides, check_image_size
from .files import UNBUILDABLE, Unfit, finite_float32, read_state_dict


UNET, VAE, CLASSES = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.embedding.weight"
EMA = "model_ema."
VAE_LOSS = "first_stage_model.loss."  # the discriminator that the autoencoder was trained against
IMAGE_SIZE = 256
BETA_START, BETA_END = 0.0015, 0.0195


def ldm_pipeline(
    file: str,
    *,
    ema: bool = False,
    image_size: int = IMAGE_SIZE,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
) -> LatentDiffusionPipeline:
    """The pipeline of a `.ckpt` file.

    Args:
        ema: take the averaged weights of the network instead of the last ones.
        image_size: height and width that it was trained on, pixels.
        num_heads, num_head_channels: of the network's attention, one of both; default: [`published_heads`].

    Raises:
        ValueError: if the file is refused, its names are not exactly those of such networks, its numbers are
        impossible, or options ([`Unfit`]) do not go with it.
    """
    checkpoint = read_state_dict(file)
    try:
        return pipeline_of(
            checkpoint, ema=ema, image_size=image_size, num_heads=num_heads, num_head_channels=num_head_channels
        )
    except KeyError as error:
        raise ValueError(f"{str(file)!r} lacks {error.args[0]!r}; pass a latent-diffusion .ckpt of CompVis") from None
    except Unfit:
        raise
    except UNBUILDABLE as error:
        raise ValueError(f"{str(file)!r} makes no latent diffusion: {error!s:.1000}") from error


def pipeline_of(
    checkpoint: dict[str, Tensor],
    *,
    ema: bool = False,
    image_size: int = IMAGE_SIZE,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
) -> LatentDiffusionPipeline:
    """[`ldm_pipeline`] of a state dict.

    Raises:
        ValueError, KeyError: if it lacks a network, or has names, shapes or numbers that the networks have not.
    """
    _check_rest(checkpoint)
    vae = autoencoder({name: tensor for name, tensor in checkpoint.items() if name.startswith(VAE)}, image_size)
    vae.register_to_config(scaling_factor=latent_scale(checkpoint.get("scale_factor")))
    halvings = len(vae.config.block_out_channels) - 1
    check_image_size(image_size, halvings)
    sample_size = image_size // 2**halvings
    unet = {name.removeprefix(UNET): tensor for name, tensor in checkpoint.items() if name.startswith(UNET)}
    if ema:
        unet = averaged(checkpoint, unet)
    conditional = any("transformer_blocks" in name for name in unet)
    if num_heads is None and num_head_channels is None:
        num_heads, num_head_channels = published_heads(unet)
    make = conditional_unet if conditional else unconditional_unet
    network = make(unet, sample_size=sample_size, num_heads=num_heads, num_head_channels=num_head_channels)
    embedder = class_embedder(checkpoint[CLASSES]) if conditional else None
    if embedder is not None and embedder.config.embed_dim != network.config.cross_attention_dim:
        raise ValueError(
            f"its classes are embedded in {embedder.config.embed_dim} numbers, and the network attends to "
            f"{network.config.cross_attention_dim}"
        )
    return LatentDiffusionPipeline(vae, network, noise_schedule(checkpoint.get("betas")), embedder)


def published_heads(unet: dict[str, Tensor]) -> tuple[int | None, int | None]:
    """(heads, None) or (None, width of a head) of the published network of this kind: shapes do not tell.

    One head for the classes of ImageNet; 8 for LSUN churches, whose blocks resample; 32 channels a head for the other
    unconditional ones.
    """
    if any("transformer_blocks" in name for name in unet):
        return 1, None
    if not any(name.endswith(".op.weight") for name in unet):
        return 8, None
    return None, 32


def averaged(checkpoint: dict[str, Tensor], unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights averaged over training: their names have lost their dots.

    Raises:
        Unfit: if one is missing.
    """
    prefix = EMA + UNET.removeprefix("model.").replace(".", "")
    found = {name: checkpoint.get(prefix + name.replace(".", "")) for name in unet}
    missing = [name for name, tensor in found.items() if tensor is None]
    if missing:
        raise Unfit(f"there is no averaged {missing[0]!r}, nor {len(missing) - 1} others; convert it without --ema")
    return found


# ---------------------------------------------------------------------- networks


def conditional_unet(
    unet: dict[str, Tensor], *, sample_size: int, num_heads: int | None, num_head_channels: int | None
) -> UNet2DConditionModel:
    """The network whose blocks have transformers, which attend to the conditioning.

    Raises:
        ValueError, KeyError: if names or shapes are not exactly such a network's.
    """
    widths, layers, depths = _levels(unet)
    attended = [depth > 0 for depth in depths]
    check_image_size(sample_size, len(widths) - 1)
    for width, attends in zip(widths, (*attended[:-1], True)):  # the middle always attends
        if attends:
            check_divides(
                *(("num_heads", num_heads) if num_heads else ("num_head_channels", num_head_channels)), width
            )
    tokens = unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    config = {
        "sample_size": sample_size,
        "in_channels": unet["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(unet["out.2.weight"]),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attended)],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": tokens.shape[1],
        # Diffusers' name for the number of heads
        "attention_head_dim": [num_heads or max(1, width // num_head_channels) for width in widths],
    }
    converted = convert_ldm_unet_checkpoint({UNET + name: tensor for name, tensor in unet.items()}, config)
    return _filled(UNet2DConditionModel, config, converted, len(unet))


def unconditional_unet(
    unet: dict[str, Tensor], *, sample_size: int, num_heads: int | None, num_head_channels: int | None
) -> UNet2DModel:
    """The network of plain attention, which is guided diffusion's; Diffusers' own class where heads have a width.

    Raises:
        ValueError: if names or shapes are not exactly such a network's.
    """
    if num_heads is not None:
        return adm_unet(unet, image_size=sample_size, num_heads=num_heads)
    network = adm_unet(unet, image_size=sample_size, num_head_channels=num_head_channels)
    known = inspect.signature(UNet2DModel.__init__).parameters.keys() & network.config.keys()
    state = network.state_dict()
    return _filled(UNet2DModel, {name: network.config[name] for name in known}, state, len(state))


def autoencoder(tensors: dict[str, Tensor], image_size: int = IMAGE_SIZE) -> VQModel | AutoencoderKL:
    """Encoder and decoder of the latents, with a codebook or without.

    Raises:
        ValueError, KeyError: if names or shapes are not exactly such a network's.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(VAE_LOSS)}
    own = {name.removeprefix(VAE): tensor for name, tensor in tensors.items()}
    levels = _count(own, "encoder.down.{}.block.0.conv1.weight")
    config = {
        "sample_size": image_size,
        "in_channels": own["encoder.conv_in.weight"].shape[1],
        "out_channels": len(own["decoder.conv_out.weight"]),
        "block_out_channels": [len(own[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "layers_per_block": _count(own, "encoder.down.0.block.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": own["decoder.conv_in.weight"].shape[1],
    }
    converted = convert_ldm_vae_checkpoint(tensors, config)
    codebook = own.get("quantize.embedding.weight")
    if codebook is None:
        return _filled(AutoencoderKL, config, converted, len(own))
    converted["quantize.embedding.weight"] = codebook
    config |= {"num_vq_embeddings": len(codebook), "vq_embed_dim": codebook.shape[1]}
    return _filled(VQModel, config, converted, len(own))


def class_embedder(rows: Tensor) -> LDMClassEmbedder:
    """Embeddings of classes, the last of which is no class.

    Raises:
        ValueError: if there is no class, or the table is none.
    """
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(
            f"{CLASSES} has the shape {tuple(rows.shape)}, where a row for each class and one for none must be"
        )
    config = {"num_class_embeds": len(rows) - 1, "embed_dim": rows.shape[1]}
    return _filled(LDMClassEmbedder, config, {"embedding.weight": rows}, 1)


def noise_schedule(betas: Tensor | None) -> DDIMScheduler:
    """DDIM on the checkpoint's own betas, or the published ones.

    Raises:
        ValueError: unless they are a list of numbers between 0 and 1.
    """
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    if betas is None:
        return DDIMScheduler(beta_schedule="scaled_linear", beta_start=BETA_START, beta_end=BETA_END, **options)
    numbers = finite_float32(betas)
    if numbers is None or numbers.ndim != 1 or not len(numbers) or not bool(((numbers > 0) & (numbers < 1)).all()):
        raise ValueError("its betas are no list of numbers between 0 and 1")
    betas = betas.double()
    start, end, steps = _rounded(betas[0]), _rounded(betas[-1]), len(betas)
    linear = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if torch.allclose(linear, betas, rtol=1e-4, atol=0):
        named = {"beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
    else:
        named = {"trained_betas": betas.tolist()}
    return DDIMScheduler(num_train_timesteps=steps, **named, **options)


def latent_scale(factor: Tensor | None) -> float:
    """What latents are multiplied with before diffusion: 1 where the checkpoint does not say.

    Raises:
        ValueError: unless it is one positive number.
    """
    if factor is None:
        return 1.0
    number = finite_float32(factor)
    if number is None or number.numel() != 1 or not float(number) > 0:
        raise ValueError("its scale_factor is no positive number")
    return _rounded(number)


# ---------------------------------------------------------------------- reading names


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many of the names "a.0.b", "a.1.b", ... are there, from 0 on.

    Raises:
        KeyError: if there is none.
    """
    tensors[pattern.format(0)]
    return next(i for i in itertools.count() if pattern.format(i) not in tensors)


def _levels(unet: dict[str, Tensor]) -> tuple[list[int], int, list[int]]:
    """Channels of each level, residual blocks a level, and transformers in each level's attention (0: it has none)."""
    widths, layers, depths, block = [], 0, [], 1
    while f"input_blocks.{block}.0.in_layers.2.weight" in unet:
        widths.append(len(unet[f"input_blocks.{block}.0.in_layers.2.weight"]))
        depths.append(
            next(
                depth
                for depth in itertools.count()
                if f"input_blocks.{block}.1.transformer_blocks.{depth}.norm1.weight" not in unet
            )
        )
        first = block
        while f"input_blocks.{block}.0.in_layers.2.weight" in unet:
            block += 1
        layers = max(layers, block - first)
        block += 1  # the convolution that halves the resolution
    if not widths:
        raise ValueError("its network has no residual blocks")
    return widths, layers, depths


def _check_rest(checkpoint: dict[str, Tensor]) -> None:
    """Raises a `ValueError` for a weight outside the networks; a noise schedule's tables are vectors and numbers."""
    known = (UNET, VAE, EMA, CLASSES)
    for name, tensor in checkpoint.items():
        if tensor.ndim > 1 and not name.startswith(known):
            raise ValueError(
                f"it has the weight {name!r:.100}, which no latent diffusion of images or their classes has"
            )


def _rounded(number: Tensor) -> float:
    """The decimal number that was stored in float32."""
    return float(f"{float(number):.7g}")


def _filled(kind: type, config: dict, tensors: dict[str, Tensor], given: int):
    """A network made of a config, with these tensors, of which the checkpoint has `given`.

    Raises:
        ValueError: unless their names and shapes are exactly the network's, and their numbers finite.
    """
    with torch.device("meta"):
        network = kind(**config)
    expected = network.state_dict()
    missing = [name for name in expected if tensors.get(name) is None]
    extra = [name for name in tensors if name not in expected]
    for what, names in (("lacks", missing), ("has the unknown", extra)):
        if names:
            raise ValueError(f"its {kind.__name__} {what} {names[0]!r:.100}, and {len(names) - 1} more")
    if len(tensors) != given:
        raise ValueError(f"of {given} tensors, its {kind.__name__} has {len(tensors)}; the rest has unknown names")
    for name, like in expected.items():
        if tensors[name].shape != like.shape or not tensors[name].is_floating_point():
            raise ValueError(
                f"its {kind.__name__} has a {name} of {tuple(tensors[name].shape)} {tensors[name].dtype}, which must be "
                f"{tuple(like.shape)} of floating point"
            )
    finite = {name: finite_float32(tensors[name]) for name in expected}
    spoilt = [name for name, values in finite.items() if values is None]
    if spoilt:
        raise ValueError(f"its {kind.__name__} has a {spoilt[0]} that is not of finite numbers")
    network.load_state_dict({name: values.contiguous() for name, values in finite.items()}, assign=True)
    return network.eval().requires_grad_(False)
