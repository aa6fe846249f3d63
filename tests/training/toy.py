# SPDX-License-Identifier: Apache-2.0
"""Problems whose network is known in closed form: mixtures of isotropic Gaussians, and pairs made with them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ld3_diffusers.discretization import discretization
from ld3_diffusers.noise_path import NoisePath, VPLinear
from ld3_diffusers.schedule import Schedule, SolverSpec
from ld3_diffusers.step_table import Executor


@dataclass(frozen=True, eq=False)
class Mixture:
    r"""$\sum_k w_k N(\mu_k, s_k^2 I)$ seen through a noise path; `__call__` is the exact noise prediction (on flow: velocity)."""

    means: Tensor  # (K, D)
    stds: Tensor  # (K,)
    weights: Tensor  # (K,)

    @classmethod
    def random(cls, components: int = 8, dim: int = 48, spread: float = 0.4, seed: int = 0) -> "Mixture":
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        means = spread * torch.randn(components, dim, **options)
        stds = 0.1 + 0.3 * torch.rand(components, **options)
        return cls(means, stds, torch.softmax(0.5 * torch.randn(components, **options), 0))

    def __call__(self, x: Tensor, t: Tensor, path: NoisePath) -> Tensor:
        means, stds = self.means.to(x), self.stds.to(x)
        alpha, sigma = path.alpha(t).to(x), path.sigma(t).to(x)
        flat = x.flatten(1)
        variance = alpha**2 * stds**2 + sigma**2
        distance = ((flat[:, None] - alpha * means) ** 2).sum(-1)
        logits = self.weights.to(x).log() - distance / (2 * variance) - flat.shape[1] / 2 * variance.log()
        share = torch.softmax(logits, 1)
        gain = alpha * stds**2 / variance
        data = (share[..., None] * (means + gain[:, None] * (flat[:, None] - alpha * means))).sum(1).view_as(x)
        return (x - data) / sigma if path.kind == "flow" else (x - alpha * data) / sigma


class ToyRollout:
    """`(schedule, noise, conditioning) -> end` through the package's own step table."""

    moves_noise = True

    def __init__(self, network, path: NoisePath, mu: float = 0.0):
        self.network, self.path, self.mu, self.evaluations = network, path, mu, 0

    def __call__(self, schedule: Schedule, noise: Tensor, conditioning: dict) -> Tensor:
        table = schedule.table(self.path, mu=self.mu)
        executor = Executor(table)
        x = noise * table.start.to(noise)
        for t in table.network_times:
            self.evaluations += len(x)
            scaled = self.network(x, t, self.path)
            x = executor.step(x, scaled)
        return x

    def output(self, state: Tensor, time: float, conditioning: dict) -> Tensor:
        """As `PipelineRollout.output`."""
        self.evaluations += len(state)
        return self.network(state, torch.tensor(time, dtype=torch.float64), self.path)

    def rounded(self, schedule: Schedule) -> Schedule:
        return schedule

    def visit(self, schedule: Schedule, noise: Tensor, conditioning: dict, at_step) -> None:
        """As `PipelineRollout.visit`."""
        table = schedule.table(self.path, mu=self.mu)
        executor, x = Executor(table), noise * table.start
        for i, t in enumerate(table.network_times):
            self.evaluations += len(x)
            output = self.network(x, t, self.path)
            result = executor.step(x, output)
            other = at_step(i, x, output, result)
            x = result if other is None else other


@dataclass(frozen=True, eq=False)
class ToyPairs:
    noise: Tensor
    end: Tensor

    def __len__(self):
        return len(self.noise)

    def batch(self, indices, device):
        return self.noise[indices].to(device), self.end[indices].to(device), {}

    def part(self, first: int, last: int) -> "ToyPairs":
        return ToyPairs(self.noise[first:last], self.end[first:last])


PREDICTION = {"flow": "flow_prediction"}


def grid_schedule(path: NoisePath, name: str, nfe: int, spec: SolverSpec) -> Schedule:
    return Schedule(
        discretization(name, path, nfe), None, spec, path.kind, PREDICTION.get(path.kind, "epsilon")
    )  # fmt: skip


def make_pairs(
    rollout: ToyRollout, count: int, seed: int, shape=(3, 4, 4), nfe: int = 20, grid: str = "logsnr"
) -> ToyPairs:
    """From a teacher of UniPC order 3, as LD3's authors use."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return ToyPairs(noise, rollout(grid_schedule(rollout.path, grid, nfe, SolverSpec("unipc", 3)), noise, {}))


def toy(path: NoisePath | None = None, dim: int = 48, **options) -> ToyRollout:
    return ToyRollout(Mixture.random(dim=dim, **options), path or VPLinear())


def single_gaussian(path: NoisePath, std: float, dim: int = 4) -> ToyRollout:
    """One Gaussian around 0: the network is linear, and the end point a known multiple of the start."""
    return ToyRollout(Mixture(torch.zeros(1, dim), torch.full((1,), std), torch.ones(1)), path)


def perfect_gain(path: NoisePath, std: float, first: float, last: float) -> float:
    r"""Of a Gaussian's exact ODE from `first` to `last`: $\sqrt{(\alpha'^2 s^2 + \sigma'^2)/(\alpha^2 s^2 + \sigma^2)}$."""
    ends = torch.tensor([first, last], dtype=torch.float64)
    variance = (path.alpha(ends) * std) ** 2 + path.sigma(ends) ** 2
    return math.sqrt(float(variance[1] / variance[0]))
