# SPDX-License-Identifier: Apache-2.0
"""What one iteration of a recipe that differentiates costs at 3 to 10 evaluations: network evaluations a sample, and bytes kept for its backward
pass. The default recipe keeps none: what it holds is printed last, the end states' derivatives by each number of the table.

    python -m tests.benchmarks.learning_cost [--teacher examples/teachers/fashion-sd] [--batch 4]

A backward evaluation counts as 2 forward ones; recomputation as 1. Bytes are the distinct storages that autograd keeps after the
rollout, the arguments of the recomputed calls included; those as large as the latents (or guidance's doubled ones) are listed apart.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from ld3_diffusers import Schedule, SolverSpec
from ld3_diffusers.discretization import append_zero, discretization
from training.denoisers import denoisers
from training.recipe import DefaultRecipe
from training.rollout import PipelineRollout
from training.sensitivity import sensitivities


def measure(rollout: PipelineRollout, nfe: int, batch: int) -> dict[str, float]:
    conditioning = rollout.encode(["a photo of a sneaker"])
    shape = rollout.state_shape(conditioning)
    noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    times = append_zero(discretization("logsnr", rollout.path, nfe - 1)).requires_grad_()
    schedule = Schedule(times, None, SolverSpec("dpmpp"), rollout.path.kind, rollout.scheduler.config.prediction_type)
    storages: dict[int, torch.Tensor] = {}

    def keep(tensor):
        # the tensor itself is kept, so that its storage cannot be freed and its address used again
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def arguments(_module, args, kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                keep(value)

    before = rollout.evaluations.forward, rollout.evaluations.recomputed, rollout.evaluations.backward
    handles = [n.register_forward_pre_hook(arguments, with_kwargs=True) for n in denoisers(rollout.pipe).values()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        end = rollout(schedule, noise, conditioning)
    for handle in handles:
        handle.remove()
    sizes = [
        (t.untyped_storage().nbytes(), t.untyped_storage().nbytes() // t.element_size()) for t in storages.values()
    ]
    latents = sum(size for size, count in sizes if count in (noise.numel(), 2 * noise.numel()))
    end.float().square().sum().backward()
    after = rollout.evaluations.forward, rollout.evaluations.recomputed, rollout.evaluations.backward
    forward, recomputed, backward = ((b - a) / batch for a, b in zip(before, after))
    return {
        "forward": forward,
        "recomputed": recomputed,
        "backward": backward,
        "cost": forward + recomputed + 2 * backward,
        "latents": latents,
        "other": sum(size for size, _ in sizes) - latents,
    }


def linearise(rollout: PipelineRollout, nfe: int, batch: int) -> dict[str, float]:
    conditioning = rollout.encode(["a photo of a sneaker"])
    noise = torch.randn(batch, *rollout.state_shape(conditioning), generator=torch.Generator().manual_seed(0))
    times = append_zero(discretization("logsnr", rollout.path, nfe - 1))
    schedule = Schedule(times, None, SolverSpec("unipc"), rollout.path.kind, rollout.scheduler.config.prediction_type)
    saved = 0

    def keep(tensor):
        nonlocal saved
        saved += tensor.untyped_storage().nbytes()
        return tensor

    before, numbers = rollout.evaluations.forward, torch.eye(nfe * (nfe + 2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, derivatives = sensitivities(
            rollout, schedule, rollout.path, noise, conditioning, numbers, DefaultRecipe().directions
        )
    return {
        "forward": (rollout.evaluations.forward - before) / batch,
        "derivatives": derivatives.numel() * derivatives.element_size(),
        "saved": saved,
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="examples/teachers/fashion-sd")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args(argv)
    pipe = DiffusionPipeline.from_pretrained(args.teacher)
    print(
        f"{'NFE':>4}{'checkpointed':>14}{'forward':>9}{'again':>7}{'backward':>10}{'cost':>6}{'latents, kB':>13}{'other, kB':>11}"
    )
    for checkpointing in (True, False):
        with PipelineRollout(pipe, guidance_scale=3.0, checkpointing=checkpointing) as rollout:
            for nfe in range(3, 11):
                m = measure(rollout, nfe, args.batch)
                print(
                    f"{nfe:>4}{'yes' if checkpointing else 'no':>14}{m['forward']:>9.0f}{m['recomputed']:>7.0f}{m['backward']:>10.0f}"
                    f"{m['cost']:>6.0f}{m['latents'] / 1024:>13.0f}{m['other'] / 1024:>11.0f}"
                )
    print(f"\ndefault recipe\n{'NFE':>4}{'forward':>9}{'derivatives, kB':>17}{'kept for backward, kB':>23}")
    with PipelineRollout(pipe, guidance_scale=3.0) as rollout:
        for nfe in range(3, 11):
            m = linearise(rollout, nfe, args.batch)
            print(f"{nfe:>4}{m['forward']:>9.0f}{m['derivatives'] / 1024:>17.0f}{m['saved'] / 1024:>23.0f}")


if __name__ == "__main__":
    main()
