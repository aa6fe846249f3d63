# SPDX-License-Identifier: Apache-2.0
"""Use schedules that were published as lists: LD3's two time vectors, Align Your Steps' sigmas.

python examples/import_published_schedule.py
"""

from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.schedulers import AysSchedules

from ld3_diffusers import LD3Scheduler, import_sigmas, import_times, scheduler_for


pipe = StableDiffusionPipeline.from_pretrained(Path(__file__).parent / "teachers" / "fashion-sd")
stock_config = pipe.scheduler.config
path = LD3Scheduler.from_config(stock_config).path

# `custom_ts_1` and `custom_ts_2` of LD3's programs, for Stable Diffusion with iPNDM of order 2 and 4 evaluations.
ld3 = import_times(
    "[1, 0.76668, 0.48113, 0.18417, 0.001]",
    "[1, 0.76706, 0.48103, 0.18396, 0.001]",
    path=path,
    solver="ipndm",
    solver_order=2,
)
# Align Your Steps, 10 evaluations, here with DPM-Solver++ 2M.
ays = import_sigmas(AysSchedules["StableDiffusionSigmas"], path=path, solver="dpmpp")

for name, schedule in (("LD3", ld3), ("AYS", ays)):
    pipe.scheduler = scheduler_for(schedule, stock_config)
    pipe("a photo of a sneaker", num_inference_steps=schedule.nfe, output_type="latent")
    print(f"{name}: timesteps {[round(t, 2) for t in pipe.scheduler.timesteps.tolist()]}")
