# SPDX-License-Identifier: Apache-2.0
"""Schedules on a teacher's grid: the searches GITS and OSS on pairs, with what they compute kept on disk, and their students."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ld3_diffusers import Schedule, SolverSpec
from ld3_diffusers.noise_path import NoisePath

from .gits import COEFF, COEFFS, cost_sums, dynamic_programme
from .initial import grid_search, named_grid
from .kept_parts import kept
from .learner import Problem
from .learning_pairs import Part
from .oss import COST_POWER, combined_path, optimal_paths
from .trajectory import record


SEARCHES = ("gits", "oss")
NUM_WARMUP = 256  # teacher trajectories of GITS, as its authors take
NUM_SAMPLES = 16  # samples of OSS, whose lists are combined
GITS_POINTS = 61
# Half of the authors' 100 steps: the K passes over the grid are what OSS costs, and its jumps span several of these steps.
OSS_POINTS = 51
SEARCH_BATCH_SIZE = 16


@dataclass(frozen=True, eq=False)
class TeacherGrid:
    """The levels among which a search chooses.

    Attributes:
        name: of the discretization.
        times: (N,) float64, from noise to data; rectified flow: before the resolution shift.
        final: the times take no resolution shift, see [`Schedule`].
    """

    name: str
    times: Tensor
    path: NoisePath
    prediction_type: str
    final: bool = False

    def __len__(self) -> int:
        return len(self.times)

    def teacher(self, spec: SolverSpec) -> Schedule:
        """The schedule that steps on every point."""
        times = spec.make().expand(self.path, self.times)
        return Schedule(times, None, spec, self.path.kind, self.prediction_type, final=self.final)

    def num_steps(self, nfe: int, spec: SolverSpec) -> int:
        """Steps of a student with `nfe` evaluations, the analytical first one included."""
        return spec.make().num_steps(nfe + int(spec.afs), bool(self.times[-1] == 0))

    def student(self, indices: Sequence[int], nfe: int, spec: SolverSpec) -> Schedule:
        """The schedule whose steps end on these points, the network being told their own times."""
        times, solver = self.times[list(indices)], spec.make()
        if solver.stages > 1:
            times = solver.expand_to(self.path, times, nfe + int(spec.afs))
        return Schedule(times, None, spec, self.path.kind, self.prediction_type, final=self.final)


def teacher_grid(
    problem: Problem,
    search: str,
    *,
    name: str | None = None,
    num_points: int | None = None,
    rho: float | None = None,
    final_sigmas_type: str = "zero",
    final: bool = False,
) -> TeacherGrid:
    """The grid of a search, "gits" or "oss".

    By default of 61 points, polynomial (OSS on variance-preserving paths: uniform in t), on rectified flow uniform before the shift.
    "zero" replaces the last point by clean data.

    Raises:
        ValueError: for a grid that this path cannot have, or a model whose data prediction is bounded.
    """
    path, config = problem.path, problem.rollout.scheduler.config
    if config.clip_sample or config.thresholding:
        raise ValueError(
            "this pipeline's scheduler bounds the data prediction, so that its trajectory is not that of an ODE; set clip_sample "
            "and thresholding to false in its scheduler_config.json, or learn with train_ld3 from a hand-made grid"
        )
    if name is None:
        uniform = path.kind == "flow" or (search == "oss" and path.kind != "ve")
        name = "time_uniform" if uniform else "polynomial"
    steps = (num_points or (GITS_POINTS if search == "gits" else OSS_POINTS)) - 1
    times = named_grid(name, path, steps, final_sigmas_type == "zero", rho)
    return TeacherGrid(name, times, path, config.prediction_type, final)


def most_steps(num_points: int, nfes: Sequence[int], spec: SolverSpec, final_sigmas_type: str) -> int:
    """Steps of the longest of these students.

    Raises:
        ValueError: if a grid of so many points has too few for it.
    """
    steps = {nfe: spec.make().num_steps(nfe + int(spec.afs), final_sigmas_type == "zero") for nfe in nfes}
    longest = max(steps, key=steps.get)
    if steps[longest] >= num_points:
        raise ValueError(
            f"{longest} evaluations are {steps[longest]} steps of {spec.solver}, but a teacher's grid of {num_points} points has "
            f"only {num_points - 1}; raise --num_grid_points, or lower --nfe"
        )
    return steps[longest]


# ---------------------------------------------------------------------- what is computed, and kept


def gits_cost(
    problem: Problem,
    grid: TeacherGrid,
    folder: Path,
    *,
    teacher: SolverSpec = SolverSpec("ipndm"),
    metric: str = "dev",
    batch_size: int = SEARCH_BATCH_SIZE,
) -> tuple[Tensor, Tensor]:
    """(N, N) mean costs over the training pairs, and the (N,) levels z at which the teacher was; kept in `folder`."""
    schedule = grid.teacher(teacher)
    request = {"search": "gits", "metric": metric, **_request(problem, schedule, batch_size)}

    def compute(noise: Tensor, conditioning: dict) -> dict[str, Tensor]:
        trajectory = record(problem.rollout, schedule, noise, conditioning)
        return {"sum": cost_sums(trajectory, metric), "z": trajectory.z.cpu()}

    def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        total = sum((part["sum"] for part in parts[1:]), parts[0]["sum"])
        return {"cost": total / len(problem.train), "z": parts[0]["z"]}

    found = kept(folder / "cost.safetensors", request, problem, batch_size, compute, together, "teacher trajectories")
    return found["cost"], found["z"]


def oss_paths(
    problem: Problem,
    grid: TeacherGrid,
    folder: Path,
    *,
    num_steps: int,
    cost_power: float = COST_POWER,
    batch_size: int = SEARCH_BATCH_SIZE,
) -> Tensor:
    """(samples, num_steps, num_steps + 1): see [`optimal_paths`]; of all training pairs, kept in `folder`."""
    schedule = grid.teacher(SolverSpec("euler"))
    request = {"search": "oss", "num_steps": num_steps, "cost_power": cost_power}
    request.update(_request(problem, schedule, batch_size))

    def compute(noise: Tensor, conditioning: dict) -> dict[str, Tensor]:
        paths = optimal_paths(problem.rollout, schedule, noise, conditioning, num_steps, cost_power=cost_power)
        return {"paths": paths}

    def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"paths": torch.cat([part["paths"] for part in parts])}

    return kept(folder / "paths.safetensors", request, problem, batch_size, compute, together, "optimal steps")[
        "paths"
    ]


def _request(problem: Problem, schedule: Schedule, batch_size: int) -> dict:
    """What decides a search's result, beside its own options."""
    return {
        "teacher": vars(schedule.spec),
        "times": schedule.times.tolist(),
        "final": schedule.final,
        "pairs": problem.train.identity(),
        "batch_size": batch_size,
    }


# ---------------------------------------------------------------------- students


def gits_ways(cost: Tensor, num_steps: int, coeffs: Sequence[float]) -> dict[str, list[list[int]]]:
    """Index lists of 1, ..., `num_steps` steps for each coeff, by the name "coeff <value>"."""
    return {f"coeff {coeff:g}": dynamic_programme(cost, num_steps, coeff) for coeff in coeffs}


def oss_ways(paths: Tensor, num_points: int) -> dict[str, list[list[int]]]:
    """The same for OSS, by the name "oss"."""
    return {"oss": [combined_path(paths[:, k, : k + 2], num_points) for k in range(paths.shape[1])]}


def students(ways: dict[str, list[list[int]]], grid: TeacherGrid, nfe: int, spec: SolverSpec) -> dict[str, Schedule]:
    """The students of a search for one count, by name; names that mean the same levels share one object.

    An analytical first step is one step more, which no cost of the search is about: every level between the first and the second
    of the list with a step less is offered as its end, beside the longer list itself.
    """
    steps, found, known = grid.num_steps(nfe, spec), {}, {}
    for name, lists in ways.items():
        offers = {name: lists[steps - 1]}
        if spec.afs and steps > 1:
            first, second, *rest = lists[steps - 2]
            offers.update({f"{name}, {k} inserted": [first, k, second, *rest] for k in range(first + 1, second)})
        for offer, indices in offers.items():
            if tuple(indices) not in known:
                known[tuple(indices)] = grid.student(indices, nfe, spec)
            found[offer] = known[tuple(indices)]
    return found


def judge(problem: Problem, schedules: dict[str, Schedule], **options) -> dict[str, float]:
    """[`grid_search`] that samples with schedules of several names once."""
    names: dict[int, list[str]] = {}
    for name, schedule in schedules.items():
        names.setdefault(id(schedule), []).append(name)
    losses = grid_search(problem, {first: schedules[first] for first, *_ in names.values()}, **options)
    return {name: losses[first] for first in losses for name in names[id(schedules[first])]}


def first_pairs(pairs: Part, count: int) -> Part:
    """The first `count` pairs, or all that there are."""
    return replace(pairs, count=min(count, len(pairs)))


def search_start(
    search: str,
    problem: Problem,
    nfe: int,
    most_evaluations: int,
    spec: SolverSpec,
    *,
    folder: Path,
    batch_size: int | None,
    final_sigmas_type: str,
    final: bool,
) -> tuple[str, Schedule]:
    """Where learning starts: the student of a search on the training pairs, of GITS with the coeff that is best there.

    Args:
        search: "gits" or "oss".
        most_evaluations: of the counts that this will be called for; what is kept in `folder` serves them all.

    Raises:
        ValueError: if the solver cannot run on the grid.
    """
    grid = teacher_grid(problem, search, final_sigmas_type=final_sigmas_type, final=final)
    num_steps = most_steps(len(grid), [nfe, most_evaluations], spec, final_sigmas_type)
    count = NUM_WARMUP if search == "gits" else NUM_SAMPLES
    asked = replace(problem, train=first_pairs(problem.train, count))
    if search == "gits":
        coeffs = sorted(COEFFS, key=lambda coeff: abs(coeff - COEFF))  # of equally good ones the usual
        ways = gits_ways(gits_cost(asked, grid, folder / search)[0], num_steps, coeffs)
    else:
        ways = oss_ways(oss_paths(asked, grid, folder / search, num_steps=num_steps), len(grid))
    found = students(ways, grid, nfe, spec)
    name = next(iter(judge(problem, found, batch_size=batch_size) if len(found) > 1 else found))
    return (name if name.startswith(search) else f"{search}, {name}"), found[name]
