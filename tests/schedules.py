# SPDX-License-Identifier: Apache-2.0
"""Schedules that could have been learned: uneven steps, and network times off the levels."""

import torch

from ld3_diffusers import LD3Scheduler, Schedule, SolverSpec
from ld3_diffusers.discretization import append_zero, discretization


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"noise_path": "flow", "prediction_type": "flow_prediction"}


def plausible_schedule(path, nfe=5, solver="unipc", order=None, prediction_type=None, *, provenance=None, **options):
    """A `Schedule` of `nfe` evaluations that ends in clean data; `options` are those of [`SolverSpec`]."""
    spec = SolverSpec(solver, order, **options)
    rows = nfe + int(spec.afs)
    steps = spec.make().num_steps(rows, True)
    if path.kind == "ve":
        ends = append_zero(discretization("polynomial", path, steps - 1)) if steps > 1 else [path.t_max, 0.0]
    else:
        ends = path.t_max * (1 - (torch.arange(steps + 1, dtype=torch.float64) / steps) ** 1.2)
    times = spec.make().expand_to(path, ends, rows)
    network_times = times[:-1] * torch.linspace(0.9963, 0.97, rows, dtype=torch.float64)
    prediction_type = prediction_type or ("flow_prediction" if path.kind == "flow" else "epsilon")
    return Schedule(times, network_times, spec, path.kind, prediction_type, provenance=provenance or {})


def scheduler_with(nfes=(5,), solver="unipc", order=None, config=None, provenance=None, options=None, **kwargs):
    """An `LD3Scheduler` with a plausible schedule for each of `nfes`, from `config`, that of any scheduler."""
    config = dict(config or SD_BETAS)
    plain = LD3Scheduler.from_config(config, schedules=None, **kwargs)
    entries = {
        str(nfe): plausible_schedule(
            plain.path, nfe, solver, order, plain.config.prediction_type, provenance=provenance, **(options or {})
        ).to_dict(plain.path)
        for nfe in nfes
    }
    return LD3Scheduler.from_config(config, schedules=entries, **kwargs)


def outputs(count, shape=(2, 4, 8, 8), dtype=torch.float32, seed=0):
    """A starting state and `count` network outputs."""
    generator = torch.Generator().manual_seed(seed)
    x, *rest = torch.randn(count + 1, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, rest


def run(scheduler, x, rest, start=0):
    """The states after each step, from step `start` on."""
    states = []
    for t, output in zip(scheduler.timesteps[start:], rest):
        x = scheduler.step(output, t, x, return_dict=False)[0]
        states.append(x)
    return states
