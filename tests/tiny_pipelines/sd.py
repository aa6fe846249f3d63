# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion and its relatives: text-conditioned U-Nets on a discrete variance-preserving path."""

import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LDMTextToImagePipeline,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from .components import (
    CLIP_WIDTH,
    NEGATIVE_PROMPT,
    PROMPT,
    SD_BETAS,
    autoencoder,
    clip_text_model,
    clip_tokenizer,
    random_image,
    text_unet,
    tiny,
)


TEXT = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "output_type": "latent"}
SIZE = {"height": 32, "width": 32}


def _sd_components() -> dict:
    return {
        "unet": text_unet(),
        "vae": autoencoder(),
        "text_encoder": clip_text_model(),
        "tokenizer": clip_tokenizer(),
        "scheduler": PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@tiny
def sd():
    return StableDiffusionPipeline(**_sd_components()), {**TEXT, **SIZE, "guidance_scale": 7.5}


@tiny
def sd_img2img():
    pipe = StableDiffusionImg2ImgPipeline(**_sd_components())
    return pipe, {**TEXT, "image": random_image(), "strength": 0.8, "guidance_scale": 7.5}


@tiny
def sd_inpaint():
    # Four latent channels, not nine: only then does the pipeline re-noise the known region inside its loop.
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionInpaintPipeline(**{**_sd_components(), "scheduler": scheduler})
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    call = {"image": random_image(), "mask_image": mask, "strength": 0.8, "guidance_scale": 7.5}
    return pipe, {**TEXT, **SIZE, **call}


@tiny
def sd_controlnet():
    controlnet = ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=CLIP_WIDTH,
        # Two entries: the condition is halved once, like the image by the autoencoder.
        conditioning_embedding_out_channels=(4, 8),
    )
    # A new ControlNet ends in zeros, which would make it invisible.
    for layer in (controlnet.controlnet_cond_embedding.conv_out, *controlnet.controlnet_down_blocks):
        torch.nn.init.normal_(layer.weight, std=0.5)
    scheduler = UniPCMultistepScheduler(**SD_BETAS, steps_offset=1)
    pipe = StableDiffusionControlNetPipeline(**{**_sd_components(), "scheduler": scheduler}, controlnet=controlnet)
    return pipe, {**TEXT, **SIZE, "image": random_image(), "guidance_scale": 7.5}


def _sdxl_components() -> dict:
    time_ids, time_id_width = 6, 8
    return {
        "unet": text_unet(
            cross_attention_dim=2 * CLIP_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_id_width,
            projection_class_embeddings_input_dim=time_ids * time_id_width + CLIP_WIDTH,
            use_linear_projection=True,
        ),
        "vae": autoencoder(scaling_factor=0.13025),
        "text_encoder": clip_text_model(),
        "text_encoder_2": clip_text_model(projection=True, hidden_act="gelu"),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        # Otherwise the default depends on whether a watermark library is installed.
        "add_watermarker": False,
    }


@tiny
def sdxl():
    return StableDiffusionXLPipeline(**_sdxl_components()), {**TEXT, **SIZE, "guidance_scale": 5.0}


@tiny
def sdxl_denoising_end():
    call = {**TEXT, **SIZE, "guidance_scale": 5.0, "denoising_end": 0.7}
    return StableDiffusionXLPipeline(**_sdxl_components()), call


@tiny
def sdxl_img2img():
    pipe = StableDiffusionXLImg2ImgPipeline(**_sdxl_components())
    return pipe, {**TEXT, "image": random_image(), "strength": 0.8, "guidance_scale": 5.0}


@tiny
def animatediff():
    adapter = MotionAdapter(
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    pipe = AnimateDiffPipeline(
        vae=autoencoder(),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(),
        motion_adapter=adapter,
        scheduler=DDIMScheduler(
            **{**SD_BETAS, "beta_schedule": "linear"},
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="linspace",
        ),
    )
    return pipe, {**TEXT, **SIZE, "num_frames": 4, "guidance_scale": 7.5}


@tiny
def ldm():
    pipe = LDMTextToImagePipeline(
        vqvae=autoencoder(),
        bert=clip_text_model(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(),
        scheduler=DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )
    # This pipeline divides the size by 8 whatever its autoencoder does, and returns no latents.
    return pipe, {"prompt": PROMPT, "height": 64, "width": 64, "guidance_scale": 5.0, "output_type": "pt"}
