# SPDX-License-Identifier: Apache-2.0
"""Search schedules for a pipeline by the geometry of a teacher's trajectories (GITS, arXiv:2405.11326).

    accelerate launch -m training.search_gits --pretrained_model_name_or_path examples/teachers/fashion-sd \\
        --teacher_set fashion-train --solver ipndm --output_dir fashion-gits

Nothing is learned: one pass of a long teacher over the training pairs serves all numbers of evaluations. The cost knows nothing of
the student, so its solver then chooses on the validation pairs: among schedules for several coeffs and the hand-made grids
(`--no-rescore`: the plain schedule for one coeff). The output folder is a scheduler repository like train_ld3's; `gits/` in it
has all schedules as JSON and a picture of the costs. A run that was stopped continues when it is started again.
"""

import argparse
from pathlib import Path

from torch import Tensor

from ld3_diffusers import SolverSpec
from ld3_diffusers.solvers import SOLVERS

from .arguments import check_writable, parse, usage_errors
from .cost_plot import plot_costs
from .gits import COEFF, COEFFS, METRICS
from .learner import Problem
from .learning_arguments import solver_of
from .processes import lost_process_message
from .schedule_folder import existing
from .search import GITS_POINTS, NUM_WARMUP, TeacherGrid, gits_cost, gits_ways, most_steps
from .search_arguments import check_search, search_parser
from .search_run import Ways, run_search, save_ways
from .teacher import check_teacher_name


def parser() -> argparse.ArgumentParser:
    about = f"training pairs, whose teacher trajectories are recorded (default: {NUM_WARMUP}, or all there are)"
    names = ("--num_train", "--num_warmup")
    p, search = search_parser("search_gits", __doc__, names, about, GITS_POINTS, "unipc")
    search.add_argument("--metric", choices=METRICS, default="dev", help="of a jump's cost (default: %(default)s)")
    search.add_argument(
        "--coeff",
        type=float,
        nargs="+",
        help=f"above 1: more levels at low noise (default: {COEFF}; with --rescore the best of {' '.join(map(str, COEFFS))})",
    )
    search.add_argument(
        "--teacher_solver", choices=sorted(SOLVERS), default="ipndm", help="that is recorded (default: %(default)s)"
    )
    search.add_argument("--teacher_solver_order", type=int, help="default: the solver's own")
    search.add_argument(
        "--rescore",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the student choose on the validation pairs, among the hand-made grids, too",
    )
    return p


def check(args: argparse.Namespace) -> None:
    """As [`check_search`], and fills in the coeffs."""
    check_search(args)
    if args.coeff is None:
        # the usual one first, so that it wins where schedules are alike
        args.coeff = sorted(COEFFS, key=lambda coeff: abs(coeff - COEFF)) if args.rescore else [COEFF]
    for coeff in args.coeff:
        if not 0 < coeff < float("inf"):
            raise ValueError(f"--coeff must be positive, got {coeff}; {COEFF} is usual")


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    with usage_errors(command_line):
        check(args)
        check_writable(args.output_dir)
        spec, teacher = solver_of(args), SolverSpec(args.teacher_solver, args.teacher_solver_order)
        teacher.make()
        num_steps = most_steps(args.num_grid_points, args.nfe, spec, args.final_sigmas_type)
        check_teacher_name(args.pretrained_model_name_or_path)
        existing(args.output_dir)
        with lost_process_message(args.output_dir):
            search(args, spec, teacher, num_steps)


def search(args: argparse.Namespace, spec: SolverSpec, teacher: SolverSpec, num_steps: int) -> None:
    folder = Path(args.output_dir, "gits")
    coeffs = args.coeff if args.rescore else args.coeff[:1]  # without rescoring nothing chooses among several
    options = {"metric": args.metric, "coeff": coeffs, "solver": teacher.solver, "solver_order": teacher.make().order}

    def find(problem: Problem, grid: TeacherGrid) -> Ways:
        batch_size = args.train_batch_size
        cost, z = gits_cost(problem, grid, folder, teacher=teacher, metric=args.metric, batch_size=batch_size)
        if problem.accelerator.is_main_process:
            save_pictures(grid, cost, z)
        return gits_ways(cost, num_steps, coeffs)

    def save_pictures(grid: TeacherGrid, cost: Tensor, z: Tensor) -> None:
        everything = gits_ways(cost, num_steps, sorted({*COEFFS, *args.coeff}))
        save_ways(folder / "schedules.json", "gits", grid, everything, z)
        plot_costs(cost, z, everything[f"coeff {coeffs[0]:g}"], folder / "cost.png")

    run_search(args, spec, "gits", NUM_WARMUP, find, options)


if __name__ == "__main__":
    main()
