# SPDX-License-Identifier: Apache-2.0
"""Hand-made schedules: where learning starts, and what a learned one has to beat."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ld3_diffusers.discretization import DISCRETIZATIONS, discretization, discretization_to_zero, stock_times
from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.schedule import Schedule, SolverSpec
from ld3_diffusers.schedule_curve import ScheduleCurve

from .learner import Problem, mean_of_means


VP_GRIDS = ("logsnr", "time_uniform", "time_quadratic", "polynomial", "edm")
GRIDS = {
    "vp_discrete": (*VP_GRIDS, "ays"),
    "vp_linear": VP_GRIDS,
    "vp_cosine": VP_GRIDS,
    "ve": ("logsnr", "polynomial", "time_uniform_vp", "ays"),
    "flow": ("time_uniform", "flow_linear", "time_quadratic", "edm"),
}
STOCK = ("stock", "stock_karras", "stock_exponential")
FIRST_PAIRS = 4  # that halve the hand-made grids
FEW_PAIRS = 32  # that tell good ones from bad
RIVALS = 3  # of which as many are compared on all pairs
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")
BEFORE_ZERO = (
    "_before_zero"  # the named grid ends at t_min and the step to 0 comes after; else 0 stands for its last level
)


def grid_schedule(
    name: str,
    path: NoisePath,
    nfe: int,
    spec: SolverSpec,
    prediction_type: str,
    *,
    final_sigmas_type: str = "zero",
    stock_config: dict | None = None,
    final: bool = False,
) -> Schedule:
    """The schedule of a named grid for `nfe` evaluations.

    Args:
        name: a discretization ("poly" with rho 3, "time_uniform_vp" with 2, "flow_linear" with shift 3), perhaps followed by "_before_zero";
            "stock", "stock_karras", "stock_exponential": what Diffusers makes of `stock_config`, on discrete
            variance-preserving paths.
        final_sigmas_type: "zero" ends in clean data, "sigma_min" at `path.t_min`.
        final: take no resolution shift, see [`Schedule`].

    Raises:
        ValueError: for an unknown name, or a grid that this path, count or solver cannot have.
    """
    if final_sigmas_type not in FINAL_SIGMAS_TYPES:
        raise ValueError(f"unknown final_sigmas_type {final_sigmas_type!r}; use 'zero' or 'sigma_min'")
    to_zero, solver = final_sigmas_type == "zero", spec.make()
    rows = nfe + int(spec.afs)
    steps = solver.num_steps(rows, to_zero)
    network_times = None
    if name in STOCK:
        if stock_config is None or path.kind != "vp_discrete":
            raise ValueError(f"the grid {name!r} needs a model with betas; use one of {', '.join(GRIDS[path.kind])}")
        config = {**stock_config, "final_sigmas_type": final_sigmas_type}
        config.update(dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False))
        config.update(
            {
                "use_lu_lambdas": False,
                **({f"use_{name.removeprefix('stock_')}_sigmas": True} if name != "stock" else {}),
            }
        )
        times, timesteps = stock_times(config, path, steps)
        network_times = path.time(timesteps).clamp(path.t_min, path.t_max)
        # Stock's rounding may repeat or exceed a level; the network is told the levels' own times there.
        times = torch.cat([times[:-1].clamp(max=path.t_max), times[-1:]])
    else:
        times = named_grid(name, path, steps, to_zero)
    if solver.stages > 1:
        times, network_times = solver.expand_to(path, times, rows), None
    return Schedule(times, network_times, spec, path.kind, prediction_type, final=final)


def named_grid(name: str, path: NoisePath, steps: int, to_zero: bool, rho: float | None = None) -> Tensor:
    """(steps + 1,) times of a discretization, perhaps with the suffix "_before_zero"; `rho` for those that have one.

    Raises:
        ValueError: as [`grid_schedule`].
    """
    base = name.removesuffix(BEFORE_ZERO)
    if base not in DISCRETIZATIONS:
        known = ", ".join([*DISCRETIZATIONS, *STOCK])
        raise ValueError(f"unknown discretization {name!r}; use one of {known}, or the folder of a saved schedule")
    usual = {"poly": {"rho": 3.0}, "time_uniform_vp": {"rho": 2.0}, "flow_linear": {"shift": 3.0}}
    options = usual.get(base, {})
    options = options if rho is None else {**options, "rho": rho}
    if not to_zero:
        if name != base:
            raise ValueError(f"{name!r} ends in clean data; use {base!r}, or final_sigmas_type='zero'")
        return discretization(base, path, steps, **options)
    return discretization_to_zero(base, path, steps, before_zero=name != base, **options)


def candidates(
    path: NoisePath,
    nfe: int,
    spec: SolverSpec,
    prediction_type: str,
    *,
    final_sigmas_type: str = "zero",
    stock_config: dict | None = None,
    final: bool = False,
) -> dict[str, Schedule]:
    """All hand-made schedules that this path, count and solver can have, by name."""
    names = list(GRIDS[path.kind])
    if final_sigmas_type == "zero":
        names += [name + BEFORE_ZERO for name in names]
    if stock_config is not None and path.kind == "vp_discrete":
        names += STOCK
    found = {}
    for name in names:
        try:
            options = {"final_sigmas_type": final_sigmas_type, "stock_config": stock_config, "final": final}
            schedule = grid_schedule(name, path, nfe, spec, prediction_type, **options)
            schedule.table(path)
        except ValueError:
            continue
        found[name] = schedule
    if not found:
        raise ValueError(
            f"no hand-made grid fits {spec.solver} with {nfe} evaluations on a {path.kind!r} path; use more evaluations or "
            "another solver"
        )
    return found


def grid_search(
    problem: Problem,
    schedules: dict[str, Schedule],
    *,
    pairs: str = "train",
    batch_size: int | None = None,
    count: int | None = None,
) -> dict[str, float]:
    """Mean loss of each schedule on the first `count` (all) training ("train") or validation ("valid") pairs, best first; not finite ones
    last."""
    judges = getattr(problem, pairs)
    options = {"batch_size": batch_size, "indices": range(len(judges))[:count]}
    losses = {name: problem.mean_loss(schedule, judges, **options) for name, schedule in schedules.items()}
    order = sorted(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
    return {name: losses[name] for name in order}


def best_grid(problem: Problem, grids: Mapping[str, Sequence[Schedule]], batch_size: int | None = None) -> str:
    """The name of the best grid on training pairs, by the geometric mean over its schedules (for one count, or several) of the losses.

    Found by successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): each time the better half is tried on as many pairs more.

    Raises:
        ValueError: if none has a finite loss.
    """
    losses = {name: torch.empty(len(schedules), 0, dtype=torch.float64) for name, schedules in grids.items()}
    left, count = list(grids), FIRST_PAIRS
    while True:
        for name in left:
            known = losses[name].shape[1]
            if more := range(known, min(count, len(problem.train))):
                options = {"batch_size": batch_size, "indices": more}
                new = [problem.each_loss(each, problem.train, **options) for each in grids[name]]
                losses[name] = torch.cat([losses[name], torch.stack(new)], 1)
        means = {name: mean_of_means(losses[name]) for name in left}
        finite = [name for name in left if math.isfinite(means[name])]
        if not finite:
            raise ValueError("no hand-made grid has a finite loss; use another solver or more evaluations")
        left, count = sorted(finite, key=means.__getitem__)[: (len(left) + 1) // 2], 2 * count
        if len(left) == 1:
            return left[0]


def rivals(problem: Problem, grids: dict[str, Schedule], batch_size: int | None = None) -> dict[str, float]:
    """Mean losses on all validation pairs of the hand-made grids that are best on the first of them, best first."""
    first = grid_search(problem, grids, pairs="valid", batch_size=batch_size, count=FEW_PAIRS)
    return grid_search(
        problem, {name: grids[name] for name in list(first)[:RIVALS]}, pairs="valid", batch_size=batch_size
    )


class LosesToGrid(ValueError):
    """A learned schedule that is no better than a hand-made grid."""


def refuse_worse(nfe: int, loss: float, rivals: dict[str, float]) -> None:
    """Raises [`LosesToGrid`] if the best of the hand-made grids, from [`grid_search`], is as good as a learned schedule."""
    best = next(iter(rivals))
    if loss < rivals[best]:
        return
    raise LosesToGrid(
        f"the schedule learned for {nfe} evaluations does not beat the grid {best!r} on the validation pairs "
        f"({loss:.6g} against {rivals[best]:.6g}), so it was not saved; use more pairs, or learn longer, or that grid, or --allow_worse"
    )


def saved_schedule(folder: str | Path, path: NoisePath, nfe: int, spec: SolverSpec, prediction_type: str) -> Schedule:
    """The schedule for `nfe` evaluations in a saved scheduler's config, or its curve's, with another solver if `spec` says so, which leaves
    learned coefficients behind.

    Raises:
        ValueError: if there is none, or it belongs to another model family.
    """
    file = Path(folder)
    file = file / "scheduler_config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        entries, curve = config.get("schedules") or {}, config.get("curve")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"cannot read a schedule from {str(folder)!r} ({error}); give a folder with a scheduler_config.json"
        ) from error
    curve = None if curve is None else ScheduleCurve.from_dict(curve)
    if str(nfe) in entries:
        schedule = Schedule.from_dict(entries[str(nfe)])
    elif curve is not None and curve.serves(nfe):
        schedule = curve.schedule(nfe, path)
    else:
        counts = [*entries, *([] if curve is None else ["{} to {}".format(*curve.counts)])]
        raise ValueError(
            f"{str(folder)!r} has no schedule for {nfe} evaluations, only for {', '.join(counts) or 'none'}; start from a grid"
        )
    for name, mine, its in (
        ("noise path", path.kind, schedule.noise_path),
        ("prediction type", prediction_type, schedule.prediction_type),
    ):
        if mine != its:
            raise ValueError(
                f"the schedule in {str(folder)!r} has {name} {its!r}, this model {mine!r}; start from a grid"
            )
    if schedule.stages is not None:
        raise ValueError(
            f"the schedule in {str(folder)!r} for {nfe} evaluations has AMED's stages, from which nothing else is learned; start "
            "from a grid"
        )
    levels = {solver.make().stages for solver in (spec, schedule.spec)}
    if len(levels) > 1 or spec.afs != schedule.spec.afs or (levels == {2} and spec.solver != schedule.spec.solver):
        raise ValueError(f"{spec.solver} cannot start from levels made for {schedule.spec.solver}; start from a grid")
    residuals = schedule.residuals if spec.make() == schedule.spec.make() else None
    return replace(schedule, spec=spec, residuals=residuals, checksum=None)
