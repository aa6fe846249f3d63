# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a comparison: stock schedulers in every setting, and the schedulers that a command line names."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ld3_diffusers import AMEDPredictor, AMEDScheduler, LD3Scheduler, Schedule, SolverSpec, load_scheduler
from ld3_diffusers.schedule import SOLVER_KEYS
from ld3_diffusers.schedulers.learned import check_model

from .comparison import Contender
from .request_file import digest
from .scheduler_specs import PLACES, STOCK, SchedulerSpec, called


SPACINGS = ("linspace", "leading", "trailing")
EDM_FACTS = ("sigma_min", "sigma_max", "sigma_data", "prediction_type", "rho")


# ---------------------------------------------------------------------- stock schedulers


def stock_contenders(config, nfe: int) -> Iterator[Contender]:
    """Stock schedulers made from a pipeline's own scheduler config for `nfe` evaluations, in each timestep spacing that they have.

    Stock Heun makes 2n - 1 evaluations; where `nfe` is even it gets one more.
    """
    heun_steps = nfe // 2 + 1
    if is_flow(config):
        shift, dynamic = _shift(config)
        setting = "shift by resolution" if dynamic else f"shift {shift:g}"
        for name, kind, steps in (
            ("FlowMatchEuler", FlowMatchEulerDiscreteScheduler, nfe),
            ("UniPC", UniPCMultistepScheduler, nfe),
            ("DPM++ 2M", DPMSolverMultistepScheduler, nfe),
            ("FlowMatchHeun", FlowMatchHeunDiscreteScheduler, heun_steps),
        ):
            yield Contender(name, flow_scheduler(kind, config), steps, setting)
        return
    if is_preconditioned(config):
        facts = {key: config[key] for key in EDM_FACTS if config.get(key) is not None}
        for sigmas in ("karras", "exponential"):
            yield Contender("Euler", EDMEulerScheduler(**facts, sigma_schedule=sigmas), nfe, sigmas)
            for order in (2, 3):
                scheduler = EDMDPMSolverMultistepScheduler(**facts, sigma_schedule=sigmas, solver_order=order)
                yield Contender(f"DPM++ {order}M", scheduler, nfe, sigmas)
        return
    for spacing in SPACINGS:
        for name, kind, steps in (
            ("UniPC", UniPCMultistepScheduler, nfe),
            ("DPM++ 2M", DPMSolverMultistepScheduler, nfe),
            ("DEIS", DEISMultistepScheduler, nfe),
            ("Euler", EulerDiscreteScheduler, nfe),
            ("DDIM", DDIMScheduler, nfe),
            ("Heun", HeunDiscreteScheduler, heun_steps),
        ):
            yield Contender(name, kind.from_config(config, timestep_spacing=spacing), steps, spacing)
    karras = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    yield Contender("DPM++ 2M Karras", karras, nfe)


def is_flow(config) -> bool:
    """Whether a scheduler's config is that of a flow model."""
    return LD3Scheduler.from_config(config, schedules=None).path.kind == "flow"


def is_preconditioned(config) -> bool:
    """Whether a scheduler's config is that of a model with EDM's preconditioning."""
    return LD3Scheduler.from_config(config, schedules=None).config.noise_path == "edm"


def _shift(config) -> tuple[float, bool]:
    """Flow models have no timestep spacing but a shift, a constant or one that the pipeline computes from the resolution."""
    # A FlowMatch scheduler calls it `shift`, another one `flow_shift`.
    return config.get("shift", config.get("flow_shift", 1.0)), bool(config.get("use_dynamic_shifting"))


def flow_scheduler(kind: type[SchedulerMixin], config, **options) -> SchedulerMixin:
    """A stock scheduler for a flow pipeline, with the shift of the pipeline's own.

    Raises:
        ValueError: if this one knows no flow models.
    """
    takes = inspect.signature(kind.__init__).parameters
    if "use_flow_sigmas" in takes:
        key, given = "flow_shift", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    elif "shift" in takes:
        key, given = "shift", {}
    else:
        raise ValueError(f"{kind.__name__} knows no flow models, which this pipeline has; use another scheduler")
    shift, dynamic = _shift(config)
    shifted_by_pipelines = not {"sigmas", "mu"} <= set(inspect.signature(kind.set_timesteps).parameters)
    if shifted_by_pipelines and "use_dynamic_shifting" in takes:
        given["use_dynamic_shifting"] = False
    # With a dynamic shift its own must be 1: Heun shifts its largest and smallest sigma once more.
    given[key] = 1.0 if dynamic and shifted_by_pipelines else shift
    scheduler = kind.from_config(config, **{**given, **options})
    return _shifted_by_pipelines(scheduler, key, config) if shifted_by_pipelines else scheduler


def _shifted_by_pipelines(scheduler: SchedulerMixin, key: str, config) -> SchedulerMixin:
    """Let pipelines pass their sigmas and shift to a stock scheduler that does not take them.

    Pipelines of the Flux family pass both. Stock Heun knows neither; DPM++ knows no sigmas and fails on a shift that its config
    does not ask for. Both would drop out of the comparison; so they get the shift as the constant option `key`, which is the
    same formula, and go on from their own unshifted sigmas.
    """
    own, dynamic = scheduler.set_timesteps, bool(config.get("use_dynamic_shifting"))
    exponential = config.get("time_shift_type", "exponential") == "exponential"

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None) -> None:
        if dynamic:
            if mu is None:
                raise ValueError("the pipeline passes no mu, by which its scheduler's config wants to be shifted")
            scheduler.register_to_config(**{key: math.exp(mu) if exponential else mu})
        own(len(sigmas) if num_inference_steps is None else num_inference_steps, device=device)

    set_timesteps.__signature__ = inspect.signature(set_timesteps)
    scheduler.set_timesteps = set_timesteps
    return scheduler


# ---------------------------------------------------------------------- named ones


# In the name of a scheduler that adds noise at each step.
STOCHASTIC = ("Ancestral", "SDE", "DDPM", "LCM", "TCD", "SASolver", "Stochastic")


class NoSchedule(ValueError):
    """A contender cannot run with this number of evaluations; the others can."""


class NamedScheduler:
    """A spec, loaded for a pipeline; makes its contenders for any number of evaluations.

    Args:
        config: of the pipeline's own scheduler.

    Raises:
        ValueError: if it cannot be loaded, or is for another model.
    """

    def __init__(self, spec: SchedulerSpec, config):
        self.spec, self.config = spec, config
        options = {key: value for key, value in spec.options.items() if key not in PLACES}
        self.scheduler: SchedulerMixin | None = None
        try:
            if spec.is_saved:
                self.scheduler = _saved(spec, options)
                check_model(self.scheduler.config, LD3Scheduler.from_config(config, schedules=None).config)
            elif spec.kind is LD3Scheduler:
                self.scheduler = LD3Scheduler.from_config(config, **{"schedules": None, **options})
            elif spec.kind is not None:
                self._stock()
        except (OSError, TypeError, ValueError, NotImplementedError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"the scheduler {spec.text!r} cannot be made: {reason}") from error

    def _stock(self) -> SchedulerMixin:
        kind, options = self.spec.kind, self.spec.options
        if is_flow(self.config):
            return flow_scheduler(kind, self.config, **options)
        takes = inspect.signature(kind.__init__).parameters
        if "shift" in takes and "beta_start" not in takes:
            raise ValueError("it is for flow models, and this pipeline has none; use another scheduler")
        if is_preconditioned(self.config) and "sigma_data" not in takes:
            raise ValueError(
                "it does not know EDM's preconditioning, which this pipeline's network has; use EDMEulerScheduler, "
                "EDMDPMSolverMultistepScheduler, or LD3Scheduler with any solver"
            )
        return kind.from_config(self.config, **options)

    @property
    def name(self) -> str:
        """How it is called in tables; of `stock`, which has many, as typed."""
        return self.spec.name or called(self.spec.source)

    def contenders(self, nfe: int) -> list[Contender]:
        """Ready to run, for `nfe` evaluations or, where that cannot be, the fewest above.

        Raises:
            NoSchedule: if there is no schedule for so many.
        """
        spec = self.spec
        if spec.source == STOCK:
            return [replace(each, spec=spec.text) for each in stock_contenders(self.config, nfe)]
        if isinstance(self.scheduler, LD3Scheduler):
            return [Contender(self.name, *self._learned(nfe), spec=spec.text)]
        setting = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        return [Contender(self.name, self._stock(), _steps(self._stock, nfe), setting, spec=spec.text)]

    def _learned(self, nfe: int) -> tuple[LD3Scheduler, int, str]:
        scheduler = copy_of(self.scheduler)
        try:
            # Where stages are predicted, its own would ask for the pipeline.
            _set_timesteps(scheduler, nfe, LD3Scheduler)
        except ValueError as error:
            raise NoSchedule(str(error)) from error
        learned = scheduler.learned_schedule(nfe)
        if learned is not None:
            return copy_of(self.scheduler), nfe, setting_of(learned.spec, learned)
        interpolated = scheduler.served_counts and scheduler.config.interpolate
        grid = "interpolated" if interpolated else scheduler.config.discretization or "stock grid"
        return copy_of(self.scheduler), nfe, f"{setting_of(scheduler.spec)}, {grid}"


def setting_of(spec: SolverSpec, learned: Schedule | None = None) -> str:
    """A solver in tables, e.g. "unipc 3", and what more a schedule has learned of it: coefficients, or where AMED's stages are."""
    solver = spec.make()
    parts = [f"{solver.name} {solver.order}" if getattr(solver, "order", None) else solver.name]
    parts += ["analytical first step"] if spec.afs else []
    if learned is not None and learned.stages is not None:
        parts.append("static stages" if learned.stages == "static" else "stages per sample")
    parts += ["learned coefficients"] if learned is not None and learned.residuals is not None else []
    return ", ".join(parts)


def scheduler_from(config: Mapping[str, Any], predictors: Mapping[int, AMEDPredictor]) -> LD3Scheduler:
    """The scheduler of a config: an [`AMEDScheduler`] where stages are predicted for each sample, else an [`LD3Scheduler`]."""
    entries = (config["schedules"] or {}).values()
    if any(entry.get("predictor") is not None for entry in entries):
        return AMEDScheduler.from_config(config, predictors=predictors)
    return LD3Scheduler.from_config(config)


def copy_of(scheduler: LD3Scheduler, **options) -> LD3Scheduler:
    """The scheduler anew, with other options of its config, and attached to nothing."""
    return scheduler_from({**scheduler.config, **options}, predictors_of(scheduler))


def predictors_of(scheduler: LD3Scheduler) -> Mapping[int, AMEDPredictor]:
    """By number of evaluations; those that place stages for each sample."""
    return scheduler.predictors if isinstance(scheduler, AMEDScheduler) else {}


def _saved(spec: SchedulerSpec, options: dict[str, Any]) -> LD3Scheduler:
    """Learned schedules, with another solver where options say so."""
    place = {key: spec.options[key] for key in PLACES if key in spec.options}
    scheduler = load_scheduler(spec.source, **place)
    if not scheduler.served_counts:
        return LD3Scheduler.from_config(scheduler.config, **options)
    solver = {key: value for key, value in options.items() if key in SOLVER_KEYS}
    curve = scheduler.learned_curve
    if curve is not None and any(getattr(curve.spec, key) != value for key, value in solver.items()):
        raise ValueError("a curve serves the solver that it was learned with; drop the solver's options")
    entries = {
        str(nfe): _with_solver(scheduler.learned_schedules[nfe], solver).to_dict(scheduler.path)
        if solver
        else scheduler.config.schedules[str(nfe)]
        for nfe in scheduler.learned_counts
    }
    return copy_of(scheduler, schedules=entries or None, curve=scheduler.config.curve, **options)


def _with_solver(schedule: Schedule, options: dict[str, Any]) -> Schedule:
    """The same times with another solver, whose order and type are its own defaults unless `options` name them.

    Raises:
        ValueError: if the levels of one cannot serve the other.
    """
    own = schedule.spec
    kept = {key: getattr(own, key) for key in SOLVER_KEYS}
    if options.get("solver", own.solver) != own.solver:
        kept |= {"solver_order": None, "solver_type": None}
    other = SolverSpec(**{**kept, **options})
    if schedule.stages is not None and other != own:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(
            f"AMED's stages were learned for {setting_of(own)} and serve no other solver; drop {given}, or train them with "
            "training.train_amed"
        )
    if schedule.residuals is not None and other != own:
        raise ValueError(
            f"coefficients were learned for {setting_of(own)} and serve no other solver; drop the solver's options"
        )
    stages = {spec.make().stages for spec in (own, other)}
    if len(stages) > 1 or other.afs != own.afs or (stages == {2} and other.solver != own.solver):
        raise ValueError(f"{other.solver} cannot run on levels that were learned for {own.solver}; drop solver=")
    return replace(schedule, spec=other, checksum=None)


def _set_timesteps(scheduler: SchedulerMixin, steps: int, kind: type[SchedulerMixin] | None = None) -> None:
    """With some shift where one is asked for: the number of timesteps is the same with any. By the method of its class, or of
    `kind`, which needs no pipeline's shift.
    """
    set_timesteps = (kind or type(scheduler)).set_timesteps
    takes = "mu" in inspect.signature(set_timesteps).parameters
    set_timesteps(scheduler, steps, **({"mu": 1.0} if takes and scheduler.config.get("use_dynamic_shifting") else {}))


def _steps(make, nfe: int) -> int:
    """The fewest steps of a stock scheduler whose evaluations are at least `nfe`: each of its timesteps takes one.

    Two-stage schedulers have nearly two timesteps a step, PNDM's Runge-Kutta warm-up four.
    """
    reason = "it takes fewer at any number of steps"
    for steps in range(1, nfe + 1):
        scheduler = make()
        try:
            _set_timesteps(scheduler, steps)
        except Exception as error:  # whatever a scheduler raises on numbers of steps that it cannot have
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        if len(scheduler.timesteps) >= nfe:
            return steps
    raise NoSchedule(f"there is no number of steps with {nfe} evaluations: {reason}")


def solver_of(contender: Contender) -> str | None:
    """Name of the solver of one of our schedulers at its number of evaluations; None for stock ones."""
    scheduler = contender.scheduler
    if not isinstance(scheduler, LD3Scheduler):
        return None
    learned = scheduler.learned_schedule(contender.num_inference_steps)
    return (scheduler.spec if learned is None else learned.spec).solver


def sampler_key(contender: Contender) -> str:
    """Sixteen hexadecimal digits of all that decides what a contender samples, whatever it is called.

    Ask before it runs: stock schedulers may write a pipeline's shift into their config.
    """
    config = {key: value for key, value in contender.scheduler.config.items() if not key.startswith("_")}
    return digest([type(contender.scheduler).__name__, config, contender.num_inference_steps])


def is_stochastic(scheduler: SchedulerMixin) -> bool:
    """Whether each step adds noise of its own."""
    config = scheduler.config
    return (
        any(part in type(scheduler).__name__ for part in STOCHASTIC)
        or str(config.get("algorithm_type", "")).startswith("sde")
        or bool(config.get("stochastic_sampling"))
    )
