# SPDX-License-Identifier: Apache-2.0
"""Learn schedules for a pipeline (LD3, arXiv:2405.15506).

    accelerate launch -m training.train_ld3 --pretrained_model_name_or_path examples/teachers/fashion-sd \\
        --teacher_set fashion-train --nfe 4 5 6 8 --solver unipc --output_dir fashion-ld3

The output folder becomes a scheduler repository: `LD3Scheduler.from_pretrained("fashion-ld3")`. Run again with another `--nfe`
and the same folder to serve more counts. A schedule that loses to a hand-made grid on the validation pairs is not saved.
"""

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from tqdm.auto import tqdm

from ld3_diffusers import Schedule, ScheduleCurve, SolverSpec
from ld3_diffusers.discretization import DISCRETIZATIONS
from ld3_diffusers.schedulers.thresholding import check_bounds_data

from .arguments import check_writable, parse, usage_errors
from .call_settings import CALL_SETTINGS
from .gradient_check import check_gradients
from .initial import (
    BEFORE_ZERO,
    STOCK,
    LosesToGrid,
    best_grid,
    candidates,
    grid_schedule,
    refuse_worse,
    rivals,
    saved_schedule,
)
from .learner import LearnResult, Problem, learn
from .learning_arguments import check, parser, recipe_of, solver_of
from .learning_pairs import learning_pairs
from .learning_problem import learning_problem
from .objectives import Objective, make_distance
from .processes import COLLECTIVE_TIMEOUT, lost_process_message, on_main
from .recipe import Recipe
from .schedule_folder import CURVE_FOLDER, existing, holds, results, save, settings, with_start
from .search import SEARCHES, search_start
from .teacher import check_teacher_name


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    with usage_errors(command_line):
        check(args)
        check_writable(args.output_dir)
        recipe = recipe_of(args)
        spec = solver_of(args)
        check_start(args)
        check_teacher_name(args.pretrained_model_name_or_path)
        existing(args.output_dir)
        try:
            distance = make_distance(args.loss, args.loss_space, args.lpips_net)
        except ImportError as error:
            raise ValueError(str(error)) from error
        with lost_process_message(args.output_dir):
            train(args, recipe, spec, distance)


def check_start(args: argparse.Namespace) -> None:
    """Raises a `ValueError` unless `--discretization` is a grid, a search or a folder."""
    name = args.discretization
    if (
        name in ("best", *SEARCHES)
        or name in STOCK
        or name.removesuffix(BEFORE_ZERO) in DISCRETIZATIONS
        or Path(name).exists()
    ):
        return
    known = ", ".join(["best", *SEARCHES, *DISCRETIZATIONS, *STOCK])
    raise ValueError(f"--discretization {name!r} is neither a folder with a schedule nor one of {known}")


def train(args: argparse.Namespace, recipe: Recipe, spec: SolverSpec, distance: Objective) -> None:
    tracker = None if args.report_to == "none" else args.report_to
    project = ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir)))
    accelerator = Accelerator(log_with=tracker, project_config=project, kwargs_handlers=[COLLECTIVE_TIMEOUT])
    set_seed(args.seed)
    training, validation = learning_pairs(args, accelerator)
    options = {"loss_space": args.loss_space, "gradient_checkpointing": args.gradient_checkpointing}
    with learning_problem(args, training, validation, accelerator, distance=distance, **options) as problem:
        if problem.rollout.bounds_data:
            check_bounds_data(spec, problem.path)
        facts = settings(args, problem, learning_settings(args, recipe))
        refusals, logged = [], 0
        for nfe in [None] if args.curve else args.nfe:
            learned = on_main(lambda nfe=nfe: holds(args.output_dir, nfe, spec, facts), accelerator)
            if learned and args.resume_from_checkpoint == "latest":
                what = "this curve" if nfe is None else f"this schedule for {nfe} evaluations"
                accelerator.print(f"{args.output_dir} has {what} already")
                continue
            try:
                if nfe is None:
                    learn_curve(args, recipe, spec, problem, facts)
                else:
                    logged += learn_one(args, nfe, recipe, spec, problem, facts, logged)
            except LosesToGrid as error:
                refusals.append(str(error))
                accelerator.print(refusals[-1])
    accelerator.end_training()
    if refusals:
        raise ValueError("; ".join(refusals))


def learning_settings(args, recipe: Recipe) -> dict:
    return {
        "recipe": recipe.name,
        "recipe_settings": json.loads(json.dumps(asdict(recipe))),
        "loss_name": args.loss,
        "loss_space": args.loss_space,
        "lpips_net": args.lpips_net if args.loss == "lpips" else None,
        "discretization": Path(args.discretization).name,
        **({"counts_learned_on": counts_of_curve(args)} if args.curve else {}),
    }


def learn_one(args, nfe: int, recipe: Recipe, spec: SolverSpec, problem: Problem, facts: dict, logged: int = 0) -> int:
    """Learn, judge and save the schedule for `nfe` evaluations; returns the iterations, which trackers count on from `logged`."""
    rollout = problem.rollout
    grids, start, initial = starting_points(args, [nfe], recipe, spec, problem)[nfe]
    if recipe.name != "default":
        noise, _, conditioning = problem.train.batch([0], problem.device)
        check_gradients(rollout, initial, noise, conditioning)
    result = run(args, recipe, problem, initial, nfe, facts, logged)
    # What is saved is what the network is told: a pipeline that casts times to its dtype would round them anyway.
    schedule = rollout.rounded(result.schedule)
    beaten = judged(args, nfe, result.loss, problem, grids, recipe)
    facts = with_start(facts, initial.provenance)
    found = {"start": start, "initial_loss": result.initial_loss, "loss": result.loss}
    schedule = replace(schedule, provenance={**facts, **results(found, beaten, rollout.mu)})
    best = next(iter(beaten))
    pictures = {"learned": schedule, f"start: {start}": initial, f"best grid: {best}": grids[best]}
    write(args, problem, schedule, pictures, result)
    return len(result.history)


def counts_of_curve(args) -> list[int]:
    """All from the least to the largest: at a count between two that it was learned on, a curve may be far off."""
    return list(range(min(args.nfe), max(args.nfe) + 1))


def learn_curve(args, recipe: Recipe, spec: SolverSpec, problem: Problem, facts: dict) -> None:
    """The same for one curve that serves every count from the least to the largest of `--nfe`."""
    path, counts = problem.path, counts_of_curve(args)
    starts = starting_points(args, counts, recipe, spec, problem)
    result = run(args, recipe, problem, {nfe: initial for nfe, (_, _, initial) in starts.items()}, counts, facts, 0)
    schedules = {nfe: result.schedule.schedule(nfe, path) for nfe in counts}
    found: dict[str, Any] = {
        "initial_loss": result.initial_loss,
        "loss": result.loss,
        "losses": {},
        "best_grid_losses": {},
    }
    for nfe, schedule in schedules.items():
        loss = problem.mean_loss(schedule, problem.valid, pass_size(recipe))
        beaten = judged(args, nfe, loss, problem, starts[nfe][0], recipe)
        found["losses"][str(nfe)], found["best_grid_losses"][str(nfe)] = loss, min(beaten.values())
    for _, _, initial in starts.values():
        facts = with_start(facts, initial.provenance)
    curve = replace(result.schedule, provenance={**facts, **results(found, {}, problem.rollout.mu)})
    write(args, problem, curve, {f"{nfe} evaluations": schedule for nfe, schedule in schedules.items()}, result)


def judged(
    args, nfe: int, loss: float, problem: Problem, grids: dict[str, Schedule], recipe: Recipe
) -> dict[str, float]:
    """The losses of the best hand-made grids on the validation pairs, best first.

    Raises:
        LosesToGrid: if the learned one is no better, unless `--allow_worse`.
    """
    beaten = rivals(problem, grids, batch_size=pass_size(recipe))
    best = next(iter(beaten))
    problem.accelerator.print(
        f"{nfe} evaluations: validation loss {loss:.6g}; {best}, the best hand-made grid, {beaten[best]:.6g}"
    )
    if not args.allow_worse:
        refuse_worse(nfe, loss, beaten)
    return beaten


def write(args, problem: Problem, learned: Schedule | ScheduleCurve, pictures: dict, result: LearnResult) -> None:
    if problem.accelerator.is_main_process:
        stock = problem.rollout.stock_scheduler.config
        save(args.output_dir, learned, stock, problem.path, pictures, result.history)
    problem.accelerator.wait_for_everyone()


def pass_size(recipe: Recipe) -> int | None:
    return recipe.micro_batch_size or getattr(recipe, "batch_size", None)


Start = tuple[dict[str, Schedule], str, Schedule]


def starting_points(args, nfes: list[int], recipe: Recipe, spec: SolverSpec, problem: Problem) -> dict[int, Start]:
    """For each count the hand-made schedules by name, the name of what learning starts from, and that; the same grid for all counts, if the
    best one is asked for."""
    path, config, name = problem.path, problem.rollout.scheduler.config, args.discretization
    # Times of flow models are learned before their resolution shift, where that is possible.
    grid = {"final_sigmas_type": args.final_sigmas_type, "final": bool(config.shift_terminal)}
    stock = dict(problem.rollout.stock_scheduler.config)
    grids = {nfe: candidates(path, nfe, spec, config.prediction_type, stock_config=stock, **grid) for nfe in nfes}
    if name == "best" and recipe.name == "published":
        name = "time_uniform" if recipe.mode == "time" else "logsnr"  # where it starts by itself
    elif name == "best":
        shared = [each for each in grids[nfes[0]] if all(each in of_count for of_count in grids.values())]
        name = best_grid(problem, {each: [grids[nfe][each] for nfe in nfes] for each in shared}, pass_size(recipe))
    found = {}
    for nfe in nfes:
        if name in SEARCHES:
            options = {"batch_size": pass_size(recipe), "folder": Path(args.output_dir), **grid}
            start, initial = search_start(name, problem, nfe, max(args.nfe), spec, **options)
        elif name in grids[nfe]:
            start, initial = name, grids[nfe][name]
        elif Path(name).exists():
            start, initial = Path(name).name, saved_schedule(name, path, nfe, spec, config.prediction_type)
        else:
            start, initial = name, grid_schedule(name, path, nfe, spec, config.prediction_type, **grid)
        problem.accelerator.print(f"{nfe} evaluations: starting from {start}")
        found[nfe] = grids[nfe], start, initial
    return found


def run(
    args, recipe: Recipe, problem: Problem, initial, nfe: int | list[int], facts: dict, logged: int
) -> LearnResult:
    """Learn; `initial` is a schedule for `nfe` evaluations or, for a curve, one for each of these counts."""
    accelerator, folder = problem.accelerator, f"nfe-{nfe}" if isinstance(nfe, int) else CURVE_FOLDER
    steps = recipe.steps(len(problem.train)) if recipe.name == "published" else recipe.max_steps
    what = f"{nfe} evaluations" if isinstance(nfe, int) else f"a curve for {nfe[0]} to {nfe[-1]} evaluations"
    progress = tqdm(total=steps, desc=f"learning {what}", unit="step", disable=not accelerator.is_local_main_process)

    def report(done: int, entry: dict[str, float]) -> None:
        progress.update(done - progress.n)
        progress.set_postfix(
            {key: f"{value:.3g}" for key, value in entry.items() if key.endswith("loss")}, refresh=False
        )
        if accelerator.log_with and not accelerator.trackers:
            settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers("train_ld3", settings)
        if accelerator.log_with:
            finite = {f"{folder}/{key}": value for key, value in entry.items() if math.isfinite(value)}
            accelerator.log(finite, step=logged + done)

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
            checkpoint_dir=Path(args.output_dir, folder),
            checkpointing_steps=args.checkpointing_steps,
            checkpoints_total_limit=args.checkpoints_total_limit,
            resume_from_checkpoint=args.resume_from_checkpoint,
            facts={
                **{name: facts.get(name) for name in ("loss_name", "loss_space", *CALL_SETTINGS)},
                "lpips_net": args.lpips_net,
                "pairs": [problem.train.identity(), problem.valid.identity()],
            },
            callback=report,
        )
    finally:
        progress.close()


if __name__ == "__main__":
    main()
