# SPDX-License-Identifier: Apache-2.0
"""Make a teacher set: starting noise and where a teacher's long schedule takes it.

    accelerate launch -m training.make_teacher_set --pretrained_model_name_or_path examples/teachers/fashion-sd \\
        --output_dir fashion-train --num_samples 256 --prompts_file prompts.txt --guidance_scale 3

Sample i starts from seed `--seed` + i, conditioned on prompt i modulo the number of prompts. A run that was stopped
continues when it is started again with the same arguments, on any number of processes, and ends in the same set. Sets for
learning and for evaluation must not share seeds; give the second a `--seed` of at least the first's plus `--num_samples`.
"""

import argparse
import hashlib
import json
from pathlib import Path

import datasets
import diffusers
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

import ld3_diffusers
from ld3_diffusers import LD3Scheduler, SolverSpec
from ld3_diffusers.discretization import DISCRETIZATIONS
from ld3_diffusers.solvers import SOLVERS, VARIANTS

from .arguments import check_writable, parse, usage_errors
from .call_settings import CALL_SETTINGS, add_call_arguments, call_settings, check_call_arguments
from .conditioning import ConditioningStore
from .initial import FINAL_SIGMAS_TYPES
from .processes import COLLECTIVE_TIMEOUT, is_sharded, lost_process_message, on_main, shard, turns
from .prompts import add_prompt_arguments, prompts_of
from .rollout import PipelineRollout
from .teacher import check_teacher_name, encoding, free_text_encoders, load_teacher, scheduler_digest, teacher_digest
from .teacher_set import TeacherSetWriter, has_embeddings, starting_noise


PROMPTS_PER_ENCODING = 16


def parser() -> argparse.ArgumentParser:
    description, _, details = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "make_teacher_set",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--pretrained_model_name_or_path", "--teacher", required=True, help="pipeline folder or Hub id")
    p.add_argument("--revision", help="branch, tag or commit on the Hub")
    p.add_argument("--variant", help="variant of the weight files, such as fp16")
    p.add_argument(
        "--output_dir", required=True, help="folder of the finished set; `<output_dir>.partial` while it is made"
    )
    p.add_argument("--num_samples", type=int, default=256, help="pairs to make (default: %(default)s)")
    p.add_argument(
        "--num_inference_steps", type=int, default=50, help="network evaluations of the teacher (default: %(default)s)"
    )
    p.add_argument("--solver", choices=sorted(SOLVERS), default="unipc", help="of the teacher (default: %(default)s)")
    p.add_argument("--solver_order", type=int, help="default: the solver's own")
    kinds = sorted({kind for kinds in VARIANTS.values() for kind in kinds})
    p.add_argument("--solver_type", choices=kinds, help="default: the pipeline's, or the solver's own")
    p.add_argument(
        "--final_sigmas_type",
        choices=FINAL_SIGMAS_TYPES,
        help="end in clean data or at t_min (published); default: the pipeline's",
    )
    p.add_argument(
        "--discretization",
        choices=sorted(DISCRETIZATIONS),
        help="grid of the teacher; default: logsnr, for flow models the pipeline's own",
    )
    p.add_argument(
        "--train_batch_size", "--batch_size", type=int, default=16, help="samples at once (default: %(default)s)"
    )
    add_call_arguments(p)
    p.add_argument("--seed", type=int, default=0, help="seed of the first sample (default: %(default)s)")
    add_prompt_arguments(p)
    p.add_argument("--split", default="train", help="name of this split, recorded (default: %(default)s)")
    p.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="dtype of the teacher (default: float32)",
    )
    return p


def check(args: argparse.Namespace) -> list[str] | None:
    """What can be refused before anything is loaded; returns the prompts.

    Raises:
        ValueError: for an impossible argument.
    """
    for name in ("num_samples", "num_inference_steps", "train_batch_size"):
        value = getattr(args, name)
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")
    if args.solver_type is not None:  # a scheduler would take another solver's as its own default
        SolverSpec(args.solver, solver_type=args.solver_type).make()
    check_call_arguments(args)
    check_teacher_name(args.pretrained_model_name_or_path)
    if not Path(args.output_dir).exists():  # a finished set may lie in a folder that is read-only
        check_writable(args.output_dir)
    return prompts_of(args, args.num_samples)


def teacher_scheduler(args: argparse.Namespace, config) -> LD3Scheduler:
    """The long schedule: a named grid, or for flow models the pipeline's own with its resolution shift."""
    given = {name: getattr(args, name, None) for name in ("solver_order", "solver_type", "final_sigmas_type")}
    options = {"solver": args.solver, "schedules": None}
    options |= {name: value for name, value in given.items() if value is not None}
    scheduler = LD3Scheduler.from_config(config, **options)
    grid = args.discretization
    if grid is None and scheduler.path.kind != "flow":
        grid = "logsnr"
    elif grid is None and given["final_sigmas_type"] == "sigma_min":
        grid = "time_uniform"  # the stock grid ends at the smallest level after shifting it twice
    return scheduler if grid is None else LD3Scheduler.from_config(scheduler.config, discretization=grid)


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    with usage_errors(command_line), lost_process_message(args.output_dir):
        make(args, check(args))


def make(args: argparse.Namespace, prompts: list[str] | None) -> None:
    accelerator = Accelerator(kwargs_handlers=[COLLECTIVE_TIMEOUT])
    pipe = load_teacher(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        mixed_precision=args.mixed_precision,
        device=None,  # text encoders and the denoiser may not fit together
        text_encoders=not has_embeddings(args.output_dir),
    )
    pipe.scheduler = teacher_scheduler(args, pipe.scheduler.config)
    with PipelineRollout(pipe, checkpointing=False, **call_settings(args)) as rollout:
        writer = TeacherSetWriter(args.output_dir, request(args, prompts, rollout))
        if writer.finished:
            accelerator.print(f"{args.output_dir} is finished already: {args.num_samples} pairs")
            return
        encode_and_sample(args, prompts, rollout, writer, accelerator)


def request(args: argparse.Namespace, prompts: list[str] | None, rollout: PipelineRollout) -> dict:
    """Everything that decides what the pairs are."""
    scheduler = rollout.scheduler
    facts = {key: scheduler.config[key] for key in ("solver", "solver_order", "solver_type", "discretization")}
    return {
        "teacher": args.pretrained_model_name_or_path.rstrip("/").split("/")[-1]
        if Path(args.pretrained_model_name_or_path).is_dir()
        else args.pretrained_model_name_or_path,
        "revision": args.revision,
        "variant": args.variant,
        "pipeline": type(rollout.pipe).__name__,
        "teacher_digest": teacher_digest(rollout.pipe),
        "scheduler_digest": scheduler_digest(scheduler.config),
        "dtype": args.mixed_precision if args.mixed_precision != "no" else "float32",
        **{name: getattr(args, name) for name in CALL_SETTINGS},
        "guidance_scale": rollout.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
        **facts,
        "final_sigmas_type": args.final_sigmas_type,  # None: of the teacher, as in sets that do not record it
        "noise_path": scheduler.config.noise_path,
        "prediction_type": scheduler.config.prediction_type,
        "split": args.split,
        "base_seed": args.seed,
        "num_samples": args.num_samples,
        "shard_size": args.train_batch_size,
        "prompts_digest": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32],
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "datasets": datasets.__version__,
            "ld3_diffusers": ld3_diffusers.__version__,
        },
    }


@torch.no_grad()
def encode_and_sample(
    args, prompts, rollout: PipelineRollout, writer: TeacherSetWriter, accelerator: Accelerator
) -> None:
    def encode() -> ConditioningStore:
        if prompts is None:
            return ConditioningStore.of([rollout.encode()])
        # Prompts beyond the samples are never used.
        used = prompts[: args.num_samples]
        starts = range(0, len(used), PROMPTS_PER_ENCODING)
        return ConditioningStore.of(rollout.encode(used[start : start + PROMPTS_PER_ENCODING]) for start in starts)

    def begin() -> None:
        with encoding(rollout.pipe, accelerator.device):
            writer.begin((prompts or [])[: args.num_samples], encode)

    on_main(begin, accelerator)
    store = writer.store()
    if not store.has_text:
        free_text_encoders(rollout.pipe)
    shard(rollout.pipe, accelerator)
    if not is_sharded(accelerator):
        rollout.pipe.to(accelerator.device)
    num_prompts = min(len(prompts), args.num_samples) if prompts else 1
    shape = rollout.state_shape(store.select([0], accelerator.device))
    missing = writer.missing()
    accelerator.wait_for_everyone()  # nobody writes a shard before all have seen what is missing
    progress = tqdm(
        turns(missing, accelerator), desc="teacher", unit="batch", disable=not accelerator.is_local_main_process
    )
    for part, own in progress:
        indices = writer.indices(part)
        seeds = [args.seed + i for i in indices]
        prompt_indices = [i % num_prompts for i in indices]
        noise = starting_noise(seeds, shape) if rollout.moves_noise else torch.tensor(seeds)
        end = rollout(args.num_inference_steps, noise, store.select(prompt_indices, accelerator.device))
        if own:
            writer.write(part, noise if rollout.moves_noise else None, end, prompt_indices)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finished = writer.finish(shape)
        accelerator.print(
            f"{args.output_dir}: {len(finished)} pairs, seeds {finished.seeds.start} to {finished.seeds.stop - 1}"
        )


if __name__ == "__main__":
    main()
