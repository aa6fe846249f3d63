# SPDX-License-Identifier: Apache-2.0
"""What it costs to be as near to the teacher as LD3's published procedure ends: network evaluations and seconds, side by side in one run.

    PYTHONPATH=. python examples/evaluation/compare_cost.py --config training/recipes/fashion-flux.yaml

learns as published and by the default recipe, as the file says, and looks after which iteration of the latter the distance to the teacher, on pairs
that neither learns or selects on, is no larger than where the former ends, and where it ends itself. An evaluation is that of one sample; backward
counts as two, recomputation as one, and choosing the grid to start from is counted, too. Both learn with the same solver, with the pairs that their
recipes say. The distance is `--loss`, by which the published recipe also learns: the mean square, or one that few samples do not rule; the farthest
sample's share of the mean is told. Counts that are in `cost.json`, or `cost-<loss>.json`, beside the results of the recipe's `evaluate`, are not
measured again unless a recipe has changed.
"""

import argparse
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import compare_generalised
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ld3_diffusers import LD3Scheduler
from training import learning_arguments, make_teacher_set
from training.arguments import parse, read_recipe
from training.contenders import is_preconditioned
from training.learner import Problem, learn, parameters_for
from training.learner_default import DefaultLearner
from training.learning_pairs import Part, learning_pairs
from training.learning_problem import learning_problem
from training.objectives import Objective, make_distance
from training.train_ld3 import starting_points
from training.whole_files import write_whole


UNSEEN = 128  # pairs, in the middle of the teacher set: training is on its beginning, validation on its end


@dataclass
class Cost:
    """Of all that happened while [`counted`]."""

    evaluations: float = 0
    seconds: float = 0


@contextmanager
def counted(problem: Problem, cost: Cost):
    def total() -> float:
        count = problem.rollout.evaluations
        return count.forward + count.recomputed + 2 * count.backward

    before, start = total(), time.perf_counter()
    yield
    cost.evaluations += total() - before
    cost.seconds += time.perf_counter() - start


@contextmanager
def problem_of(options: list[str]):
    """Arguments, recipe, problem and unseen pairs of a run of `train_ld3` with these options."""
    args = parse(learning_arguments.parser(), options)
    learning_arguments.check(args)
    accelerator = Accelerator()
    train, valid = learning_pairs(args, accelerator)
    first = valid.first - UNSEEN
    if first < len(train):
        raise ValueError(f"the teacher set is too small to leave {UNSEEN} pairs unseen; make a larger one")
    distance = make_distance(args.loss, args.loss_space)
    options = {"distance": distance, "loss_space": args.loss_space}
    with learning_problem(args, train, valid, accelerator, **options) as problem:
        yield args, learning_arguments.recipe_of(args), problem, Part(train.whole, first, UNSEEN)


def as_published(options: list[str], nfe: int) -> tuple[Tensor, Cost]:
    """The losses of unseen pairs at its end, and what it cost to get there."""
    cost = Cost()
    with problem_of([*options, "--nfe", str(nfe)]) as (args, recipe, problem, unseen):
        solver = learning_arguments.solver_of(args)
        _, _, initial = starting_points(args, [nfe], recipe, solver, problem)[nfe]
        steps = recipe.steps(len(problem.train))
        with counted(problem, cost), tqdm(total=steps, desc=f"published, {nfe} evaluations", unit="step") as progress:
            pairs = problem.rollout, problem.train, problem.valid
            result = learn(*pairs, initial, recipe, path=problem.path, callback=lambda *_: progress.update())
        return problem.each_loss(result.schedule, unseen, 32), cost


def by_default(options: list[str], nfe: int, judge: Objective, loss: float) -> tuple[dict | None, dict]:
    """State of learning when it is first no farther from the teacher than `loss` by `judge`, if ever, and at its end."""
    cost, reached = Cost(), None
    with problem_of([*options, "--nfe", str(nfe)]) as (args, recipe, problem, unseen):
        with counted(problem, cost):
            solver = learning_arguments.solver_of(args)
            _, _, initial = starting_points(args, [nfe], recipe, solver, problem)[nfe]
            learner = DefaultLearner(problem, recipe, parameters_for(recipe, initial, problem.path))
        judged = replace(problem, objective=judge)
        with tqdm(total=recipe.max_steps, desc=f"default, {nfe} evaluations", unit="step") as progress:
            while True:
                losses = judged.each_loss(learner.best_schedule(), unseen, 32)
                state = {**distance_of(losses), "iterations": learner.done, **asdict(cost)}
                if reached is None and state["loss"] <= loss:
                    reached = state
                if learner.finished:
                    return reached, state
                with counted(problem, cost):
                    learner.step()
                progress.update()


def distance_of(losses: Tensor) -> dict[str, float]:
    return {"loss": float(losses.mean()), "share_of_farthest": float(losses.max() / losses.sum())}


def measured(options: dict[str, list[str]], nfe: int, judge: Objective) -> dict:
    """Both recipes at one number of evaluations, as JSON."""
    losses, cost = as_published(options["published"], nfe)
    published = {**distance_of(losses), **asdict(cost)}
    reached, end = by_default(options["default"], nfe, judge, published["loss"])
    return {"nfe": nfe, "published": published, "default_reaches": reached, "default_ends": end}


def table(rows: list[dict]) -> str:
    of_default = "distance | iterations | evaluations (share) | seconds (share)"
    lines = [
        f"| NFE | published: distance x 1e-3 (farthest sample's share) | evaluations | seconds | default, there: {of_default} "
        f"| default, at its end: {of_default} |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        published = row["published"]
        cells = [distance(published), f"{published['evaluations']:,.0f}", f"{published['seconds']:.0f}"]
        cells += cells_of(row["default_reaches"], published) + cells_of(row["default_ends"], published)
        lines.append(f"| {row['nfe']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cells_of(state: dict | None, published: dict) -> list[str]:
    if state is None:
        return ["not reached", "", "", ""]
    costs = [f"{state[name]:,.0f} ({state[name] / published[name]:.3f})" for name in ("evaluations", "seconds")]
    return [distance(state), str(state["iterations"]), *costs]


def distance(state: dict) -> str:
    return f"{1e3 * state['loss']:.2f} ({state['share_of_farthest']:.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="training/recipes/fashion-flux.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 4, 5, 6, 8, 10], help="default: 3 4 5 6 8 10")
    parser.add_argument("--loss", choices=["l1", "l2", "huber"], default="l2", help="default: %(default)s")
    args = parser.parse_args(argv)
    recipe, config = read_recipe(args.config), ["--config", args.config]
    stock = LD3Scheduler.load_config(recipe["common"]["pretrained_model_name_or_path"], subfolder="scheduler")
    of_published = compare_generalised.published(Path(args.config).parent, is_preconditioned(stock))
    learned, folder = recipe["train_ld3"], Path(recipe["evaluate"]["output_dir"])
    shared = [*config, "--output_dir", learned["output_dir"] + "-cost"]
    solver = ["--solver", learned["solver"], "--solver_order", str(learned["solver_order"])]
    options = {"published": [*shared, *of_published, *solver, "--loss", args.loss], "default": shared}
    judge = make_distance(args.loss, "latent")
    make_teacher_set.main(config)
    name = "cost" if args.loss == "l2" else f"cost-{args.loss}"
    file = folder / f"{name}.json"
    recipes = {
        way: repr(learning_arguments.recipe_of(parse(learning_arguments.parser(), options[way]))) for way in options
    }
    found = json.loads(file.read_text()) if file.is_file() else []
    rows = {row["nfe"]: row for row in found if row.get("recipes") == recipes}
    for nfe in args.nfe:
        if nfe not in rows:
            rows[nfe] = {**measured(options, nfe, judge), "recipes": recipes}
            content = json.dumps([rows[count] for count in sorted(rows)], indent=1)
            write_whole(file, lambda out, content=content: out.write_text(content))
    text = table([rows[count] for count in sorted(rows)])
    write_whole(folder / f"{name}.md", lambda out: out.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
