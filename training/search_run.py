# SPDX-License-Identifier: Apache-2.0
"""How a search program runs: pairs, teacher, students, the choice among them, and the output folder."""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ld3_diffusers import SolverSpec

from .initial import candidates
from .learner import Problem
from .learning_pairs import learning_pairs
from .learning_problem import learning_problem
from .processes import COLLECTIVE_TIMEOUT, on_main
from .schedule_folder import holds, results, save, settings
from .search import TeacherGrid, first_pairs, judge, students, teacher_grid
from .whole_files import write_whole


Ways = dict[str, list[list[int]]]  # index lists of 1, 2, ... steps, by name


def run_search(
    args: Namespace,
    spec: SolverSpec,
    search: str,
    default_pairs: int,
    find: Callable[[Problem, TeacherGrid], Ways],
    options: dict[str, Any],
) -> None:
    """Search, let the validation pairs judge, and save a schedule for every count.

    Args:
        search: "gits" or "oss".
        default_pairs: how many training pairs are used at most without `--num_train`.
        find: the search itself, on the problem's training pairs.
        options: of the search, for the provenance.
    """
    accelerator = Accelerator(kwargs_handlers=[COLLECTIVE_TIMEOUT])
    training, validation = learning_pairs(args, accelerator)
    if args.num_train is None:
        training = first_pairs(training, default_pairs)
    with learning_problem(args, training, validation, accelerator) as problem:
        if spec.afs and problem.path.kind == "flow":
            raise ValueError(
                "an analytical first step needs a path with noise at its start only; drop --afs for flow models"
            )
        config = problem.rollout.scheduler.config
        ends = {"final_sigmas_type": args.final_sigmas_type, "final": bool(config.shift_terminal)}
        shape = {"name": args.teacher_discretization, "num_points": args.num_grid_points, "rho": args.teacher_rho}
        grid = teacher_grid(problem, search, **shape, **ends)
        facts = settings(args, problem, method_facts(search, grid, options, args))
        ways = find(problem, grid)
        for nfe in args.nfe:
            if on_main(lambda nfe=nfe: holds(args.output_dir, nfe, spec, facts), accelerator):
                accelerator.print(f"{args.output_dir} has this schedule for {nfe} evaluations already")
                continue
            choose_and_save(args, problem, ways, grid, ends, nfe, spec, facts)
    accelerator.end_training()


def method_facts(search: str, grid: TeacherGrid, options: dict[str, Any], args: Namespace) -> dict[str, Any]:
    return {
        "recipe": search,
        "loss_name": "l2",
        "loss_space": "latent",
        "search": {
            **options,
            "grid": grid.name,
            "rho": args.teacher_rho,
            "num_grid_points": len(grid),
            "rescore": args.rescore,
        },
    }


def choose_and_save(
    args: Namespace,
    problem: Problem,
    ways: Ways,
    grid: TeacherGrid,
    ends: dict[str, Any],
    nfe: int,
    spec: SolverSpec,
    facts: dict[str, Any],
) -> None:
    """The student with the smallest loss on the validation pairs, with `--rescore` among the hand-made grids, too."""
    rollout, accelerator = problem.rollout, problem.accelerator
    stock = rollout.stock_scheduler.config
    found, grids = students(ways, grid, nfe, spec), {}
    if args.rescore:
        grids = candidates(problem.path, nfe, spec, grid.prediction_type, stock_config=dict(stock), **ends)
    losses = judge(problem, {**found, **grids}, pairs="valid", batch_size=args.train_batch_size)
    won = next(iter(losses))
    if not math.isfinite(losses[won]):
        raise ValueError(
            f"no schedule for {nfe} evaluations has a finite loss; use another solver or more evaluations"
        )
    rivals = {name: loss for name, loss in losses.items() if name in grids}
    told = {"won": won, "loss": losses[won], "losses": best_of_each(losses)}
    # What is saved is what the network is told, see the rollout.
    schedule = rollout.rounded({**found, **grids}[won])
    schedule = replace(schedule, provenance={**facts, **results(told, rivals, rollout.mu)})
    accelerator.print(f"{nfe} evaluations: {won}, validation loss {losses[won]:.6g}")
    if accelerator.is_main_process:
        best = [next((name for name in losses if name in kind), won) for kind in (found, grids)]
        others = {name: {**found, **grids}[name] for name in best if name != won}
        save(args.output_dir, schedule, stock, problem.path, {won: schedule, **others})
    accelerator.wait_for_everyone()


def best_of_each(losses: dict[str, float]) -> dict[str, float | None]:
    """Losses, best first, and None where not finite; of the levels that an analytical first step inserts only the best one."""
    kept: dict[str, float | None] = {}
    bases = set()
    for name, loss in losses.items():
        base = name.partition(",")[0]
        if base not in bases:
            kept[name] = loss if math.isfinite(loss) else None
        bases.add(base)
    return kept


def save_ways(file: Path, search: str, grid: TeacherGrid, ways: Ways, z: Tensor | None = None) -> None:
    """All lists as JSON: indices, times and, where known, the levels z that they are."""

    def entry(indices: list[int]) -> dict[str, list]:
        levels = {} if z is None else {"levels": z[indices].tolist()}
        return {"indices": indices, "times": grid.times[indices].tolist(), **levels}

    schedules = {name: {str(k): entry(indices) for k, indices in enumerate(lists, 1)} for name, lists in ways.items()}
    content = {"search": search, "grid": grid.name, "grid_times": grid.times.tolist(), "schedules": schedules}
    write_whole(file, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))
