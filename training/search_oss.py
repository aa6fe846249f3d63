# SPDX-License-Identifier: Apache-2.0
"""Search schedules for a pipeline by the best few steps of its own Euler student (OSS, arXiv:2503.21774).

    accelerate launch -m training.search_oss --pretrained_model_name_or_path examples/teachers/fashion-flux \\
        --teacher_set flux-train --output_dir flux-oss

For each of a few samples the student's steps are chosen by dynamic programming, one pass over the teacher's grid for every step;
the samples' lists are combined level by level. The lists are Euler's; another `--solver` may sample with them, and `--rescore` lets it
choose on the validation pairs between them and the hand-made grids. The output folder is a scheduler repository like train_ld3's;
`oss/` in it has all lists as JSON. A run that was stopped continues when it is started again.
"""

import argparse
from pathlib import Path

from ld3_diffusers import SolverSpec

from .arguments import check_writable, parse, usage_errors
from .learner import Problem
from .learning_arguments import solver_of
from .oss import COST_POWER
from .processes import lost_process_message
from .schedule_folder import existing
from .search import NUM_SAMPLES, OSS_POINTS, TeacherGrid, most_steps, oss_paths, oss_ways
from .search_arguments import check_search, search_parser
from .search_run import Ways, run_search, save_ways
from .teacher import check_teacher_name


def parser() -> argparse.ArgumentParser:
    about = f"training pairs to search on (default: {NUM_SAMPLES}, or all there are)"
    p, search = search_parser("search_oss", __doc__, ("--num_train", "--num_samples"), about, OSS_POINTS, "euler")
    search.add_argument(
        "--cost_power", type=float, default=COST_POWER, help="p of the mean |difference|^p (default: %(default)s)"
    )
    search.add_argument(
        "--rescore",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the student choose on the validation pairs, among the hand-made grids, too",
    )
    return p


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    with usage_errors(command_line):
        check_search(args)
        if not 0 < args.cost_power < float("inf"):
            raise ValueError(f"--cost_power must be a positive number, got {args.cost_power}; {COST_POWER:g} is usual")
        check_writable(args.output_dir)
        spec = solver_of(args)
        num_steps = most_steps(args.num_grid_points, args.nfe, spec, args.final_sigmas_type)
        check_teacher_name(args.pretrained_model_name_or_path)
        existing(args.output_dir)
        with lost_process_message(args.output_dir):
            search(args, spec, num_steps)


def search(args: argparse.Namespace, spec: SolverSpec, num_steps: int) -> None:
    folder = Path(args.output_dir, "oss")

    def find(problem: Problem, grid: TeacherGrid) -> Ways:
        options = {"num_steps": num_steps, "cost_power": args.cost_power, "batch_size": args.train_batch_size}
        ways = oss_ways(oss_paths(problem, grid, folder, **options), len(grid))
        if problem.accelerator.is_main_process:
            save_ways(folder / "schedules.json", "oss", grid, ways)
        return ways

    run_search(args, spec, "oss", NUM_SAMPLES, find, {"cost_power": args.cost_power})


if __name__ == "__main__":
    main()
