# SPDX-License-Identifier: Apache-2.0
"""EDM: a class-conditional, preconditioned U-Net on pixels."""

from diffusers import EDMDPMSolverMultistepScheduler
from torch import nn

from pipelines.edm import EDMPipeline, EDMUNet2DModel

from .components import tiny


@tiny
def edm():
    unet = EDMUNet2DModel(
        sample_size=16,
        num_class_embeds=10,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(8,),
    )
    nn.init.normal_(unet.dec["16x16_aux_conv"].weight, std=0.1)  # a new network says next to nothing
    return EDMPipeline(unet, EDMDPMSolverMultistepScheduler()), {"class_labels": [7], "output_type": "pt"}
