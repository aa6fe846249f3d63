# SPDX-License-Identifier: Apache-2.0
"""Reading a certificate from elsewhere: its form, before anything in it is believed."""

import json
from pathlib import Path
from typing import Any

from .call_settings import CALL_SETTINGS
from .teacher_set import LARGEST_SEED


FORMAT_VERSION = 1
LARGEST_FILE = 64 * 2**20
TEXT, COUNT, FLAG, LIST, MAP, NONE = (str,), (int,), (bool,), (list,), (dict,), (type(None),)
NUMBER = (int, float)
FORM = {
    "certificate": {
        **{"format_version": COUNT, "teacher": MAP, "base_model": TEXT + NONE, "pipeline": TEXT, "dtype": TEXT},
        **{"call_settings": MAP, "solver": MAP, "teacher_schedule": MAP, "metric": TEXT, "runs": MAP, "counts": MAP},
    },
    "teacher": {"name": TEXT, "hub_id": TEXT + NONE, "revision": TEXT + NONE, "digest": TEXT},
    "solver": {
        **{"solver": TEXT, "solver_order": COUNT + NONE, "solver_type": TEXT + NONE, "predict_x0": FLAG},
        **{"lower_order_final": FLAG, "afs": FLAG, "starting_scale": TEXT + NONE},
    },
    "teacher_schedule": {
        **{"solver": TEXT, "solver_order": COUNT + NONE, "discretization": TEXT + NONE, "steps": COUNT},
    },
    "run": {
        **{"seeds": LIST, "prompts": LIST, "disjoint": LIST, "left_out": COUNT, "batch_size": COUNT},
        **{"arguments": MAP, "versions": MAP, "device": TEXT, "date": TEXT},
    },
    "count": {"entry_sha256": TEXT, "won": FLAG, "learned": MAP, "stock": LIST, "run": TEXT},
    "scheduler": {
        **{"name": TEXT, "class": TEXT, "setting": TEXT, "num_inference_steps": COUNT, "evaluations": COUNT},
        **{"mean": NUMBER + NONE, "distances": LIST + NONE},
    },
}
STAGES = ("static", "per sample")  # of AMED's steps; schedules without them have no such key in their `solver`
CALL_TYPES = {"negative_prompt": TEXT, "guidance_scale": NUMBER, "true_cfg_scale": NUMBER}


def read(path: str | Path) -> dict[str, Any]:
    """A certificate of the right form.

    Raises:
        ValueError: if the file cannot be read, or is no certificate of this version, saying where.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"the certificate has more than {LARGEST_FILE >> 20} MiB; make one with fewer samples")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read the certificate {path.name!r}: {error}; download it again") from error
    validate(content)
    return content


def validate(content: Any) -> None:
    """Raises a `ValueError` that names the place, if this has not the form of a certificate."""
    if isinstance(content, dict) and content.get("format_version") not in (None, FORMAT_VERSION):
        raise ValueError(
            f"this certificate has format version {content['format_version']!r}, this program reads {FORMAT_VERSION}; update it"
        )
    _shaped("certificate", content, "the certificate")
    for name in ("teacher", "teacher_schedule"):
        _shaped(name, content[name], name)
    solver = dict(content["solver"])
    _require(solver.pop("stages", STAGES[0]) in STAGES, "solver.stages")
    _shaped("solver", solver, "solver")
    for name, value in content["call_settings"].items():
        _require(name in CALL_SETTINGS and _is(value, CALL_TYPES.get(name, COUNT)), f"call_settings.{name}")
    for label, run in content["runs"].items():
        _shaped("run", run, f"runs.{label}")
        where = f"runs.{label}"
        seeds = run["seeds"]
        _require(len(seeds) == 2 and all(_is(seed, COUNT) for seed in seeds), f"{where}.seeds")
        _require(0 <= seeds[0] <= seeds[1] <= LARGEST_SEED, f"{where}.seeds")
        _require(all(_is(prompt, TEXT) for prompt in run["prompts"]), f"{where}.prompts")
        _require(run["disjoint"] in (["seeds"], ["seeds", "prompts"]), f"{where}.disjoint")
        _require(run["left_out"] >= 0 and run["batch_size"] > 0, f"{where}.left_out or batch_size")
    for nfe, record in content["counts"].items():
        where = f"counts.{nfe}"
        _require(nfe.isdecimal() and int(nfe) > 0, where)
        _shaped("count", record, where)
        _require(record["run"] in content["runs"], f"{where}.run")
        first, last = content["runs"][record["run"]]["seeds"]
        _scheduler(record["learned"], last - first + 1, f"{where}.learned")
        _require(record["learned"]["distances"] is not None, f"{where}.learned.distances")
        for k, row in enumerate(record["stock"]):
            _require(isinstance(row, dict), f"{where}.stock[{k}]")
            interval = row.get("difference")
            _scheduler({key: row[key] for key in row if key != "difference"}, last - first + 1, f"{where}.stock[{k}]")
            fits = interval is None if row["distances"] is None else _is(interval, LIST) and len(interval) == 3
            _require(fits and all(_is(x, NUMBER) for x in interval or []), f"{where}.stock[{k}].difference")


def _is(value, kinds: tuple) -> bool:
    # In Python true is an int and NaN a float; in a certificate they are neither.
    if isinstance(value, bool):
        return kinds is FLAG
    return isinstance(value, kinds) and (not isinstance(value, NUMBER) or abs(value) < 1e300)


def _require(condition: bool, where: str) -> None:
    if not condition:
        raise ValueError(f"the certificate is malformed at {where}; download it again, or certify again")


def _shaped(form: str, value, where: str) -> None:
    _require(isinstance(value, dict) and set(value) == set(FORM[form]), where)
    for name, kinds in FORM[form].items():
        _require(_is(value[name], kinds), f"{where}.{name}")


def _scheduler(row, samples: int, where: str) -> None:
    _shaped("scheduler", row, where)
    _require((row["mean"] is None) == (row["distances"] is None), f"{where}.mean")
    distances = row["distances"]
    if distances is not None:
        right = len(distances) == samples and all(_is(d, NUMBER) and d >= 0 for d in distances)
        _require(right, f"{where}.distances")
