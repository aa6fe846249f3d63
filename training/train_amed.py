# SPDX-License-Identifier: Apache-2.0
"""Learn where the stages of a sampler's steps lie (AMED-Solver and AMED-Plugin, arXiv:2312.00094).

    accelerate launch -m training.train_amed --pretrained_model_name_or_path examples/teachers/fashion-sd \\
        --teacher_set fashion-train --nfe 4 6 8 --solver amed --output_dir fashion-amed

Each step of the student makes two network evaluations; with `--afs` the first one is saved, and counts are odd. The output folder becomes a
scheduler repository: `AMEDScheduler.from_pretrained("fashion-amed")`. Run again with another `--nfe` and the same folder to serve more counts.
A schedule that loses to a hand-made grid on the validation pairs is not saved.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor
from tqdm.auto import tqdm

from ld3_diffusers import AMEDPredictor, Schedule, SolverSpec
from ld3_diffusers.amed import STUDENT_KEYS, amed_schedule, num_student_steps, static_schedule
from ld3_diffusers.attachment import BOTTLENECK

from .amed_arguments import BEST, check, parser, recipe_of, teacher_solver
from .amed_learner import AMEDLearner, AMEDRecipe
from .amed_student import GuidedNetwork, Student
from .amed_trajectories import refined_grid, teacher_trajectories
from .arguments import check_writable, parse, usage_errors
from .checkpoint import Checkpoints
from .initial import GRIDS, LosesToGrid, candidates, grid_search, refuse_worse
from .learner import Problem, iterate, warn_of_idle_processes
from .learning_arguments import solver_of
from .learning_pairs import learning_pairs
from .learning_problem import learning_problem
from .processes import COLLECTIVE_TIMEOUT, lost_process_message, on_main
from .schedule_folder import existing, holds, results, save, settings
from .search import first_pairs
from .teacher import check_teacher_name


GRID_PAIRS = 64  # training pairs that choose a grid


def main(argv=None) -> None:
    command_line = parser(__doc__)
    args = parse(command_line, argv)
    with usage_errors(command_line):
        check(args)
        check_writable(args.output_dir)
        spec = solver_of(args)
        check_teacher_name(args.pretrained_model_name_or_path)
        existing(args.output_dir)
        with lost_process_message(args.output_dir):
            train(args, recipe_of(args), spec)


def train(args: argparse.Namespace, recipe: AMEDRecipe, spec: SolverSpec) -> None:
    tracker = None if args.report_to == "none" else args.report_to
    project = ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir)))
    accelerator = Accelerator(log_with=tracker, project_config=project, kwargs_handlers=[COLLECTIVE_TIMEOUT])
    set_seed(args.seed)
    training, validation = learning_pairs(args, accelerator)
    # What is differentiated is one evaluation at a time, whose activations recomputation would not make fewer.
    options = {"gradient_checkpointing": args.gradient_checkpointing, "checkpointing": False}
    with learning_problem(args, training, validation, accelerator, **options) as problem:
        check_pipeline(problem, spec)
        facts = settings(args, problem, method_facts(args, recipe))
        network = GuidedNetwork(problem.rollout, watches=args.form == "per_sample")
        try:
            refusals = learn_all(args, recipe, spec, problem, network, facts)
        finally:
            network.close()
    accelerator.end_training()
    if refusals:
        raise ValueError("; ".join(refusals))


def check_pipeline(problem: Problem, spec: SolverSpec) -> None:
    """Raises a `ValueError` for a pipeline that AMED cannot learn through."""
    config = problem.rollout.scheduler.config
    if config.clip_sample or config.thresholding:
        raise ValueError(
            "this pipeline's scheduler bounds the data prediction, so that its trajectory is not that of an ODE; set clip_sample "
            "and thresholding to false in its scheduler_config.json"
        )
    if spec.afs and problem.path.kind == "flow":
        raise ValueError(
            "an analytical first step needs a path with noise at its start only; drop --afs for flow models"
        )


def method_facts(args: argparse.Namespace, recipe: AMEDRecipe) -> dict:
    names = (
        "form",
        "random_start",
        "scale_dir",
        "scale_time",
        "teacher_solver",
        "teacher_solver_order",
        "num_intermediate_points",
    )
    chosen = {name: getattr(args, name) for name in (*names, "rho")}
    return {
        "recipe": "amed",
        "loss_name": "l2",
        "loss_space": "latent",
        "discretization": args.discretization,
        "amed": {key: value for key, value in {**chosen, **asdict(recipe)}.items() if value is not None},
    }


def learn_all(
    args, recipe: AMEDRecipe, spec: SolverSpec, problem: Problem, network: GuidedNetwork, facts
) -> list[str]:
    """All counts, one after another; returns why some were not saved."""
    accelerator = problem.accelerator
    refusals, logged = [], 0
    for nfe in args.nfe:
        if on_main(lambda nfe=nfe: holds(args.output_dir, nfe, spec, facts), accelerator):
            accelerator.print(f"{args.output_dir} has this schedule for {nfe} evaluations already")
            continue
        try:
            logged += learn_one(args, nfe, recipe, spec, problem, network, facts, logged)
        except LosesToGrid as error:
            refusals.append(str(error))
            accelerator.print(refusals[-1])
    return refusals


@dataclass(frozen=True, eq=False)
class Start:
    """The bare solver on a grid, and the teacher's grid."""

    name: str
    bare: Schedule
    grid: Tensor


def starting_point(args, nfe: int, spec: SolverSpec, problem: Problem, batch_size: int) -> Start:
    """On the grid of `--discretization`, or on the one that suits the bare solver best.

    Raises:
        ValueError: for a grid that this path cannot have.
    """
    path, config = problem.path, problem.rollout.scheduler.config
    steps, to_zero = num_student_steps(nfe, spec.afs), args.final_sigmas_type == "zero"
    starts, reason = {}, ""
    for name in GRIDS[path.kind] if args.discretization == BEST else [args.discretization]:
        try:
            grid = refined_grid(name, path, steps, args.num_intermediate_points, to_zero, args.rho)
            ends = grid[:: args.num_intermediate_points + 1]
            bare = amed_schedule(ends, spec, path, config.prediction_type, final=bool(config.shift_terminal))
            bare.table(path)
        except ValueError as error:
            reason = str(error)
            continue
        starts[name] = Start(name, bare, grid)
    if not starts:
        raise ValueError(f"{spec.solver} cannot make {nfe} evaluations on this grid: {reason}")
    if len(starts) == 1:
        return next(iter(starts.values()))
    judged = replace(problem, train=first_pairs(problem.train, GRID_PAIRS))
    losses = grid_search(judged, {name: start.bare for name, start in starts.items()}, batch_size=batch_size)
    name = next(iter(losses))
    if not math.isfinite(losses[name]):
        raise ValueError("the bare solver has no finite loss on any grid; use another solver or more evaluations")
    return starts[name]


def new_predictor(args, spec: SolverSpec, bare: Schedule, path) -> AMEDPredictor:
    z = path.levels(bare.times).z
    torch.manual_seed(args.seed)
    predictor = AMEDPredictor(
        form=args.form,
        scale_dir=args.scale_dir,
        scale_time=args.scale_time,
        num_steps=(len(bare.times) - 1) // 2,
        z_max=float(z[0]),
        z_min=float(z[-1]),
        bottleneck=BOTTLENECK,
        **{name: getattr(spec, name) for name in STUDENT_KEYS},
    )
    if not args.random_start:
        predictor.start_bare()
    return predictor


def learn_one(
    args, nfe: int, recipe: AMEDRecipe, spec: SolverSpec, problem: Problem, network: GuidedNetwork, facts, logged: int
) -> int:
    """Learn, judge and save the schedule for `nfe` evaluations; returns the batches, which trackers count on from `logged`."""
    rollout, accelerator, path = problem.rollout, problem.accelerator, problem.path
    batch_size = min(args.micro_batch_size or args.train_batch_size, len(problem.train))
    start = starting_point(args, nfe, spec, problem, batch_size)
    accelerator.print(f"{nfe} evaluations: {spec.solver} on the grid {start.name}")
    trajectories = teacher_trajectories(
        problem,
        network,
        start.grid,
        args.num_intermediate_points,
        teacher_solver(args),
        Path(args.trajectories or Path(args.output_dir, "trajectories")),
        final=start.bare.final,
        batch_size=batch_size,
    )
    student = Student(network, start.bare)
    predictor = new_predictor(args, spec, start.bare, path)
    learner = AMEDLearner(problem, student, predictor, trajectories, recipe, args.seed)
    warn_of_idle_processes(learner.batch_size, learner.pass_size, accelerator)
    history, initial_loss = run(args, nfe, learner, start, facts, logged)
    predictor, loss = learner.best_predictor(), learner.best_loss
    schedule = start.bare
    if args.form == "static":
        schedule = static_schedule(schedule, predictor, path)
    bare_loss = problem.mean_loss(start.bare, problem.valid, learner.pass_size)
    stock, grids, rivals = rollout.stock_scheduler.config, {}, {}
    if not args.allow_worse:
        config = rollout.scheduler.config
        ends = {"final_sigmas_type": args.final_sigmas_type, "final": bool(config.shift_terminal)}
        grids = candidates(path, nfe, spec, config.prediction_type, stock_config=dict(stock), **ends)
        grids[f"{start.name}, bare stages"] = start.bare
        rivals = grid_search(problem, grids, pairs="valid", batch_size=learner.pass_size)
    found = {
        "start": start.name,
        "initial_loss": initial_loss,
        "bare_loss": bare_loss,
        "loss": loss,
        "evaluations": {"teacher": len(problem.train) * teacher_evaluations(args, start, path), **learner.evaluations},
    }
    schedule = replace(schedule, provenance={**facts, **results(found, rivals, rollout.mu)})
    accelerator.print(f"validation loss {loss:.6g}; with the stages of the bare solver {bare_loss:.6g}")
    if not args.allow_worse:
        refuse_worse(nfe, loss, rivals)
    if accelerator.is_main_process:
        learned = static_schedule(start.bare, predictor, path)
        title = "learned" if args.form == "static" else "learned, features of 0"
        pictures = {title: learned, f"start: {start.name}": start.bare}
        pictures |= {f"best grid: {name}": grids[name] for name in list(rivals)[:1]}
        kept = None if args.form == "static" else predictor
        save(args.output_dir, schedule, stock, path, pictures, history, kept)
    accelerator.wait_for_everyone()
    return len(history)


def teacher_evaluations(args, start: Start, path) -> int:
    """Of one trajectory."""
    return len(teacher_solver(args).make().expand(path, start.grid)) - 1


def run(args, nfe: int, learner: AMEDLearner, start: Start, facts: dict, logged: int) -> tuple[list[dict], float]:
    accelerator = learner.problem.accelerator
    progress = tqdm(
        total=learner.num_steps,
        desc=f"learning {nfe} evaluations",
        unit="batch",
        disable=not accelerator.is_local_main_process,
    )

    def report(done: int, entry: dict[str, float]) -> None:
        progress.update(done - progress.n)
        shown = {key: f"{entry[key]:.3g}" for key in ("loss", "validation_loss") if key in entry}
        progress.set_postfix(shown, refresh=False)
        if accelerator.log_with and not accelerator.trackers:
            given = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers("train_amed", given)
        if accelerator.log_with:
            finite = {f"nfe-{nfe}/{key}": value for key, value in entry.items() if math.isfinite(value)}
            accelerator.log(finite, step=logged + done)

    identity = {**facts, "nfe": nfe, "solver": repr(start.bare.spec), "times": start.bare.times.tolist()}
    identity |= {"pairs": [learner.problem.train.identity(), learner.problem.valid.identity()]}
    checkpoints = Checkpoints(Path(args.output_dir, f"nfe-{nfe}"), args.checkpoints_total_limit)
    try:
        # The main process reads for all, whose disks may be others.
        state = on_main(lambda: checkpoints.load(args.resume_from_checkpoint, identity), accelerator)
        saving = checkpoints, args.checkpointing_steps, identity
        return iterate(learner, learner.validation_loss, state, saving, accelerator, report)
    finally:
        progress.close()


if __name__ == "__main__":
    main()
