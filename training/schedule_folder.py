# SPDX-License-Identifier: Apache-2.0
"""The folder that learning and searches write: one scheduler config with a schedule for each count, and how each came about."""

import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import diffusers
import torch

import ld3_diffusers
from ld3_diffusers import (
    AMEDPredictor,
    AMEDScheduler,
    LD3Scheduler,
    Schedule,
    ScheduleCurve,
    SolverSpec,
    load_scheduler,
)
from ld3_diffusers.schedulers.scheduling_amed import PREDICTOR_FOLDER
from ld3_diffusers.schedulers.stock_config import MODEL_KEYS
from ld3_diffusers.solvers import VARIANTS

from .learner import Problem
from .schedule_plot import plot_schedules


CONFIG = "scheduler_config.json"
CURVE_FOLDER = "curve"  # of what belongs to a curve, as nfe-<n> is of a schedule


def existing(folder: str | Path) -> LD3Scheduler | None:
    """The scheduler that the folder already holds; a `ValueError` if it cannot be read."""
    return load_scheduler(folder) if Path(folder, CONFIG).exists() else None


def check_same_model(present: LD3Scheduler | None, config) -> None:
    """Raises a `ValueError` if the schedules in the output folder are for another kind of model."""
    if present is None:
        return
    for key in MODEL_KEYS:
        if present.config[key] != config[key]:
            raise ValueError(
                f"the output folder holds schedules for a model with {key}={present.config[key]!r}, this one has "
                f"{config[key]!r}; choose another --output_dir"
            )


def holds(folder: str | Path, nfe: int | None, spec: SolverSpec, facts: dict) -> bool:
    """Whether the folder holds the schedule for `nfe` evaluations, or if None the curve, that a run with these facts would make."""
    present = existing(folder)
    config = {} if present is None else present.config
    entry = config.get("curve") if nfe is None else (config.get("schedules") or {}).get(str(nfe))
    entry = entry or {}
    made = entry.get("provenance", {})
    same_solver = all(entry.get(name) == value for name, value in vars(spec).items())
    return same_solver and all(made.get(name) == value for name, value in facts.items())


def settings(args: Namespace, problem: Problem, method: dict) -> dict:
    """Facts of a run that are known before it, as plain JSON: teacher, settings of its call, pairs; `method` are those of what it does."""
    pipe, made = problem.rollout.pipe, problem.train.whole
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    # A local folder's name identifies nothing; `LD3Scheduler.check` compares "teacher", so that is a Hub id or absent.
    local = Path(args.pretrained_model_name_or_path).is_dir()
    facts = {
        "teacher": None if local else args.pretrained_model_name_or_path,
        "teacher_name": Path(args.pretrained_model_name_or_path).resolve().name if local else None,
        "revision": args.revision,
        "teacher_digest": made.provenance["teacher_digest"],
        "pipeline": type(pipe).__name__,
        # FSDP puts its name before that of the network's class.
        "denoiser": None if denoiser is None else type(denoiser).__name__.removeprefix("FSDP"),
        "in_channels": None if denoiser is None else denoiser.config.get("in_channels"),
        "guidance_embeds": None if denoiser is None else denoiser.config.get("guidance_embeds"),
        "dtype": None if denoiser is None else str(denoiser.dtype).removeprefix("torch."),
        **made.call_settings,
        "teacher_solver": made.provenance.get("solver"),
        "teacher_solver_order": made.provenance.get("solver_order"),
        "teacher_solver_type": _solver_type(made.provenance),
        "teacher_discretization": made.provenance.get("discretization"),
        "teacher_final_sigmas_type": made.provenance.get("final_sigmas_type"),
        "teacher_steps": made.provenance["num_inference_steps"],
        **method,
        "final_sigmas_type": args.final_sigmas_type,
        "train_pairs": len(problem.train),
        "valid_pairs": len(problem.valid),
        "learned_on": {"train": problem.train.used(), "valid": problem.valid.used()},
        "seed": args.seed,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _solver_type(made: dict) -> str | None:
    """The variant of the solver that made some pairs; None for its default, or where the config names another solver's."""
    kind = made.get("solver_type")
    return kind if kind in VARIANTS.get(made.get("solver"), ())[1:] else None


def with_start(facts: dict, start: dict) -> dict:
    """The facts of a run that started from a schedule with the provenance `start`: what that was learned on is known to this one."""
    before = start.get("learned_on")
    if before is None:
        return facts
    united = {}
    for part, used in facts["learned_on"].items():
        seeds = [*used["seeds"], *before[part]["seeds"]]
        prompts = sorted({*used["prompts"], *before[part]["prompts"]})
        united[part] = {"seeds": [min(seeds), max(seeds)], "prompts": prompts}
    return {**facts, "learned_on": united}


def results(found: dict, rivals: dict[str, float], mu: float) -> dict:
    """Facts that a run found out: its own, and with which loss of which hand-made grid (best first), `mu` and versions."""
    best = next(iter(rivals), None)
    return {
        **found,
        **({} if best is None else {"best_grid": best, "best_grid_loss": rivals[best]}),
        **({"mu": mu} if mu else {}),
        "versions": {
            "ld3_diffusers": ld3_diffusers.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }


def save(
    output_dir: str | Path,
    schedule: Schedule | ScheduleCurve,
    stock,
    path,
    pictures: dict[str, Schedule],
    history: list | None = None,
    predictor: AMEDPredictor | None = None,
) -> None:
    """Everything to a temporary folder first, then file by file to its place, the config last.

    Args:
        history: that of learning.
        predictor: that of a schedule whose stages are predicted for each sample.
    """
    output = Path(output_dir)
    present = existing(output)
    if isinstance(schedule, ScheduleCurve):
        learned, folder, has_stages = {"curve": schedule.to_dict(path)}, output / CURVE_FOLDER, False
    else:
        entries = {
            **({} if present is None else present.config.schedules or {}),
            str(schedule.nfe): schedule.to_dict(path),
        }
        learned = {"schedules": {count: entries[count] for count in sorted(entries, key=int)}}
        folder, has_stages = output / f"nfe-{schedule.nfe}", schedule.direction_scales is not None
    has_stages = has_stages or isinstance(present, AMEDScheduler)
    kind = AMEDScheduler if has_stages else LD3Scheduler
    if present is None:
        spec = schedule.spec
        names = ("solver", "solver_order", "solver_type", "predict_x0", "lower_order_final")
        # None, a solver's default, is no value to a stock scheduler that may be made from this config
        given = {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}
        scheduler = kind.from_config(stock, **given, **learned)
    else:
        scheduler = kind.from_config(present.config, **learned)
    predictors = dict(getattr(present, "predictors", {}))
    if isinstance(schedule, Schedule):
        predictors[schedule.nfe] = predictor
    predictors = {nfe: each for nfe, each in predictors.items() if each is not None}
    for nfe, each in predictors.items():
        scheduler.set_predictor(nfe, each)
    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        scheduler.save_pretrained(partial)
        load_scheduler(partial)
        if history is not None:
            numbers = [{k: v if math.isfinite(v) else None for k, v in entry.items()} for entry in history]
            log = "".join(json.dumps({"step": i + 1, **entry}) + "\n" for i, entry in enumerate(numbers))
            (partial / "training_log.jsonl").write_text(log, encoding="utf-8")
        plot_schedules(pictures, path, partial / "schedule.png")
        folder.mkdir(exist_ok=True)
        for name in ("training_log.jsonl", "schedule.png"):
            if (partial / name).exists():
                os.replace(partial / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # of what was there before
        own = PREDICTOR_FOLDER.format(nfe=getattr(schedule, "nfe", "curve"))
        if predictor is not None:
            if (output / own).exists():
                if present is not None:  # while one predictor takes another's place, no config names either
                    (partial / "before.json").write_text(_without(present, schedule.nfe), encoding="utf-8")
                    os.replace(partial / "before.json", output / CONFIG)
                shutil.rmtree(output / own)
            os.replace(partial / own, output / own)
        os.replace(partial / CONFIG, output / CONFIG)
        if predictor is None:
            shutil.rmtree(output / own, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _without(scheduler: LD3Scheduler, nfe: int) -> str:
    """Its config without the schedule for `nfe` evaluations."""
    rest = {count: entry for count, entry in (scheduler.config.schedules or {}).items() if count != str(nfe)}
    return type(scheduler).from_config(scheduler.config, schedules=rest or None).to_json_string()
