# SPDX-License-Identifier: Apache-2.0
r"""How a student's end state depends on its step table, from network evaluations alone.

On data predictions a row is $x_{i+1} = a_i x_i + \sum_k c_{ik} D_k$ (see `ld3_diffusers.residuals`). With a prime for the derivative by one
parameter, and $\tau_i$ for the time that the network is told,

$$ D_i' = J_i x_i' + \tau_i' \, \partial D_i / \partial \tau, \qquad x_{i+1}' = a_i x_i' + a_i' x_i + \sum_k (c_{ik} D_k' + c_{ik}' D_k). $$

Only the products with $J_i$, the Jacobian of the data prediction, cost evaluations. There are dozens of parameters, but a run's predictions
resemble each other, and so all of them move a sample's state in few directions that differ. The prediction is therefore differenced along the first few, d,
principal directions B of the $x_i'$ that were scaled to equal length. Of a remainder $r = x' - B B^\top x'$, the image is

$$ J r \approx B (J B)^\top r + (b^\top J b) \, r, $$

for the Jacobian of a posterior mean is symmetric; b is the last direction. Derivatives by $\tau$, which are less linear, come from two other times, through a
parabola. For N evaluations this takes at most $N + d (N - 1) + 2 N$ a sample, the unchanged run included (41 at N = 5 and d = 8, for few numbers precede the
first rows, where one gradient by backpropagation with recomputation takes 20).

No graph is kept and no network differentiated: pipelines may be quantised, compiled or offloaded. States and their derivatives are
combinations of the first state, the $D_i$, $J_i b$ and $\partial D_i / \partial \tau$; those are kept, and the matrices of combination.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ld3_diffusers import Schedule
from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.step_table import StepTable, conversion

from .conditioning import repeated


CHANGE = {torch.float32: 1e-2, torch.float64: 1e-4}  # of states, relative, by their dtype
COARSE_CHANGE = 5e-2  # where states are in half precision
TIME_CHANGE = 0.05  # of network times, as a share of the way to the next level
SAME = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative difference of evaluations that are called alike
COARSELY_SAME = 5e-2
NEGLIGIBLE = {torch.float32: 1e-6, torch.float64: 1e-12}  # share of the largest principal component, by dtype


def on_data_predictions(schedule: Schedule) -> Schedule:
    """The same schedule with residuals, of 0 where it has none, which makes its table one on data predictions."""
    rows = len(schedule.times) - 1
    residuals = torch.zeros(rows, 0) if schedule.residuals is None else schedule.residuals
    padded = torch.nn.functional.pad(residuals, (0, rows - residuals.shape[1]))
    return replace(schedule, residuals=padded, checksum=None)


def whole_table(schedule: Schedule, path: NoisePath, mu: float) -> StepTable:
    """Its table on data predictions, the row of an analytical first step among the others."""
    return replace(on_data_predictions(schedule), spec=replace(schedule.spec, afs=False)).table(path, mu=mu)


def coordinates(table: StepTable, path: NoisePath) -> Tensor:
    """Numbers of a table of R rows on which its end state depends, differentiable: (R,) a, (R, R) c (newest first, flat), (R,) network times
    in lambda, on rectified flow in s.
    """
    return torch.cat([table.state, table.history.flatten(), _coordinate(table.network_times, path)])


def _coordinate(times: Tensor, path: NoisePath) -> Tensor:
    return times if path.kind == "flow" else path.lam(times)


@torch.no_grad()
def evaluates_alone(rollout, schedule: Schedule, noise: Tensor, conditioning: dict) -> bool:
    """Whether each evaluation of a run depends on its state and time only and can be repeated outside of it, and rows are linear in it."""
    if not rollout.moves_noise or getattr(rollout, "bounds_data", False):
        return False
    seen: list[tuple[Tensor, Tensor]] = []
    rollout.visit(schedule, noise, conditioning, lambda _i, state, output, _result: seen.append((state, output)))
    times = whole_table(rollout.rounded(schedule), rollout.path, rollout.mu).network_times[int(schedule.spec.afs) :]
    for (state, output), time in zip(seen, times.tolist()):
        again = rollout.output(state, time, conditioning)
        if float((again - output).norm()) > SAME.get(output.dtype, COARSELY_SAME) * float(output.norm()):
            return False
    return True


class _Frame:
    """Vectors of each sample, of which others are combinations: coefficients are float64 on the CPU, (..., capacity)."""

    def __init__(self, like: Tensor, capacity: int):
        self.vectors = like.new_zeros(len(like), capacity, like[0].numel())
        self.products = torch.zeros(len(like), capacity, capacity, dtype=torch.float64)
        self.count = 0

    def add(self, vector: Tensor) -> Tensor:
        """(capacity,) coefficients of a (batch, ...) vector that becomes one of the frame."""
        k, self.count = self.count, self.count + 1
        self.vectors[:, k] = vector.flatten(1)
        products = (self.vectors @ self.vectors[:, k, :, None])[..., 0].double().cpu()
        self.products[:, k], self.products[:, :, k] = products, products
        return torch.eye(self.products.shape[1], dtype=torch.float64)[k]

    def combined(self, coefficients: Tensor) -> Tensor:
        """(batch, n, capacity) -> (batch, n, entries)."""
        return coefficients.to(self.vectors) @ self.vectors


def most_directions(by_parameters: Tensor) -> list[int]:
    """For each row the most directions in which parameters can move its state: numbers of the table that they move before it, or parameters."""
    by_state, by_history, by_time = _by_rows(by_parameters)
    of_row = by_state.any(1).long() + by_history.any(2).sum(1) + by_time.any(1)
    return [min(by_parameters.shape[1], numbers) for numbers in [0, *of_row.cumsum(0).tolist()[:-1]]]


def _by_rows(by_parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(coordinates, parameters) -> of a (R, parameters), of c (R, R, parameters), of network times (R, parameters)."""
    rows = math.isqrt(len(by_parameters) + 1) - 1  # R (R + 2) coordinates
    by_state, by_history, by_time = by_parameters.split([rows, rows * rows, rows])
    return by_state, by_history.view(rows, rows, -1), by_time


@torch.no_grad()
def sensitivities(
    rollout,
    schedule: Schedule,
    path: NoisePath,
    noise: Tensor,
    conditioning: dict,
    by_parameters: Tensor,
    directions: int,
    at_once: int = 1,
) -> tuple[Tensor, Tensor]:
    """End states (batch, ...) and their derivatives (parameters, batch, ...), float32 (float64 where states are).

    Args:
        rollout: as `PipelineRollout`, with `visit`, `output`, `rounded`, `path` and `mu`, whose evaluations stand alone.
        by_parameters: (coordinates, parameters), the derivatives of the table's [`coordinates`].
        directions: the most along which the prediction is differenced at a step; with [`most_directions`], nothing is left to approximate.
        at_once: changed states of all these noises that go through the network together.
    """
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    rollout.visit(schedule, noise, conditioning, lambda _i, *step: steps.append(step))
    kept = steps[0][0].dtype
    exact = torch.float64 if kept == torch.float64 else torch.float32
    change = CHANGE.get(kept, COARSE_CHANGE)
    schedule = rollout.rounded(schedule)
    table = whole_table(schedule, path, rollout.mu)
    rows, skipped = len(table), int(schedule.spec.afs)
    by_state, by_history, by_time = _by_rows(by_parameters.double().cpu())
    counts = [min(directions, most) for most in most_directions(by_parameters)]

    def predicted(states: list[Tensor], time: Tensor) -> list[Tensor]:
        p, q = conversion(path, "data", schedule.prediction_type, time)
        outputs: list[Tensor] = []
        for start in range(0, len(states), at_once):
            some = states[start : start + at_once]
            output = rollout.output(torch.cat(some).to(kept), float(time), repeated(conditioning, len(some)))
            outputs += output.to(exact).split(len(noise))
        return [float(p) * state + float(q) * output for state, output in zip(states, outputs)]

    x = noise.to(steps[0][0]).to(exact) * float(table.start)
    frame = _Frame(x, 1 + sum(counts) + 2 * rows)
    state = frame.add(x)
    moved = torch.zeros(len(x), by_parameters.shape[1], len(state), dtype=torch.float64)
    predictions: list[Tensor] = []  # newest first, as the table's coefficients
    moved_predictions: list[Tensor] = []
    for i in range(rows):
        if i < skipped:
            # An analytical first step predicts noise, a multiple of the state; see `build_table`.
            alpha, sigma = path.alpha(table.times[0]), path.sigma(table.times[0])
            predictions.insert(0, state * float((1 - sigma / (alpha**2 + sigma**2).sqrt()) / alpha))
            moved_predictions.insert(0, torch.zeros_like(moved))
        else:
            x, output = (part.to(exact) for part in steps[i - skipped][:2])
            prediction, time = float(table.p[i]) * x + float(table.q[i]) * output, table.network_times[i]
            sizes = change * x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
            moved_prediction = torch.zeros_like(moved)
            if counts[i]:
                principal = _Principal(frame, moved, counts[i], NEGLIGIBLE[exact])
                along = frame.combined(principal.basis).unbind(1)
                changed = predicted([x + sizes * each.view_as(x) for each in along], time)
                moved_prediction = principal.image([frame.add((each - prediction) / sizes) for each in changed])
            if bool(by_time[i].any()):
                by_told = torch.zeros_like(x)
                for other, weight in _changed_times(rollout, schedule, table, path, i):
                    by_told += weight * (predicted([x], other)[0] - prediction)
                moved_prediction = moved_prediction + torch.outer(by_time[i], frame.add(by_told))
            moved_predictions.insert(0, moved_prediction)
            predictions.insert(0, frame.add(prediction))
        moved = float(table.state[i]) * moved + torch.outer(by_state[i], state)
        state = float(table.state[i]) * state
        for weight, moved_weight, prediction, moved_prediction in zip(
            table.history[i].tolist(), by_history[i], predictions, moved_predictions
        ):
            moved = moved + weight * moved_prediction + torch.outer(moved_weight, prediction)
            state = state + weight * prediction
    end = steps[-1][2].to(exact)
    return end, frame.combined(moved).transpose(0, 1).reshape(-1, *end.shape)


class _Principal:
    """The first principal directions of derivatives that are scaled to equal length, of each sample.

    Args:
        moved: (batch, parameters, capacity) coefficients of the derivatives.
        negligible: share of the largest principal component below which there is no direction.

    Attributes:
        basis: (batch, count, capacity) coefficients of directions of unit length, the first last.
    """

    def __init__(self, frame: _Frame, moved: Tensor, count: int, negligible: float):
        self.frame = frame
        self.lengths = ((moved @ frame.products) * moved).sum(-1, keepdim=True).clamp(min=0).sqrt()
        self.units = torch.where(self.lengths > 0, moved / self.lengths, torch.zeros_like(moved))
        products = self.units @ frame.products @ self.units.mT
        # What is not finite stays so in `lengths`, and is refused by the learner; `eigh` would raise first.
        values, vectors = torch.linalg.eigh(products.nan_to_num(0.0, 0.0, 0.0))
        values, vectors = values[:, None, -count:], vectors[..., -count:]
        differ = values > negligible * values[..., -1:].clamp(min=1e-30)
        roots = torch.where(differ, values.clamp(min=0).sqrt(), 0.0)
        self.shares = vectors * roots
        self.basis = torch.where(differ, vectors / roots, 0.0).mT @ self.units

    def image(self, images: list[Tensor]) -> Tensor:
        """Coefficients as `moved`, of its images under the Jacobian, from those (capacity,) of the images of the basis."""
        along = self.frame.products @ torch.stack(images, 1)  # (batch, capacity, count) inner products
        rest = self.units - self.shares @ self.basis
        of_last = (self.basis[:, 0] * along[:, :, 0]).sum(-1)[:, None, None]
        return self.lengths * (self.shares @ torch.stack(images) + rest @ along @ self.basis + of_last * rest)


def _changed_times(
    rollout, schedule: Schedule, table: StepTable, path: NoisePath, i: int
) -> list[tuple[Tensor, float]]:
    """Two other network times for row i, as the network is told them, and their weights in the derivative at its own.

    On both sides of it, but for the first and the last of a path, whose other times lie to one side.
    """
    limits = _coordinate(table.times.new_tensor([path.t_max, path.t_min]), path)
    here = _coordinate(table.network_times[i], path)
    near = _coordinate(table.times[max(i - 1, 0) : i + 2].clamp(min=path.t_min), path).diff().abs()
    way = TIME_CHANGE * (near[-1] if near[-1] > 0 else near[0])  # a level of two stages is repeated
    low, high = limits.min() + 1e-9 * way, limits.max() - 1e-9 * way
    sides = [-1, 1] if low <= here - way and here + way <= high else [1, 2] if here + 2 * way <= high else [-1, -2]
    times, ways = [], []
    for side in sides:
        time = here + side * way
        time = time if path.kind == "flow" else path.inverse_lam(time)
        single = Schedule(
            torch.stack([time, torch.zeros_like(time)]),
            time[None],
            schedule.spec,
            path.kind,
            schedule.prediction_type,
            final=True,
        )
        times.append(rollout.rounded(single).network_times[0])
        ways.append(float(_coordinate(times[-1], path) - here))
    first, second = ways
    if not (first and second and first != second):
        return []  # rounded to its own time, which it then cannot leave
    return [(times[0], second / (first * (second - first))), (times[1], -first / (second * (second - first)))]
