# SPDX-License-Identifier: Apache-2.0
"""Arguments of `train_ld3`, and the recipe that they add up to. Searches share those of teacher, pairs and schedule."""

import argparse
from collections.abc import Iterable

from ld3_diffusers import SolverSpec
from ld3_diffusers.solvers import SOLVERS, VARIANTS

from .call_settings import add_call_arguments, check_call_arguments
from .curve_parameters import check_curve_counts
from .initial import FINAL_SIGMAS_TYPES
from .learning_pairs import OF_MAKING
from .objectives import LOSS_SPACES, LOSSES
from .parameters import LEARNABLE
from .prompts import add_prompt_arguments
from .recipe import RECIPES, Recipe, make_recipe


# Field of a recipe: name on the command line where it differs, type, help. None keeps the recipe's own value.
RECIPE_ARGUMENTS = {
    "batch_size": ("train_batch_size", int, "adam, published: pairs of an iteration, over all processes"),
    "lr_times": ("learning_rate", float, "adam, published: of the times"),
    "lr_network_times": (
        "learning_rate_network_times",
        float,
        "adam, published: of the network times (published: divided by N)",
    ),
    "max_grad_norm": (None, float, "adam, published: gradients are clipped to this norm"),
    "patience": (None, int, "adam, published: validations without improvement that are borne"),
    "micro_batch_size": (None, int, "pairs that go through the network at once"),
    # default, adam
    "max_steps": ("max_train_steps", int, "default, adam: iterations"),
    "learn": (None, str, f"default, adam: what to learn, of {','.join(LEARNABLE)}"),
    "last_level": (None, str, "default, adam: last level before 0, free or fixed"),
    "coefficient_window": (
        None,
        int,
        "default, adam: predictions that learned coefficients reach back (default: all)",
    ),
    # default
    "first_pairs": (None, int, "default: pairs of the first iteration; each later one takes twice as many"),
    "directions": (
        None,
        int,
        "default: directions of each state along which the network is differenced, until a step from all pairs fails",
    ),
    # adam
    "lr_coefficients": ("learning_rate_coefficients", float, "adam: of the coefficients"),
    "warmup_steps": ("lr_warmup_steps", int, "adam: iterations in which the rates rise"),
    "times_first": (None, float, "adam: share of the iterations that learn times alone"),
    "validation_steps": (None, int, "adam: iterations between validations"),
    "averaging": ("ema_decay", float, "adam: decay of an average of the parameters"),
    "relaxation": (None, float, "adam: gamma of the ball in which the student's noise may move"),
    "relaxation_lr": (None, float, "adam: step of that noise, as a share of the ball's radius"),
    # published
    "mode": (None, str, "published: softmax gaps in lambda or time"),
    "window": (None, float, "published: share of the smallest gap that network times may move"),
    "radius": (None, float, "published: gamma of the bound on moved noise; 0: the hard objective"),
    "fixed_bound": (None, float, "published: that bound itself"),
    "valid_batch_size": (None, int, "published: validation pairs at once; the first such batch decides at first"),
    "rounds_v1": (None, int, "published: epochs of times alone"),
    "rounds_v2": (None, int, "published: epochs of both vectors"),
    "momentum": (None, float, "published: of RMSprop"),
    "weight_decay": (None, float, "published: of RMSprop"),
    "min_lr_times": (None, float, "published: floor of the times' rate"),
    "min_lr_network_times": (None, float, "published: floor of the network times' rate"),
    "lr_decay": (None, float, "published: factor of both rates when patience is lost"),
    "shift_lr": (None, float, "published: rate of the moved noise (default 12/N)"),
    "shift_lr_decay": (None, float, "published: its factor after a round that moved no validation noise"),
    "floor_patience": (None, int, "published: how often the network times' rate may be at its floor"),
}
RECIPE_FLAGS = {
    "no_v1": "published: never learn the times",
    "logit_window_bug": "published: take the window of network times from raw logits (--no-logit_window_bug: from lambda)",
}


def add_teacher_arguments(p: argparse.ArgumentParser, differentiated: bool = False) -> None:
    """The teacher; `differentiated`, by programs that learn through it."""
    model = p.add_argument_group("teacher")
    model.add_argument("--pretrained_model_name_or_path", "--teacher", required=True, help="pipeline folder or Hub id")
    model.add_argument("--revision", help="branch, tag or commit on the Hub")
    model.add_argument("--variant", help="variant of the weight files, such as fp16")
    model.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="dtype of the pipeline")
    if differentiated:
        model.add_argument(
            "--gradient_checkpointing",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="recompute the network block by block: less memory, more time",
        )


def add_pair_arguments(
    p: argparse.ArgumentParser,
    train: tuple[str, ...] = ("--num_train",),
    about_train: str = "training pairs (default: all that are not held out)",
) -> None:
    """The pairs, found or made here; `train` are the names of the argument that counts those for training."""
    pairs = p.add_argument_group("pairs")
    pairs.add_argument(
        "--teacher_set", help="folder made by make_teacher_set; default: one is made in the output folder"
    )
    pairs.add_argument("--validation_set", help="another such folder; default: the end of the teacher set is held out")
    pairs.add_argument(*train, dest="num_train", type=int, help=about_train)
    pairs.add_argument("--num_valid", type=int, help="validation pairs (default: the validation set, or a third)")

    made = p.add_argument_group("pairs made here", "without --teacher_set: what make_teacher_set is to do")
    made.add_argument("--teacher_steps", type=int, default=50, help="the teacher's evaluations")
    add_prompt_arguments(made)
    add_call_arguments(made)


def add_schedule_arguments(
    p: argparse.ArgumentParser, nfe: list[int] | None = None, solver: str = "unipc", solvers: Iterable[str] = SOLVERS
):
    """What schedules are wanted: counts, of which `nfe` are the default, solver and end; returns the group."""
    schedule = p.add_argument_group("schedule")
    counts = "" if nfe is None else f" (default: {' '.join(map(str, nfe))})"
    schedule.add_argument(
        "--nfe",
        type=int,
        nargs="+",
        required=nfe is None,
        default=nfe,
        help=f"network evaluations, guidance's doubling apart: one or several{counts}",
    )
    schedule.add_argument(
        "--solver", choices=sorted(solvers), default=solver, help="that will sample (default: %(default)s)"
    )
    schedule.add_argument("--solver_order", type=int, help="default: the solver's own")
    kinds = sorted({kind for kinds in VARIANTS.values() for kind in kinds})
    schedule.add_argument("--solver_type", choices=kinds, help="default: the solver's own")
    schedule.add_argument(
        "--predict_x0", action=argparse.BooleanOptionalAction, default=True, help="data or noise form"
    )
    schedule.add_argument("--lower_order_final", action=argparse.BooleanOptionalAction, default=True)
    schedule.add_argument(
        "--afs",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="analytical first step, which costs no evaluation",
    )
    schedule.add_argument(
        "--final_sigmas_type", choices=FINAL_SIGMAS_TYPES, help="end in clean data (default) or at t_min (published)"
    )
    return schedule


def solver_of(args: argparse.Namespace) -> SolverSpec:
    """The student's solver; a `ValueError` for an order or variant that it does not have."""
    spec = SolverSpec(
        args.solver, args.solver_order, args.solver_type, args.predict_x0, args.lower_order_final, args.afs
    )
    spec.make()
    return spec


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("train_ld3", description="Learn a schedule for a pipeline; see training/README.md.")
    add_teacher_arguments(p, differentiated=True)
    add_pair_arguments(p)
    add_schedule_arguments(p).add_argument(
        "--discretization",
        "--init",
        default="best",
        help="start from this grid, from the schedule in this folder, or from what a search finds (gits, oss); best: from the "
        "grid best on the training pairs",
    )

    learning = p.add_argument_group("learning")
    learning.add_argument(
        "--curve",
        action="store_true",
        help="learn one curve for every count from the least to the largest --nfe, in place of a schedule for each",
    )
    learning.add_argument("--recipe", choices=sorted(RECIPES), default="default")
    learning.add_argument("--loss", choices=LOSSES, default="l2")
    learning.add_argument(
        "--loss_space", choices=LOSS_SPACES, help="default: pixel for lpips and stlpips, else latent"
    )
    learning.add_argument("--lpips_net", choices=["vgg", "alex"], default="vgg")
    for field, (name, kind, text) in RECIPE_ARGUMENTS.items():
        learning.add_argument(f"--{name or field}", dest=f"recipe_{field}", type=kind, help=text)
    for field, text in RECIPE_FLAGS.items():
        learning.add_argument(f"--{field}", dest=f"recipe_{field}", action=argparse.BooleanOptionalAction, help=text)
    learning.add_argument(
        "--seed", type=int, default=0, help="of the order of the pairs, and of a teacher set made here"
    )
    learning.add_argument("--allow_worse", action="store_true", help="save even what loses to a hand-made grid")

    output = p.add_argument_group("output")
    output.add_argument("--output_dir", required=True, help="a config there keeps its schedules for other counts")
    output.add_argument("--resume_from_checkpoint", help="a checkpoint-<step> folder, or latest")
    output.add_argument(
        "--checkpointing_steps",
        type=int,
        help="iterations between checkpoints (default: 100; of the recipe default 1)",
    )
    output.add_argument("--checkpoints_total_limit", type=int, help="keep only so many")
    output.add_argument("--report_to", default="tensorboard", help="a tracker of Accelerate, or none")
    output.add_argument("--logging_dir", default="logs", help="of the tracker, inside the output folder")
    return p


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises a `ValueError` if one of these arguments is given and not positive."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


def check_pairs(args: argparse.Namespace) -> None:
    """Refuses impossible counts of evaluations and of pairs, and arguments of pairs that are not made here.

    Raises:
        ValueError: naming the argument.
    """
    check_counts(args, "num_train", "num_valid", "teacher_steps")
    if min(args.nfe) < 1 or len(set(args.nfe)) < len(args.nfe):
        raise ValueError(f"--nfe must name different counts of at least 1, got {' '.join(map(str, args.nfe))}")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")
    if args.teacher_set is not None:
        for name in OF_MAKING:
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} is for a teacher set made here, but --teacher_set is given; drop one of them"
                )
    elif args.validation_set is not None:
        raise ValueError("--validation_set needs a --teacher_set beside it")
    else:
        check_call_arguments(args)


def check(args: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is loaded, and fills in what follows from other arguments.

    Raises:
        ValueError: for an impossible argument.
    """
    check_pairs(args)
    check_counts(args, "checkpointing_steps", "checkpoints_total_limit")
    if args.curve and (len(args.nfe) < 2 or args.recipe != "default"):
        raise ValueError(
            "--curve learns from the least to the largest --nfe, by the recipe 'default'; name two, and drop --recipe"
        )
    if args.curve:
        check_curve_counts(args.nfe)
    if args.curve and args.recipe_last_level is not None:
        raise ValueError("the last level of a curve is always free; drop --last_level, or --curve")
    if args.recipe == "default" and args.loss == "lpips":
        raise ValueError("the recipe 'default' minimises squares of features; use --loss stlpips, or --recipe adam")
    if len(args.nfe) > 1 and not args.curve and args.resume_from_checkpoint not in (None, "latest"):
        raise ValueError("a checkpoint is of one count; give --resume_from_checkpoint latest, or one --nfe")
    if args.recipe == "published" and args.discretization != "best":
        raise ValueError("the published recipe starts from its own uniform grid; drop --discretization")
    if args.recipe == "published" and args.final_sigmas_type == "zero":
        raise ValueError("the published recipe ends at the model's smallest time; drop --final_sigmas_type zero")
    if args.recipe == "published" and (args.afs or solver_of(args).make().stages != 1):
        raise ValueError("the published recipe makes one evaluation a step; drop --afs, or choose another --solver")
    if args.final_sigmas_type is None:
        args.final_sigmas_type = "sigma_min" if args.recipe == "published" else "zero"
    if args.checkpointing_steps is None:
        args.checkpointing_steps = 1 if args.recipe == "default" else 100
    if args.loss_space is None:
        args.loss_space = "pixel" if args.loss in ("lpips", "stlpips") else "latent"


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe with the values given; a `ValueError` names an argument that belongs to the other recipe."""
    fields = [*RECIPE_ARGUMENTS, *RECIPE_FLAGS]
    given = {
        field: getattr(args, f"recipe_{field}") for field in fields if getattr(args, f"recipe_{field}") is not None
    }
    known = RECIPES[args.recipe].__dataclass_fields__
    for field in given:
        if field not in known:
            name = RECIPE_ARGUMENTS.get(field, (None,))[0] or field
            others = [name for name, recipe in RECIPES.items() if field in recipe.__dataclass_fields__]
            raise ValueError(
                f"--{name} belongs to the recipe {' or '.join(map(repr, others))}; drop it, or use --recipe {others[0]}"
            )
    return make_recipe(args.recipe, given)
