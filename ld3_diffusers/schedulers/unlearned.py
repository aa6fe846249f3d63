# SPDX-License-Identifier: Apache-2.0
"""Schedules that nobody learned: a stock scheduler's grid, a named discretization, or the times of `set_timesteps`' caller."""

import numbers

import torch
from torch import Tensor

from ..discretization import append_zero, discretization, discretization_to_zero, stock_times
from ..noise_path import NoisePath, float64, shift_flow_time
from ..schedule import Schedule, SolverSpec
from .pipeline_defaults import default_grid
from .stock_config import logit_shift


def requested(
    num_inference_steps: int | None, timesteps, sigmas
) -> tuple[int, list[float] | None, list[float] | None]:
    """The number of evaluations and the grids, as plain lists of that length, that a call of `set_timesteps` asks for.

    Raises:
        ValueError: if there is no count, or it is no positive integer or not the length of a grid.
    """
    timesteps, sigmas = _as_list("timesteps", timesteps), _as_list("sigmas", sigmas)
    if sigmas and sigmas[-1] == 0:  # EulerDiscreteScheduler, and lists published for it, name the final 0
        sigmas = sigmas[:-1]
    nfe = num_inference_steps
    if nfe is None:
        if timesteps is None and sigmas is None:
            raise ValueError("pass num_inference_steps, the number of network evaluations")
        nfe = len(sigmas if timesteps is None else timesteps)
    if isinstance(nfe, bool) or not isinstance(nfe, numbers.Real) or not nfe >= 1 or nfe % 1 != 0:
        raise ValueError(f"num_inference_steps must be a positive integer, got {nfe!r}")
    for name, grid in (("timesteps", timesteps), ("sigmas", sigmas)):
        if grid is not None and len(grid) != nfe:
            raise ValueError(f"got {len(grid)} {name} for {nfe} evaluations; give one for each")
    return int(nfe), timesteps, sigmas


def _as_list(name: str, grid) -> list[float] | None:
    try:
        return (
            None if grid is None else float64(grid).tolist() if isinstance(grid, Tensor) else [float(v) for v in grid]
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a list of numbers, one for each evaluation, got {grid!r:.60}") from error


def refuse_custom_grids(nfe: int, **grids) -> None:
    """Raises a `ValueError` if one of `grids`, by name, is a user's own."""
    for name, grid in grids.items():
        if grid is not None and default_grid(grid, nfe) is None:
            raise ValueError(f"custom {name} contradict the learned schedule; drop them, or load with schedules=None")


def unlearned_schedule(
    config: dict,
    path: NoisePath,
    spec: SolverSpec,
    nfe: int,
    timesteps: list[float] | None,
    sigmas: list[float] | None,
    mu: float | None,
) -> Schedule:
    """The schedule of `nfe` evaluations that an `LD3Scheduler` config describes without a learned one; its times are final.

    Args:
        timesteps, sigmas: what the pipeline or its user handed to `set_timesteps`, `nfe` values each.
        mu: the resolution shift of `use_dynamic_shifting`.

    Raises:
        ValueError: for a grid of `nfe` values where the solver takes another number of steps, or as `stock_times`.
    """
    solver = spec.make()
    rows = nfe + int(spec.afs)
    to_zero = config["final_sigmas_type"] == "zero"
    steps = solver.num_steps(rows, to_zero)
    if config["discretization"] is not None:  # it replaces a pipeline's default grid, but not a user's own
        timesteps, sigmas = (None if grid and default_grid(grid, nfe) else grid for grid in (timesteps, sigmas))
    if steps != nfe:  # a pipeline's default grid is meant for a step an evaluation
        timesteps, sigmas = (_resized(grid, nfe, steps, spec.solver) for grid in (timesteps, sigmas))

    if timesteps is None and sigmas is None and config["discretization"] is not None:
        named = discretization_to_zero if to_zero else discretization
        grid, network_times = named(config["discretization"], path, steps, rho=config["rho"]), None
        if path.kind == "flow":
            grid = shift_flow_time(grid, logit_shift(config, mu))
    elif path.kind == "flow" and (sigmas is not None or timesteps is None):
        grid, network_times = _stock_grid(config, path, solver, steps, mu, sigmas)
        if timesteps is not None:
            network_times = path.time(float64(timesteps))
    elif timesteps is None and sigmas is None:
        grid, network_times = _stock_grid(config, path, solver, steps, mu)
    else:
        levels = path.time(float64(timesteps)) if sigmas is None else path.inverse_sigma_edm(float64(sigmas))
        network_times = levels if timesteps is None else path.time(float64(timesteps))
        grid = append_zero(levels) if to_zero else torch.cat([levels, float64([path.t_min])])

    return Schedule(
        solver.expand_to(path, grid, rows),
        network_times if solver.stages == 1 else None,
        spec,
        path.kind,
        config["prediction_type"],
        final=True,
    )


def _stock_grid(config, path, solver, steps, mu, sigmas=None) -> tuple[Tensor, Tensor]:
    # With as many steps as the model was trained on, the multistep classes' rounding would repeat a level.
    multistep = solver.name in ("dpmpp", "unipc", "deis") and steps < config["num_train_timesteps"]
    convention = "multistep" if multistep else "euler"
    grid, timesteps = stock_times(
        config, path, steps, spacing_convention=convention, flow_grid=config["flow_grid"], mu=mu, sigmas=sigmas
    )
    return grid, path.time(timesteps)


def _resized(grid, nfe, steps, solver_name):
    if grid is None:
        return None
    default = default_grid(grid, nfe)
    if default is None:
        raise ValueError(
            f"{solver_name} takes {steps} steps in {nfe} evaluations and cannot use a custom grid of {nfe}; "
            "use `discretization`, or a solver with one evaluation a step"
        )
    return (default(steps) * (1000 if grid[0] > 2 else 1)).tolist()
