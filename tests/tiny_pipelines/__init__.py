# SPDX-License-Identifier: Apache-2.0
"""Tiny real Diffusers pipelines with seeded random weights, built offline, to try schedulers in their true callers.

Each builder takes nothing and returns a new pipeline, holding the stock scheduler of its family, and the keyword
arguments of one small 5-step call. The caller adds `generator` (and `latents`, where wanted).
"""

from .adm import adm
from .components import Builder
from .edm import edm
from .flow import flux, flux_img2img, pixart, qwen_image, sana, sd3, z_image
from .latent import latent_diffusion
from .pixel import ddpm, dit, ldm_unconditional
from .sd import (
    animatediff,
    ldm,
    sd,
    sd_controlnet,
    sd_img2img,
    sd_inpaint,
    sdxl,
    sdxl_denoising_end,
    sdxl_img2img,
)
from .video import hunyuan_video, ltx, ltx_condition, wan, wan_video_to_video


PIPELINES: dict[str, Builder] = {
    build.__name__: build
    for build in (
        sd,
        sd_img2img,
        sd_inpaint,
        sd_controlnet,
        sdxl,
        sdxl_img2img,
        sdxl_denoising_end,
        sd3,
        flux,
        flux_img2img,
        pixart,
        sana,
        wan,
        wan_video_to_video,
        ltx,
        ltx_condition,
        hunyuan_video,
        qwen_image,
        z_image,
        animatediff,
        dit,
        ldm,
        ldm_unconditional,
        ddpm,
        edm,
        adm,
        latent_diffusion,
    )
}
