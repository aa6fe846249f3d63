# SPDX-License-Identifier: Apache-2.0
"""What AMED's predicted stages add to a student step, beside one call of the U-Net in the same run.

    python -m tests.benchmarks.amed_predictor_cost [--networks fashion-sd sd15] [--rounds 20] [--sd15_rounds 2] [--threads 1]

Sampling loops run around a network that returns at once what a real U-Net returned, with guidance by a doubled batch: with stages
predicted for each sample, with static stages, and with stock UniPC. What the first takes longer than the second is what prediction
adds: predictor, rows of the step table, hooks, and steps that differ between samples. Loops and calls of the U-Net take turns, so
that noise of the machine hits all alike; printed are medians over rounds. `fashion-sd` is the shipped pipeline, `sd15` a U-Net of
Stable Diffusion 1.5's shapes with random weights.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel, UniPCMultistepScheduler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ld3_diffusers import AMEDPredictor, AMEDScheduler, LD3Scheduler, SolverSpec
from ld3_diffusers.amed import amed_schedule
from ld3_diffusers.discretization import discretization


TEACHER = "examples/teachers/fashion-sd"
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GUIDANCE = 2  # guidance doubles the batch


def unets(names: list[str]):
    """Name, U-Net and batch sizes."""
    if "fashion-sd" in names:
        yield "fashion-sd", UNet2DConditionModel.from_pretrained(TEACHER, subfolder="unet"), (1, 4, 32)
    if "sd15" in names:
        yield "sd15", UNet2DConditionModel(sample_size=64, cross_attention_dim=768), (1,)


class Answers(nn.Module):
    """Returns what the U-Net returned, bottleneck and output, without computing it."""

    def __init__(self, bottleneck: torch.Tensor, output: torch.Tensor):
        super().__init__()
        self.output = output
        self.mid_block = nn.Module()
        self.mid_block.forward = lambda: bottleneck

    def forward(self, sample, timestep):
        self.mid_block()
        return self.output


def call_of(unet: UNet2DConditionModel, batch: int):
    """A call of the U-Net for a guided batch, and the samples."""
    sample = torch.randn(batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    prompts = torch.randn(GUIDANCE * batch, 77, unet.config.cross_attention_dim)
    doubled, times = torch.cat([sample] * GUIDANCE), torch.full((GUIDANCE * batch,), 500.0)
    return (lambda: unet(doubled, times, encoder_hidden_states=prompts).sample), sample


def contenders(steps: int, answers: tuple[torch.Tensor, torch.Tensor]):
    """Scheduler and network by name; only the first network has hooks."""
    path = LD3Scheduler(**SD_BETAS).path
    bare = amed_schedule(discretization("time_uniform", path, steps), SolverSpec("amed"), path, "epsilon")
    schedules = {str(bare.nfe): bare.to_dict(path)}
    per_sample = AMEDScheduler(**SD_BETAS, schedules=schedules)
    per_sample.set_predictor(bare.nfe, AMEDPredictor(scale_dir=0.01, scale_time=0.2, solver="amed"))
    static, stock = LD3Scheduler(**SD_BETAS, schedules=schedules), UniPCMultistepScheduler(**SD_BETAS)
    entries = {"per sample": per_sample, "static": static, "stock UniPC": stock}
    result = {name: (scheduler, Answers(*answers)) for name, scheduler in entries.items()}
    per_sample.attach(SimpleNamespace(unet=result["per sample"][1], scheduler=per_sample))
    return result


def loop_seconds(scheduler, network: Answers, sample: torch.Tensor, nfe: int) -> float:
    scheduler.set_timesteps(nfe)
    start = time.perf_counter()
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([sample] * GUIDANCE), t)
        without, conditional = network(both, t).chunk(GUIDANCE)
        sample = scheduler.step(without + 7.5 * (conditional - without), t, sample, return_dict=False)[0]
    return time.perf_counter() - start


def seconds_of(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bottleneck_and_output(unet: UNet2DConditionModel, call) -> tuple[torch.Tensor, torch.Tensor]:
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    output = call()
    hook.remove()
    return seen[0], output


@torch.no_grad()
def measured(unet: UNet2DConditionModel, batch: int, steps: int, rounds: int, loops: int) -> dict[str, float]:
    """Seconds of a U-Net call, of an evaluation with the static and stock schedulers, and of what a student step adds."""
    call, sample = call_of(unet, batch)
    answers, nfe = bottleneck_and_output(unet, call), 2 * steps
    entries = contenders(steps, answers)
    times: dict[str, list[float]] = {name: [] for name in ("U-Net", *entries)}
    for _ in range(rounds):
        times["U-Net"].append(seconds_of(call))
        for _ in range(loops):
            for name, (scheduler, network) in entries.items():
                times[name].append(loop_seconds(scheduler, network, sample, nfe))
    medians = {name: statistics.median(values) for name, values in times.items()}
    predictor, features = entries["per sample"][0].predictors[nfe], answers[0][-batch:].mean(1)
    return {
        "U-Net": medians["U-Net"],
        "static": medians["static"] / nfe,
        "stock UniPC": medians["stock UniPC"] / nfe,
        "added": (medians["per sample"] - medians["static"]) / steps,
        "U-Net FLOPs": flops_of(call),
        "predictor FLOPs": flops_of(lambda: predictor(features, 10.0, 1.0)),
    }


def main(argv=None) -> list[dict[str, float]]:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--networks", nargs="+", choices=["fashion-sd", "sd15"], default=["fashion-sd", "sd15"])
    p.add_argument("--student_steps", type=int, default=3)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--sd15_rounds", type=int, default=2, help="a call takes about a minute on one core")
    p.add_argument("--loops", type=int, default=5, help="sampling loops of each scheduler a call of the U-Net")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    predictor = AMEDPredictor(scale_dir=0.01, scale_time=0.2)
    print(f"predictor: {sum(parameter.numel() for parameter in predictor.parameters())} parameters")
    print(
        f"{'':12}{'batch':>6}{'U-Net, ms':>11}{'added, ms':>11}{'/ call':>9}{'static, us':>12}{'UniPC, us':>11}"
        f"{'U-Net, MFLOP':>14}{'predictor, MFLOP':>18}"
    )
    results = []
    for name, unet, batches in unets(args.networks):
        for batch in batches:
            rounds = args.sd15_rounds if name == "sd15" else args.rounds
            result = measured(unet.eval(), batch, args.student_steps, rounds, args.loops)
            print(
                f"{name:12}{batch:6}{1e3 * result['U-Net']:11.2f}{1e3 * result['added']:11.3f}"
                f"{result['added'] / result['U-Net']:9.4f}{1e6 * result['static']:12.1f}{1e6 * result['stock UniPC']:11.1f}"
                f"{result['U-Net FLOPs'] / 1e6:14.1f}{result['predictor FLOPs'] / 1e6:18.4f}",
                flush=True,
            )
            results.append(result)
    return results


if __name__ == "__main__":
    main()
