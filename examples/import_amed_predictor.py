# SPDX-License-Identifier: Apache-2.0
"""Use a predictor that AMED's authors trained for Stable Diffusion; the file is read without running the code in it.

python examples/import_amed_predictor.py network-snapshot-000005.pkl

The small pipeline that ships here stands in for Stable Diffusion: put your own in its place.
"""

import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline

from ld3_diffusers import import_amed


if len(sys.argv) != 2:
    sys.exit("give the predictor's file: python examples/import_amed_predictor.py network-snapshot-000005.pkl")
file = sys.argv[1]
pipe = StableDiffusionPipeline.from_pretrained(Path(__file__).parent / "teachers" / "fashion-sd")
stock_config = pipe.scheduler.config

# The stages of the steps are predicted for each sample, from the U-Net's bottleneck.
pipe.scheduler = import_amed(file, stock_config)
pipe.scheduler.attach(pipe)
(nfe,) = pipe.scheduler.learned_counts
pipe(["a photo of a sneaker", "a photo of a coat"], num_inference_steps=nfe, output_type="latent")
print(f"per_sample: {nfe} evaluations of {pipe.scheduler.schedule.spec.solver}")
pipe.scheduler.detach()

# The same stages for all samples: plain times, which every pipeline can use.
pipe.scheduler = import_amed(file, stock_config, form="static")
pipe("a photo of a sneaker", num_inference_steps=nfe, output_type="latent")
print(f"static: timesteps {[round(t, 2) for t in pipe.scheduler.timesteps.tolist()]}")
