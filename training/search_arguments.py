# SPDX-License-Identifier: Apache-2.0
"""Arguments that `search_gits` and `search_oss` share."""

import argparse

from ld3_diffusers.discretization import DISCRETIZATIONS

from .learning_arguments import (
    add_pair_arguments,
    add_schedule_arguments,
    add_teacher_arguments,
    check_counts,
    check_pairs,
)
from .search import SEARCH_BATCH_SIZE


NFES = [3, 4, 5, 6, 7, 8, 9, 10]


def search_parser(
    program: str, documentation: str, train: tuple[str, ...], about_train: str, points: int, solver: str
):
    """The parser, and its group "search", to which a program adds its own."""
    description, _, details = documentation.partition("\n\n")
    p = argparse.ArgumentParser(
        program, description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher_arguments(p)
    add_pair_arguments(p, train, about_train)
    search = p.add_argument_group("search")
    search.add_argument(
        "--num_grid_points",
        type=int,
        default=points,
        help="levels of the teacher, one more than its steps (default: %(default)s)",
    )
    search.add_argument("--teacher_discretization", choices=sorted(DISCRETIZATIONS), help="grid of the teacher")
    search.add_argument("--teacher_rho", type=float, help="exponent of that grid (default: the grid's own)")
    search.add_argument(
        "--train_batch_size",
        "--batch_size",
        type=int,
        default=SEARCH_BATCH_SIZE,
        help="samples at once (default: %(default)s)",
    )
    search.add_argument("--seed", type=int, default=0, help="of a teacher set made here")
    add_schedule_arguments(p, NFES, solver)
    output = p.add_argument_group("output")
    output.add_argument("--output_dir", required=True, help="a config there keeps its schedules for other counts")
    return p, search


def check_search(args: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is loaded, and fills in the end of the schedules.

    Raises:
        ValueError: for an impossible argument.
    """
    check_pairs(args)
    check_counts(args, "train_batch_size")
    if args.num_grid_points < 3:
        raise ValueError(f"--num_grid_points must be at least 3, got {args.num_grid_points}")
    if args.teacher_rho is not None and not 0 < args.teacher_rho < float("inf"):
        raise ValueError(f"--teacher_rho must be a positive number, got {args.teacher_rho}")
    if args.final_sigmas_type is None:
        args.final_sigmas_type = "zero"
