# SPDX-License-Identifier: Apache-2.0
"""Schedules published elsewhere: lists of times, lists of sigmas, LD3's `.pt` files, AMED's predictors.

path = LD3Scheduler.from_config(pipe.scheduler.config).path
schedule = import_times("[1, .76668, .48113, .18417, .001]", path=path, solver="ipndm", solver_order=2)
pipe.scheduler = scheduler_for(schedule, pipe.scheduler.config)
"""

import ast
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .amed import FORMS, STUDENT_KEYS, amed_schedule, static_schedule
from .amed_predictor_file import DISCRETIZATIONS, read_predictor_file
from .discretization import discretization
from .noise_path import NoisePath, float64
from .schedule import SOLVER_KEYS, Schedule, SolverSpec
from .schedulers import AMEDScheduler, LD3Scheduler
from .schedulers.scheduling_amed import check_predictor


def _numbers(values, name: str) -> torch.Tensor:
    """A list of numbers, or the text of one as it stands in a command line."""
    if isinstance(values, str):
        try:
            values = ast.literal_eval(values.strip())
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{name} is not a list of numbers; write it as '[1, 0.7, 0.3, 0.001]'") from error
    try:
        numbers = float64(values if isinstance(values, torch.Tensor) else list(map(float, values)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not a list of numbers; write it as [1, 0.7, 0.3, 0.001]") from error
    if numbers.ndim != 1 or len(numbers) < 2:
        raise ValueError(f"{name} needs at least a first and a last value, from noise to data")
    return numbers


def import_times(
    times: Sequence[float] | str,
    network_times: Sequence[float] | str | None = None,
    *,
    path: NoisePath,
    prediction_type: str | None = None,
    final: bool = False,
    **solver,
) -> Schedule:
    """LD3's `custom_ts_1` and `custom_ts_2`: N + 1 continuous times each, from t_max to t_min in the time of the path.

    Args:
        times: where the solver steps.
        network_times: what the network is told; its last entry, of an evaluation that is never used, may be left out. Defaults
            to `times`.
        path: noise path of the model, e.g. `LD3Scheduler.from_config(pipe.scheduler.config).path`.
        prediction_type: of the network; default: "flow_prediction" on rectified flow, else "epsilon".
        final: of rectified flow: the times have their resolution shift already, and no other is applied.
        solver: fields of [`SolverSpec`]; `solver` itself defaults to "unipc".

    Raises:
        ValueError: if the lists are no schedule on this path.
    """
    times = _numbers(times, "times")
    if network_times is not None:
        network_times = _numbers(network_times, "network_times")
        if len(network_times) == len(times):
            network_times = network_times[:-1]
    if prediction_type is None:
        prediction_type = "flow_prediction" if path.kind == "flow" else "epsilon"
    unknown = sorted(set(solver) - set(SOLVER_KEYS))
    if unknown:
        raise ValueError(f"unknown options {unknown}; a schedule's solver has {', '.join(SOLVER_KEYS)}")
    schedule = Schedule(times, network_times, SolverSpec(**solver), path.kind, prediction_type, final=final)
    schedule.table(path)
    return schedule


def import_sigmas(
    sigmas: Sequence[float] | str, *, path: NoisePath, prediction_type: str | None = None, **solver
) -> Schedule:
    """N + 1 noise levels sigma/alpha, from noise to data and perhaps ending in 0 (AYS, GITS, k-diffusion); on
    rectified flow s, before any resolution shift unless `final=True`. Options as [`import_times`]."""
    sigmas = _numbers(sigmas, "sigmas")
    if bool((sigmas < 0).any()):
        raise ValueError("sigmas must not be negative; give noise levels, from noise to data")
    times = sigmas if path.kind == "flow" else path.inverse_sigma_edm(sigmas)
    # Tables are printed with few digits: AYS's 14.615 lies a hair above the path of Stable Diffusion.
    if path.t_max < float(times[0]) <= path.t_max * 1.001:
        times = torch.cat([float64([path.t_max]), times[1:]])
    return import_times(times, path=path, prediction_type=prediction_type, **solver)


def import_pt(file: str | Path, *, path: NoisePath, prediction_type: str | None = None, **solver) -> Schedule:
    """A checkpoint of LD3's authors: `best_t_steps` holds both time vectors, N + 1 entries each. Only tensors are read.

    Raises:
        ValueError: if the file is missing, holds more than tensors, or no such vectors.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no file {str(file)!r}; give the path of a best_v2.pt")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged or holds more than tensors, and is not opened; export its times"
        ) from error
    vector = state.get("best_t_steps") if isinstance(state, dict) else None
    if not isinstance(vector, torch.Tensor) or vector.ndim != 1 or len(vector) % 2 or len(vector) < 4:
        raise ValueError(
            f"{str(file)!r} has no 'best_t_steps' with two equally long time vectors; pass a file of LD3's training"
        )
    times, network_times = vector.double().chunk(2)
    # Saved in float32, whose rounding may leave the path by a last digit.
    return import_times(
        times.clamp(max=path.t_max),
        network_times.clamp(max=path.t_max),
        path=path,
        prediction_type=prediction_type,
        **solver,
    )


def import_amed(file: str | Path, config, *, form: str = "per_sample") -> AMEDScheduler:
    """A predictor of AMED's authors, `network-snapshot-*.pkl`, as a scheduler; no code in the file is run.

    Step ends are those of the file's discretization on the noise path of the pipeline, from t_max to t_min.

    Args:
        config: the pipeline's `scheduler.config`; of the model that the predictor was trained with.
        form: "per_sample": stages are predicted for each sample, after `attach(pipe)`; "static": they are what the
            predictor says to a bottleneck of zeros, plain times that every pipeline and [`LD3Scheduler`] can use.
            Static stages are good ones for some solvers, not for dpm2: compare them.

    Raises:
        ValueError: if the file is no such predictor, or was trained on other noise levels than the pipeline has.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r} of a predictor; use one of {', '.join(FORMS)}")
    predictor, settings = read_predictor_file(file)
    plain = AMEDScheduler.from_config(config, schedules=None)
    path = plain.path
    if path.kind == "flow":
        raise ValueError(
            "AMED's predictor files are of diffusion models and this pipeline has rectified flow; train stages for it "
            "with training.train_amed"
        )
    name = DISCRETIZATIONS[settings["schedule_type"]]
    rho = None if name == "logsnr" else settings["schedule_rho"]
    steps = discretization(name, path, predictor.config.num_steps, rho=rho)
    # The authors' samplers start at sigma times the noise on all paths.
    spec = SolverSpec(**{key: predictor.config[key] for key in STUDENT_KEYS}, starting_scale="sigma")
    schedule = amed_schedule(steps, spec, path, plain.config.prediction_type)
    check_predictor(predictor, schedule, path)
    facts = {"imported_from": Path(file).name, "amed_settings": settings}
    if settings["guidance_type"] == "cfg":
        facts["guidance_scale"] = settings["guidance_rate"]
    schedule = replace(schedule, provenance=facts)
    if form == "static":
        return _scheduler_for(static_schedule(schedule, predictor, path), config, AMEDScheduler)
    scheduler = _scheduler_for(schedule, config, AMEDScheduler)
    scheduler.set_predictor(schedule.nfe, predictor)
    return scheduler


def scheduler_for(schedule: Schedule, config) -> LD3Scheduler:
    """An [`LD3Scheduler`] made from a pipeline's `scheduler.config` that serves this schedule."""
    return _scheduler_for(schedule, config, LD3Scheduler)


def _scheduler_for(schedule, config, cls):
    names = ("solver", "solver_order", "solver_type", "predict_x0")
    # None, a solver's default, is no value to a stock scheduler that may be made from this config
    spec = {key: getattr(schedule.spec, key) for key in names if getattr(schedule.spec, key) is not None}
    plain = cls.from_config(config, schedules=None)
    return cls.from_config(config, schedules={str(schedule.nfe): schedule.to_dict(plain.path)}, **spec)
