# SPDX-License-Identifier: Apache-2.0
"""CompVis's latent diffusion for classes: one embedded class as the only token, guided by a doubled batch, VQ-coded."""

from diffusers import DDIMScheduler

from pipelines.ldm import LatentDiffusionPipeline, LDMClassEmbedder
from tests.pipelines.ldm_networks import conditional, vq

from .components import tiny


@tiny
def latent_diffusion():
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False)
    pipe = LatentDiffusionPipeline(vq(), conditional(), scheduler, LDMClassEmbedder(10, 24))
    return pipe, {"class_labels": [7], "guidance_scale": 3.0, "output_type": "pt"}
