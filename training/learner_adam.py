# SPDX-License-Identifier: Apache-2.0
r"""The recipe "adam": on softmax gaps, network times and coefficients, from a good grid, selected on unmoved held-out noise.

For what the default recipe cannot do: any differentiable objective, relaxed noise, pipelines that draw their own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ld3_diffusers.schedule import Schedule

from .learner import Problem, is_stable, split, with_moved
from .parameters import GapParameters
from .recipe import AdamRecipe


MOST_SKIPPED = 10  # iterations in a row whose loss or gradient is not finite


class AdamLearner:
    """One iteration a [`step`]; all that changes is in [`state_dict`]."""

    def __init__(self, problem: Problem, recipe: AdamRecipe, initial: Schedule, seed: int):
        self.problem, self.recipe = problem, recipe
        self.parameters = GapParameters(
            initial,
            problem.path,
            learn=recipe.learn,
            last_level=recipe.last_level,
            coefficient_window=recipe.coefficient_window,
        )
        if not any(p.numel() for p in self.parameters.parameters()):
            raise ValueError("this schedule has no free times; learn network_times too, or use more evaluations")
        rates = {
            "times": recipe.lr_times,
            "network_times": recipe.lr_network_times,
            "coefficients": recipe.lr_coefficients,
        }
        self.optimizer = torch.optim.Adam(
            [{"params": [value], "lr": rates[name]} for name, value in self.parameters.groups.items()],
            betas=recipe.betas,
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        count = len(problem.train)
        self.batch_size = min(recipe.batch_size or count, count)
        self.pass_size = min(recipe.micro_batch_size or self.batch_size, self.batch_size)
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.done = self.skipped = self.worse = 0
        self.average = self.parameters.state_dict()
        self.best, self.best_loss = self.parameters.state_dict(), math.inf
        self.moved: dict[int, Tensor] = {}
        if recipe.relaxation and not problem.moves_noise:
            raise ValueError("this pipeline draws its own noise, which cannot be moved; set relaxation=0")
        self.nfe = initial.nfe

    def start(self, initial_loss: float) -> None:
        self.best_loss = initial_loss

    @property
    def finished(self) -> bool:
        patience = self.recipe.patience
        return self.done >= self.recipe.max_steps or (patience is not None and self.worse >= patience)

    def best_schedule(self) -> Schedule:
        return self.parameters.schedule_of(self.best)

    def _next_batch(self) -> list[int]:
        """Indices of training pairs, in a new random order each epoch; an epoch's rest is filled up from the next."""
        count = len(self.problem.train)
        if self.batch_size == count:
            return list(range(count))
        while len(self.order) < self.batch_size:
            self.order += torch.randperm(count, generator=self.generator).tolist()
        batch, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return batch

    def _set_rates(self) -> None:
        recipe, step = self.recipe, self.done
        warmup = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.max_steps))
        waiting = "times" in self.parameters.groups and step < recipe.times_first * recipe.max_steps
        for name, group, rate in zip(self.parameters.groups, self.optimizer.param_groups, self.rates):
            group["lr"] = 0.0 if waiting and name != "times" else rate * warmup * cosine

    def step(self) -> dict[str, float]:
        problem, recipe = self.problem, self.recipe
        self._set_rates()
        indices = self._next_batch()
        results = problem.share(split(indices, self.pass_size), self._differentiate)
        packed = sum(numbers for numbers, _ in results) / len(indices)
        if recipe.relaxation:
            self.moved.update(zip(indices, (x.clone() for _, moved in results for x in moved)))
        sizes = [1, *[value.numel() for value in self.parameters.parameters()]]
        loss, *gradients = packed.split(sizes)
        for value, gradient in zip(self.parameters.parameters(), gradients):
            value.grad = gradient.view_as(value)

        entry = {"loss": float(loss), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        if bool(packed.isfinite().all()):
            entry["grad_norm"] = float(
                torch.nn.utils.clip_grad_norm_(self.parameters.parameters(), recipe.max_grad_norm)
            )
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
            if self.skipped >= MOST_SKIPPED:
                raise ValueError(
                    f"the loss or its gradient was not finite {MOST_SKIPPED} times in a row; learn in bfloat16 or float32, or "
                    "lower the learning rates"
                )
        self.done += 1
        self._average()
        if self.done % recipe.validation_steps == 0 or self.done == recipe.max_steps:
            entry["valid_loss"] = self._validate()
        return entry

    def _differentiate(self, indices: list[int]) -> tuple[Tensor, Tensor | None]:
        """Of a micro-batch: the sum of its losses and that sum's gradient, in one float64 vector, and its moved noises."""
        problem, parameters = self.problem, self.parameters.parameters()
        noise, target, conditioning = problem.train.batch(indices, problem.device)
        radius = self.recipe.relaxation * noise[0].numel() / self.nfe**2
        start = with_moved(noise, indices, self.moved).requires_grad_() if radius else noise
        losses = problem.losses(self.parameters.schedule(), start, target, conditioning)
        gradients = problem.gradients(losses, target, [*parameters, *([start] if radius else [])])
        moved = self._move(noise, start.detach(), gradients.pop(), radius).cpu() if radius else None
        total = losses.detach().double().sum().cpu()
        return torch.cat([total[None], *[gradient.flatten().double().cpu() for gradient in gradients]]), moved

    def _move(self, noise: Tensor, start: Tensor, gradients: Tensor, radius: float) -> Tensor:
        r"""x' <- projection to the ball of x' - (share of the radius) * gradient / its norm: no rate depends on the loss."""
        result = start.clone()
        for i, (x, moved, gradient) in enumerate(zip(noise, start, gradients)):
            if not bool(gradient.isfinite().all()):
                continue
            moved = moved - self.recipe.relaxation_lr * radius * gradient / gradient.norm().clamp(min=1e-30)
            away = moved - x
            result[i] = x + away * (radius / away.norm().clamp(min=radius))
        return result

    def _average(self) -> None:
        decay = self.recipe.averaging
        if decay is None:
            return
        decay = min(decay, self.done / (self.done + 9))  # short memory at the start, where the initial values are far
        for name, value in self.parameters.state_dict().items():
            self.average[name] = decay * self.average[name] + (1 - decay) * value

    def _validate(self) -> float:
        candidate = self.parameters.state_dict() if self.recipe.averaging is None else dict(self.average)
        schedule, problem, loss = self.parameters.schedule_of(candidate), self.problem, math.inf
        if is_stable(schedule, problem.path):
            loss = problem.mean_loss(schedule, problem.valid, self.pass_size)
        if loss < self.best_loss:
            self.best, self.best_loss, self.worse = candidate, loss, 0
        else:
            self.worse += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "order": list(self.order),
            "counters": [self.done, self.skipped, self.worse],
            "average": self.average,
            "best": self.best,
            "best_loss": self.best_loss,
            "moved": self.moved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters.load_state_dict(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.order = list(state["order"])
        self.done, self.skipped, self.worse = state["counters"]
        self.average, self.best, self.best_loss = state["average"], state["best"], state["best_loss"]
        self.moved = dict(state["moved"])
