# SPDX-License-Identifier: Apache-2.0
"""Pipelines without text, which call `set_timesteps(n)` and end in pixels: DDPM, DiT, unconditional latent diffusion."""

from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)

from .components import LINEAR_BETAS, autoencoder, tiny


def _unet(**overrides) -> UNet2DModel:
    return UNet2DModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=2,
        **overrides,
    )


@tiny
def ddpm():
    scheduler = DDPMScheduler(**LINEAR_BETAS, variance_type="fixed_large", clip_sample=True)
    return DDPMPipeline(_unet(sample_size=16), scheduler), {"output_type": "pt"}


@tiny
def dit():
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        # Twice the channels: the second half is the learned variance, which the pipeline drops.
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        # The pipeline writes the null class as 1000.
        num_embeds_ada_norm=1000,
    )
    pipe = DiTPipeline(transformer, autoencoder(), DDIMScheduler(**LINEAR_BETAS, clip_sample=False))
    return pipe, {"class_labels": [7], "guidance_scale": 4.0, "output_type": "pt"}


@tiny
def ldm_unconditional():
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=3,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    unet = _unet(sample_size=16)
    return LDMPipeline(vqvae, unet, scheduler), {"output_type": "np"}
