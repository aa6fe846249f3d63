# SPDX-License-Identifier: Apache-2.0
"""Subfolders of a repository of certified schedules, named after what tells their schedules from those in the root."""

import hashlib
from typing import Any

from .call_settings import CALL_SETTINGS
from .certificate import SOLVER, solver_facts


SHORT = {"true_cfg_scale": "t", "max_sequence_length": "l"}  # in the names of variants


def variant_name(certificate: dict[str, Any], root: dict[str, Any]) -> str:
    """`<solver>`, how AMED's stages are placed, and behind it what else differs from the root: `unipc-o3`, `dpmpp-g5-768`,
    `ipndm-static`, `amed-per-sample`; "" if nothing does.
    """
    solver, call = certificate["solver"], certificate["call_settings"]
    sampler = _sampler(solver)
    other = sampler != _sampler(root["solver"])
    # The options of another solver are compared with that solver's defaults.
    same = solver["solver"] == root["solver"]["solver"]
    usual = root["solver"] if same else solver_facts({"solver": solver["solver"], "times": [1, 0]})
    different = {name for name in SOLVER if solver[name] != usual[name]}
    different |= {name for name in CALL_SETTINGS if call.get(name) != root["call_settings"].get(name)}
    parts = []
    if "solver_order" in different:
        parts.append(f"o{solver['solver_order']}")
    if "solver_type" in different:
        parts.append(str(solver["solver_type"]))
    options = ("predict_x0", "lower_order_final", "afs", "starting_scale")
    parts += [f"{name}-{solver[name]}".lower() for name in options if name in different]
    if "guidance_scale" in different:
        parts.append(f"g{_text(call.get('guidance_scale'))}")
    parts += [f"{short}{_text(call.get(name))}" for name, short in SHORT.items() if name in different]
    if different & {"height", "width"}:
        height, width = (_text(call.get(name)) for name in ("height", "width"))
        parts.append(height if height == width else f"{height}x{width}")
    if "negative_prompt" in different:
        parts.append("n" + hashlib.sha256(str(call.get("negative_prompt")).encode()).hexdigest()[:6])
    return "-".join([sampler, *parts]) if parts or other else ""


def _sampler(solver: dict[str, Any]) -> str:
    return "-".join([solver["solver"], *(solver.get("stages") or "").split()])


def _text(value) -> str:
    return "default" if value is None else f"{value:g}"
