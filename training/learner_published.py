# SPDX-License-Identifier: Apache-2.0
r"""LD3's own procedure (Tong et al., arXiv:2405.15506, as in its public code), kept to compare with.

One iteration, on a batch with per-sample noises x' that are kept from epoch to epoch and start at the teacher's x_T:

1. losses with the current times and x'; gradient of their mean with respect to times, network times and x';
2. x' <- x' - shift_lr * gradient; norms of the two time gradients clipped; RMSprop on times, SGD on network times;
3. x' <- projection to the ball of radius gamma d / N^2 around x_T;
4. losses again with the new times and x'; a sample whose loss did not fall keeps its old x'.

Then a validation, whose noises have been moved by the same rule. Left out, because nothing is computed with it: the network
call at t_min, whose output is thrown away, pictures of every improvement, and the float32 of the parameters.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ld3_diffusers.schedule import Schedule

from .learner import Pairs, Problem
from .parameters import PublishedParameters
from .recipe import PublishedRecipe


class PublishedLearner:
    """One iteration a [`step`]; all that changes is in [`state_dict`]."""

    def __init__(self, problem: Problem, recipe: PublishedRecipe, initial: Schedule, seed: int):
        if float(initial.times[-1]) == 0:
            raise ValueError("the published recipe stops at t_min > 0; use final_sigmas_type='sigma_min'")
        self.problem, self.recipe = problem, recipe
        self.parameters = PublishedParameters(
            problem.path,
            initial.nfe,
            spec=initial.spec,
            prediction_type=initial.prediction_type,
            mode=recipe.mode,
            window=recipe.window,
            logit_window_bug=recipe.logit_window_bug,
            t_max=float(initial.times[0]),
            t_min=float(initial.times[-1]),
        )
        self.times, self.offsets = self.parameters.parameters()
        steps = initial.nfe
        self.rms = torch.optim.RMSprop(
            [self.times], lr=recipe.lr_times, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.sgd = torch.optim.SGD([self.offsets], lr=recipe.lr_network_times / steps)
        noise = problem.train.batch([0], problem.device)[0]
        self.bound = recipe.radius * noise[0].numel() / steps**2 if recipe.fixed_bound is None else recipe.fixed_bound
        if not problem.moves_noise:
            self.bound = 0.0  # the pipeline draws its own noise
        self.shift_lr = 12 / steps if recipe.shift_lr is None else recipe.shift_lr
        self.moved: dict[str, dict[int, Tensor]] = {"train": {}, "valid": {}}
        self.round = self.batch = self.worse = self.at_floor = 0
        self.whole_validation = self.stopped = False
        self.best, self.best_loss = self.parameters.state_dict(), math.inf
        self.pass_size = recipe.valid_batch_size

    def start(self, initial_loss: float) -> None:
        """Nothing: the published best begins at infinity, so the first iteration always is an improvement."""

    @property
    def finished(self) -> bool:
        return self.stopped or self.round >= self.recipe.rounds_v1 + self.recipe.rounds_v2

    @property
    def second_stage(self) -> bool:
        return self.round >= self.recipe.rounds_v1

    def best_schedule(self) -> Schedule:
        current = self.parameters.state_dict()
        self.parameters.load_state_dict(self.best)
        schedule = self.parameters.schedule().detach()
        self.parameters.load_state_dict(current)
        return schedule

    def _noise(self, which: str, indices: list[int], noise: Tensor) -> Tensor:
        moved = self.moved[which]
        return torch.stack([moved[i].to(x) if i in moved else x for i, x in zip(indices, noise)])

    def step(self) -> dict[str, float]:
        recipe, problem = self.recipe, self.problem
        if self.batch == 0:
            self._begin_round()
        count = len(problem.train)
        indices = list(range(count))[self.batch * recipe.batch_size : (self.batch + 1) * recipe.batch_size]
        entry = {"loss": self._iterate(indices), "learning_rate": self.rms.param_groups[0]["lr"]}
        self.batch += 1
        # Quirk: a validation after every single iteration.
        entry["valid_loss"] = self._validate()
        if self.batch * recipe.batch_size >= count and not self.stopped:
            self._end_round()
        return entry

    def _begin_round(self) -> None:
        first_of_stage = self.round in (0, self.recipe.rounds_v1)
        if self.round == self.recipe.rounds_v1 and self.round:
            self._restore()  # the second stage goes on from the best of the first
            self.best_loss, self.worse = math.inf, 0
        if not first_of_stage:
            # Quirk: parameters go back to the stage's best, but not the momentum of their optimiser.
            self._restore()

    def _restore(self) -> None:
        # Quirk: the published code also reloads the moved noises of the best, but writes the newer ones of the running round
        # over them at its end; so they never go back, and here are left alone.
        self.parameters.load_state_dict(self.best)

    def _learns(self) -> tuple[bool, bool]:
        # Quirk: with no_v1 times stay frozen in both stages.
        return not self.recipe.no_v1, self.second_stage or self.recipe.no_v1

    def _iterate(self, indices: list[int]) -> float:
        problem, recipe = self.problem, self.recipe
        mine = [indices[position] for position in problem.mine(len(indices))]
        for value in (self.times, self.offsets):
            value.grad = torch.zeros_like(value)
        total, moved, old = torch.zeros(1, dtype=torch.float64), None, None
        if mine:
            batch = problem.train.batch(mine, problem.device)
            moved, old = self._reference(self.parameters.schedule(), "train", mine, batch, len(indices))
            total += old.double().sum().cpu()
        packed = problem.sum(torch.cat([total, self.times.grad, self.offsets.grad]))
        if not bool(packed.isfinite().all()):
            raise ValueError(
                "the loss or its gradient is not finite in the published recipe, which has no way to go on; learn in bfloat16 "
                "or float32, or use the recipe 'default'"
            )
        loss, self.times.grad, self.offsets.grad = packed.split([1, len(self.times), len(self.offsets)])
        for learned, value, optimizer in zip(self._learns(), (self.times, self.offsets), (self.rms, self.sgd)):
            if learned:
                torch.nn.utils.clip_grad_norm_([value], recipe.max_grad_norm)
                optimizer.step()
        self._accept("train", indices, mine, batch if mine else None, moved, old)
        return float(loss) / len(indices)

    def _reference(self, schedule, which, mine, batch, batch_size) -> tuple[Tensor | None, Tensor]:
        """Gradients of the batch's mean loss, and x' after its gradient step and projection, with the losses before it."""
        noise, target, conditioning = batch
        start = self._noise(which, mine, noise).requires_grad_(self.bound > 0)
        losses = self.problem.losses(schedule, start, target, conditioning)
        scale = self.problem.backward(losses, target) * batch_size
        for value in (self.times, self.offsets):
            if which == "train":
                value.grad /= scale
        if not self.bound:
            return None, losses.detach()
        # Quirk: the step of x' follows the mean over the batch, so it shrinks as the batch grows.
        moved = start.detach() - self.shift_lr * start.grad / scale
        away = moved - noise
        norm = away.flatten(1).norm(dim=1).view(-1, *[1] * (noise.ndim - 1))
        return torch.where(
            norm > self.bound, noise + self.bound * away / norm.clamp(min=1e-30), moved
        ), losses.detach()

    def _accept(self, which, indices, mine, batch, moved, old) -> int:
        """Keeps those x' whose loss fell; returns how many did, over all processes."""
        if not self.bound:
            return 0
        problem = self.problem
        everyone = problem.train if which == "train" else problem.valid
        noise = batch[0] if mine and problem.processes == 1 else everyone.batch(indices, problem.device)[0]
        kept = torch.zeros_like(noise)
        accepted = torch.zeros(1, dtype=torch.float64)
        if mine:
            with torch.no_grad():
                # Quirk: old times with old noise against new times with new noise; a fall may be the times' alone.
                new = problem.losses(self.parameters.schedule(), moved, batch[1], batch[2])
            better = new < old
            accepted += better.sum().cpu()
            before = self._noise(which, mine, batch[0])
            mask = better.view(-1, *[1] * (noise.ndim - 1))
            kept[list(problem.mine(len(indices)))] = torch.where(mask, moved, before)
        self.moved[which].update(zip(indices, problem.sum(kept)))
        return int(problem.sum(accepted))

    def _validation_loss(self, pairs: Pairs, count: int) -> float:
        """Mean over the first `count` pairs, from their moved noises."""
        problem, schedule = self.problem, self.parameters.schedule().detach()
        mine = list(problem.mine(count))
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(mine), self.pass_size):
                indices = mine[start : start + self.pass_size]
                noise, target, conditioning = pairs.batch(indices, problem.device)
                # Quirk: not from the teacher's noise but from the one that suits the student.
                losses = problem.losses(schedule, self._noise("valid", indices, noise), target, conditioning)
                total += losses.double().sum().cpu()
        return float(problem.sum(total)) / count

    def _validate(self) -> float:
        recipe, pairs = self.recipe, self.problem.valid
        # Quirk: until patience is lost for the first time, the first validation batch alone decides what is best.
        count = len(pairs) if self.whole_validation else min(self.recipe.valid_batch_size, len(pairs))
        loss = self._validation_loss(pairs, count)
        if loss < self.best_loss:
            self.best, self.best_loss, self.worse = self.parameters.state_dict(), loss, 0
            return loss
        self.worse += 1
        if self.worse < recipe.patience:
            return loss
        self.worse = 0
        self._restore()
        if not self.whole_validation:
            # Quirk: the first loss of patience only enlarges the validation set; rates are left alone.
            self.whole_validation = True
            self.best_loss = self._validation_loss(pairs, len(pairs))
            return loss
        self._decay_rates()
        return loss

    def _decay_rates(self) -> None:
        recipe = self.recipe
        for group in self.rms.param_groups:
            group["lr"] = max(recipe.lr_decay * group["lr"], recipe.min_lr_times)
        if not self.second_stage:
            return
        for group in self.sgd.param_groups:
            group["lr"] = max(recipe.lr_decay * group["lr"], recipe.min_lr_network_times)
            if group["lr"] <= recipe.min_lr_network_times:
                # Quirk: only the network times' rate can stop learning; that of the times stays at its floor for ever.
                self.at_floor += 1
        self.stopped = self.at_floor >= recipe.floor_patience

    def _end_round(self) -> None:
        if self.bound:
            moved = 0
            pairs, size = self.problem.valid, self.recipe.valid_batch_size
            for start in range(0, len(pairs), size):
                indices = list(range(start, min(start + size, len(pairs))))
                mine = [indices[position] for position in self.problem.mine(len(indices))]
                batch, new, old = None, None, None
                if mine:
                    batch = pairs.batch(mine, self.problem.device)
                    new, old = self._reference(self.parameters.schedule().detach(), "valid", mine, batch, len(indices))
                moved += self._accept("valid", indices, mine, batch, new, old)
            if moved == 0:
                self.shift_lr *= self.recipe.shift_lr_decay
        self.round, self.batch = self.round + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters.state_dict(),
            "rms": self.rms.state_dict(),
            "sgd": self.sgd.state_dict(),
            "moved": self.moved,
            "best": self.best,
            "best_loss": self.best_loss,
            "shift_lr": self.shift_lr,
            "counters": [self.round, self.batch, self.worse, self.at_floor],
            "flags": [self.whole_validation, self.stopped],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters.load_state_dict(state["parameters"])
        self.rms.load_state_dict(state["rms"])
        self.sgd.load_state_dict(state["sgd"])
        self.moved = {which: dict(noises) for which, noises in state["moved"].items()}
        self.best, self.best_loss, self.shift_lr = state["best"], state["best_loss"], state["shift_lr"]
        self.round, self.batch, self.worse, self.at_floor = state["counters"]
        self.whole_validation, self.stopped = state["flags"]
