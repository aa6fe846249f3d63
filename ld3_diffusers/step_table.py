# SPDX-License-Identifier: Apache-2.0
r"""The step table: what every sampler here is, and the one executor that runs it.

At fixed times an ODE sampler is linear in its state and the network's outputs. With N network evaluations it is

$$ m_i = p_i x_i + q_i\,\mathrm{net}(x_i, \tau_i), \qquad x_{i+1} = a_i x_i + \sum_{j\ge0} c_{ij}\, m_{i-j}, \qquad i = 0..N-1. $$

$m_i$ is the network's output rewritten in the form that the solver extrapolates: data prediction, noise prediction or, on
rectified flow, velocity. Following LD3 (Tong et al., arXiv:2405.15506) alpha and sigma in p and q are those of the
network's time $\tau_i$, while a and c know the levels' times only.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise_path import Levels, NoisePath, float64
from .residuals import data_conversion, in_data_form, with_residuals
from .solvers import Solver
from .solvers.rows import Row, scaled_direction


@dataclass(frozen=True, eq=False)
class StepTable:
    """N rows, float64.

    Attributes:
        form: "data", "noise" or "velocity", what m is.
        times: (N+1,) levels in the path's own time.
        network_times: (N,) the same for the network.
        timesteps: (N,) what the network is given.
        state: (N,) a.
        history: (N, W) c, of the newest prediction first.
        p, q: (N,) conversion of the network's output.
        input_scale: (N,) what the state is multiplied by before the network sees it.
        start: factor of the unit-variance starting noise at `times[0]`.
        direction_scales: (N,) AMED's, which are in `history` already; None for other tables.
        first_prediction: with an analytical first step, $m_{-1}$ as a multiple of the starting state; else None.
    """

    form: str
    times: Tensor
    network_times: Tensor
    timesteps: Tensor
    state: Tensor
    history: Tensor
    p: Tensor
    q: Tensor
    input_scale: Tensor
    start: Tensor
    direction_scales: Tensor | None = None
    first_prediction: Tensor | None = None

    def __len__(self) -> int:
        return len(self.state)

    @property
    def differentiable(self) -> bool:
        return any(t.requires_grad for t in (self.state, self.history, self.p, self.q, self.timesteps))


def conversion(
    path: NoisePath, form: str, prediction_type: str, t: Tensor, level: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""(p, q) with m = p x + q net: from $\hat x_0 = p_0 x + q_0\,\mathrm{net}$ by
    $\hat\epsilon = (x-\alpha\hat x_0)/\sigma$ and $\hat u = (x-\hat x_0)/s$, all at the network's time t (LD3).

    With `level`, AMED's convention: the network sees the state scaled as if it were at t, see [`input_scale`], and its data prediction
    becomes noise or velocity at the level where the state is.
    """
    p, q = path.data_prediction(prediction_type, t)
    zero, one = torch.zeros_like(p), torch.ones_like(q)
    if level is not None:
        p = p * path.scale(t) / path.scale(level)
        t = level
    if form == "data":
        return p, q
    if form == "noise":
        if prediction_type == "epsilon" and level is None and not getattr(path, "preconditioned", False):
            return zero, one
        alpha, sigma = path.alpha(t), path.sigma(t)
        return (1 - alpha * p) / sigma, -alpha * q / sigma
    if prediction_type == "flow_prediction" and level is None:
        return zero, one
    return (1 - p) / t, -q / t


def input_scale(path: NoisePath, t: Tensor, level: Tensor | None = None) -> Tensor:
    """What the state is multiplied by before a network that is told t sees it; `level` as in [`conversion`]."""
    scale = path.input_scale(t)
    return scale if level is None else scale * path.scale(t) / path.scale(level)


def check_times(times: Tensor, network_times: Tensor, path: NoisePath) -> None:
    """Raises a `ValueError` that names the entry unless levels never rise, steps fall and everything is on the path."""
    counts = [len(values) if values.ndim else 0 for values in (times, network_times)]
    if counts[0] < 2 or counts[1] != counts[0] - 1:
        raise ValueError(
            f"a schedule of N evaluations needs N + 1 times and N network times, got {counts[0]} and {counts[1]}"
        )
    for name, values in (("times", times), ("network_times", network_times)):
        flat = values.detach().reshape(len(values), -1)
        before = torch.cat([flat[:1], flat[:-1]])
        infinite, outside = ~torch.isfinite(flat), (flat < 0) | (flat > path.t_max * (1 + 1e-9))
        bad = (infinite | outside | (flat > before)).nonzero()
        if len(bad):
            i, sample = bad[0].tolist()
            value = f"{name}[{i}] = {flat[i, sample]:.6g}"
            if infinite[i, sample]:
                raise ValueError(f"{name}[{i}] is not finite; give finite times in [0, {path.t_max:g}]")
            if outside[i, sample]:
                raise ValueError(f"{value} is outside the path; give times in [0, {path.t_max:g}]")
            raise ValueError(
                f"{value} is above {name}[{i - 1}] = {before[i, sample]:.6g}; give times that decrease, from noise to data"
            )
    for name, values in (("times", times[:-1]), ("network_times", network_times)):
        zero = (values.detach().reshape(len(values), -1) == 0).any(1).nonzero()
        if len(zero):
            raise ValueError(
                f"{name}[{int(zero[0])}] is 0, but only the last of the times may be 0, and no network time; "
                "drop what comes after the first 0"
            )


def build_table(
    solver: Solver,
    path: NoisePath,
    times,
    network_times=None,
    *,
    prediction_type: str,
    analytical_first_step: bool = False,
    starting_scale: str | None = None,
    first: int = 0,
    direction_scales=None,
    residuals: Tensor | None = None,
    wanted: range | None = None,
) -> StepTable:
    r"""Fill in a step table.

    Args:
        solver: builder of the rows.
        times: (N+1,) levels, non-increasing; may require grad.
        network_times: (N,); defaults to the levels'.
        analytical_first_step: replace the first network output by $\hat\epsilon = x/\sqrt{\alpha^2+\sigma^2}$
            (Dockhorn et al., arXiv:2210.05475), which makes N - 1 rows out of N + 1 times.
        starting_scale: "variance" starts where $\alpha^2+\sigma^2$ is the variance, "sigma" at sigma times the noise; default:
            "sigma" on variance-exploding paths, else "variance".
        first: index of the first row in the schedule that these times are the tail of.
        direction_scales: (N,) factors of the rows' directions, see [`scaled_direction`]. With them the network's outputs are
            converted as AMED does, see [`conversion`].
        residuals: (N, window), see [`with_residuals`]; rows then are on data predictions, whatever the solver's form.
        wanted: only these rows, before the first is folded in; of a two-stage solver whole steps.

    Raises:
        ValueError: for times that are not a schedule, or a solver or option that this path cannot have.
    """
    times = float64(times)
    network_times = times[:-1] if network_times is None else float64(network_times)
    check_times(times, network_times, path)
    form = solver.form(path)
    levels = path.levels(times)
    wanted = range(len(network_times)) if wanted is None else wanted
    rows = solver.rows(levels, first, wanted)
    if direction_scales is not None:
        direction_scales = float64(direction_scales)[wanted.start : wanted.stop]
        rows = _scaled(rows, direction_scales, solver, first + wanted.start)
    if residuals is not None:
        rows, form = with_residuals(in_data_form(rows, *data_conversion(path, form, network_times)), residuals), "data"
    times, network_times = times[wanted.start : wanted.stop + 1], network_times[wanted.start : wanted.stop]
    levels = Levels(*(part[wanted.start : wanted.stop + 1] for part in levels))
    converted_at = None if direction_scales is None else times[:-1]
    p, q = conversion(path, form, prediction_type, network_times, converted_at)

    width = max(len(row.history) for row in rows)
    zero = torch.zeros_like(rows[0].state)
    state = torch.stack([row.state for row in rows])
    history = torch.stack([torch.stack([*row.history, *[zero] * (width - len(row.history))]) for row in rows])
    table = StepTable(
        form=form,
        times=times,
        network_times=network_times,
        timesteps=path.timestep(network_times),
        state=state,
        history=history,
        p=p,
        q=q,
        input_scale=input_scale(path, network_times, converted_at),
        start=_starting_scale(levels, path, starting_scale),
        direction_scales=direction_scales,
    )
    if analytical_first_step and wanted.start == 0:
        table = _fold_first_step(table, levels, path)
    _check_entries(table)
    return table


def _scaled(rows: list[Row], scales: Tensor, solver: Solver, first: int) -> list[Row]:
    """`first` decides which rows are second stages; one whose step began before the table is scaled by itself."""
    result = []
    for i, (row, scale) in enumerate(zip(rows, scales)):
        stage = rows[i - 1] if i and (first + i) % solver.stages == 1 else None
        result.append(scaled_direction(row, scale, stage))
    return result


def _starting_scale(levels: Levels, path: NoisePath, starting_scale: str | None) -> Tensor:
    starting_scale = starting_scale or ("sigma" if path.kind == "ve" else "variance")
    if starting_scale == "sigma":
        return levels.sigma[0]
    if path.kind == "flow":
        return torch.ones_like(levels.sigma[0])
    return (levels.alpha[0] ** 2 + levels.sigma[0] ** 2).sqrt()


def _fold_first_step(table: StepTable, levels: Levels, path: NoisePath) -> StepTable:
    if path.kind == "flow":
        raise ValueError(
            "an analytical first step needs a path with noise at its start only; set afs=False for flow models"
        )
    if len(table) < 2:
        raise ValueError("an analytical first step leaves no evaluation here; use at least two steps or set afs=False")
    alpha, sigma = levels.alpha[0], levels.sigma[0]
    noise = 1 / (alpha**2 + sigma**2).sqrt()
    multiple = noise if table.form == "noise" else (1 - sigma * noise) / alpha
    growth = table.state[0] + table.history[0, 0] * multiple
    return StepTable(
        form=table.form,
        times=table.times[1:],
        network_times=table.network_times[1:],
        timesteps=table.timesteps[1:],
        state=table.state[1:],
        history=table.history[1:],
        p=table.p[1:],
        q=table.q[1:],
        input_scale=table.input_scale[1:],
        start=table.start * growth,
        direction_scales=None if table.direction_scales is None else table.direction_scales[1:],
        first_prediction=multiple / growth,
    )


def _check_entries(table: StepTable) -> None:
    for name in ("state", "history", "p", "q", "start"):
        bad = ~torch.isfinite(getattr(table, name).detach())
        if bool(bad.any()):
            raise ValueError(
                f"the step table's {name}{bad.nonzero()[0].tolist()} is not finite; move the times apart or lower the order"
            )


def sum_rule_error(table: StepTable, path: NoisePath) -> float:
    r"""How far rows are from carrying a constant prediction exactly.

    A constant data prediction D and noise e make $x = \alpha D + \sigma e$ at every level. The largest violation of, in data
    form, $a_i\alpha_i + \sum_j c_{ij} = \alpha_{i+1},\ a_i\sigma_i = \sigma_{i+1}$; in noise form with alpha and sigma
    exchanged; in velocity form $a_i = 1,\ \sum_j c_{ij} = s_{i+1} - s_i$.
    """
    levels = path.levels(table.times.detach())
    alpha, sigma = levels.alpha, levels.sigma
    total = table.history.detach().sum(1)
    if table.first_prediction is not None:
        raise ValueError(
            "the sum rules hold for the table before its first step was folded in; build it with afs=False"
        )
    if table.form == "velocity":
        errors = torch.stack([table.state.detach() - 1, total - levels.z.diff()])
    else:
        kept, moved = (sigma, alpha) if table.form == "data" else (alpha, sigma)
        a = table.state.detach()
        errors = torch.stack([a * kept[:-1] - kept[1:], a * moved[:-1] + total - moved[1:]])
    return float(errors.abs().max())


class Executor:
    """Runs a step table, one network output at a time.

    Two paths, same numbers: with gradients in the table, the state or the output, plain torch; else numbers precomputed on
    the host, predictions in a ring buffer and one fused multiply-add a step, without host-device synchronisation. Arithmetic is
    in float32, or in float64 for float64 states, whatever the output's dtype.

    Args:
        threshold: bounds the data prediction.
        fused: whether the second path may be taken; rows that become known while sampling ([`go_on_with`]) need the first.
    """

    def __init__(self, table: StepTable, threshold=None, fused: bool = True):
        self.table = table
        self.first = 0  # index of the table's first row
        self.threshold = threshold  # of the data prediction; not linear, so not in the table
        self.done = 0
        self.predictions: list[Tensor] = []  # newest first, on the differentiable path
        self.ring: Tensor | None = None
        # Rows that differ between samples have no single weight, and stay with plain torch too.
        self.differentiable = table.differentiable or table.state.ndim > 1 or not fused
        if self.differentiable:
            return
        n, width = table.history.shape
        self.width = width
        self.state = table.state.tolist()
        self.first_prediction = None if table.first_prediction is None else float(table.first_prediction)
        # The ring holds m / q = net + (p / q) x, one multiply-add; q goes into the weights.
        self.ratio = (table.p / table.q).tolist()
        age = torch.arange(n)[:, None] - torch.arange(width)[None]  # row i finds m_{i-j} in slot (i - j) mod width
        scale = torch.where(age < 0, torch.ones((), dtype=torch.float64), table.q[age.clamp(min=0)])
        self.weights = torch.zeros_like(table.history).scatter_(1, age % width, table.history * scale)

    def go_on_with(self, table: StepTable) -> None:
        """Take the next rows from this table; only without fused steps."""
        self.table, self.first = table, self.done

    def step(self, x: Tensor, output: Tensor, p_q=None, hold: Tensor | None = None) -> Tensor:
        """The next state.

        Args:
            x: state that the network saw.
            output: what it returned.
            p_q: conversion to use in place of the table's (per-token times).
            hold: mask of entries that keep their state.
        """
        i = self.done
        if i - self.first >= len(self.table):
            raise ValueError(
                f"all {len(self.table)} steps of this schedule are taken; call set_timesteps before sampling again"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if x.dtype != dtype or output.dtype != dtype:
            x, output = x.to(dtype), output.to(dtype)
        tracked = self.differentiable or (torch.is_grad_enabled() and (x.requires_grad or output.requires_grad))
        if tracked or self.predictions or p_q is not None or (self.threshold is not None):
            if self.ring is not None:
                self._leave_ring(i, x)
            result = self._step_plain(i, x, output, p_q)
        else:
            result = self._step_fused(i, x, output)
        self.done += 1
        return result if hold is None else torch.where(hold, x, result)

    def _step_plain(self, i, x, output, p_q):
        table, row = self.table, i - self.first
        if i == 0 and table.first_prediction is not None:
            self.predictions.append(_broadcast(table.first_prediction, x) * x)
        p, q = (table.p[row], table.q[row]) if p_q is None else p_q
        prediction = _broadcast(p, x) * x + _broadcast(q, x) * output
        if self.threshold is not None:
            prediction = self.threshold(prediction)
        self.predictions = [prediction, *self.predictions[: table.history.shape[1] - 1]]
        result = _broadcast(table.state[row], x) * x
        for j, m in enumerate(self.predictions):
            weight = table.history[row, j]
            if weight.requires_grad or bool((weight != 0).any()):
                result = result + _broadcast(weight, x) * m
        return result.to(x.dtype)

    def _leave_ring(self, i, x):
        """Hands the history of a run that began fused to the plain path: gradients were asked for on its way."""
        oldest = max(i - self.width, 0 if self.first_prediction is None else -1)
        for k in range(i - 1, oldest - 1, -1):
            q = self.table.q[k] if k >= 0 else 1.0
            self.predictions.append((self.slots[k % self.width] * q).view(x.shape))
        self.ring = None

    def _step_fused(self, i, x, output):
        flat = x.reshape(-1)
        if self.ring is None:
            self._allocate(flat)
        slot = self.slots[i % self.width]
        ratio = self.ratio[i]
        if ratio == 0.0:
            slot.copy_(output.reshape(-1))
        else:
            torch.add(output.reshape(-1), flat, alpha=ratio, out=slot)
        if self.width == 1:
            result = flat * self.state[i]
            result.add_(slot, alpha=self.single[i])
        else:
            with _without_autocast(flat.device.type):
                result = torch.addmv(flat, self.ring_t, self.rows[i], beta=self.state[i])
        return result.view(x.shape)

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.ring is not None:  # a pickle does not keep that these share memory
            self._view_ring()

    def _view_ring(self):
        self.ring_t = self.ring.t()
        self.slots = list(self.ring)

    def _allocate(self, flat):
        self.ring = torch.zeros(self.width, flat.numel(), dtype=flat.dtype, device=flat.device)
        self._view_ring()
        weights = self.weights.to(device=flat.device, dtype=flat.dtype)
        self.rows = list(weights)
        self.single = self.weights[:, 0].tolist()
        if self.first_prediction is not None:
            torch.mul(flat, self.first_prediction, out=self.slots[-1])


def _without_autocast(device_type: str) -> AbstractContextManager:
    """On GPUs autocast would compute matrix products in half precision; some devices, such as meta, have none."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """A scalar, or a per-sample vector shaped to multiply x."""
    if coefficient.ndim == 0:
        return coefficient
    coefficient = coefficient.to(x.dtype).to(x.device, non_blocking=True)
    return coefficient if coefficient.ndim == x.ndim else coefficient.reshape(-1, *[1] * (x.ndim - 1))
