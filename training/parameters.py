# SPDX-License-Identifier: Apache-2.0
r"""Maps from free numbers to a schedule, float64 and differentiable.

Two maps share one small protocol (see [`Parameters`]): the one that LD3 was published with (Tong et al.,
arXiv:2405.15506), kept exactly, and the one that this project learns with by default.

| | [`PublishedParameters`] | [`GapParameters`] |
|---|---|---|
| times | softmax gaps in lambda or in t, first logit dead | softmax gaps in lambda (rectified flow: in s), no dead logit |
| started from | a uniform grid | any schedule, exactly |
| network times | clamp to half the *smallest* gap; stuck outside | tanh to half the *own* gaps; never stuck |
| first and last network time | the levels' | as far as the path goes |
| coefficients | the solver's | the solver's with residuals (GAS, arXiv:2510.17699), see `ld3_diffusers.residuals` |
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ld3_diffusers.noise_path import NoisePath, float64
from ld3_diffusers.schedule import MAX_RESIDUAL_ROWS, Schedule, SolverSpec


LEARNABLE = ("times", "network_times", "coefficients")
SMALLEST_SHARE = 1e-4  # of the whole range that one softmax gap keeps, whatever its logit
EDGE = 1e-9  # relative to the range of the levels: closer than this to an end of the path is at it


class Parameters(Protocol):
    """What a learner needs of a parameterisation.

    Attributes:
        groups: the leaf tensors (float64, CPU) that are learned, by name, of `LEARNABLE`.
    """

    groups: dict[str, Tensor]

    def parameters(self) -> list[Tensor]: ...

    def schedule(self) -> Schedule: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Groups:
    """What parameterisations share: their tensors, as lists, dicts and one vector."""

    groups: dict[str, Tensor]

    def parameters(self) -> list[Tensor]:
        return list(self.groups.values())

    def vector(self) -> Tensor:
        """All parameters in one."""
        return torch.cat([value.detach().flatten() for value in self.parameters()])

    def set_vector(self, vector: Tensor) -> None:
        """Inverse of [`vector`]."""
        parts = vector.split([value.numel() for value in self.parameters()])
        self.load_state_dict({name: part.view_as(self.groups[name]) for name, part in zip(self.groups, parts)})

    def schedules(self) -> list[Schedule]:
        return [self.schedule()]

    def learned(self) -> Schedule:
        return self.schedule().detach()

    def schedule_of(self, state: dict[str, Tensor]) -> Schedule:
        """The schedule of a [`state_dict`], detached; the parameters stay as they are."""
        current = self.state_dict()
        self.load_state_dict(state)
        schedule = self.schedule().detach()
        self.load_state_dict(current)
        return schedule

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.groups.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises a `ValueError` if the names or shapes are not these parameters'."""
        shapes = {name: tuple(value.shape) for name, value in self.groups.items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != given:
            raise ValueError(
                f"saved parameters {given} do not fit {shapes}; resume with the arguments of the first run"
            )
        with torch.no_grad():
            for name, value in self.groups.items():
                value.copy_(state[name])


def check_learnable(learn: tuple[str, ...]) -> None:
    if not learn or set(learn) - set(LEARNABLE) or len(set(learn)) != len(learn):
        raise ValueError(f"cannot learn {list(learn)}; name some of {', '.join(LEARNABLE)}")


class PublishedParameters(Groups):
    r"""LD3's own map, N steps from `t_max` to `t_min`.

    With $a \in R^{N+1}$ (ones) and $b \in R^{N+1}$ (zeros),

    $$ u_i = \frac{\sum_{j=1}^{i} e^{a_j}}{\sum_{j=1}^{N} e^{a_j}}, \qquad
       \lambda_i = \lambda_{min} + (\lambda_{max}-\lambda_{min})\,u_i \quad\text{(mode "lambda")}, \qquad
       t_i = t_{min} + (t_{max}-t_{min})\,u_{N-i} \quad\text{(mode "time")}. $$

    The second time vector is $t_i + \mathrm{clamp}(b_i, -w, w)$, in lambda in mode "lambda", both ends kept, where w is
    `window` times the smallest gap, held constant. $a_0$ cancels, and in mode "time" the gap between $t_{i-1}$ and $t_i$
    belongs to $a_{N-i+1}$.

    Args:
        path: noise path.
        num_steps: N.
        spec: a solver with one evaluation a step.
        prediction_type: of the network.
        mode: "lambda" or "time".
        window: LD3's `win_rate`.
        logit_window_bug: in mode "lambda" take the gaps of the raw logits a for those of lambda, as published: with equal
            logits network times then cannot move at all, later they may leave their gap, and even the path.
        t_max, t_min: ends, by default the path's.

    Raises:
        ValueError: for an unknown mode, a two-stage solver, an analytical first step, or mode "lambda" where lambda is
            infinite.
    """

    def __init__(
        self,
        path: NoisePath,
        num_steps: int,
        *,
        spec: SolverSpec,
        prediction_type: str,
        mode: str = "lambda",
        window: float = 0.5,
        logit_window_bug: bool = False,
        t_max: float | None = None,
        t_min: float | None = None,
    ):
        if mode not in ("lambda", "time"):
            raise ValueError(f"unknown mode {mode!r} of the published parameterisation; use 'lambda' or 'time'")
        if spec.make().stages != 1 or spec.afs:
            raise ValueError(
                f"the published parameterisation has one evaluation a step, but {spec.solver!r} "
                f"{'skips the first' if spec.afs else 'takes two'}; use the recipe 'default'"
            )
        self.path, self.num_steps, self.spec, self.prediction_type = path, num_steps, spec, prediction_type
        self.mode, self.window, self.logit_window_bug = mode, window, logit_window_bug
        self.ends = float64([path.t_max if t_max is None else t_max, path.t_min if t_min is None else t_min])
        if mode == "lambda" and not bool(path.lam(self.ends).isfinite().all()):
            raise ValueError("lambda is infinite at an end of this schedule; use mode='time'")
        self.groups = {
            "times": torch.ones(num_steps + 1, dtype=torch.float64, requires_grad=True),
            "network_times": torch.zeros(num_steps + 1, dtype=torch.float64, requires_grad=True),
        }

    def both_times(self) -> tuple[Tensor, Tensor]:
        """(N+1,) times of the levels and (N+1,) of the network; no evaluation uses the last of the latter."""
        logits, offsets = self.groups["times"], self.groups["network_times"]
        cumulated = torch.softmax(logits, 0).cumsum(0)
        cumulated = cumulated.flip(0) if self.mode == "time" else cumulated
        low, high = cumulated.min(), cumulated.max()
        share = (cumulated - low) / (high - low)
        if self.mode == "lambda":
            first, last = self.path.lam(self.ends)
            grid = first + (last - first) * share
        else:
            grid = self.ends[1] + (self.ends[0] - self.ends[1]) * share
        gaps = logits if self.mode == "lambda" and self.logit_window_bug else grid
        limit = self.window * float(gaps.detach().diff().abs().min())
        inner = torch.ones_like(offsets)
        inner[0] = inner[-1] = 0
        moved = grid + offsets.clamp(-limit, limit) * inner
        to_time = self.path.inverse_lam if self.mode == "lambda" else (lambda grid: grid)
        return tuple(torch.cat([self.ends[:1], to_time(values[1:-1]), self.ends[1:]]) for values in (grid, moved))

    def schedule(self) -> Schedule:
        times, network_times = self.both_times()
        return Schedule(times, network_times[:-1], self.spec, self.path.kind, self.prediction_type)


class GapParameters(Groups):
    r"""Softmax gaps, tanh offsets and residuals of coefficients, started from any schedule.

    Let u be lambda, or on rectified flow 1 - s, which increase from noise to data, and $u_0 < \dots < u_n$ the schedule's
    distinct levels above time 0. With logits g, one a gap, and $\delta$ the least share that a gap can shrink to,

    $$ u_i = u_0 + (u_{end} - u_0)\sum_{j \le i} \big(\delta + (1 - n\delta)\,\mathrm{softmax}(g)_j\big). $$

    A schedule that ends above 0 keeps both ends. One that ends at time 0 keeps its first level and the 0; its last level
    above 0 is free between its neighbour and `path.t_min`, by one gap more, which reaches from that level to `path.t_min`.
    Started *at* `path.t_min` (where that gap would be empty), or with `last_level="fixed"`, it stays where it is.

    Levels that repeat (Heun's second stage) stay tied; those of other stages (DPM-Solver-2) are free like any.

    The network's times move in u too, each between two fences: halfway to the levels before and after, and for the first and
    the last evaluation the ends of the path. With l and r the ways from level to fence, $\tau = u + r\tanh b$ for $b \ge 0$,
    $u + l\tanh b$ else. Where the level itself lies on its fence (t_max, or a repeated level), $|b|$ stands for b, so that
    the gradient does not vanish. Network times never increase, whatever the parameters.

    Coefficients are residuals $C_{i,i-j}$, $j <$ `coefficient_window`, of all rows on data predictions (see `ld3_diffusers.residuals`).

    Args:
        initial: the schedule to start from; [`schedule`] first returns exactly these times and coefficients.
        path: its noise path.
        learn: of `LEARNABLE`.
        last_level: "free" or "fixed".
        coefficient_window: predictions that a row's residuals reach back, itself included; None: to the first.

    Raises:
        ValueError: for a schedule of another path, or network times that lie beyond a neighbouring level.
    """

    def __init__(
        self,
        initial: Schedule,
        path: NoisePath,
        *,
        learn: tuple[str, ...] = LEARNABLE,
        last_level: str = "free",
        coefficient_window: int | None = None,
    ):
        check_learnable(learn)
        if last_level not in ("free", "fixed"):
            raise ValueError(f"unknown last_level {last_level!r}; use 'free' or 'fixed'")
        initial.table(path)  # complains about what is no schedule of this path
        self.path, self.initial = path, replace(initial.detach(), checksum=None)
        times, network_times = self.initial.times, self.initial.network_times
        self.ends_at_zero = float(times[-1]) == 0
        positive = times[:-1] if self.ends_at_zero else times
        # Repeated levels share one entry of `distinct`.
        self.index = torch.cat([torch.zeros(1, dtype=torch.long), (positive.diff() != 0).long().cumsum(0)])
        self.distinct = positive[torch.cat([torch.ones(1, dtype=torch.bool), positive.diff() != 0])]
        self.limits = self._coordinate(float64([path.t_max, min(path.t_min, float(network_times.min()))]))
        groups = {"times": self._init_gaps(last_level)}
        groups["network_times"] = self._init_offsets(self._coordinate(network_times))
        groups["coefficients"] = self._init_residuals(coefficient_window, learn)
        self._values = groups
        self.groups = {name: groups[name].requires_grad_() for name in LEARNABLE if name in learn}

    def _coordinate(self, times: Tensor) -> Tensor:
        return 1 - times if self.path.kind == "flow" else self.path.lam(times)

    def _time(self, u: Tensor) -> Tensor:
        return 1 - u if self.path.kind == "flow" else self.path.inverse_lam(u)

    def _init_gaps(self, last_level: str) -> Tensor:
        u = self._coordinate(self.distinct)
        floor = self._coordinate(float64([self.path.t_min]))
        reach = float(floor) - float(u[0])
        self.free_end = self.ends_at_zero and last_level == "free" and float(floor - u[-1]) > EDGE * reach
        self.ends = torch.stack([u[0], floor[0] if self.free_end else u[-1]])
        gaps = torch.cat([u, floor]).diff() if self.free_end else u.diff()
        if len(gaps) < 2:
            return gaps[:0]  # one gap is the whole range: nothing to learn
        share = gaps / (self.ends[1] - self.ends[0])
        self.smallest = min(SMALLEST_SHARE, 0.5 * float(share.min()))
        return ((share - self.smallest) / (1 - len(share) * self.smallest)).log()

    def _levels(self) -> Tensor:
        """u of the distinct levels, (n+1,)."""
        logits = self._values["times"]
        if len(logits) == 0:
            return self.ends[: len(self.distinct)]
        share = self.smallest + (1 - len(logits) * self.smallest) * torch.softmax(logits, 0)
        inner = self.ends[0] + (self.ends[1] - self.ends[0]) * share.cumsum(0)[:-1]
        return torch.cat([self.ends[:1], inner] if self.free_end else [self.ends[:1], inner, self.ends[1:]])

    def _ways(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """From the level of each evaluation to its two fences, both (evaluations,) and not negative."""
        u = levels[self.index]
        count = len(self.initial.network_times)
        here, after = u[:count], u[1:]
        if self.ends_at_zero:
            after = torch.cat([after, self.limits[1:]])
        fences = here[:-1] + self.fence_shares * (after[:-1] - here[:-1])
        first, last = self.limits.unbind()
        left = here - torch.cat([torch.minimum(first, here[0])[None], fences])
        right = torch.cat([fences, torch.maximum(last, here[-1])[None]]) - here
        return left, right

    def _init_offsets(self, network_u: Tensor) -> Tensor:
        count = len(network_u)
        u = self._coordinate(self.distinct)[self.index]
        between = u.diff()[: count - 1]
        shares = torch.full((count - 1,), 0.5, dtype=torch.float64)
        for i in range(count - 1):
            # A fence stands halfway between levels unless that would fence a given network time out.
            fence = u[i] + 0.5 * between[i]
            if network_u[i] > fence or network_u[i + 1] < fence:
                lower, upper = torch.maximum(network_u[i], u[i]), torch.minimum(network_u[i + 1], u[i + 1])
                if lower > upper or between[i] == 0:
                    raise ValueError(
                        f"network_times[{i}] and [{i + 1}] lie beyond their neighbouring levels, where learning cannot start; "
                        "start from the same times without network_times"
                    )
                shares[i] = (0.5 * (lower + upper) - u[i]) / between[i]
        self.fence_shares = shares
        left, right = self._ways(self._coordinate(self.distinct))
        offset = network_u - u[:count]
        tolerance = EDGE * float((self.limits[1] - self.limits[0]).abs())
        offset = torch.where(offset.abs() < 1e-14 * (1 + network_u.abs()), torch.zeros_like(offset), offset)
        self.left_closed, self.right_closed = left <= tolerance, right <= tolerance
        way = torch.where(offset < 0, left, right)
        fraction = torch.where(way > 0, offset / way.clamp(min=1e-300), torch.zeros_like(offset))
        inner = fraction.abs() < 1 - 1e-12
        offsets = torch.atanh(torch.where(inner, fraction, fraction.sign() * (1 - 1e-12)))
        return (
            offsets[1:] if self.initial.spec.afs else offsets
        )  # the first network time of AFS is asked of no network

    def _init_residuals(self, window: int | None, learn: tuple[str, ...]) -> Tensor:
        rows, given = len(self.initial.times) - 1, self.initial.residuals
        if rows > MAX_RESIDUAL_ROWS and "coefficients" in learn:
            raise ValueError(
                f"a schedule of {rows} rows is longer than the {MAX_RESIDUAL_ROWS} whose coefficients can be learned; "
                "learn times,network_times"
            )
        width = max(min(window or rows, rows), 0 if given is None else given.shape[1])
        self.residuals = torch.zeros(rows, width, dtype=torch.float64)
        if given is not None:
            self.residuals[:, : given.shape[1]] = given
        age = (
            torch.arange(rows)[:, None] - torch.arange(width)[None]
        )  # prediction j of row i is that of evaluation i - j
        self.free_residuals = (age >= 0) & (torch.arange(width)[None] < (window or rows))
        return self.residuals[self.free_residuals]

    def _residuals(self) -> Tensor | None:
        if "coefficients" not in self.groups:
            return self.initial.residuals
        return self.residuals.masked_scatter(self.free_residuals, self._values["coefficients"])

    def _network_levels(self, levels: Tensor) -> Tensor:
        b = self._values["network_times"]
        if self.initial.spec.afs:
            b = torch.cat([b.new_zeros(1), b])
        left, right = self._ways(levels)
        magnitude = torch.where(b >= 0, torch.tanh(b), -torch.tanh(b))  # |tanh b|, of slope 1 at 0 where abs has 0
        two_sided = torch.where(b >= 0, right, left) * torch.tanh(b)
        offset = torch.where(
            self.left_closed, right * magnitude, torch.where(self.right_closed, -left * magnitude, two_sided)
        )
        return levels[self.index][: len(b)] + offset

    def schedule(self) -> Schedule:
        levels = self._levels()
        times = self._time(levels)
        # Ends must not pick up rounding errors on their way through u: solvers compare them with the path's.
        keep_last = len(times) > 1 and not self.free_end
        times = torch.cat([self.distinct[:1], times[1:-1] if keep_last else times[1:], self.distinct[-1:][:keep_last]])
        times = times[self.index]
        network_times = self._time(self._network_levels(levels))
        # Undoes rounding beyond the path or past a neighbour, but not the gradient there.
        ordered = torch.cummin(network_times.detach().clamp(max=self.path.t_max), 0).values
        network_times = network_times + (ordered - network_times.detach())
        if self.initial.spec.afs:
            network_times = torch.cat([times[:1], network_times[1:]])
        if self.ends_at_zero:
            times = torch.cat([times, times.new_zeros(1)])
        return replace(self.initial, times=times, network_times=network_times, residuals=self._residuals())
