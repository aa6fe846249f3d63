# SPDX-License-Identifier: Apache-2.0
"""Arguments of `train_amed`."""

import argparse

from ld3_diffusers import SolverSpec
from ld3_diffusers.amed import FORMS, STUDENTS, num_student_steps
from ld3_diffusers.discretization import DISCRETIZATIONS
from ld3_diffusers.solvers import SOLVERS

from .amed_learner import AMEDRecipe
from .learning_arguments import (
    add_pair_arguments,
    add_schedule_arguments,
    add_teacher_arguments,
    check_counts,
    check_pairs,
)


BEST = "best"


def parser(documentation: str) -> argparse.ArgumentParser:
    description, _, details = documentation.partition("\n\n")
    p = argparse.ArgumentParser(
        "train_amed", description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher_arguments(p, differentiated=True)
    add_pair_arguments(p)
    schedule = add_schedule_arguments(p, solver="amed", solvers=STUDENTS)
    schedule.add_argument(
        "--discretization",
        choices=[BEST, *DISCRETIZATIONS],
        default=BEST,
        help="grid of the step ends; best: the one with which the bare solver is best on the training pairs (default)",
    )
    schedule.add_argument("--rho", type=float, help="exponent of that grid (default: the grid's own)")

    stages = p.add_argument_group("stages")
    stages.add_argument(
        "--form",
        choices=FORMS,
        default="per_sample",
        help="predicted from the denoiser's bottleneck, or static: the same for all samples (default: %(default)s)",
    )
    stages.add_argument(
        "--scale_dir", type=float, default=0.01, help="how far directions may be scaled; 0: not (default: %(default)s)"
    )
    stages.add_argument(
        "--scale_time",
        type=float,
        default=0.0,
        help="how far the time that the network is told at a stage may be scaled; 0: not (default: %(default)s)",
    )

    stages.add_argument(
        "--random_start",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="begin at random, as published, in place of the bare solver",
    )

    teacher = p.add_argument_group("the teacher's trajectories")
    teacher.add_argument(
        "--teacher_solver",
        choices=sorted(set(SOLVERS) - {"amed"}),
        default="dpmpp",
        help="of the teacher (default: %(default)s)",
    )
    teacher.add_argument("--teacher_solver_order", type=int, help="default: the solver's own")
    teacher.add_argument(
        "--num_intermediate_points",
        type=int,
        default=7,
        help="of the teacher's grid in each of the student's steps (default: %(default)s)",
    )
    teacher.add_argument(
        "--trajectories", help="folder that keeps them, for several runs to share (default: in the output folder)"
    )

    learning = p.add_argument_group("learning")
    recipe = AMEDRecipe()
    learning.add_argument("--learning_rate", type=float, help="of Adam (default: .005, or .05 for the static form)")
    learning.add_argument(
        "--train_batch_size", type=int, default=recipe.batch_size, help="over all processes (default: %(default)s)"
    )
    learning.add_argument("--micro_batch_size", type=int, help="that go through the network at once (default: all)")
    learning.add_argument(
        "--num_train_epochs",
        type=int,
        default=recipe.num_epochs,
        help="how often each trajectory is seen (default: %(default)s)",
    )
    learning.add_argument(
        "--validation_steps",
        type=int,
        default=recipe.validation_steps,
        help="batches between validations (default: %(default)s)",
    )
    learning.add_argument("--seed", type=int, default=0, help="of the predictor and of the order of the trajectories")
    learning.add_argument("--allow_worse", action="store_true", help="save even what loses to a hand-made grid")

    output = p.add_argument_group("output")
    output.add_argument(
        "--output_dir",
        required=True,
        help="a config there keeps its schedules for other counts; what it holds from the same arguments is not learned again",
    )
    output.add_argument("--resume_from_checkpoint", help="a checkpoint-<step> folder, or latest")
    output.add_argument("--checkpointing_steps", type=int, default=16, help="batches between checkpoints")
    output.add_argument("--checkpoints_total_limit", type=int, help="keep only so many")
    output.add_argument("--report_to", default="tensorboard", help="a tracker of Accelerate, or none")
    output.add_argument("--logging_dir", default="logs", help="of the tracker, inside the output folder")
    return p


def check(args: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is loaded, and fills in the end of the schedules.

    Raises:
        ValueError: for an impossible argument.
    """
    check_pairs(args)
    names = ("train_batch_size", "micro_batch_size", "num_train_epochs", "validation_steps")
    check_counts(args, *names, "checkpointing_steps", "checkpoints_total_limit")
    for nfe in args.nfe:
        num_student_steps(nfe, args.afs)
    if args.solver_type is not None:
        raise ValueError(
            f"--solver_type {args.solver_type} is not for AMED, whose students have one form each; drop it"
        )
    for name in ("scale_dir", "scale_time"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(args, name)}")
    for name in ("rho", "learning_rate"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be a positive number, got {value}")
    if args.rho is not None and args.discretization == BEST:
        raise ValueError("--rho is of one grid; name it with --discretization")
    if args.num_intermediate_points < 0:
        raise ValueError(f"--num_intermediate_points must not be negative, got {args.num_intermediate_points}")
    if len(args.nfe) > 1 and args.resume_from_checkpoint not in (None, "latest"):
        raise ValueError("a checkpoint is of one count; give --resume_from_checkpoint latest, or one --nfe")
    teacher_solver(args).make()
    if args.final_sigmas_type is None:
        args.final_sigmas_type = "zero"


def teacher_solver(args: argparse.Namespace) -> SolverSpec:
    """As published, the teacher has the student's form and its way of ending; its order is its own."""
    return SolverSpec(
        args.teacher_solver,
        args.teacher_solver_order,
        predict_x0=args.predict_x0,
        lower_order_final=args.lower_order_final,
    )


def recipe_of(args: argparse.Namespace) -> AMEDRecipe:
    return AMEDRecipe(
        args.learning_rate,
        args.train_batch_size,
        args.micro_batch_size,
        args.num_train_epochs,
        args.validation_steps,
    )
