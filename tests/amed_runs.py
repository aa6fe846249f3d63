# SPDX-License-Identifier: Apache-2.0
"""AMED schedulers for tiny pipelines, records of what was asked of networks and schedulers, and AMED-Solver written by hand."""

import functools
from contextlib import contextmanager

import torch

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.amed import StepPrediction, amed_schedule, with_step
from ld3_diffusers.amed_predictor import AMEDPredictor
from ld3_diffusers.discretization import append_zero, discretization
from ld3_diffusers.schedule import SolverSpec
from ld3_diffusers.schedulers.scheduling_amed import AMEDScheduler


R, SCALE_DIR, SCALE_TIME = (0.35, 0.6, 0.45), (1.03, 0.98, 1.01), (0.93, 1.06, 0.97)
PROMPTS = ["a red fox", "blue sea", "an old tree", "tea"]


def bare_schedule(config, steps=3, solver="amed", noise_path=None, **options):
    """The bare solver's schedule for `steps` student steps, and the path it is for."""
    more = {} if noise_path is None else {"noise_path": noise_path}
    scheduler = LD3Scheduler.from_config(config, schedules=None, **more)
    path = scheduler.path
    if path.kind == "flow":
        times = append_zero(torch.linspace(1, 0.2, steps, dtype=torch.float64))
    else:
        name = "polynomial" if path.kind == "ve" else "time_uniform"
        times = discretization(name, path, steps)
    spec = SolverSpec(solver, **options)
    return amed_schedule(times, spec, path, scheduler.config.prediction_type), path


def static_schedule(config, steps=3, solver="amed", r=R, scale_dir=SCALE_DIR, scale_time=SCALE_TIME, **options):
    schedule, path = bare_schedule(config, steps, solver, **options)
    for n in range(steps):
        schedule = with_step(schedule, n, StepPrediction(r[n], scale_dir[n], scale_time[n]), path)
    return schedule, path


def serving(cls, config, schedule, path, **more):
    return cls.from_config(config, schedules={str(schedule.nfe): schedule.to_dict(path)}, **more)


def predictor_for(solver="amed", **options):
    """A predictor whose answers differ much between samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        predictor = AMEDPredictor(**{"scale_dir": 0.05, "scale_time": 0.1, "solver": solver, **options})
    with torch.no_grad():
        for layer in (predictor.enc_layer0, predictor.enc_layer1):
            layer.weight *= 4
    return predictor


def per_sample(config, steps=3, solver="amed", noise_path=None, **options) -> AMEDScheduler:
    schedule, path = bare_schedule(config, steps, solver, noise_path, **options)
    more = {} if noise_path is None else {"noise_path": noise_path}
    scheduler = serving(AMEDScheduler, config, schedule, path, **more)
    scheduler.set_predictor(schedule.nfe, predictor_for(solver, **options))
    return scheduler


@contextmanager
def recorded(scheduler):
    """(state, network's output after guidance, next state) of all steps, as the pipeline hands them over."""
    steps, step = [], scheduler.step

    @functools.wraps(step)
    def noting(model_output, timestep, sample, *args, **kwargs):
        result = step(model_output, timestep, sample, *args, **kwargs)
        steps.append((sample.double(), model_output.double(), result[0].double()))
        return result

    scheduler.step = noting
    try:
        yield steps
    finally:
        del scheduler.step


@contextmanager
def watched(network, first="sample"):
    """(sample, timestep) of all calls as the network gets them, after the hooks that are there already."""
    calls = []

    def note(_module, args, kwargs):
        sample = kwargs[first] if first in kwargs else args[0]
        calls.append((sample.clone(), kwargs["timestep"] if "timestep" in kwargs else args[1]))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def bottlenecks(unet):
    """The means over channels of the bottleneck's output in all calls."""
    means = []
    hook = unet.mid_block.register_forward_hook(lambda _module, _args, output: means.append(output.mean(1)))
    try:
        yield means
    finally:
        hook.remove()


def by_hand(schedule, path, steps, first=0, predict=None):
    r"""AMED-Solver, or the plugin on Euler, from row `first` on, without step tables.

    With $y = x/scale$ and the data prediction $D = y - \tilde z F$ of a network that predicts noise (rectified flow: velocity) and is
    told the level $\tilde z = a z_s$, the derivative is $d = (y - D)/z = (\tilde z/z) F$, and

    $$ y_s = y + (z_s - z) d, \qquad y' = y + c (z' - z) d_s, \quad \text{Euler: } y' = y_s + c (z' - z_s) d_s. $$

    Args:
        steps: as [`recorded`] from row `first` on.
        predict: (r, c, a) of step n, whose first evaluation was made; default: what the schedule has.

    Returns:
        Of each row the next state, what the network saw and the timestep that it was told, float64.
    """
    flow = path.kind == "flow"
    z, time = (lambda t: t, lambda z: z) if flow else (path.sigma_edm, path.inverse_sigma_edm)
    levels, told, scales = (
        list(values) for values in (schedule.times, schedule.network_times, schedule.direction_scales)
    )
    states, seen, begin, origin, moved = [], [], None, None, None
    for row, (state, output, _) in zip(range(first, len(told)), steps):
        if predict is not None and row % 2 == 0:
            r, scales[row + 1], scale_time = predict(row // 2)
            floor = levels[row + 2].clamp(min=path.t_min)
            levels[row + 1] = time(z(floor) ** r * z(levels[row]) ** (1 - r))
            told[row + 1] = time(scale_time * z(levels[row + 1])).clamp(floor, levels[row])
        y = state / shaped(path.scale(levels[row]), state)
        seen.append(y * shaped(path.scale(told[row]) * path.input_scale(told[row]), state))
        derivative = shaped(z(told[row]) / z(levels[row]), state) * output
        if row == first or row % 2 == 0 or schedule.spec.solver == "euler":
            begin, origin = z(levels[row]), y
        else:
            origin = y - moved
        moved = shaped(scales[row] * (z(levels[row + 1]) - begin), state) * derivative
        states.append((origin + moved) * shaped(path.scale(levels[row + 1]), state))
    return states, seen, [path.timestep(t) for t in told[first:]]


def shaped(values, state):
    """One value for all or for each sample, to multiply the state with."""
    return values.reshape(-1, *[1] * (state.ndim - 1))
