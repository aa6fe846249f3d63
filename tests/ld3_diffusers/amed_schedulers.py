# SPDX-License-Identifier: Apache-2.0
"""Schedules of AMED steps, schedulers with them, and a small pipeline that these are attached to."""

from types import SimpleNamespace

import torch
from torch import nn

from ld3_diffusers import AMEDScheduler, LD3Scheduler, SolverSpec
from ld3_diffusers.amed import StepPrediction, amed_schedule, with_step
from ld3_diffusers.discretization import discretization
from tests.schedules import SD_BETAS

from .amed_steps import random_predictor


PATH = LD3Scheduler(**SD_BETAS).path


def bare(nfe=4, solver="amed", afs=False, path=PATH, kind="epsilon", **spec):
    steps = discretization("time_uniform", path, (nfe + afs) // 2)
    return amed_schedule(steps, SolverSpec(solver, afs=afs, **spec), path, kind)


def static(nfe=4, solver="amed", afs=False, path=PATH, kind="epsilon", **spec):
    """Stages, factors and times told that differ from step to step."""
    schedule = bare(nfe, solver, afs, path, kind, **spec)
    for n in range((nfe + afs) // 2):
        schedule = with_step(schedule, n, StepPrediction(0.4 + 0.03 * n, 1.01 - 0.013 * n, 0.97 + 0.04 * n), path)
    return schedule


def scheduler_with(*schedules, cls=AMEDScheduler, config=SD_BETAS, **options):
    path = LD3Scheduler.from_config(config).path
    entries = {str(schedule.nfe): schedule.to_dict(path) for schedule in schedules}
    return cls.from_config(config, schedules=entries, **options)


def predicting(nfe=4, solver="amed", afs=False, **options):
    scheduler = scheduler_with(bare(nfe, solver, afs))
    scheduler.set_predictor(nfe, random_predictor(solver=solver, afs=afs, **options))
    return scheduler


class Denoiser(nn.Module):
    """Small, with a bottleneck; not linear in its input, nor in its time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.mid_block = nn.Conv2d(4, 6, 2, stride=2)
        self.out = nn.Conv2d(6, 4, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        self.told = []

    def forward(self, sample, timestep):
        self.told.append(timestep)
        time = (timestep / 1000).to(sample.dtype).reshape(-1, 1, 1, 1)
        hidden = self.mid_block(torch.sin(3 * time) + torch.tanh(sample))
        return nn.functional.interpolate(self.out(torch.tanh(hidden)), scale_factor=2) + 0.1 * sample


def pipeline(scheduler):
    """What of a pipeline the scheduler is attached to."""
    pipe = SimpleNamespace(unet=Denoiser().double(), scheduler=scheduler)
    scheduler.attach(pipe)
    return pipe


NOISE = torch.randn(3, 4, 20, 20, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@torch.no_grad()
def sample(pipe, nfe, noise=NOISE):
    scheduler = pipe.scheduler
    scheduler.set_timesteps(nfe)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x
