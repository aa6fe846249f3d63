# SPDX-License-Identifier: Apache-2.0
"""One learned schedule: times, network times and the solver they were learned for, for one number of evaluations.

A schedule stores its times and its solver, never finished coefficients: transfer to another resolution shift, truncation for
image-to-image and fallbacks need the solver's formulas at new times. A checksum of the table it built guards against drift.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .noise_path import NoisePath, float64, shift_flow_time
from .residuals import check_stability, tail_of
from .solvers import ORDERS, VARIANTS, Row, Solver, make_solver
from .step_table import StepTable, build_table


@dataclass(frozen=True)
class SolverSpec:
    """A solver by name with its options, as they stand in a scheduler config.

    Attributes:
        solver: name of the solver, a key of `ld3_diffusers.solvers.SOLVERS`.
        solver_order, solver_type, predict_x0, lower_order_final: options of solvers that have them; None: the solver's default.
            `solver_type` is "bh1"/"bh2" for unipc, "midpoint"/"heun" for dpmpp and "logrho"/"rhoab"/"tab" for deis.
        afs: analytical first step, which costs no evaluation.
        starting_scale: "variance" or "sigma", see [`build_table`].
    """

    solver: str = "unipc"
    solver_order: int | None = None
    solver_type: str | None = None
    predict_x0: bool = True
    lower_order_final: bool = True
    afs: bool = False
    starting_scale: str | None = None

    def __post_init__(self):
        if self.starting_scale not in (None, "variance", "sigma"):
            raise ValueError(f"unknown starting_scale {self.starting_scale!r}; use 'variance' or 'sigma'")

    def with_defaults_for_foreign_options(self) -> "SolverSpec":
        """This with the defaults for an order or type that only another solver has, as stock schedulers convert theirs."""
        order, kind = self.solver_order, self.solver_type
        if order not in ORDERS.get(self.solver, ()) and any(order in orders for orders in ORDERS.values()):
            order = None
        if kind not in VARIANTS.get(self.solver, ()) and any(kind in kinds for kinds in VARIANTS.values()):
            kind = None
        return replace(self, solver_order=order, solver_type=kind)

    def make(self) -> Solver:
        return make_solver(
            self.solver,
            order=self.solver_order,
            variant=self.solver_type,
            predict_x0=self.predict_x0,
            lower_order_final=self.lower_order_final,
        )


SOLVER_KEYS = tuple(SolverSpec.__dataclass_fields__)
SCHEDULE_KEYS = (
    *SOLVER_KEYS,
    "noise_path",
    "prediction_type",
    "times",
    "network_times",
    "direction_scales",
    "residuals",
    "predictor",
    "final",
    "checksum",
    "provenance",
)


LARGEST_ROUNDING = 1e-6  # of a checksum; processors that round float32 betas otherwise move it by 1e-7
MAX_NFE = 1000  # as many as most models have training steps; what a schedule costs to check is bounded by it
MAX_RESIDUAL_ROWS = 64  # of a schedule with residuals, whose whole triangle may be learned


def is_number(value) -> bool:
    """Whether this is a finite number that float64 has."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _is_numbers(value) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_number, value))


def _are_residuals(value) -> bool:
    rows = isinstance(value, list) and len(value) <= MAX_RESIDUAL_ROWS
    return rows and all(_is_numbers(row) and len(row) <= i + 1 for i, row in enumerate(value))


def _names_predictor(value) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("folder", "digest"))


# What may stand in a schedule's config entry: kind -> (test, keys).
ENTRY_TYPES = {
    "a list of finite numbers": (_is_numbers, ("times", "network_times", "direction_scales")),
    "a finite number": (is_number, ("checksum",)),
    "an integer": (lambda value: type(value) is int, ("solver_order",)),
    "true or false": (lambda value: type(value) is bool, ("predict_x0", "lower_order_final", "afs", "final")),
    "a string": (
        lambda value: isinstance(value, str),
        ("solver", "solver_type", "starting_scale", "noise_path", "prediction_type"),
    ),
    "a mapping": (lambda value: isinstance(value, dict), ("provenance",)),
    f"a list of at most i + 1 finite numbers for each row i of up to {MAX_RESIDUAL_ROWS}": (
        _are_residuals,
        ("residuals",),
    ),
    "a mapping with a folder and a digest": (_names_predictor, ("predictor",)),
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discretization, network times and a solver.

    Attributes:
        times: (levels,) float64, from noise to data in the time of the noise path; rectified flow: s before any shift.
        network_times: (levels - 1,) what time each evaluation is told; defaults to `times[:-1]`.
        spec: the solver.
        noise_path: kind of the path, e.g. "vp_discrete" or "flow".
        prediction_type: of the network that it was learned for.
        final: the times are final: no resolution shift is applied to them, and they do not transfer.
        direction_scales: (levels - 1,) factors of how far each evaluation's row goes, AMED's; None: 1. See [`scaled_direction`].
        residuals: (levels - 1, window), what was learned of the rows' coefficients, of the newest prediction first; None: the solver's own. See
            `ld3_diffusers.residuals`.
        predictor: of a schedule whose stages are predicted for each sample (AMED): which network does, see [`AMEDScheduler`].
        checksum: of the table that it was saved with, see [`check_checksum`].
        provenance: plain JSON facts of its making: teacher, guidance scale, resolution, versions.
    """

    times: Tensor
    network_times: Tensor | None = None
    spec: SolverSpec = field(default_factory=SolverSpec)
    noise_path: str = "vp_discrete"
    prediction_type: str = "epsilon"
    final: bool = False
    direction_scales: Tensor | None = None
    residuals: Tensor | None = None
    predictor: dict[str, Any] | None = None
    checksum: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "times", float64(self.times))
        network_times = self.times[:-1] if self.network_times is None else float64(self.network_times)
        object.__setattr__(self, "network_times", network_times)
        if self.direction_scales is not None:
            object.__setattr__(self, "direction_scales", float64(self.direction_scales))
            if len(self.direction_scales) != len(self.times) - 1:
                raise ValueError(
                    f"a schedule of {len(self.times)} times needs {len(self.times) - 1} direction_scales, got "
                    f"{len(self.direction_scales)}"
                )
        if self.residuals is not None:
            object.__setattr__(self, "residuals", float64(self.residuals))
            if self.residuals.ndim != 2 or len(self.residuals) != len(self.times) - 1:
                raise ValueError(
                    f"a schedule of {len(self.times)} times needs residuals of {len(self.times) - 1} rows, got shape "
                    f"{tuple(self.residuals.shape)}"
                )
            if self.direction_scales is not None:
                raise ValueError("a schedule has direction_scales (AMED) or residuals, not both; drop one of them")
        if self.predictor is not None and (self.direction_scales is None or len(self.times) % 2 == 0):
            raise ValueError(
                "a schedule with a 'predictor' needs direction_scales, and two rows for each of its steps; make it with "
                "`ld3_diffusers.amed.amed_schedule`"
            )

    @property
    def nfe(self) -> int:
        """Network evaluations, guidance's doubling apart."""
        return len(self.times) - 1 - int(self.spec.afs)

    @property
    def stages(self) -> str | None:
        """How AMED's stages are placed, "static" or "per sample"; None for schedules without them."""
        if self.predictor is not None:
            return "per sample"
        return None if self.direction_scales is None else "static"

    def table(self, path: NoisePath, *, mu: float = 0.0, first: int = 0, wanted: range | None = None) -> StepTable:
        """The step table of rows `first` and later, of these only those `wanted`; `mu` shifts the times of rectified flow.

        Raises:
            ValueError: if the path is of another kind, or as [`build_table`].
        """
        if path.kind != self.noise_path:
            raise ValueError(
                f"this schedule was learned on a {self.noise_path!r} noise path and cannot run on a {path.kind!r} one; "
                "use a schedule made for this model family"
            )
        times, network_times = self.times, self.network_times
        if self.spec.afs and first:
            first += 1  # the first evaluation of a tail is that of the level after
        times, network_times = times[first:], network_times[first:]
        scales = None if self.direction_scales is None else self.direction_scales[first:]
        residuals = None if self.residuals is None else tail_of(self.residuals, first)
        if mu and path.kind == "flow" and not self.final:
            times, network_times = shift_flow_time(times, mu), shift_flow_time(network_times, mu)
        return build_table(
            self.spec.make(),
            path,
            times,
            network_times,
            prediction_type=self.prediction_type,
            analytical_first_step=self.spec.afs and not first,
            starting_scale=self.spec.starting_scale,
            first=first,
            direction_scales=scales,
            residuals=residuals,
            wanted=wanted,
        )

    def lacks_history(self, first: int) -> bool:
        """Whether a run that starts with evaluation `first` leaves out some of the learned coefficients of the rows that it takes."""
        if self.residuals is None:
            return False
        first += int(self.spec.afs)
        kept, learned = tail_of(self.residuals, first), self.residuals[first:]
        return bool((kept != 0).sum() < (learned != 0).sum())

    def check_stability(self, path: NoisePath) -> None:
        """Raises a `ValueError` if the learned coefficients, where there are some, carry samples far from where the solver would."""
        if self.residuals is None:
            return
        tables = [
            build_table(
                self.spec.make(),
                path,
                self.times,
                self.network_times,
                prediction_type=self.prediction_type,
                residuals=residuals,
            )
            for residuals in (self.residuals, torch.zeros_like(self.residuals))
        ]
        learned, own = ([Row(a, list(c[: i + 1])) for i, (a, c) in enumerate(zip(t.state, t.history))] for t in tables)
        check_stability(learned, own, float(path.sigma(self.times[:1].detach())))

    def rounded(self, path: NoisePath, told: Callable[[Tensor], Tensor], *, mu: float = 0.0) -> "Schedule":
        """With network times that become `told(timesteps)` at resolution shift `mu`; the gradient passes the rounding unchanged.

        A pipeline that casts timesteps to bfloat16 tells its network rounded ones, whatever the schedule says.
        """
        mu = mu if path.kind == "flow" and not self.final else 0.0
        exact = self.network_times.detach()
        shifted = shift_flow_time(exact, mu) if mu else exact
        times = path.time(told(path.timestep(shifted))).clamp(0, path.t_max)
        times = shift_flow_time(times, -mu) if mu else times
        return replace(self, network_times=self.network_times + (times - exact), checksum=None)

    def detach(self) -> "Schedule":
        scales = None if self.direction_scales is None else self.direction_scales.detach().clone()
        return replace(
            self,
            times=self.times.detach().clone(),
            network_times=self.network_times.detach().clone(),
            direction_scales=scales,
            residuals=None if self.residuals is None else self.residuals.detach().clone(),
        )

    def to_dict(self, path: NoisePath) -> dict[str, Any]:
        """Plain JSON: Python floats, which keep every bit.

        Raises:
            ValueError: as [`check_stability`].
        """
        table = self.table(path)
        self.check_stability(path)
        return {
            **{key: getattr(self.spec, key) for key in SOLVER_KEYS},
            "noise_path": self.noise_path,
            "prediction_type": self.prediction_type,
            "times": self.times.tolist(),
            "network_times": self.network_times.tolist(),
            **({} if self.direction_scales is None else {"direction_scales": self.direction_scales.tolist()}),
            **({} if self.residuals is None else {"residuals": self._plain_residuals()}),
            **({} if self.predictor is None else {"predictor": dict(self.predictor)}),
            "final": self.final,
            "checksum": table_checksum(table),
            "provenance": dict(self.provenance),
        }

    def _plain_residuals(self) -> list[list[float]]:
        return [row[: i + 1].tolist() for i, row in enumerate(self.residuals)]

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "Schedule":
        """Inverse of [`to_dict`].

        Raises:
            ValueError: for unknown, missing or malformed entries, saying which.
        """
        if not isinstance(entry, dict):
            raise ValueError(
                f"a schedule must be a mapping with 'times', got {type(entry).__name__}; see Schedule.to_dict"
            )
        unknown = sorted(set(entry) - set(SCHEDULE_KEYS))
        if unknown:
            raise ValueError(f"unknown schedule entries {str(unknown):.200}; remove them or update ld3-diffusers")
        if entry.get("times") is None:
            raise ValueError("a schedule needs 'times', the N + 1 levels from noise to data")
        for what, (is_right, keys) in ENTRY_TYPES.items():
            for key in keys:
                value = entry.get(key)
                if value is not None and not is_right(value):
                    raise ValueError(
                        f"{key!r} of a schedule must be {what}, got {value!r:.60}; check the config it came from"
                    )
        for key in ("times", "network_times", "direction_scales"):
            if len(entry.get(key) or ()) > MAX_NFE + 1:
                raise ValueError(
                    f"{key!r} of a schedule holds {len(entry[key])} values and may hold {MAX_NFE + 1}; check the config it "
                    "came from"
                )
        spec = SolverSpec(**{key: entry[key] for key in SOLVER_KEYS if key in entry})
        spec.make()
        names = ("noise_path", "prediction_type", "final", "direction_scales", "predictor", "checksum")
        rest = {key: entry[key] for key in names if key in entry}
        if entry.get("residuals") is not None:
            width = max(map(len, entry["residuals"]), default=0)
            rest["residuals"] = float64([[*row, *[0.0] * (width - len(row))] for row in entry["residuals"]])
        return cls(entry["times"], entry.get("network_times"), spec, provenance=entry.get("provenance") or {}, **rest)


def table_checksum(table: StepTable) -> float:
    """One number that moves if any entry of the table does, by a weight unlike that of its neighbours."""
    total = torch.zeros((), dtype=torch.float64)
    for k, part in enumerate((table.state, table.history, table.p, table.q, table.timesteps)):
        flat = part.detach().flatten()
        flat = flat / flat.abs().max().clamp(min=1e-300)  # timesteps near 1000 must not drown the rest
        total = total + (flat * torch.cos(torch.arange(len(flat), dtype=torch.float64) + k)).sum()
    if table.direction_scales is not None:  # a factor common to all rows leaves what was summed as it was
        scales = table.direction_scales.detach()
        total = total + (scales * torch.cos(torch.arange(len(scales), dtype=torch.float64))).sum()
    return float(total)


def check_checksum(table: StepTable, expected: float | None) -> None:
    """Raises a `ValueError` if this table is not the one that the schedule was saved with."""
    if expected is not None:
        same_checksum(table_checksum(table), expected)


def same_checksum(actual: float, expected: float) -> None:
    """Raises a `ValueError` if these differ by more than another machine's rounding, of the model's float32 betas too."""
    if not abs(actual - expected) <= LARGEST_ROUNDING * (1 + abs(expected)):
        raise ValueError(
            f"this schedule builds another step table than the one it was saved with (checksum {actual:.12g}, saved "
            f"{expected:.12g}); its config was edited, or it needs the version of ld3-diffusers named in its provenance"
        )


def interpolate(schedules: dict[int, Schedule], nfe: int, path: NoisePath) -> Schedule:
    """A schedule for `nfe` evaluations from the learned one with the nearest count (of two, the larger).

    Levels and network times are interpolated linearly in i/N, in lambda (rectified flow: in s); a final level of clean data
    stays; learned coefficients do not. Few-step schedules are not samples of one curve, so expect less than from a learned one.

    Raises:
        ValueError: if the nearest schedule's solver has stages that cannot be interpolated.
    """
    nearest = max(schedules, key=lambda count: (-abs(count - nfe), count))
    known = schedules[nearest]
    if known.spec.make().stages > 1 or known.spec.afs or known.direction_scales is not None:
        raise ValueError(
            f"the schedule learned for {nearest} evaluations uses {known.spec.solver}, whose stages cannot be interpolated; "
            f"use num_inference_steps = {' or '.join(map(str, sorted(schedules)))}"
        )
    forward, back = (lambda t: t, lambda t: t) if path.kind == "flow" else (path.lam, path.inverse_lam)
    to_zero = bool(known.times[-1] == 0)
    levels = known.times[:-1] if to_zero else known.times
    times = back(_resample(forward(levels), nfe + (not to_zero)))
    network_times = back(_resample(forward(known.network_times), nfe)).clamp(path.t_min, path.t_max)
    times = torch.cat([times, torch.zeros(1, dtype=times.dtype)]) if to_zero else times
    return replace(known, times=times, network_times=network_times, residuals=None, checksum=None)


def _resample(values: Tensor, count: int) -> Tensor:
    position = torch.linspace(0, len(values) - 1, count, dtype=torch.float64)
    left = position.floor().long().clamp(max=max(len(values) - 2, 0))
    right = (left + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[left], values[right], position - left)
