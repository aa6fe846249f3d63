# SPDX-License-Identifier: Apache-2.0
r"""Learning a schedule: parameters -> times -> table -> rollout -> loss.

Minimised is the mean over pairs of $d(\Psi_\xi(x'), \Psi^*(x_T))$ where $\Psi^*$ is the teacher's end point, $\Psi_\xi$ the student's
with schedule $\xi$, and $x' = x_T$ unless the objective is relaxed (LD3, arXiv:2405.15506: $x'$ within a small ball around
$x_T$). A rollout is any callable `(schedule, noise, conditioning) -> end`, differentiable in the schedule's times.

Nothing here knows a model. Three recipes: `learner_default`, `learner_adam` and `learner_published`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.schedule import Schedule
from ld3_diffusers.schedule_curve import ScheduleCurve

from .checkpoint import Checkpoints
from .curve_parameters import CurveParameters
from .objectives import Objective, l2
from .parameters import GapParameters
from .processes import is_main, num_processes, on_main, share
from .recipe import DefaultRecipe, Recipe


SMALLEST_LOSS = 1e-30  # whose logarithm is taken


class Pairs(Protocol):
    """Starting noises and the teacher's end points; see `teacher_set`."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int], device) -> tuple[Tensor, Tensor, dict]: ...


def split(indices: Sequence[int], size: int | None) -> list[Sequence[int]]:
    """Consecutive parts of `size`, the last perhaps shorter; None: one part."""
    size = size or max(1, len(indices))
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def with_moved(noise: Tensor, indices: Sequence[int], moved: Mapping[int, Tensor]) -> Tensor:
    """The noises of pairs `indices`, those that have been moved in place of the teacher's."""
    return torch.stack([moved[i].to(x) if i in moved else x for i, x in zip(indices, noise)])


@dataclass
class Problem:
    """What is learned on, with all that the recipes share: losses and gradients of micro-batches, computed side by side.

    What is computed for a micro-batch depends on its pairs alone, and sums over micro-batches are taken in float64 and in the
    order of the pairs. So the result does not depend on the number of processes.

    Attributes:
        rollout: `(schedule, noise, conditioning) -> end`.
        train, valid: pairs.
        path: noise path of the schedule.
        objective: `(end, target) -> losses`.
        accelerator: of Accelerate, or None for one process.
        device: of the pairs; the accelerator's if there is one.
    """

    rollout: Callable[[Schedule, Tensor, dict], Tensor]
    train: Pairs
    valid: Pairs
    path: NoisePath
    objective: Objective = l2
    accelerator: Any = None
    device: Any = None

    def __post_init__(self):
        if self.device is None:
            self.device = torch.device("cpu") if self.accelerator is None else self.accelerator.device
        for name, pairs in (("training", self.train), ("validation", self.valid)):
            if len(pairs) == 0:
                raise ValueError(f"there are no {name} pairs; make some with training.make_teacher_set")

    @property
    def moves_noise(self) -> bool:
        """Whether the starting noise is the rollout's argument rather than drawn by the pipeline itself."""
        return getattr(self.rollout, "moves_noise", True)

    def share(self, parts: list, compute: Callable) -> list:
        """`[compute(part) for part in parts]`, spread over the processes; see `processes.share`."""
        return share(parts, compute, self.accelerator)

    def losses(self, schedule: Schedule, noise: Tensor, target: Tensor, conditioning: dict) -> Tensor:
        return self.objective(self.rollout(schedule, noise, conditioning), target)

    def gradients(self, losses: Tensor, target: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        r"""Gradients of `losses.sum()`.

        A mean over many entries has cotangents that float16 flushes to zero, so the sum over entries is what goes
        backwards. The factor is a power of two: dividing by it is exact.
        """
        scale = 2.0 ** round(math.log2(max(target[0].numel(), 1)))
        gradients = torch.autograd.grad(losses.sum() * scale, inputs, materialize_grads=True)
        return [gradient / scale for gradient in gradients]

    def losses_of(
        self, schedule: Schedule, pairs: Pairs, indices: Sequence[int], moved: Mapping[int, Tensor]
    ) -> Tensor:
        """Losses of a micro-batch without gradients, float64 on the CPU; `moved`: noises in place of the teacher's."""
        with torch.no_grad():
            noise, target, conditioning = pairs.batch(list(indices), self.device)
            losses = self.losses(schedule, with_moved(noise, indices, moved), target, conditioning)
        return losses.double().cpu()

    def each_loss(
        self,
        schedule: Schedule,
        pairs: Pairs,
        batch_size: int | None = None,
        *,
        indices: Sequence[int] | None = None,
        moved: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Losses of pairs `indices` (all), `batch_size` (all) at once, from their own or from moved noises."""
        parts = split(range(len(pairs)) if indices is None else indices, batch_size)
        return torch.cat(self.share(parts, lambda part: self.losses_of(schedule, pairs, part, moved or {})))

    def mean_loss(self, schedule: Schedule, pairs: Pairs, batch_size: int | None = None, **options) -> float:
        """Their mean; see [`each_loss`]."""
        return float(self.each_loss(schedule, pairs, batch_size, **options).mean())


def is_stable(schedule: Schedule, path: NoisePath) -> bool:
    """Whether a scheduler would take it."""
    try:
        schedule.check_stability(path)
        schedule.table(path)
    except ValueError:
        return False
    return True


def geometric_mean(losses: Sequence[float]) -> float:
    """Of one, itself."""
    if len(losses) == 1:
        return losses[0]
    return math.exp(sum(math.log(max(loss, SMALLEST_LOSS)) for loss in losses) / len(losses))


def mean_of_means(losses: Tensor) -> float:
    """(schedules, pairs) -> the geometric mean over schedules of the means over pairs."""
    return geometric_mean(losses.mean(1).tolist())


@dataclass
class LearnResult:
    """What learning returns.

    Attributes:
        schedule: the best one, or the best curve.
        history: one dict of numbers an iteration.
        initial_loss, loss: validation loss of the initial and of the returned schedule, on unmoved noise; of a curve the geometric mean over
            the counts that it was learned on.
    """

    schedule: Schedule | ScheduleCurve
    history: list[dict[str, float]] = field(default_factory=list)
    initial_loss: float = math.nan
    loss: float = math.nan


def learn(
    rollout: Callable[[Schedule, Tensor, dict], Tensor],
    train_pairs: Pairs,
    valid_pairs: Pairs,
    initial: Schedule | Mapping[int, Schedule],
    recipe: Recipe | None = None,
    *,
    path: NoisePath,
    objective: Objective = l2,
    accelerator=None,
    device=None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpointing_steps: int | None = None,
    checkpoints_total_limit: int | None = None,
    resume_from_checkpoint: str | Path | None = None,
    facts: dict[str, str | int | float | None] | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> LearnResult:
    """Learn a schedule.

    Args:
        rollout: `(schedule, noise, conditioning) -> end`.
        train_pairs, valid_pairs: see [`Pairs`].
        initial: where learning starts; by number of evaluations, for a curve that serves them all. The published recipe takes its path ends, its count and its solver from it
            and starts from its own uniform grid.
        recipe: [`DefaultRecipe`], [`AdamRecipe`] or [`PublishedRecipe`].
        path: noise path of `initial`.
        objective: see `objectives`.
        seed: of the order of the pairs.
        checkpoint_dir: where `checkpoint-<step>` folders go, every `checkpointing_steps` iterations.
        checkpoints_total_limit: how many of them are kept.
        resume_from_checkpoint: a checkpoint's folder, or "latest" in `checkpoint_dir`. On the CPU the result is bit for bit
            that of a run that was never interrupted, on any number of processes.
        facts: what else a continuation must have in common with the run, such as the loss.
        callback: called with the number of done iterations and the newest history entry.

    Raises:
        ValueError: if the losses are not finite, or a checkpoint belongs to another run.
    """
    from .learner_adam import AdamLearner
    from .learner_default import DefaultLearner
    from .learner_published import PublishedLearner

    recipe = DefaultRecipe() if recipe is None else recipe
    problem = Problem(rollout, train_pairs, valid_pairs, path, objective, accelerator, device)
    checkpoints = Checkpoints(checkpoint_dir, checkpoints_total_limit)
    identity = {**_identity(recipe, initial, problem, seed), **(facts or {})}
    # The main process reads for all, whose disks may be others.
    state = on_main(lambda: checkpoints.load(resume_from_checkpoint, identity), accelerator)
    if recipe.name == "default":
        learner = DefaultLearner(problem, recipe, parameters_for(recipe, initial, path))
    elif isinstance(initial, Mapping):
        raise ValueError("curves are learned by the recipe 'default' only; use it, or learn a schedule for each count")
    else:
        learner = {"adam": AdamLearner, "published": PublishedLearner}[recipe.name](problem, recipe, initial, seed)
    argument = "first_pairs" if recipe.name == "default" else "train_batch_size"
    warn_of_idle_processes(learner.batch_size, learner.pass_size, accelerator, argument)

    def loss_now() -> float:
        found = learner.best_schedule()
        schedules = [found] if isinstance(found, Schedule) else [found.schedule(nfe, path) for nfe in initial]
        return geometric_mean([problem.mean_loss(each, valid_pairs, learner.pass_size) for each in schedules])

    saving = checkpoints, checkpointing_steps, identity
    history, initial_loss = iterate(learner, loss_now, state, saving, accelerator, callback)
    before = {} if isinstance(initial, Mapping) else dict(initial.provenance)
    return LearnResult(replace(learner.best_schedule().detach(), provenance=before), history, initial_loss, loss_now())


def parameters_for(
    recipe: DefaultRecipe, initial: Schedule | Mapping[int, Schedule], path: NoisePath
) -> GapParameters | CurveParameters:
    """What the default recipe learns: of a schedule, or of a curve that starts from several.

    Raises:
        ValueError: if nothing is free, or as these.
    """
    options = {"learn": recipe.learn, "coefficient_window": recipe.coefficient_window}
    if isinstance(initial, Mapping):
        return CurveParameters(initial, path, **options)
    parameters = GapParameters(initial, path, last_level=recipe.last_level, **options)
    if not any(p.numel() for p in parameters.parameters()):
        raise ValueError("this schedule has no free times; learn other parameters too, or use more evaluations")
    return parameters


class Iterative(Protocol):
    """What [`iterate`] runs."""

    finished: bool

    def start(self, initial_loss: float) -> None: ...

    def step(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def iterate(
    learner: Iterative,
    first_loss: Callable[[], float],
    state: dict[str, Any] | None,
    saving: tuple[Checkpoints, int | None, dict[str, Any]],
    accelerator=None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[list[dict[str, float]], float]:
    """Step until the learner has finished, from a checkpoint's `state` or from its start.

    Args:
        first_loss: validation loss at the start.
        saving: checkpoints, iterations between them, and the identity that they are written with.
        callback: see [`learn`].

    Returns:
        The history and the loss at the start.

    Raises:
        ValueError: if that is not finite.
    """
    checkpoints, checkpointing_steps, identity = saving
    if state is not None:
        learner.load_state_dict(state["learner"])
        history, initial_loss = state["history"], state["initial_loss"]
    else:
        history, initial_loss = [], first_loss()
        if not math.isfinite(initial_loss):
            raise ValueError(
                "the initial schedule's loss is not finite; sample with it to see what fails, try another discretization "
                "or a lower solver order"
            )
        learner.start(initial_loss)
    while not learner.finished:
        history.append(learner.step())
        done = len(history)
        if checkpointing_steps and done % checkpointing_steps == 0 and is_main(accelerator):
            now = {"learner": learner.state_dict(), "history": history, "initial_loss": initial_loss}
            if state is None and done == checkpointing_steps:
                checkpoints.clear()
            checkpoints.save(done, {**now, "identity": identity})
        if callback is not None:
            callback(done, history[-1])
    return history, initial_loss


def warn_of_idle_processes(batch_size: int, pass_size: int, accelerator, argument: str = "train_batch_size") -> None:
    """Warns if there are fewer micro-batches than processes; `argument` is the one that sets `batch_size`."""
    busy, processes = math.ceil(batch_size / pass_size), num_processes(accelerator)
    if busy < processes and is_main(accelerator):
        warnings.warn(
            f"a batch of {batch_size} pairs in micro-batches of {pass_size} keeps only {busy} of {processes} processes busy; "
            f"lower --micro_batch_size or raise --{argument}",
            stacklevel=3,
        )


def _identity(
    recipe: Recipe, initial: Schedule | Mapping[int, Schedule], problem: Problem, seed: int
) -> dict[str, Any]:
    """What must not differ between a run and its continuation."""
    starts = [initial[nfe] for nfe in sorted(initial)] if isinstance(initial, Mapping) else [initial]
    return {
        "recipe": recipe.name,
        "settings": repr(recipe),
        "seed": seed,
        "solver": repr(starts[0].spec),
        "times": [start.times.detach().tolist() for start in starts],
        "network_times": [start.network_times.detach().tolist() for start in starts],
        "train_pairs": len(problem.train),
        "valid_pairs": len(problem.valid),
    }
