# SPDX-License-Identifier: Apache-2.0
"""The name of a scheduler on a command line: `NAME[:option=value,...]`.

NAME is one of

| NAME | what takes part |
|---|---|
| `stock` | the stock schedulers of `contenders.stock_contenders`, in each of their timestep spacings |
| a scheduler class of Diffusers | that one, made from the config of the pipeline's own |
| `LD3Scheduler` | a solver on a grid that was not learned, e.g. `LD3Scheduler:solver=ipndm,discretization=dmn` |
| a folder, or `owner/name` on the Hub | the learned schedules there; `subfolder=` and `revision=` say where |

`name=` is how it is called in tables; all other options are options of the scheduler's config, read as YAML scalars (`true`, `3`, `.5`,
`linspace`). A value cannot hold a comma. Of learned schedules `solver=`, `solver_order=` and the other options of a solver replace the
one that they were learned with; AMED's stages, learned coefficients and curves serve that one alone.
"""

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import yaml
from diffusers import SchedulerMixin

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.solvers import SOLVERS


STOCK, LEARNED = "stock", "LD3Scheduler"
PLACES = ("subfolder", "revision")  # options that say where a learned schedule is, beside its folder or repository


@dataclass(frozen=True)
class SchedulerSpec:
    """One `NAME[:option=value,...]`.

    Attributes:
        text: as typed.
        source: NAME.
        options: the options but for `name`.
        name: how it is called; None: after NAME.
        solver_is_tried: its solver is one for all who can take it, which this one need not.
    """

    text: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    solver_is_tried: bool = False

    @property
    def kind(self) -> type[SchedulerMixin] | None:
        """The scheduler's class; None for `stock` and for what is saved somewhere."""
        if self.source == LEARNED:
            return LD3Scheduler
        return _stock_classes().get(self.source)

    @property
    def is_saved(self) -> bool:
        return self.source != STOCK and self.kind is None

    def with_solvers(self, solvers: Sequence[str]) -> "list[SchedulerSpec]":
        """One for each of `solvers` where none was typed and one can be chosen; else this."""
        if not solvers or "solver" in self.options or not (self.is_saved or self.kind is LD3Scheduler):
            return [self]
        name = self.name or called(self.source)
        return [
            replace(self, options={**self.options, "solver": solver}, name=f"{name} {solver}", solver_is_tried=True)
            for solver in solvers
        ]


def _stock_classes() -> dict[str, type[SchedulerMixin]]:
    found = {name: getattr(diffusers, name, None) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {
        name: kind
        for name, kind in found.items()
        if inspect.isclass(kind) and issubclass(kind, SchedulerMixin) and hasattr(kind, "step")
    }


def called(source: str) -> str:
    """How a scheduler is called that has no name=: a folder's last part, else NAME."""
    return Path(source).name if Path(source).is_dir() else source


def parse_scheduler(text: str) -> SchedulerSpec:
    """Read `NAME[:option=value,...]`.

    Raises:
        ValueError: for a NAME that is nothing known, with the nearest ones, or options that cannot be read.
    """
    source, _, typed = text.partition(":") if not Path(text).is_dir() else (text, "", "")
    options: dict[str, Any] = {}
    for item in typed.split(",") if typed else ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(
                f"{item!r} in the scheduler {text!r} is no option=value; separate options by commas, which values cannot hold"
            )
        key = key.strip()
        if key in options:
            raise ValueError(f"the scheduler {text!r} gives {key} twice; give it once")
        options[key] = value.strip() if key in ("name", *PLACES) else _scalar(text, key, value)
    name = options.pop("name", None)
    if name == "":
        raise ValueError(f"the scheduler {text!r} has an empty name=; drop it")
    spec = SchedulerSpec(text, source.rstrip("/"), options, name)
    if spec.source == STOCK and (options or name):
        raise ValueError(f"stock takes no options; name a class instead of {text!r}, e.g. UniPCMultistepScheduler")
    if spec.is_saved:
        _check_source(spec)
    elif set(PLACES) & set(options):
        raise ValueError(f"subfolder= and revision= are for saved schedulers; drop them from {text!r}")
    if spec.kind is LD3Scheduler or spec.is_saved:
        unknown = set(options) - set(PLACES) - set(inspect.signature(LD3Scheduler.__init__).parameters)
    else:
        taken = inspect.signature(spec.kind.__init__).parameters if spec.kind else {}
        unknown = set(options) - set(taken)
    if unknown:
        raise ValueError(f"the scheduler {text!r} has no option {sorted(unknown)[0]!r}; see its class for the names")
    if "solver" in options and options["solver"] not in SOLVERS and (spec.is_saved or spec.kind is LD3Scheduler):
        raise ValueError(f"unknown solver {options['solver']!r} in {text!r}; use one of {', '.join(sorted(SOLVERS))}")
    return spec


def _scalar(text: str, key: str, value: str) -> Any:
    try:
        scalar = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value} in the scheduler {text!r} cannot be read; put it in quotes") from error
    if isinstance(scalar, (dict, list)):
        raise ValueError(f"{key}={value} in the scheduler {text!r} is no single value; use a saved config for lists")
    return scalar


def _check_source(spec: SchedulerSpec) -> None:
    """Raises a `ValueError` unless NAME is an existing folder or has the form of a Hub id."""
    folder = Path(spec.source)
    if folder.is_dir():
        if not (folder / spec.options.get("subfolder", "") / "scheduler_config.json").is_file():
            raise ValueError(f"the folder {spec.source!r} holds no scheduler_config.json; see subfolder=")
        return
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec.source):
        return
    known = [STOCK, LEARNED, *_stock_classes()]
    near = (
        difflib.get_close_matches(spec.source, known, n=3)
        or [name for name in known if spec.source.lower() in name.lower() and spec.source][:3]
    )
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help for the forms"
    raise ValueError(
        f"unknown scheduler {spec.source!r}: neither stock, a scheduler class of Diffusers, an existing folder nor a Hub id "
        f"owner/name; {hint}"
    )
