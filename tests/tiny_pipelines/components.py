# SPDX-License-Identifier: Apache-2.0
"""What the tiny pipelines share: seeded construction, text encoders, autoencoder, U-Net, stock scheduler settings."""

import functools
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


Builder = Callable[[], tuple[DiffusionPipeline, dict]]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPT = "a red fox"
NEGATIVE_PROMPT = "blurry"
CLIP_WIDTH, T5_WIDTH = 8, 32

# Schedulers of the published checkpoints. Keys left out have Diffusers' default there too.
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def tiny(build: Builder) -> Builder:
    """Make a builder deterministic and its pipeline quiet and in inference mode; the call runs 5 steps.

    The caller's random state is left alone. Models built in memory start in training mode, hence `eval`.
    """

    @functools.wraps(build)
    def seeded() -> tuple[DiffusionPipeline, dict]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe, call = build()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe, {"num_inference_steps": 5, **call}

    return seeded


def clip_tokenizer() -> CLIPTokenizer:
    """One token a lower-case letter; the two special tokens come last, as in the real vocabulary."""
    symbols = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token="<|endoftext|>")


def clip_text_model(
    projection: bool = False, hidden_act: str = "quick_gelu"
) -> CLIPTextModel | CLIPTextModelWithProjection:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_tokenizer() -> T5Tokenizer:
    # Scores are log probabilities: a letter must beat <unk>.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_text_model() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def autoencoder(latent_channels: int = 4, **overrides) -> AutoencoderKL:
    """An image autoencoder that halves each side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=latent_channels,
        sample_size=32,
        **overrides,
    )


def text_unet(cross_attention_dim: int = CLIP_WIDTH, **overrides) -> UNet2DConditionModel:
    config = {
        "sample_size": 16,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 2,
        "cross_attention_dim": cross_attention_dim,
    }
    return UNet2DConditionModel(**{**config, **overrides})


def random_image(size: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, size, size)
