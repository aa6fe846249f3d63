# SPDX-License-Identifier: Apache-2.0
"""Teacher trajectories for AMED: where the training pairs' samples are at each of the student's step ends.

The teacher steps on a grid with M more points in each of the student's steps. What its network returned where a step begins, and the
bottleneck's features there, are kept too: a student that restarts from the teacher's states need not evaluate them again.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ld3_diffusers import Schedule, SolverSpec
from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.solvers.two_stage import geometric_mean

from .amed_student import GuidedNetwork
from .initial import named_grid
from .kept_parts import kept
from .learner import Problem
from .processes import on_main
from .request_file import digest


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Of all training pairs, float32 on the host.

    Attributes:
        states: (pairs, N + 1, ...) at the student's N + 1 step ends, the starting state first.
        outputs: (pairs, N, ...) of the network where the N steps begin.
        features: (pairs, N, height, width) of its bottleneck there; None if that was not watched.
    """

    states: Tensor
    outputs: Tensor
    features: Tensor | None

    def first(self, indices: list[int], n: int, device) -> tuple[Tensor, Tensor | None]:
        """What the network said to these samples where step n begins; see [`Student.first_evaluation`]."""
        features = None if self.features is None else self.features[indices, n].to(device)
        return self.outputs[indices, n].to(device), features


def refined_grid(
    name: str, path: NoisePath, steps: int, intermediate_points: int, to_zero: bool, rho: float | None = None
) -> Tensor:
    """Times of the teacher, of which each (M + 1)-th is one of the student's named grid of so many steps.

    Where the grid with (M + 1) times the steps has no such points (`dmn`, `ays`), the M points lie equally spaced in lambda, on rectified
    flow in log s.

    Raises:
        ValueError: as [`named_grid`].
    """
    own, parts, finer = named_grid(name, path, steps, to_zero, rho), intermediate_points + 1, None
    if name != "dmn":  # whose optimum for another count shares no points, and takes long to find
        try:
            finer = named_grid(name, path, steps * parts, to_zero, rho)
        except ValueError:
            pass
    if finer is not None and torch.allclose(finer[::parts], own, rtol=1e-9, atol=1e-12):
        return finer
    share = torch.arange(parts, dtype=torch.float64) / parts
    between = [geometric_mean(path, start, end, share) for start, end in zip(own[:-1], own[1:])]
    return torch.cat([*between, own[-1:]])


def teacher_trajectories(
    problem: Problem,
    network: GuidedNetwork,
    grid: Tensor,
    intermediate_points: int,
    solver: SolverSpec,
    folder: Path,
    *,
    final: bool,
    batch_size: int,
) -> Trajectories:
    """Recorded through the pipeline, or found in `folder`, which keeps them.

    Args:
        grid: of the teacher, see [`refined_grid`].
        solver: of the teacher.

    Raises:
        ValueError: if they are not finite.
    """
    rollout, path = problem.rollout, problem.path
    teacher = solver.make()
    times = teacher.expand(path, grid)
    schedule = Schedule(times, None, solver, path.kind, rollout.scheduler.config.prediction_type, final=final)
    rows = teacher.stages * (intermediate_points + 1)  # of one of the student's steps

    def compute(noise: Tensor, conditioning: dict) -> dict[str, Tensor]:
        states, outputs, features = [], [], []

        def keep(i: int, state: Tensor, output: Tensor, result: Tensor) -> None:
            seen = network.features(len(noise))
            if i % rows == 0:
                states.append(state.float().cpu())
                outputs.append(output.float().cpu())
                features.append(seen)
            if i == schedule.nfe - 1:
                states.append(result.float().cpu())

        rollout.state_shape(conditioning)  # may try the pipeline out
        network.forget()
        rollout.visit(schedule, noise, conditioning, keep)
        found = {"states": torch.stack(states, 1), "outputs": torch.stack(outputs, 1)}
        if network.attachment is not None:
            found["features"] = torch.stack([seen.float().cpu() for seen in features], 1)
        return found

    def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    request = {
        "teacher": vars(solver),
        "times": times.tolist(),
        "rows": rows,
        "final": final,
        "features": True,
        "pairs": problem.train.identity(),
        "batch_size": batch_size,
    }

    def file_of(request: dict) -> Path:  # a folder for each: runs may share `folder`
        return folder / digest(request) / "trajectories.safetensors"

    if network.attachment is None and not on_main(file_of(request).is_file, problem.accelerator):
        request["features"] = False
    found = kept(file_of(request), request, problem, batch_size, compute, together, "teacher trajectories")
    if not all(bool(torch.isfinite(found[name]).all()) for name in ("states", "outputs")):
        raise ValueError(
            "the teacher's trajectories are not finite; use --mixed_precision no or bf16, or another solver of the teacher"
        )
    return Trajectories(found["states"], found["outputs"], found.get("features"))
