# SPDX-License-Identifier: Apache-2.0
"""Learn a schedule for a pipeline (LD3, arXiv:2405.15506).

    accelerate launch -m training.train_ld3 --pretrained_model_name_or_path examples/teachers/fashion-sd \\
        --teacher_set fashion-train --nfe 5 --solver unipc --output_dir fashion-ld3

The output folder becomes a scheduler repository: `LD3Scheduler.from_pretrained("fashion-ld3")`. Run again with another `--nfe`
and the same folder to serve several counts. A schedule that loses to a hand-made grid on the validation pairs is not saved.
"""

import argparse
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from tqdm.auto import tqdm

import ld3_diffusers
from ld3_diffusers import LD3Scheduler, Schedule, SolverSpec
from ld3_diffusers.discretization import DISCRETIZATIONS
from ld3_diffusers.schedulers.stock_config import BETA_KEYS, FLOW_KEYS, SIGMA_KEYS

from . import make_teacher_set
from .arguments import check_writable, parse, usage_errors
from .initial import BEFORE_ZERO, STOCK, candidates, grid_schedule, grid_search, saved_schedule
from .learner import LearnResult, Problem, learn
from .learning_arguments import check, parser, recipe_of
from .objectives import Decoded, Objective, make_distance
from .recipe import Recipe
from .rollout import PipelineRollout
from .schedule_plot import plot_schedules
from .teacher import check_teacher_name, load_teacher
from .teacher_set import TeacherSet, check_disjoint


CONFIG = "scheduler_config.json"
PAIRS_MADE_HERE = 128  # without --teacher_set and counts
MODEL_KEYS = (
    *("noise_path", "prediction_type", "num_train_timesteps", "shift_terminal", "time_shift_type"),
    *BETA_KEYS,
    *FLOW_KEYS,
    *SIGMA_KEYS,
)
# what must be alike in the making of training and validation pairs
SAME_TARGET = ("guidance_scale", "height", "width", "negative_prompt", "solver", "solver_order", "num_inference_steps")


@dataclass(frozen=True)
class Part:
    """Some pairs of a teacher set."""

    whole: TeacherSet
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, indices, device):
        return self.whole.batch([self.first + i for i in indices], device)


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    with usage_errors(command_line):
        check(args)
        check_writable(args.output_dir)
        recipe = recipe_of(args)
        spec = SolverSpec(
            args.solver, args.solver_order, args.solver_type, args.predict_x0, args.lower_order_final, args.afs
        )
        spec.make()
        check_start(args)
        check_teacher_name(args.pretrained_model_name_or_path)
        existing(args)
        try:
            distance = make_distance(args.loss, args.loss_space, args.lpips_net)
        except ImportError as error:
            raise ValueError(str(error)) from error
        train(args, recipe, spec, distance)


def check_start(args: argparse.Namespace) -> None:
    """Raises a `ValueError` unless `--discretization` is a grid or a folder."""
    name = args.discretization
    if name == "best" or name in STOCK or name.removesuffix(BEFORE_ZERO) in DISCRETIZATIONS or Path(name).exists():
        return
    raise ValueError(
        f"--discretization {name!r} is neither a folder with a schedule nor one of best, {', '.join([*DISCRETIZATIONS, *STOCK])}"
    )


def existing(args: argparse.Namespace) -> LD3Scheduler | None:
    """The scheduler that the output folder already holds; a `ValueError` if it cannot be read."""
    return LD3Scheduler.from_pretrained(args.output_dir) if Path(args.output_dir, CONFIG).exists() else None


def train(args: argparse.Namespace, recipe: Recipe, spec: SolverSpec, distance: Objective) -> None:
    folder = Path(args.output_dir, f"nfe-{args.nfe}")
    tracker = None if args.report_to == "none" else args.report_to
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / args.logging_dir))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=tracker, project_config=project)
    set_seed(args.seed)
    training, validation = teacher_pairs(args, accelerator)
    pipe = load_teacher(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        mixed_precision=args.mixed_precision,
        device=accelerator.device,
    )
    made = training.whole.provenance
    if args.guidance_scale is None:
        args.guidance_scale = made["guidance_scale"]
    for pairs in (training, validation):
        pairs.whole.check(pipe, guidance_scale=args.guidance_scale, height=made["height"], width=made["width"])
    check_same_target(made, validation.whole.provenance)
    stock = pipe.scheduler.config
    options = {"guidance_scale": args.guidance_scale, "height": made["height"], "width": made["width"]}
    with PipelineRollout(pipe, **options) as rollout:
        config, path = rollout.scheduler.config, rollout.path
        check_existing(existing(args), config)
        objective = Decoded(distance, rollout.decode) if args.loss_space == "pixel" else distance
        problem = Problem(rollout, training, validation, path, objective, accelerator)
        # Times of flow models are learned before their resolution shift, where that is possible.
        grid = {"final_sigmas_type": args.final_sigmas_type, "final": bool(config.shift_terminal)}
        grids = candidates(path, args.nfe, spec, config.prediction_type, stock_config=dict(stock), **grid)
        start, initial = starting_point(args, recipe, spec, problem, grids, grid, config)
        accelerator.print(f"starting from {start}")
        check_gradients(problem, initial)
        result = run(args, recipe, problem, initial, folder, accelerator)
        rivals = grid_search(problem, grids, pairs="valid", batch_size=pass_size(recipe))
        facts = provenance(args, recipe, rollout, made, problem, start, rivals, result)
        result.schedule = replace(result.schedule, provenance=facts)
        best = next(iter(rivals))
        accelerator.print(f"validation loss {result.loss:.6g}; {best}, the best hand-made grid, {rivals[best]:.6g}")
        refuse_worse(args, result, rivals)
        if accelerator.is_main_process:
            pictures = {"learned": result.schedule, f"start: {start}": initial, f"best grid: {best}": grids[best]}
            save(args, result, stock, path, folder, pictures)
    accelerator.end_training()


def pass_size(recipe: Recipe) -> int | None:
    return getattr(recipe, "micro_batch_size", None) or recipe.batch_size


def teacher_pairs(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Part, Part]:
    """Training and validation pairs, which share no seed.

    Raises:
        ValueError: if there are too few.
    """
    whole = TeacherSet.load(args.teacher_set if args.teacher_set else made_here(args, accelerator))
    held_out = None if args.validation_set is None else TeacherSet.load(args.validation_set)
    if held_out is not None:
        check_disjoint(whole, held_out)
        num_valid, left = args.num_valid or len(held_out), len(whole)
    else:
        num_valid = args.num_valid or max(1, len(whole) // 3)
        left = len(whole) - num_valid
    num_train = left if args.num_train is None else args.num_train
    available = len(whole) if held_out is None else len(held_out)
    if num_train < 1 or num_train > left or num_valid > available:
        raise ValueError(
            f"{num_train if args.num_train else 'some'} training and {num_valid} validation pairs are asked of "
            f"{len(whole)}{'' if held_out is None else f' and {len(held_out)}'}; make a larger teacher set, or lower --num_train "
            "or --num_valid"
        )
    valid = Part(whole, len(whole) - num_valid, num_valid) if held_out is None else Part(held_out, 0, num_valid)
    return Part(whole, 0, num_train), valid


def made_here(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """Makes a teacher set in the output folder, or continues or finds it there."""
    folder = Path(args.output_dir, "teacher_set")
    count = PAIRS_MADE_HERE
    if args.num_train or args.num_valid:
        count = (args.num_train or args.num_valid) + (args.num_valid or args.num_train)
    given = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "output_dir": folder,
        "num_samples": count,
        "num_inference_steps": args.teacher_steps,
        "seed": args.seed,
        "mixed_precision": args.mixed_precision,
        **{name: getattr(args, name) for name in ("revision", "variant", "guidance_scale", "resolution")},
        **{name: getattr(args, name) for name in ("prompts_file", "caption_column", "negative_prompt")},
    }
    command_line = [f"--{name}={value}" for name, value in given.items() if value is not None]
    asked = parse(make_teacher_set.parser(), command_line)
    make_teacher_set.make(asked, make_teacher_set.check(asked))
    accelerator.wait_for_everyone()
    return folder


def check_same_target(made: dict, validated: dict) -> None:
    """Raises a `ValueError` if the validation pairs were not made as the training pairs were."""
    for name in SAME_TARGET:
        if made.get(name) != validated.get(name):
            raise ValueError(
                f"the validation set was made with {name}={validated.get(name)!r}, the teacher set with {made.get(name)!r}; "
                "make both with the same settings"
            )


def starting_point(
    args, recipe, spec, problem, grids: dict[str, Schedule], grid: dict, config
) -> tuple[str, Schedule]:
    """What learning starts from, and its name."""
    path, name = problem.path, args.discretization
    if name == "best" and recipe.name == "published":
        name = "time_uniform" if recipe.mode == "time" else "logsnr"  # where it starts by itself
    if name == "best":
        losses = grid_search(problem, grids, batch_size=pass_size(recipe))
        name = next(iter(losses))
        if not math.isfinite(losses[name]):
            raise ValueError("no hand-made grid has a finite loss; use another solver or more evaluations")
        return name, grids[name]
    if name in grids:
        return name, grids[name]
    if Path(name).exists():
        return Path(name).name, saved_schedule(name, path, args.nfe, spec, config.prediction_type)
    return name, grid_schedule(name, path, args.nfe, spec, config.prediction_type, **grid)


def check_gradients(problem: Problem, initial: Schedule) -> None:
    noise, _, conditioning = problem.train.batch([0], problem.device)
    problem.rollout.check_gradients(initial, noise, conditioning)


def run(args, recipe, problem: Problem, initial: Schedule, folder: Path, accelerator: Accelerator) -> LearnResult:
    steps = recipe.max_steps if recipe.name == "default" else recipe.steps(len(problem.train))
    progress = tqdm(total=steps, desc="learning", unit="step", disable=not accelerator.is_local_main_process)

    def report(done: int, entry: dict[str, float]) -> None:
        progress.update(done - progress.n)
        progress.set_postfix(
            {key: f"{value:.3g}" for key, value in entry.items() if key.endswith("loss")}, refresh=False
        )
        if accelerator.log_with and not accelerator.trackers:
            settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers("train_ld3", settings)
        if accelerator.log_with:
            accelerator.log({key: value for key, value in entry.items() if math.isfinite(value)}, step=done)

    try:
        return learn(
            problem.rollout,
            problem.train,
            problem.valid,
            initial,
            recipe,
            path=problem.path,
            objective=problem.objective,
            accelerator=accelerator,
            seed=args.seed,
            checkpoint_dir=folder,
            checkpointing_steps=args.checkpointing_steps,
            checkpoints_total_limit=args.checkpoints_total_limit,
            resume_from_checkpoint=args.resume_from_checkpoint,
            facts={
                **{name: getattr(args, name) for name in ("loss", "loss_space", "lpips_net", "guidance_scale")},
                "pairs": [
                    [
                        part.whole.provenance.get(name)
                        for name in ("teacher_digest", "base_seed", "prompts_digest", *SAME_TARGET)
                    ]
                    for part in (problem.train, problem.valid)
                ],
            },
            callback=report,
        )
    finally:
        progress.close()


def provenance(args, recipe, rollout, made: dict, problem: Problem, start, rivals, result: LearnResult) -> dict:
    """Where the schedule comes from, as plain JSON."""
    pipe = rollout.pipe
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    best = next(iter(rivals))
    # A local folder's name identifies nothing; `LD3Scheduler.check` compares "teacher", so that is a Hub id or absent.
    local = Path(args.pretrained_model_name_or_path).is_dir()
    facts = {
        "teacher": None if local else args.pretrained_model_name_or_path,
        "teacher_name": Path(args.pretrained_model_name_or_path).resolve().name if local else None,
        "revision": args.revision,
        "teacher_digest": made["teacher_digest"],
        "pipeline": type(pipe).__name__,
        "denoiser": None if denoiser is None else type(denoiser).__name__,
        "in_channels": None if denoiser is None else denoiser.config.get("in_channels"),
        "dtype": None if denoiser is None else str(denoiser.dtype).removeprefix("torch."),
        "guidance_scale": args.guidance_scale,
        "height": made["height"],
        "width": made["width"],
        "teacher_solver": made.get("solver"),
        "teacher_steps": made["num_inference_steps"],
        "recipe": recipe.name,
        "recipe_settings": json.loads(json.dumps(asdict(recipe))),
        "loss_name": args.loss,
        "loss_space": args.loss_space,
        "train_pairs": len(problem.train),
        "valid_pairs": len(problem.valid),
        "seed": args.seed,
        "start": start,
        "initial_loss": result.initial_loss,
        "loss": result.loss,
        "best_grid": best,
        "best_grid_loss": rivals[best],
        "versions": {
            "ld3_diffusers": ld3_diffusers.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }
    return {key: value for key, value in facts.items() if value is not None}


def refuse_worse(args, result: LearnResult, rivals: dict[str, float]) -> None:
    """Raises a `ValueError` if a hand-made grid is as good on the validation pairs."""
    best = next(iter(rivals))
    if args.allow_worse or result.loss < rivals[best]:
        return
    raise ValueError(
        f"the learned schedule does not beat the grid {best!r} on the validation pairs ({result.loss:.6g} against "
        f"{rivals[best]:.6g}), so nothing was saved; use more pairs or iterations, or that grid, or --allow_worse"
    )


def check_existing(present: LD3Scheduler | None, config) -> None:
    """Raises a `ValueError` if the schedules in the output folder are for another kind of model."""
    if present is None:
        return
    for key in MODEL_KEYS:
        if present.config[key] != config[key]:
            raise ValueError(
                f"the output folder holds schedules for a model with {key}={present.config[key]!r}, this one has "
                f"{config[key]!r}; choose another --output_dir"
            )


def save(args, result: LearnResult, stock, path, folder: Path, pictures: dict[str, Schedule]) -> None:
    """Everything to a temporary folder first, then file by file to its place, the config last."""
    output, schedule = Path(args.output_dir), result.schedule
    entry = {str(args.nfe): schedule.to_dict(path)}
    present = existing(args)
    if present is None:
        spec = schedule.spec
        names = ("solver", "solver_order", "solver_type", "predict_x0", "lower_order_final")
        # None, a solver's default, is no value to a stock scheduler that may be made from this config
        given = {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}
        scheduler = LD3Scheduler.from_config(stock, **given, schedules=entry)
    else:
        schedules = {**(present.config.schedules or {}), **entry}
        ordered = {count: schedules[count] for count in sorted(schedules, key=int)}
        scheduler = LD3Scheduler.from_config(present.config, schedules=ordered)
    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        scheduler.save_pretrained(partial)
        LD3Scheduler.from_pretrained(partial)
        numbers = [{k: v if math.isfinite(v) else None for k, v in entry.items()} for entry in result.history]
        log = "".join(json.dumps({"step": i + 1, **entry}) + "\n" for i, entry in enumerate(numbers))
        (partial / "training_log.jsonl").write_text(log, encoding="utf-8")
        plot_schedules(pictures, path, partial / "schedule.png")
        folder.mkdir(exist_ok=True)
        for name in ("training_log.jsonl", "schedule.png"):
            os.replace(partial / name, folder / name)
        os.replace(partial / CONFIG, output / CONFIG)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
