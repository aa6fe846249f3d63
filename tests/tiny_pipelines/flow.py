# SPDX-License-Identifier: Apache-2.0
"""Image transformers: the rectified-flow families, and PixArt, which shares their text encoder."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from .components import (
    CLIP_WIDTH,
    LINEAR_BETAS,
    NEGATIVE_PROMPT,
    PROMPT,
    T5_WIDTH,
    autoencoder,
    clip_text_model,
    clip_tokenizer,
    random_image,
    t5_text_model,
    t5_tokenizer,
    tiny,
)


COMMON = {"height": 32, "width": 32, "output_type": "latent"}
TEXT = {**COMMON, "prompt": PROMPT, "max_sequence_length": 16}


@tiny
def sd3():
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_text_model(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_model(projection=True, hidden_act="gelu"),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_model(),
        tokenizer_3=t5_tokenizer(),
    )
    return pipe, {**TEXT, "negative_prompt": NEGATIVE_PROMPT, "guidance_scale": 7.0}


def _flux_components() -> dict:
    return {
        "transformer": FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        # One latent channel, since the pipeline packs 2 x 2 latents into the channels of a token.
        "vae": autoencoder(latent_channels=1, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": clip_text_model(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_text_model(),
        "tokenizer_2": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


@tiny
def flux():
    return FluxPipeline(**_flux_components()), {**TEXT, "guidance_scale": 3.5}


@tiny
def flux_img2img():
    call = {"image": random_image(), "strength": 0.8, "guidance_scale": 3.5}
    return FluxImg2ImgPipeline(**_flux_components()), {**TEXT, **call}


@tiny
def pixart():
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        in_channels=4,
        # Twice the channels: the second half is the learned variance, which the pipeline drops.
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=T5_WIDTH,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text_model(),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**LINEAR_BETAS),
    )
    call = {"negative_prompt": NEGATIVE_PROMPT, "guidance_scale": 4.5}
    return pipe, {**TEXT, **call, "clean_caption": False, "use_resolution_binning": False}


@tiny
def sana():
    width = 8
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=width,
        sample_size=16,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(
        **LINEAR_BETAS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    call = {
        "prompt_embeds": torch.randn(1, 6, width),
        "prompt_attention_mask": torch.ones(1, 6),
        "negative_prompt_embeds": torch.randn(1, 6, width),
        "negative_prompt_attention_mask": torch.ones(1, 6),
        # The default "" counts as a prompt given twice.
        "negative_prompt": None,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
    }
    return pipe, {**COMMON, **call}


@tiny
def qwen_image():
    width = 16
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    pipe = QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    call = {
        "prompt_embeds": torch.randn(1, 6, width),
        "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
        "negative_prompt_embeds": torch.randn(1, 6, width),
        "negative_prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
        "true_cfg_scale": 4.0,
    }
    return pipe, {**COMMON, **call}


@tiny
def z_image():
    width = 16
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=width,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    # The model leaves these as uninitialised memory.
    with torch.no_grad():
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    # Embeddings are lists here: one tensor a prompt, each of its own length.
    call = {
        "prompt_embeds": [torch.randn(6, width)],
        "negative_prompt_embeds": [torch.randn(4, width)],
        "guidance_scale": 5.0,
    }
    return pipe, {**COMMON, **call}
