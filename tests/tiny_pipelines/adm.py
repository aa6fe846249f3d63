# SPDX-License-Identifier: Apache-2.0
"""ADM: a class-conditional U-Net that predicts noise and variance, guided by a classifier."""

import torch
from diffusers import DDIMScheduler

from pipelines.adm import ADMClassifier, ADMPipeline, ADMUNet2DModel

from .components import LINEAR_BETAS, tiny


CLASSES = 10


@tiny
def adm():
    encoder = {
        "sample_size": 16,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "downsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 4,
        "norm_num_groups": 2,
    }
    unet = ADMUNet2DModel(
        out_channels=6,
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        upsample_type="resnet",
        attn_norm_num_groups=2,
        num_class_embeds=CLASSES,
        **encoder,
    )
    classifier = ADMClassifier(num_classes=CLASSES, **encoder)
    with torch.no_grad():
        classifier.head.to_out.weight *= 10  # else it hardly tells classes apart
    scheduler = DDIMScheduler(**LINEAR_BETAS, clip_sample=False)
    call = {"class_labels": [7], "guidance_scale": 20.0, "output_type": "pt"}
    return ADMPipeline(unet, scheduler, classifier), call
