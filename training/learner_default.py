# SPDX-License-Identifier: Apache-2.0
r"""The default recipe: Levenberg-Marquardt on gaps, network times and coefficients, selected on unmoved held-out noise.

With parameters $\theta$ of a schedule, J the Jacobian of what the objective compares and r its difference from the teacher's, an iteration
solves

$$ (H + \mu S)\,\delta = -g, \qquad H = \sum J^\top W J, \quad g = \sum J^\top W r, $$

over some pairs for several dampings $\mu$, S being the largest diagonal of H so far (Moré 1978, doi:10.1007/BFb0067700), and takes the step that is best on held-out pairs, if it is better than none there. J comes from finite
differences of the network (`sensitivity`) and the derivatives of the step table by $\theta$, from autograd in float64. These few dozen parameters differ by orders of magnitude in what they move, and neighbouring
coefficients do nearly the same: what first order methods take hundreds of iterations for, a handful does. The first iterations go by few pairs,
which suffice while the way is long; every iteration goes by few directions, until a step from all pairs is not surely better. Where evaluations do not stand alone (feature caching, pipelines that draw their own noise),
J comes from whole runs, one a parameter. Against the other recipes: `tests/benchmarks/compare_recipes.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ld3_diffusers.schedule import Schedule
from ld3_diffusers.schedule_curve import ScheduleCurve

from .curve_parameters import CurveParameters
from .learner import SMALLEST_LOSS, Problem, geometric_mean, is_stable, mean_of_means, split
from .parameters import GapParameters
from .recipe import DefaultRecipe
from .sensitivity import coordinates, evaluates_alone, most_directions, sensitivities, whole_table


DAMPINGS = range(-3, 4)  # powers of ten
CHANGES = {
    "times": 0.05,
    "network_times": 0.05,
    "coefficients": 0.02,
    "residuals": 0.02,
}  # of parameters, where whole runs are compared
NEGLIGIBLE = 1e-12  # share of the largest second derivative by which directions that move nothing are held
FEWEST_HELD_OUT = 16  # pairs that steps are judged on, while the iteration itself takes fewer


class DefaultLearner:
    """One iteration a [`step`]; all that changes is in [`state_dict`].

    Args:
        parameters: those of a schedule, or of a curve, whose schedules for several counts are learned together: then the losses are their
            geometric means.
    """

    def __init__(self, problem: Problem, recipe: DefaultRecipe, parameters: GapParameters | CurveParameters):
        if not hasattr(problem.objective, "linearised"):
            raise ValueError(
                "the default recipe learns with l1, l2, huber and stlpips, not with this loss; use the recipe 'adam'"
            )
        self.problem, self.recipe, self.parameters = problem, recipe, parameters
        self.several = len(parameters.schedules())
        count = len(problem.train)
        self.batch_size = min(recipe.first_pairs, count)
        self.pass_size = min(recipe.micro_batch_size or count, count)
        self.done, self.stopped = 0, False
        self.scale = torch.zeros_like(parameters.vector())
        self.damping = 0  # a power of ten
        self.directions = recipe.directions
        self.alone: bool | None = None  # see `evaluates_alone`

    def start(self, initial_loss: float) -> None:
        """Nothing: a step is compared with where it starts."""

    @property
    def finished(self) -> bool:
        return self.stopped or self.done >= self.recipe.max_steps

    def best_schedule(self) -> Schedule | ScheduleCurve:
        return self.parameters.learned()

    # ------------------------------------------------------------------ one iteration

    def step(self) -> dict[str, float]:
        problem = self.problem
        if self.alone is None:  # also in a continued run, whose pipeline has told no resolution shift yet
            noise, _, conditioning = problem.train.batch([0], problem.device)
            self.alone = evaluates_alone(problem.rollout, self._schedules()[0], noise, conditioning)
        pairs = range(min(self.recipe.first_pairs * 2**self.done, len(problem.train)))
        held_out = range(min(max(len(pairs), FEWEST_HELD_OUT), len(problem.valid)))
        loss, gradient, hessian = self._linearised(pairs)
        # A direction that has ceased to move anything is not free to go anywhere.
        self.scale = torch.maximum(self.scale, hessian.diagonal())
        before, losses_before = self.parameters.vector(), self._held_out_losses(held_out)
        chosen, losses, taken = before, losses_before, None
        left = sorted(DAMPINGS, key=lambda power: abs(power - self.damping))

        def improves(power: int) -> bool:
            nonlocal chosen, losses, taken
            if power not in left:
                return False
            left.remove(power)
            damped = hessian + torch.diag(10.0**power * self.scale + NEGLIGIBLE * self.scale.max())
            self.parameters.set_vector(before - torch.linalg.solve(damped, gradient))
            losses_then = self._held_out_losses(held_out)
            better = mean_of_means(losses_then) < mean_of_means(losses)
            if better:
                chosen, losses, taken = self.parameters.vector(), losses_then, power
            return better

        # From what was best last to the nearest that is better than no step, and on, to less or else to more, while that is better still.
        while left and not improves(left[0]):
            pass
        for way in (-1, 1) if taken is not None else ():
            while improves(taken + way):
                pass
        self.damping = self.damping if taken is None else taken
        self.parameters.set_vector(chosen)
        self.done += 1
        report = {
            "loss": loss,
            "valid_loss": mean_of_means(losses),
            "damping": 0.0 if taken is None else 10.0**taken,
            "pairs": len(pairs),
            **({"directions": self.directions} if self.alone else {}),
        }
        if len(pairs) == len(problem.train) and not surely_better(losses, losses_before):
            # For want of directions, perhaps: where there are more, the next step goes along twice as many.
            if self.alone and self.directions < self._most_directions():
                self.directions *= 2
            else:
                self.stopped = True
        return report

    def _most_directions(self) -> int:
        return max(max(most_directions(self._table_by_parameters(which))) for which in range(self.several))

    def _schedules(self) -> list[Schedule]:
        return [schedule.detach() for schedule in self.parameters.schedules()]

    def _held_out_losses(self, held_out: Sequence[int]) -> Tensor:
        """(schedules, pairs); infinite where the parameters make no schedule."""
        problem = self.problem
        infinite = torch.full((self.several, len(held_out)), math.inf, dtype=torch.float64)
        try:
            schedules = self._schedules()
        except ValueError:
            return infinite
        if not all(is_stable(each, problem.path) for each in schedules):
            return infinite
        losses = [problem.each_loss(each, problem.valid, self.pass_size, indices=held_out) for each in schedules]
        return torch.stack(losses) if all(bool(each.isfinite().all()) for each in losses) else infinite

    def _linearised(self, pairs: Sequence[int]) -> tuple[float, Tensor, Tensor]:
        """Mean loss over the pairs, its gradient, and the Gauss-Newton approximation of its second derivatives; of several schedules the
        geometric mean of the losses, and derivatives of its logarithm."""
        count, several = len(self.parameters.vector()), self.several
        losses, total = [], torch.zeros(count + count * count, dtype=torch.float64)
        for which in range(several):
            parts = split(pairs, self.pass_size)
            # The same for all parts: a sharded network must be called equally often by all processes.
            at_once = self.pass_size // len(parts[0])
            results = self.problem.share(parts, lambda part, which=which: self._linearise(which, part, at_once))
            packed = sum(results[1:], results[0]) / len(pairs)
            losses.append(float(packed[0]))
            total += packed[1:] / (max(losses[-1], SMALLEST_LOSS) * several if several > 1 else 1)
        if not (math.isfinite(sum(losses)) and bool(total.isfinite().all())):
            raise ValueError(
                "the loss or its derivatives are not finite; learn in bfloat16 or float32, or start from another grid"
            )
        gradient, hessian = total.split([count, count * count])
        return geometric_mean(losses), gradient, hessian.view(count, count)

    def _linearise(self, which: int, indices: Sequence[int], at_once: int) -> Tensor:
        """Of a schedule and a micro-batch: sums of its losses, gradients and second derivatives in one float64 vector."""
        problem = self.problem
        noise, target, conditioning = problem.train.batch(list(indices), problem.device)
        if self.alone:
            schedule, by_parameters = self._schedules()[which], self._table_by_parameters(which)
            end, jacobian = sensitivities(
                problem.rollout, schedule, problem.path, noise, conditioning, by_parameters, self.directions, at_once
            )
        else:
            end, jacobian = self._by_whole_runs(which, noise, conditioning)
        losses, gradient, hessian = problem.objective.linearised(end, target, jacobian)
        return torch.cat([part.double().cpu().flatten() for part in (losses.sum(), gradient, hessian)])

    def _table_by_parameters(self, which: int) -> Tensor:
        """(coordinates, parameters): derivatives of the numbers of a schedule's table."""
        parameters, path = self.parameters, self.problem.path
        values = coordinates(whole_table(parameters.schedules()[which], path, self.problem.rollout.mu), path)
        each, given = torch.eye(len(values), dtype=torch.float64), parameters.parameters()
        rows = torch.autograd.grad(values, given, each, is_grads_batched=True, materialize_grads=True)
        # Zeros for parameters that the table does not depend on are not batched.
        rows = [row.expand(len(values), *value.shape) for row, value in zip(rows, given)]
        return torch.cat([row.reshape(len(values), value.numel()) for row, value in zip(rows, given)], 1)

    @torch.no_grad()
    def _by_whole_runs(self, which: int, noise: Tensor, conditioning: dict) -> tuple[Tensor, Tensor]:
        """End states, and their derivatives by the parameters from a run for each."""
        parameters, rollout = self.parameters, self.problem.rollout
        end, here = rollout(parameters.schedules()[which], noise, conditioning), parameters.vector()
        kept = torch.float64 if end.dtype == torch.float64 else torch.float32
        sizes = torch.cat([torch.full((value.numel(),), CHANGES[name]) for name, value in parameters.groups.items()])
        columns = []
        for change in torch.diag(sizes.double()):
            parameters.set_vector(here + change)
            other = rollout(parameters.schedules()[which], noise, conditioning)
            columns.append((other.to(kept) - end.to(kept)) / float(change.sum()))
        parameters.set_vector(here)
        return end.to(kept), torch.stack(columns)

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters.state_dict(),
            "done": self.done,
            "stopped": self.stopped,
            "scale": self.scale,
            "damping": self.damping,
            "directions": self.directions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters.load_state_dict(state["parameters"])
        self.done, self.stopped, self.scale = state["done"], state["stopped"], state["scale"]
        self.damping, self.directions = state["damping"], state["directions"]


def surely_better(losses: Tensor, before: Tensor) -> bool:
    """Whether losses (schedules, pairs) of the same pairs have fallen, in the mean, by more than the standard error of that."""
    falls = ((before - losses) / before.mean(1, keepdim=True)).sum(0)
    error = falls.std(correction=0) / len(falls) ** 0.5
    return float(falls.mean()) > float(error)
