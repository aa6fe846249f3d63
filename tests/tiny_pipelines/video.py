# SPDX-License-Identifier: Apache-2.0
"""Video transformers, all rectified flow."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)

from .components import NEGATIVE_PROMPT, PROMPT, T5_WIDTH, random_image, t5_text_model, t5_tokenizer, tiny


COMMON = {"height": 32, "width": 32, "output_type": "latent"}


def _wan_components() -> dict:
    return {
        # Embeddings only: the video-to-video pipeline cleans prompts with ftfy, which it does not require.
        "tokenizer": None,
        "text_encoder": None,
        "vae": AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "transformer": WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=T5_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def _wan_call() -> dict:
    return {
        **COMMON,
        "prompt_embeds": torch.randn(1, 6, T5_WIDTH),
        "negative_prompt_embeds": torch.randn(1, 6, T5_WIDTH),
        "guidance_scale": 5.0,
    }


@tiny
def wan():
    return WanPipeline(**_wan_components()), {**_wan_call(), "num_frames": 5}


@tiny
def wan_video_to_video():
    frames = list(torch.rand(5, 3, 32, 32))
    return WanVideoToVideoPipeline(**_wan_components()), {**_wan_call(), "video": frames, "strength": 0.8}


def _ltx_components(scheduler: FlowMatchEulerDiscreteScheduler) -> dict:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=T5_WIDTH,
    )
    return {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": t5_text_model(),
        "tokenizer": t5_tokenizer(),
        "transformer": transformer,
    }


LTX_TEXT = {**COMMON, "prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "max_sequence_length": 16, "num_frames": 9}


@tiny
def ltx():
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return LTXPipeline(**_ltx_components(scheduler)), {**LTX_TEXT, "guidance_scale": 3.0}


@tiny
def ltx_condition():
    # No dynamic shifting: this pipeline passes no mu. It passes `per_token_timesteps` to `step` instead.
    pipe = LTXConditionPipeline(**_ltx_components(FlowMatchEulerDiscreteScheduler()))
    return pipe, {**LTX_TEXT, "image": random_image(), "guidance_scale": 3.0}


@tiny
def hunyuan_video():
    text_width, pooled_width = 16, 8
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=text_width,
        pooled_projection_dim=pooled_width,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    call = {
        "prompt_embeds": torch.randn(1, 6, text_width),
        "prompt_attention_mask": torch.ones(1, 6),
        "pooled_prompt_embeds": torch.randn(1, pooled_width),
        "guidance_scale": 6.0,
        "num_frames": 5,
    }
    return pipe, {**COMMON, **call}
