# SPDX-License-Identifier: Apache-2.0
r"""Learning where AMED's stages lie (arXiv:2312.00094): step by step from a teacher's trajectories.

After each student step n the loss is $\|y' - y^*_{n+1}\|^2$, summed over pixels and averaged over the batch, in EDM's variable $y = x/\alpha$; one Adam
step follows. Single-step students begin each step where the teacher is, multistep ones where they are themselves, without
gradients through earlier steps. What is best is decided by the distance of end states on held-out pairs, which stepwise losses
need not follow.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ld3_diffusers import AMEDPredictor

from .amed_student import Progress, Student
from .amed_trajectories import Trajectories
from .learner import Problem, split
from .learner_adam import MOST_SKIPPED


LARGEST_GRADIENT = 1e5  # in place of an infinite one, as published


@dataclass(frozen=True)
class AMEDRecipe:
    """How to learn a predictor.

    Attributes:
        learning_rate: of Adam; default: .005 as published, and ten times that for the static form, whose logits are few.
        batch_size: trajectories of a batch. Published: 128 (CIFAR-10), 64, 32 (Stable Diffusion).
        micro_batch_size: trajectories that go through the network at once.
        num_epochs: how often each trajectory is seen; published: once, 10,000 of them.
        validation_steps: batches between validations.
    """

    learning_rate: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    num_epochs: int = 4
    validation_steps: int = 8

    def rate(self, form: str) -> float:
        return self.learning_rate or {"per_sample": 5e-3, "static": 5e-2}[form]


class AMEDLearner:
    """One batch a [`step`]; all that changes is in [`state_dict`]."""

    def __init__(
        self,
        problem: Problem,
        student: Student,
        predictor: AMEDPredictor,
        trajectories: Trajectories,
        recipe: AMEDRecipe,
        seed: int,
    ):
        self.problem, self.student, self.recipe, self.seed = problem, student, recipe, seed
        self.predictor = predictor.to(problem.device).train()
        self.trajectories = trajectories
        self.optimizer = torch.optim.Adam(predictor.parameters(), lr=recipe.rate(predictor.config.form))
        self.batch_size = min(recipe.batch_size, len(problem.train))
        self.pass_size = min(recipe.micro_batch_size or self.batch_size, self.batch_size)
        self.batches = math.ceil(len(problem.train) / self.batch_size)
        self.num_steps = recipe.num_epochs * self.batches
        self.done = self.skipped = 0
        self.best, self.best_loss = self._weights(), math.inf

    def start(self, initial_loss: float) -> None:
        self.best_loss = initial_loss

    @property
    def finished(self) -> bool:
        return self.done >= self.num_steps

    def best_predictor(self) -> AMEDPredictor:
        """The predictor with the weights of the best validation."""
        self.predictor.load_state_dict(self.best)
        return self.predictor.eval()

    @property
    def evaluations(self) -> dict[str, int]:
        """Network evaluations of learning, validation apart, on all processes: what is known from the teacher is not counted."""
        visits, steps = self.recipe.num_epochs * len(self.problem.train), self.student.num_steps
        firsts = 0 if self.student.restarts else steps - 1
        return {"forward": visits * (steps + firsts), "backward": visits * steps}

    def step(self) -> dict[str, float]:
        epoch, batch = divmod(self.done, self.batches)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.problem.train), generator=generator).tolist()
        indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        entry = {f"step-{n}/loss": loss for n, loss in enumerate(self._learn(split(indices, self.pass_size)))}
        entry["loss"] = math.fsum(entry.values())
        self.skipped = 0 if math.isfinite(entry["loss"]) else self.skipped + 1
        if self.skipped >= MOST_SKIPPED:
            raise ValueError(
                f"the losses of {MOST_SKIPPED} batches in a row are not finite; use --mixed_precision no or bf16, another "
                "discretization or a lower solver order"
            )
        self.done += 1
        if self.done % self.recipe.validation_steps == 0 or self.finished:
            entry["validation_loss"] = loss = self.validation_loss()
            if loss < self.best_loss:
                self.best, self.best_loss = self._weights(), loss
        return entry

    def validation_loss(self) -> float:
        """Mean distance of the student's end states to the teacher's on the held-out pairs."""
        problem, self.predictor = self.problem, self.predictor.eval()

        def compute(part: list[int]) -> Tensor:
            noise, target, conditioning = problem.valid.batch(list(part), problem.device)
            return problem.objective(self.student.run(self.predictor, noise, conditioning), target).double().cpu()

        losses = problem.share(split(range(len(problem.valid)), self.pass_size), compute)
        self.predictor.train()
        return float(torch.cat(losses).mean())

    def _learn(self, parts: list[list[int]]) -> list[float]:
        """All student steps of a batch, all of its micro-batches after one another; returns the steps' losses."""
        size = sum(map(len, parts))
        underway: dict[int, Progress] = {}
        found = []
        for n in range(self.student.num_steps):
            results = self.problem.share(
                list(range(len(parts))), lambda k, n=n: self._differentiate(k, list(parts[k]), n, underway)
            )
            found.append(math.fsum(loss for loss, _ in results) / size)
            self.optimizer.zero_grad(set_to_none=True)
            for i, parameter in enumerate(self.predictor.parameters()):
                gradients = [gradients[i] for _, gradients in results if gradients[i] is not None]
                if gradients:  # a static step leaves the others' logits alone
                    mean = torch.stack(gradients).sum(0) / size
                    mean = torch.nan_to_num(mean, 0.0, LARGEST_GRADIENT, -LARGEST_GRADIENT)
                    parameter.grad = mean.to(parameter)
            self.optimizer.step()
        return found

    def _differentiate(
        self, k: int, indices: list[int], n: int, underway: dict[int, Progress]
    ) -> tuple[float, list[Tensor | None]]:
        """The sum of the losses of micro-batch k after step n, and its gradient, float64 on the host."""
        student, device, states = self.student, self.problem.device, self.trajectories.states
        if n == 0:
            noise, _, conditioning = self.problem.train.batch(indices, device)
            underway[k] = student.begin(noise, conditioning)
        progress, first = underway[k], None
        if student.restarts:
            progress.state = states[indices, n].to(progress.noise)
        if student.restarts or n == 0:
            first = self.trajectories.first(indices, n, device)
        with torch.enable_grad():
            state = student.step(progress, n, self.predictor, first)
            away = (state.float() - states[indices, n + 1].to(device)) / student.scale_at_end(n)
            loss = away.square().sum()
            gradients = torch.autograd.grad(loss, list(self.predictor.parameters()), allow_unused=True)
        return float(loss.detach()), [None if gradient is None else gradient.double().cpu() for gradient in gradients]

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.predictor.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "predictor": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_loss": self.best_loss,
            "done": self.done,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_loss = state["best"], state["best_loss"]
        self.done, self.skipped = state["done"], state["skipped"]
