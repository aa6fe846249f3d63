# SPDX-License-Identifier: Apache-2.0
"""Time of one `scheduler.step`, side by side with stock schedulers in one run, and on a GPU the host-device synchronisations in it.

    python -m tests.benchmarks.step_overhead [--device cuda] [--shape 1 4 64 64] [--rounds 40]

Every scheduler takes a full sampling loop of random outputs in turn, round after round, so that noise of the machine hits all
alike; printed is the median over rounds of the mean time of a step, and its ratio to stock UniPC and FlowMatchEuler.
"""

import argparse
import statistics
import time

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.solvers import ORDERS, SOLVERS


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedulers():
    yield "stock UniPC", UniPCMultistepScheduler(**SD_BETAS)
    yield "stock DPM++ 2M", DPMSolverMultistepScheduler(**SD_BETAS)
    yield "stock DEIS", DEISMultistepScheduler(**SD_BETAS)
    yield "stock Euler", EulerDiscreteScheduler(**SD_BETAS)
    yield "stock FlowMatchEuler", FlowMatchEulerDiscreteScheduler()
    for name in SOLVERS:
        for order in ORDERS[name]:
            yield f"{name} {order}", LD3Scheduler(solver=name, solver_order=order, **SD_BETAS)


def one_round(scheduler, sample, output, steps, device) -> float:
    scheduler.set_timesteps(steps, device=device)
    timesteps = list(scheduler.timesteps)
    x = sample
    x = scheduler.step(output, timesteps[0], x, return_dict=False)[0]  # the first step allocates
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for t in timesteps[1:]:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / (len(timesteps) - 1)


def synchronisations(scheduler, sample, output, steps) -> int:
    """How often the driver was made to wait during the steps of one loop."""
    scheduler.set_timesteps(steps, device="cuda")
    scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as p:
        for t in scheduler.timesteps[1:]:
            scheduler.step(output, t, sample, return_dict=False)
    return sum(e.count for e in p.key_averages() if "Synchronize" in e.key or e.key == "aten::_local_scalar_dense")


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 4, 64, 64])
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # stock Euler asks for scale_model_input at every step
    torch.set_num_threads(1)
    sample, output = torch.randn(2, *args.shape, device=args.device)
    times: dict[str, list[float]] = {}
    entries = list(schedulers())
    with torch.no_grad():
        for _ in range(args.rounds):
            for name, scheduler in entries:
                times.setdefault(name, []).append(one_round(scheduler, sample, output, args.steps, args.device))
        medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
        print(
            f"{'':22}{'us/step':>9}{'/ UniPC':>9}{'/ FlowMatchEuler':>18}"
            + ("   synchronisations" if args.device == "cuda" else "")
        )
        for name, scheduler in entries:
            line = f"{name:22}{medians[name]:9.1f}{medians[name] / medians['stock UniPC']:9.3f}"
            line += f"{medians[name] / medians['stock FlowMatchEuler']:18.2f}"
            if args.device == "cuda":
                line += f"{synchronisations(scheduler, sample, output, args.steps):19d}"
            print(line)
    return medians


if __name__ == "__main__":
    main()
