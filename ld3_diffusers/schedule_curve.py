# SPDX-License-Identifier: Apache-2.0
r"""One learned curve that is a schedule for every number of network evaluations in a range.

Each of the N steps has a few free numbers: how long it is, how far the network's time lies from its level, and the residuals of its row
(see `residuals`). Along the schedule they are functions of the position $p = i/(N-1)$ of the step and of the count,

$$ v_{N,i} = \sum_{k<K} \sum_{q<Q} M_{kq}\,h_k(p)\,\nu^q, \qquad \nu = \frac{1/N - 1/N_{max}}{1/N_{min} - 1/N_{max}}, $$

with hat functions $h_k$ at K equidistant knots, so that the first and the last step, which differ from all others, have knots of their own.
Few-step schedules are no samples of one curve: that is what the powers of $\nu$ are for. Of the matrices M one holds logits of the
steps' lengths, one network times, and one $C_{i,i-j}$ for each j in the window.

With u = lambda, or 1 - s on rectified flow, the levels are $u_i = u_0 + (u_{end}-u_0)\sum_{j<i}\mathrm{softmax}(v^{times})_j$ from the
path's noisiest time to its least, in whose place, or after which, comes clean data. Step i tells the network $u_i + r_i\tanh v_i$ with $r_i$ half the
way to the next level ($v_i \ge 0$) or to the one before.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .noise_path import NoisePath, float64
from .schedule import ENTRY_TYPES, SOLVER_KEYS, Schedule, SolverSpec, is_number, table_checksum


SMALLEST_SHARE = 1e-4  # of the whole way that a step keeps, whatever its logit
LARGEST_SIDE = (
    64  # of a matrix, of the window, and evaluations that a curve serves: what it costs to check is bounded by it
)
KINDS = ("times", "network_times", "residuals")  # of values


def basis(nfe: int, counts: tuple[int, int], knots: int, powers: int) -> Tensor:
    """(nfe, knots * powers): what each entry of a matrix, flattened, adds to the value of each step."""
    positions = torch.linspace(0, knots - 1, nfe, dtype=torch.float64) if nfe > 1 else float64([0.0])
    hats = (1 - (positions[:, None] - torch.arange(knots, dtype=torch.float64)).abs()).clamp(min=0)
    least, most = counts
    nu = 0.0 if least == most else (1 / nfe - 1 / most) / (1 / least - 1 / most)
    return (hats[..., None] * nu ** torch.arange(powers, dtype=torch.float64)).flatten(1)


def schedule_of_values(
    values: dict[str, Tensor],
    path: NoisePath,
    spec: SolverSpec,
    prediction_type: str,
    *,
    to_zero: bool,
    final: bool = False,
) -> Schedule:
    """The schedule of N steps from (N,) logits "times", (N,) "network_times" and (window, N) "residuals"."""
    flow = path.kind == "flow"
    coordinate, time = (lambda t: 1 - t, lambda u: 1 - u) if flow else (path.lam, path.inverse_lam)
    ends = float64([path.t_max, path.t_min])
    first, last = coordinate(ends)
    count = len(values["times"])
    share = SMALLEST_SHARE + (1 - count * SMALLEST_SHARE) * torch.softmax(values["times"], 0)
    gaps = (last - first) * share
    u = first + torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
    inner = time(u[1:-1])
    times = torch.cat([ends[:1], inner, ends.new_zeros(1) if to_zero else ends[1:]])
    left, right = ways(gaps, to_zero)
    told = values["network_times"]
    network_times = time(u[:-1] + torch.where(told >= 0, right, left) * torch.tanh(told))
    # Undoes rounding beyond the path, but not the gradient there.
    network_times = network_times + (network_times.detach().clamp(path.t_min, path.t_max) - network_times.detach())
    residuals = None
    if len(values["residuals"]):
        residuals = values["residuals"][:count].T
        age = torch.arange(count)[:, None] - torch.arange(residuals.shape[1])[None]
        residuals = torch.where(age >= 0, residuals, 0.0)
    return Schedule(times, network_times, spec, path.kind, prediction_type, final=final, residuals=residuals)


def ways(gaps: Tensor, to_zero: bool) -> tuple[Tensor, Tensor]:
    """How far each step's network time may lie before and after its level, (N,) each, in u."""
    right = 0.5 * gaps
    right = torch.cat([right[:-1], gaps[-1:] if to_zero else right[-1:]])
    return torch.cat([gaps.new_zeros(1), 0.5 * gaps[:-1]]), right


@dataclass(frozen=True, eq=False)
class ScheduleCurve:
    """A learned curve.

    Attributes:
        matrices: "times" and "network_times" (K, Q), "residuals" (window, K, Q), float64; a window of 0: the solver's coefficients.
        counts: the least and the largest number of evaluations that it serves.
        spec: a solver with one evaluation a step.
        to_zero: whether schedules end in clean data, else at the path's smallest time.
        noise_path, prediction_type, final, checksum, provenance: see [`Schedule`].
    """

    matrices: dict[str, Tensor]
    counts: tuple[int, int]
    spec: SolverSpec = field(default_factory=SolverSpec)
    noise_path: str = "vp_discrete"
    prediction_type: str = "epsilon"
    to_zero: bool = True
    final: bool = False
    checksum: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "matrices", {name: float64(matrix) for name, matrix in self.matrices.items()})

    def detach(self) -> "ScheduleCurve":
        return replace(self, matrices={name: matrix.detach().clone() for name, matrix in self.matrices.items()})

    def serves(self, nfe: int) -> bool:
        return self.counts[0] <= nfe <= self.counts[1]

    def schedule(self, nfe: int, path: NoisePath) -> Schedule:
        """Its schedule for `nfe` evaluations.

        Raises:
            ValueError: for a count outside of its range, or another kind of path.
        """
        if not self.serves(nfe):
            raise ValueError(f"this curve serves {self.counts[0]} to {self.counts[1]} evaluations, not {nfe}")
        if path.kind != self.noise_path:
            raise ValueError(
                f"this curve was learned on a {self.noise_path!r} noise path and cannot run on a {path.kind!r} one; use one made "
                "for this model family"
            )
        knots, powers = self.matrices["times"].shape
        function = basis(nfe, self.counts, knots, powers)
        values = {name: matrix.flatten(-2) @ function.T for name, matrix in self.matrices.items()}
        options = {"to_zero": self.to_zero, "final": self.final}
        schedule = schedule_of_values(values, path, self.spec, self.prediction_type, **options)
        return replace(schedule, provenance=dict(self.provenance))

    def check(self, path: NoisePath) -> float:
        """The sum of its tables' checksums.

        Raises:
            ValueError: if one of its schedules is none, or its coefficients are not stable.
        """
        total = 0.0
        for nfe in range(self.counts[0], self.counts[1] + 1):
            schedule = self.schedule(nfe, path)
            schedule.check_stability(path)
            total += table_checksum(schedule.table(path))
        return total

    def to_dict(self, path: NoisePath) -> dict[str, Any]:
        """Plain JSON, every bit kept. Raises a `ValueError` as [`check`]."""
        return {
            **{key: getattr(self.spec, key) for key in SOLVER_KEYS},
            "noise_path": self.noise_path,
            "prediction_type": self.prediction_type,
            "counts": list(self.counts),
            "to_zero": self.to_zero,
            "final": self.final,
            **{name: matrix.tolist() for name, matrix in self.matrices.items()},
            "checksum": self.check(path),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "ScheduleCurve":
        """Inverse of [`to_dict`].

        Raises:
            ValueError: for unknown, missing or malformed entries, saying which.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"a curve must be a mapping, got {type(entry).__name__}; see ScheduleCurve.to_dict")
        unknown = sorted(set(entry) - set(CURVE_KEYS))
        if unknown:
            raise ValueError(f"unknown entries {str(unknown):.200} of the curve; remove them or update ld3-diffusers")
        for what, (is_right, keys) in _entry_types().items():
            for key in keys:
                if not is_right(entry.get(key)):
                    raise ValueError(
                        f"{key!r} of the curve must be {what}, got {entry.get(key)!r:.60}; check its config"
                    )
        shapes = {name: tuple(float64(entry[name]).shape[-2:]) for name in KINDS if entry[name]}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the matrices of the curve must have one shape, got {shapes}; check its config")
        spec = SolverSpec(**{key: entry[key] for key in SOLVER_KEYS if key in entry})
        if spec.make().stages != 1 or spec.afs:
            raise ValueError(
                f"the curve's solver {spec.solver} must make one evaluation a step, without an analytical first one"
            )
        matrices = {name: float64(entry[name]) for name in KINDS}
        matrices["residuals"] = matrices["residuals"].view(-1, *matrices["times"].shape)  # of none, too
        names = ("noise_path", "prediction_type", "to_zero", "final", "checksum")
        rest = {key: entry[key] for key in names if entry.get(key) is not None}
        return cls(matrices, tuple(entry["counts"]), spec, provenance=entry.get("provenance") or {}, **rest)


CURVE_KEYS = (
    *SOLVER_KEYS,
    "noise_path",
    "prediction_type",
    "counts",
    "to_zero",
    "final",
    *KINDS,
    "checksum",
    "provenance",
)


def _is_matrix(value) -> bool:
    rows = isinstance(value, list) and 0 < len(value) <= LARGEST_SIDE and all(isinstance(row, list) for row in value)
    widths = {len(row) for row in value} if rows else set()
    return len(widths) == 1 and 0 < min(widths) <= LARGEST_SIDE and all(is_number(x) for row in value for x in row)


def _are_matrices(value) -> bool:
    return isinstance(value, list) and len(value) <= LARGEST_SIDE and all(map(_is_matrix, value))


def _are_counts(value) -> bool:
    whole = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(count) is int for count in value)
    return whole and 2 <= value[0] <= value[1] <= LARGEST_SIDE


def _entry_types() -> dict:
    """As `ENTRY_TYPES` of schedules, of which it takes over those of the same entries."""
    own = {
        f"a matrix of finite numbers of at most {LARGEST_SIDE} rows": (_is_matrix, ("times", "network_times")),
        f"a list of at most {LARGEST_SIDE} such matrices": (_are_matrices, ("residuals",)),
        f"two numbers of evaluations, 2 to {LARGEST_SIDE}, that rise": (_are_counts, ("counts",)),
        "true or false": (lambda value: type(value) is bool, ("to_zero",)),
    }
    optional = {}
    for what, (is_right, keys) in ENTRY_TYPES.items():
        kept = tuple(key for key in keys if key in CURVE_KEYS and key not in KINDS)
        optional[f"{what}, or absent"] = (lambda value, is_right=is_right: value is None or is_right(value), kept)
    return {**own, **optional}
