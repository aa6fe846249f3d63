# SPDX-License-Identifier: Apache-2.0
"""Solvers as row builders; one file a family."""

from dataclasses import fields

from .adams_bashforth import IPNDM, IPNDMV, AdamsBashforth
from .deis import DEIS
from .dpmpp import DPMSolverMultistep
from .euler import DDIM, Euler
from .rows import Row, Solver
from .two_stage import AMED, DPMSolver2, Heun
from .unipc import UniPC


SOLVERS: dict[str, type[Solver]] = {
    cls.name: cls
    for cls in (Euler, DDIM, DPMSolverMultistep, UniPC, IPNDM, IPNDMV, AdamsBashforth, DEIS, Heun, DPMSolver2, AMED)
}
ORDERS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("euler", "ddim"), (1,)),
    **dict.fromkeys(("dpmpp", "unipc"), (1, 2, 3)),
    **dict.fromkeys(("ipndm", "ipndm_v", "abv", "deis"), (1, 2, 3, 4)),
    **dict.fromkeys(("heun", "dpm2", "amed"), (2,)),
}
VARIANTS = {"dpmpp": ("midpoint", "heun"), "unipc": ("bh2", "bh1"), "deis": ("logrho", "rhoab", "tab")}


def make_solver(name: str, **options) -> Solver:
    """The solver of that name; `options` that are None or that the solver does not have stay at its defaults.

    Raises:
        ValueError: for an unknown solver, order or variant.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; use one of {', '.join(sorted(SOLVERS))}")
    known = {f.name for f in fields(SOLVERS[name])}
    options = {key: value for key, value in options.items() if key in known and value is not None}
    order = options.get("order")
    if order is not None:
        if type(order) is not int or order not in ORDERS[name]:
            raise ValueError(
                f"{name} has no order {order!r}; use solver_order = {' or '.join(map(str, ORDERS[name]))}"
            )
    variant = options.get("variant")
    if variant is not None and variant not in VARIANTS[name]:
        raise ValueError(f"{name} has no solver_type {variant!r}; use one of {', '.join(VARIANTS[name])}")
    return SOLVERS[name](**options)


__all__ = ["ORDERS", "SOLVERS", "VARIANTS", "Row", "Solver", "make_solver"] + [
    cls.__name__ for cls in SOLVERS.values()
]
