# SPDX-License-Identifier: Apache-2.0
r"""How a student's end state depends on its step table, from network evaluations alone.

On data predictions a row is $x_{i+1} = a_i x_i + \sum_k c_{ik} D_k$ (see `ld3_diffusers.residuals`). A change of $a_i$, which the times decide,
moves $x_{i+1}$ along $x_i$, one of $c_{ik}$ along $D_k$, and one of the network's time $\tau_i$ changes $D_i$. What becomes of that at the end is
found by following the changed state through the rows that are left. The evaluations before are those of the unchanged run, and
the last row, which is linear, costs nothing. States are nearly linear in small changes of coefficients, but not in times: of those two are
tried, and a parabola laid through them. All N (N + 5) / 2 derivatives take $N(N-1)(N+10)/6 + 3N$ evaluations a sample, the unchanged run
included; 65 at N = 5, where one gradient by backpropagation with recomputation takes 20.

No graph is kept and no network differentiated: pipelines may be quantised, compiled or offloaded, and memory is that of sampling.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ld3_diffusers import Schedule
from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.step_table import StepTable, conversion

from .conditioning import repeated


CHANGE = {torch.float32: 1e-2, torch.float64: 1e-4}  # of states by coefficients, relative, by their dtype
COARSE_CHANGE = 5e-2  # where states are in half precision
TIME_CHANGE = 0.05  # of network times, as a share of the way to the next level
SAME = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative difference of evaluations that are called alike
COARSELY_SAME = 5e-2


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


@dataclass
class _Run:
    """A run in which one coordinate is changed, from that change on.

    Attributes:
        weight: of its difference from the unchanged run in the derivative, a number or a tensor ().
        predictions: data predictions so far, newest first.
    """

    coordinate: int
    weight: float | Tensor
    state: Tensor
    predictions: list[Tensor]


@torch.no_grad()
def sensitivities(
    rollout,
    schedule: Schedule,
    path: NoisePath,
    noise: Tensor,
    conditioning: dict,
    wanted: list[bool],
    at_once: int = 1,
) -> tuple[Tensor, Tensor]:
    """End states (batch, ...) and their derivatives (coordinates, batch, ...) by the [`coordinates`], float32 (float64 where states are).

    Args:
        rollout: as `PipelineRollout`, with `visit`, `output`, `rounded`, `path` and `mu`, whose evaluations stand alone.
        wanted: (coordinates,); the derivatives by the others are left 0.
        at_once: changed runs of all these noises that go through the network together.
    """
    states: list[Tensor] = []
    outputs: list[Tensor] = []

    def at_step(_i: int, state: Tensor, output: Tensor, _result: Tensor) -> None:
        states.append(state)
        outputs.append(output)

    rollout.visit(schedule, noise, conditioning, at_step)
    kept = states[0].dtype
    exact = torch.float64 if kept == torch.float64 else torch.float32
    change = CHANGE.get(kept, COARSE_CHANGE)
    schedule = rollout.rounded(schedule)
    table = whole_table(schedule, path, rollout.mu)
    rows, skipped = len(table), int(schedule.spec.afs)

    def as_kept(state: Tensor) -> Tensor:
        return state.to(kept).to(exact)

    def step(i: int, state: Tensor, predictions: list[Tensor]) -> Tensor:
        result = float(table.state[i]) * state
        for weight, prediction in zip(table.history[i].tolist(), predictions):
            result = result + weight * prediction
        return result if i == rows - 1 else as_kept(result)

    def outputs_of(states: list[Tensor], time: float) -> list[Tensor]:
        found = []
        for start in range(0, len(states), at_once):
            some = states[start : start + at_once]
            output = rollout.output(torch.cat(some), time, repeated(conditioning, len(some)))
            found += output.split(len(noise))
        return found

    def predicted(state: Tensor, output: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return float(p) * state + float(q) * output.to(exact)

    x, predictions, runs = noise.to(states[0]).to(exact) * float(table.start), [], []
    for i in range(rows):
        if i < skipped:
            # An analytical first step predicts noise, a multiple of the state; see `build_table`.
            alpha, sigma = path.alpha(table.times[0]), path.sigma(table.times[0])
            predictions = [float((1 - sigma / (alpha**2 + sigma**2).sqrt()) / alpha) * x]
        else:
            x = states[i - skipped].to(exact)
            predictions = [predicted(x, outputs[i - skipped], table.p[i], table.q[i]), *predictions]
            outputs_then = outputs_of([run.state for run in runs], float(table.network_times[i]))
            for run, output in zip(runs, outputs_then):
                run.predictions.insert(0, predicted(run.state, output, table.p[i], table.q[i]))
        for run in runs:
            run.state = step(i, run.state, run.predictions)
        following = step(i, x, predictions)
        told = rows + rows * rows + i
        if wanted[told] and i >= skipped:
            for time, weight in _changed_times(rollout, schedule, table, path, i):
                output = rollout.output(x, float(time), conditioning)
                p, q = conversion(path, "data", schedule.prediction_type, time)
                changed = [predicted(x, output, p, q), *predictions[1:]]
                runs.append(_Run(told, weight, step(i, x, changed), changed))
        directions = {i: x, **{rows + i * rows + j: predictions[j] for j in range(i + 1)}}
        for k, direction in directions.items():
            if wanted[k]:
                size = change * following.norm() / direction.norm().clamp(min=1e-30)
                state = following + size * direction
                runs.append(_Run(k, 1 / size, state if i == rows - 1 else as_kept(state), list(predictions)))
        x = following
    derivatives = torch.zeros(len(wanted), *x.shape, dtype=exact, device=x.device)
    for run in runs:
        derivatives[run.coordinate] += run.weight * (run.state - x)
    return x, derivatives


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
