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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ld3_diffusers.schedule import Schedule

from .learner import Pairs, Problem, split, with_moved
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
        self.batch_size = min(recipe.batch_size, len(problem.train))
        self.pass_size = recipe.micro_batch_size or max(recipe.batch_size, recipe.valid_batch_size)

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
        parts = split(indices, self.pass_size)
        results = problem.share(parts, lambda part: self._differentiate("train", part, len(indices)))
        loss = float(torch.cat([losses for losses, _, _ in results]).mean())
        gradient = sum(gradient for _, gradient, _ in results) / len(indices)
        if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
            raise ValueError(
                "the loss or its gradient is not finite in the published recipe, which has no way to go on; learn in bfloat16 "
                "or float32, or use the recipe 'default'"
            )
        self.times.grad, self.offsets.grad = gradient.split([len(self.times), len(self.offsets)])
        for learned, value, optimizer in zip(self._learns(), (self.times, self.offsets), (self.rms, self.sgd)):
            if learned:
                torch.nn.utils.clip_grad_norm_([value], recipe.max_grad_norm)
                optimizer.step()
        self._accept("train", parts, results)
        return loss

    def _pairs(self, which: str) -> Pairs:
        return self.problem.train if which == "train" else self.problem.valid

    def _differentiate(
        self, which: str, indices: Sequence[int], batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a micro-batch of a batch of `batch_size`: its losses, the gradient of their sum with respect to both vectors
        (training pairs only), and x' after its gradient step and projection; losses and gradient are float64."""
        problem = self.problem
        noise, target, conditioning = self._pairs(which).batch(list(indices), problem.device)
        start = with_moved(noise, indices, self.moved[which]).requires_grad_(self.bound > 0)
        schedule = self.parameters.schedule()
        schedule = schedule if which == "train" else schedule.detach()
        losses = problem.losses(schedule, start, target, conditioning)
        learned = [self.times, self.offsets] if which == "train" else []
        gradients = problem.gradients(losses, target, [*learned, *([start] if self.bound else [])])
        moved = None
        if self.bound:
            # Quirk: the step of x' follows the mean over the batch, so it shrinks as the batch grows.
            moved = start.detach() - self.shift_lr * gradients.pop() / batch_size
            away = moved - noise
            norm = away.flatten(1).norm(dim=1).view(-1, *[1] * (noise.ndim - 1))
            moved = torch.where(norm > self.bound, noise + self.bound * away / norm.clamp(min=1e-30), moved).cpu()
        return losses.detach().double().cpu(), torch.cat([torch.empty(0), *gradients]), moved

    def _accept(self, which: str, parts: list[Sequence[int]], results: list[tuple]) -> int:
        """Keeps those x' whose loss fell; returns how many did."""
        if not self.bound:
            return 0
        schedule, accepted = self.parameters.schedule().detach(), 0
        tried = [dict(zip(part, moved)) for part, (_, _, moved) in zip(parts, results)]
        # Quirk: old times with old noise against new times with new noise; a fall may be the times' alone.
        pairs = self._pairs(which)
        after = self.problem.share(tried, lambda moved: self.problem.losses_of(schedule, pairs, list(moved), moved))
        for moved, (before, _, _), new in zip(tried, results, after):
            fell = [i for i, better in zip(moved, new < before) if better]
            self.moved[which].update({i: moved[i].clone() for i in fell})
            accepted += len(fell)
        return accepted

    def _validation_loss(self, count: int) -> float:
        """Mean over the first `count` validation pairs."""
        schedule = self.parameters.schedule().detach()
        # Quirk: not from the teacher's noise but from the one that suits the student.
        moved = self.moved["valid"]
        return self.problem.mean_loss(schedule, self.problem.valid, self.pass_size, indices=range(count), moved=moved)

    def _validate(self) -> float:
        recipe, pairs = self.recipe, self.problem.valid
        # Quirk: until patience is lost for the first time, the first validation batch alone decides what is best.
        count = len(pairs) if self.whole_validation else min(self.recipe.valid_batch_size, len(pairs))
        loss = self._validation_loss(count)
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
            self.best_loss = self._validation_loss(len(pairs))
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
            batches = split(range(len(self.problem.valid)), self.recipe.valid_batch_size)
            parts = [(part, len(batch)) for batch in batches for part in split(batch, self.pass_size)]
            results = self.problem.share(parts, lambda part: self._differentiate("valid", *part))
            if self._accept("valid", [part for part, _ in parts], results) == 0:
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
