# SPDX-License-Identifier: Apache-2.0
"""Parameters of a schedule for every number of evaluations: the matrices of a [`ScheduleCurve`]."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ld3_diffusers.noise_path import NoisePath
from ld3_diffusers.schedule import Schedule
from ld3_diffusers.schedule_curve import LARGEST_SIDE, ScheduleCurve, basis, ways

from .parameters import LEARNABLE, Groups, check_learnable


KNOTS = 5
POWERS = 3
LARGEST_SHARE = 0.99  # of the way to its fence that a network time starts at


class CurveParameters(Groups):
    """Started from one schedule for each count that it is learned on, as nearly as their steps lie on such a curve.

    Args:
        initial: schedules by number of evaluations, with one evaluation a step, of one solver, prediction type and end.
        path: their noise path.
        learn: of `LEARNABLE`.
        knots, powers: of the matrices.
        coefficient_window: predictions that a row's residuals reach back, itself included; None: to the first.

    Raises:
        ValueError: for schedules that have no such curve.
    """

    def __init__(
        self,
        initial: Mapping[int, Schedule],
        path: NoisePath,
        *,
        learn: tuple[str, ...] = LEARNABLE,
        knots: int = KNOTS,
        powers: int = POWERS,
        coefficient_window: int | None = None,
    ):
        check_learnable(learn)
        self.path, self.nfes = path, sorted(initial)
        check_curve_counts(self.nfes)
        first = initial[self.nfes[0]]
        self.to_zero = float(first.times[-1]) == 0
        for nfe, schedule in initial.items():
            if schedule.spec.make().stages != 1 or schedule.spec.afs or schedule.nfe != nfe:
                raise ValueError(
                    "a curve needs a solver with one evaluation a step and no analytical first one; choose another"
                )
            same = schedule.spec == first.spec and schedule.final == first.final
            if not same or (float(schedule.times[-1]) == 0) != self.to_zero:
                raise ValueError(
                    "the schedules that a curve starts from must share solver and end; start from named grids"
                )
        self.first, counts = first.detach(), (self.nfes[0], self.nfes[-1])
        shape = knots, min(powers, len(self.nfes))
        functions = torch.cat([basis(nfe, counts, *shape) for nfe in self.nfes])
        position = torch.cat([torch.arange(nfe) for nfe in self.nfes])
        starts = [initial[nfe] for nfe in self.nfes]
        window = max(0 if each.residuals is None else each.residuals.shape[1] for each in starts)
        if "coefficients" in learn:
            window = max(window, coefficient_window or counts[1])
        window = min(window, counts[1])

        def fitted(values: Tensor, reach: int = 0) -> Tensor:
            """The matrix whose curve is nearest to (steps,) values, of steps that have this many before them."""
            has = position >= reach
            return torch.linalg.lstsq(functions[has], values[has, None], driver="gelsd").solution.view(shape)

        self._values = {
            "times": fitted(torch.cat([self._logits(each) for each in starts])),
            "network_times": fitted(torch.cat([self._offsets(each) for each in starts])),
            "residuals": torch.zeros(window, *shape, dtype=torch.float64),
        }
        residuals = torch.cat([_residuals(each, window) for each in starts])
        for j in range(window):
            self._values["residuals"][j] = fitted(residuals[:, j], reach=j)
        names = {"coefficients": "residuals"}
        chosen = [names.get(group, group) for group in LEARNABLE if group in learn]
        self.groups = {name: self._values[name].requires_grad_() for name in chosen}

    def _levels(self, schedule: Schedule) -> Tensor:
        """u of its levels; the last step to clean data ends at the path's smallest time."""
        return self._coordinate(torch.cat([schedule.times[:-1], schedule.times.new_tensor([self.path.t_min])]))

    def _coordinate(self, times: Tensor) -> Tensor:
        return 1 - times if self.path.kind == "flow" else self.path.lam(times)

    def _logits(self, schedule: Schedule) -> Tensor:
        """Of its steps' lengths, up to a constant."""
        u = self._levels(schedule)
        shares = u.diff().clamp(min=1e-3 * float(u[-1] - u[0]) / len(u)).log()
        return shares - shares.mean()

    def _offsets(self, schedule: Schedule) -> Tensor:
        """Of its network times, as [`schedule_of_values`] has them."""
        u = self._levels(schedule)
        left, right = ways(u.diff(), self.to_zero)
        offsets = self._coordinate(schedule.network_times) - u[:-1]
        shares = offsets / torch.where(offsets >= 0, right, left).clamp(min=1e-300)
        return torch.atanh(shares.clamp(-LARGEST_SHARE, LARGEST_SHARE))

    def curve(self) -> ScheduleCurve:
        return ScheduleCurve(
            dict(self._values),
            (self.nfes[0], self.nfes[-1]),
            self.first.spec,
            self.path.kind,
            self.first.prediction_type,
            self.to_zero,
            self.first.final,
        )

    def schedules(self) -> list[Schedule]:
        """Those of the counts that are learned on."""
        curve = self.curve()
        return [curve.schedule(nfe, self.path) for nfe in self.nfes]

    def learned(self) -> ScheduleCurve:
        return self.curve().detach()


def check_curve_counts(nfes: Sequence[int]) -> None:
    """Raises a `ValueError` if no curve serves these numbers of evaluations."""
    if len(nfes) < 2 or min(nfes) < 2 or max(nfes) > LARGEST_SIDE:
        raise ValueError(f"a curve is learned on several numbers of evaluations, 2 to {LARGEST_SIDE}; name such ones")


def _residuals(schedule: Schedule, window: int) -> Tensor:
    """(steps, window)."""
    rows, given = len(schedule.times) - 1, schedule.residuals
    given = torch.zeros(rows, 0, dtype=torch.float64) if given is None else given
    return torch.nn.functional.pad(given, (0, window - given.shape[1]))
