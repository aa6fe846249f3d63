# SPDX-License-Identifier: Apache-2.0
"""The recipes on analytic mixtures, judged on fresh noise: `python -m tests.benchmarks.compare_recipes [--seeds 3]`.

Every problem has 50 training pairs, 50 validation pairs and 1024 fresh test noises; the network is exact, the teacher UniPC of
order 3 with 20 steps (rectified flow: 100). Printed are mean squared distances x 1e-3, and the time of each run.
"""

import argparse
import time
from dataclasses import replace

import torch

from ld3_diffusers.noise_path import RectifiedFlow, VPLinear
from ld3_diffusers.schedule import SolverSpec
from tests.training.toy import grid_schedule, make_pairs, toy
from training.learner import Problem, learn
from training.recipe import AdamRecipe, DefaultRecipe, PublishedRecipe


PROBLEMS = {
    "dpmpp2-5": (VPLinear(), SolverSpec("dpmpp", 2), 5),
    "ipndm3-5": (VPLinear(), SolverSpec("ipndm", 3), 5),
    "unipc3-5": (VPLinear(), SolverSpec("unipc", 3), 5),
    "dpmpp2-8": (VPLinear(), SolverSpec("dpmpp", 2), 8),
    "flow-dpmpp2-4": (RectifiedFlow(), SolverSpec("dpmpp", 2), 4),
}
D, A = DefaultRecipe(), AdamRecipe()
RECIPES = {
    "published, lambda": PublishedRecipe(),
    "published, time": PublishedRecipe(mode="time"),
    "published, hard": PublishedRecipe(mode="time", radius=0.0),
    "default": D,
    "times only": replace(D, learn=("times",)),
    "both times": replace(D, learn=("times", "network_times")),
    "window 1": replace(D, coefficient_window=1),
    "window 2": replace(D, coefficient_window=2),
    "adam": A,
    "adam, both times": replace(A, learn=("times", "network_times")),
    "adam, full batch": replace(A, batch_size=None),
    "adam, no averaging": replace(A, averaging=None),
    "adam, relaxation": replace(A, relaxation=1e-3),
    "adam, 600 steps": replace(A, max_steps=600),
}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["published, time", "default"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=50)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{'problem':16}{'recipe':22}{'test by seed':30}{'mean':>8}{'train':>8}{'seconds':>9}")
    for name in args.problems:
        path, spec, nfe = PROBLEMS[name]
        rollout = toy(path)
        flow = path.kind == "flow"
        teacher = {"nfe": 100, "grid": "time_uniform"} if flow else {"nfe": 20, "grid": "logsnr"}
        grids = ("time_uniform", "time_quadratic") if flow else ("logsnr", "time_uniform", "time_quadratic", "edm")
        test = make_pairs(rollout, 1024, 999, **teacher)
        results: dict[str, list] = {}
        for seed in range(args.seeds):
            train, valid = (make_pairs(rollout, args.pairs, first + seed, **teacher) for first in (100, 200))
            problem = Problem(rollout, train, valid, path)
            schedules = {grid: grid_schedule(path, grid, nfe, spec) for grid in grids}
            losses = {grid: problem.mean_loss(s, train) for grid, s in schedules.items()}
            best = min(losses, key=losses.get)
            tests = [problem.mean_loss(s, test) for s in schedules.values()]
            results.setdefault("best grid by training", []).append(
                (problem.mean_loss(schedules[best], test), losses[best], 0.0)
            )
            results.setdefault("best grid by test", []).append((min(tests), losses[best], 0.0))
            for recipe in args.recipes:
                started = time.perf_counter()
                found = learn(rollout, train, valid, schedules[best], RECIPES[recipe], path=path, seed=seed).schedule
                seconds = time.perf_counter() - started
                print(f"# {name} seed {seed} {recipe}: {1e3 * problem.mean_loss(found, test):.3f}", flush=True)
                numbers = (problem.mean_loss(found, test), problem.mean_loss(found, train), seconds)
                results.setdefault(recipe, []).append(numbers)
        for recipe, rows in results.items():
            test_losses, train_losses, seconds = (torch.tensor(column) for column in zip(*rows))
            by_seed = " ".join(f"{1e3 * value:7.2f}" for value in test_losses)
            means = f"{1e3 * test_losses.mean():8.2f}{1e3 * train_losses.mean():8.2f}{seconds.mean():9.1f}"
            print(f"{name:16}{recipe:22}{by_seed:30}{means}", flush=True)


if __name__ == "__main__":
    main()
