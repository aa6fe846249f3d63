# SPDX-License-Identifier: Apache-2.0
"""`LD3Scheduler`: learned (and hand-made) schedules of any solver, inside any Diffusers pipeline."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from ..noise_path import float64
from ..schedule import Schedule, SolverSpec
from ..schedule_curve import ScheduleCurve
from ..step_table import Executor, StepTable, conversion
from .config_file import lookup_errors, read_config_file, without_unknown_options
from .learned import (
    check_model,
    check_provenance,
    describe,
    describe_curve,
    learned_schedule,
    plain_copy,
    plain_json,
    read_curve,
    read_schedules,
)
from .stock_config import logit_shift, make_noise_path, refuse_grid_flags, stock_overrides
from .thresholding import check_bounds_data, make_threshold
from .timestep_lookup import TimestepLookup
from .unlearned import refuse_custom_grids, requested, unlearned_schedule


logger = logging.get_logger(__name__)


UNSCALED_START = (
    "an analytical first step is part of the starting noise, which this pipeline does not multiply by init_noise_sigma "
    "after set_timesteps; use a schedule without one (afs=False)"
)


LEAVES_LEARNED = (
    "sampling begins in a noised picture, at step {} of {}: what was learned is for all steps together, so this call goes as without "
    "a learned schedule, by the spacing and the solver of the config"
)


LACKS_HISTORY = (
    "learned coefficients are left out, because sampling begins at step {}, without the predictions that they weigh; without a learned "
    "schedule (LD3Scheduler.from_config(config, schedules=None)) it may end nearer to the teacher"
)


COPIED_TIMESTEPS = (
    "from a picture sampling goes as without a learned schedule, but this pipeline has copied the learned schedule's timesteps; load the scheduler without "
    "learned schedules, LD3Scheduler.from_config(config, schedules=None)"
)


UNSCALED_INPUT = (
    "the network's input is scaled to the time that it is told (scale_time), but this pipeline does not call scale_model_input; "
    "use a schedule without scaled times"
)


class LD3Scheduler(SchedulerMixin, ConfigMixin):
    r"""Runs a step table: any solver at any times, with the network told times of its own.

    This model inherits from [`SchedulerMixin`] and [`ConfigMixin`]. LD3 (Tong et al., "Learning to Discretize Denoising
    Diffusion ODEs", arXiv:2405.15506) learns two time vectors for a frozen model: where the solver steps (`sigmas`) and what
    time the network is told (`timesteps`). A config holds one such schedule for each learned number of network evaluations;
    without any it is a stock-like scheduler for every count, as it is for pipelines that start in a picture (see [`add_noise`]).

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, prediction_type:
            as in stock schedulers: what the model was trained with.
        noise_path: "vp_discrete" (the betas), "vp_linear", "vp_cosine", "ve", "edm" (VE with EDM's preconditioning) or "flow".
        solver, solver_order, solver_type, predict_x0, lower_order_final, afs, starting_scale: see [`SolverSpec`]; they serve
            step counts without a learned schedule. A `solver_type` of another solver means this solver's default.
        schedules: mapping from the number of evaluations, a decimal string, to a [`Schedule`] as plain JSON.
        curve: a [`ScheduleCurve`] as plain JSON, which serves the other counts in its range.
        interpolate: serve a count without a schedule by interpolating the nearest learned one, instead of raising.
        discretization, rho: named grid of `ld3_diffusers.discretization` to use in place of the stock spacings.
        timestep_spacing, steps_offset, final_sigmas_type, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas,
        use_lu_lambdas: the stock grids, for counts without a learned schedule.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: bounds on the data
            prediction, for solvers that extrapolate it; off by default.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal,
        time_shift_type, use_flow_sigmas: resolution shifts of flow models, as in `FlowMatchEulerDiscreteScheduler`.
        flow_grid: whose unlearned flow grid to use, "flow_match_euler", "unipc" or "dpmpp".
        sigma_min, sigma_max, sigma_data: range and preconditioning of "ve" and "edm" paths.

    Raises:
        ValueError: for any option that is unknown, impossible or contradicts a learned schedule.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "DPMSolverSDEScheduler"] + [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ]
    order = 1  # one row is one network evaluation, also for two-stage solvers
    runs_predictors = False  # whether schedules may name a predictor; see `AMEDScheduler`

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        noise_path: str = "vp_discrete",
        solver: str = "unipc",
        solver_order: int = 2,
        solver_type: str | None = "bh2",
        predict_x0: bool = True,
        lower_order_final: bool = True,
        afs: bool = False,
        starting_scale: str | None = None,
        schedules: dict[str, dict[str, Any]] | None = None,
        curve: dict[str, Any] | None = None,
        interpolate: bool = False,
        discretization: str | None = None,
        rho: float | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        use_flow_sigmas: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        flow_grid: str = "flow_match_euler",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
    ):
        self.path = make_noise_path(self.config)
        if prediction_type not in self.path.prediction_types:
            self.path.data_prediction(prediction_type, float64(self.path.t_min))
        if noise_path == "vp_discrete":
            self.alphas_cumprod = torch.exp(2 * self.path.log_alphas).float()
            self.betas = 1 - self.alphas_cumprod / torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.spec = SolverSpec(
            solver, solver_order, solver_type, predict_x0, lower_order_final, afs, starting_scale
        ).with_defaults_for_foreign_options()
        self.spec.make()
        self._schedules: dict[int, Schedule] = {}
        if schedules is not None:
            schedules = plain_json(schedules)
            self.register_to_config(schedules=schedules)
            self._schedules = read_schedules(schedules, self.config, self.path, self.runs_predictors)
        self._curve: ScheduleCurve | None = None
        if curve is not None:
            curve = plain_copy(curve, "curve")
            self.register_to_config(curve=curve)
            self._curve = read_curve(curve, self.config, self.path)
        if self._schedules or self._curve is not None:
            refuse_grid_flags(self.config)
        self._threshold = make_threshold(self.config)
        if self._threshold is not None:
            learned = [*self._schedules.values(), *([] if self._curve is None else [self._curve])]
            for spec in (self.spec, *(each.spec for each in learned)):
                check_bounds_data(spec, self.path)
        self._override: Schedule | None = None
        self._told = None
        self._cache: dict[tuple, tuple[Schedule, StepTable, float]] = {}
        self.num_inference_steps = None
        self._table: StepTable | None = None
        self._executor: Executor | None = None
        self._start_was_scaled = self._input_was_scaled = self._scales_input = False
        self._leaves_learned = self._left_learned = False  # see `add_noise`
        self._said: set[str] = set()
        self._step_index = self._begin_index = None
        times = torch.linspace(self.path.t_max, self.path.t_min, num_train_timesteps, dtype=torch.float64)
        self.sigmas = self.path.levels(times).z.float()
        self._tell(self.path.timestep(times))

    # ------------------------------------------------------------------ making and loading

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """From the config of this or any stock scheduler; what the model was trained with is taken over, never guessed.

        Raises:
            ValueError: for a stock scheduler that cannot be followed, or options that contradict a learned schedule.
        """
        kwargs = {**stock_overrides(config, kwargs), **kwargs}
        config = without_unknown_options(config, cls)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, subfolder=None, return_unused_kwargs=False, **kwargs):
        """Load from a folder or a Hub repository, as [`SchedulerMixin.from_pretrained`]. Nothing in the file is trusted.

        Raises:
            OSError: if there is no such repository, revision, folder or subfolder, or no connection to look.
            ValueError: if the file is no well-formed config or describes no valid schedule.
        """
        with lookup_errors(pretrained_model_name_or_path, subfolder):
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, return_unused_kwargs, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file, dduf_entries=None):
        return read_config_file(json_file, cls, dduf_entries)

    @property
    def learned_counts(self) -> list[int]:
        """Numbers of evaluations with a learned schedule."""
        return sorted(self._schedules)

    @property
    def learned_schedules(self) -> dict[int, Schedule]:
        """The learned schedules by number of evaluations."""
        return dict(self._schedules)

    @property
    def learned_curve(self) -> ScheduleCurve | None:
        """The curve, which serves other counts, too."""
        return self._curve

    @property
    def served_counts(self) -> list[int]:
        """Numbers of evaluations with a learned schedule, by themselves or from the curve."""
        curve = () if self._curve is None else range(self._curve.counts[0], self._curve.counts[1] + 1)
        return sorted({*self._schedules, *curve})

    def learned_schedule(self, nfe: int) -> Schedule | None:
        """What was learned for `nfe` evaluations, by itself or as part of the curve; None where nothing was."""
        served = nfe in self.served_counts
        return learned_schedule(self._schedules, self._curve, nfe, self.path, False) if served else None

    @property
    def schedule(self) -> Schedule | None:
        """The schedule of the last `set_timesteps`, learned or not; None before."""
        return None if self._table is None else self._schedule

    def use_schedule(self, schedule: Schedule | None, told: Callable[[Tensor], Tensor] | None = None) -> None:
        """Serve `schedule`, whose times may require grad, in place of the config's; None goes back to the config.

        With `told`, what a pipeline makes of timesteps, it is served as [`Schedule.rounded`].
        """
        self._override, self._told = schedule, told
        self._cache.clear()

    def check(self, pipe) -> None:
        """Compare the provenance of the learned schedules with a pipeline.

        Raises:
            ValueError: naming what differs: the denoiser's class, channels, guidance embedding, dtype or name, or, while
                the pipeline has another scheduler, that scheduler's noise path or prediction type.
        """
        if pipe.scheduler is not self:
            check_model(self.config, type(self).from_config(pipe.scheduler.config, schedules=None).config)
        learned = {f"the schedule for {nfe} evaluations": self._schedules[nfe] for nfe in self.learned_counts}
        check_provenance(learned if self._curve is None else {**learned, "the curve": self._curve}, pipe)

    def __repr__(self) -> str:
        first = f"{type(self).__name__}(noise_path={self.config.noise_path!r}, solver={self.spec.solver!r}"
        lines = [describe(nfe, self._schedules[nfe]) for nfe in self.learned_counts]
        lines += [] if self._curve is None else [describe_curve(self._curve)]
        return "\n".join([first, *lines, ")"])

    # ------------------------------------------------------------------ times

    def _tell(self, timesteps: Tensor, device=None) -> None:
        self._lookup = TimestepLookup(timesteps, device)

    @property
    def timesteps(self) -> Tensor:
        """(N,) float32: what the network is told at each step."""
        return self._lookup.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._lookup.timesteps = timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the schedule for `num_inference_steps` network evaluations and fill in its step table.

        Args:
            timesteps, sigmas: custom network times and noise levels, only without a learned schedule; levels follow from
                `timesteps` alone. Sigmas are sigma/alpha, on rectified flow s before any shift. A pipeline's own default
                grid counts as no grid at all.
            mu: resolution shift of flow models with `use_dynamic_shifting`.

        Raises:
            ValueError: for a count without a learned schedule, a custom grid beside a learned one, or a missing mu.
        """
        nfe, timesteps, sigmas = requested(num_inference_steps, timesteps, sigmas)
        learned, interpolates = self._override, self.config.interpolate
        if learned is None and (nfe in self.served_counts or interpolates or self.config.discretization is None):
            learned = learned_schedule(self._schedules, self._curve, nfe, self.path, interpolates)
        asked = nfe, timesteps, sigmas, mu
        self._serve(*self._choose(learned, *asked), device)
        self._asked = asked
        self._leaves_learned = learned is not None and learned is not self._override and learned.stages is None
        self._left_learned = False
        self._start_was_scaled = self._input_was_scaled = False
        self._step_index = self._begin_index = None

    def _serve(self, schedule: Schedule, table: StepTable, mu: float, device) -> None:
        self._schedule, self._table, self._mu = schedule, table, mu
        self.num_inference_steps = schedule.nfe
        self._tell(table.timesteps, device)
        self.sigmas = self.path.levels(table.times).z.to(device=device, dtype=torch.float32)
        scale = table.input_scale
        self._input_scales = scale if scale.requires_grad else scale.tolist()
        self._scales_input = scale.requires_grad or any(value != 1 for value in self._input_scales)
        self._executor = None

    def _choose(self, learned: Schedule | None, nfe, timesteps, sigmas, mu) -> tuple[Schedule, StepTable, float]:
        """A schedule, its table and the resolution shift of that; of `learned`, or where there is none of what the config describes."""
        if learned is not None:
            if learned.nfe != nfe:
                raise ValueError(f"the schedule in use makes {learned.nfe} evaluations; set num_inference_steps to it")
            refuse_custom_grids(nfe, timesteps=timesteps, sigmas=sigmas)
            mu = 0.0 if learned.final else logit_shift(self.config, mu)
            key = (nfe, mu)
            if self._told is not None and learned is self._override:
                learned = learned.rounded(self.path, self._told, mu=mu)
        else:
            key = (nfe, mu, *(None if grid is None else tuple(grid) for grid in (timesteps, sigmas)))
        if key not in self._cache:
            if learned is None:
                learned, mu = unlearned_schedule(self.config, self.path, self.spec, nfe, timesteps, sigmas, mu), 0.0
            chosen = learned, learned.table(self.path, mu=mu), mu
            if chosen[1].differentiable:
                return chosen
            self._cache = {**dict(list(self._cache.items())[-7:]), key: chosen}
        return self._cache[key]

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the starting noise."""
        if self._table is None:
            if self.spec.afs or any(schedule.spec.afs for schedule in self._schedules.values()):
                raise ValueError(UNSCALED_START)
            return float(self.path.t_max) if self.path.kind == "ve" else 1.0
        self._start_was_scaled = True
        start = self._table.start
        return start if start.requires_grad else float(start)

    @property
    def mu(self) -> float:
        """Resolution shift that the last `set_timesteps` asked for, added to logit s; 0 where there is none."""
        config = self.config
        asked = None if self._table is None else self._asked[-1]
        unknown = self._table is None or (config.use_dynamic_shifting and asked is None)
        return 0.0 if unknown or config.shift_terminal else logit_shift(config, asked)

    # ------------------------------------------------------------------ where we are

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of `timestep`: where a view of `timesteps` lies in it, else the nearest value.

        Raises:
            ValueError: if no timestep of the schedule is near.
        """
        return self._lookup.index(timestep)

    def _index_of(self, timestep) -> int:
        """Index of the step to take, which the pipeline calls `timestep`."""
        for index in (self._step_index, self._begin_index):
            if index is not None:
                return index
        return self.index_for_timestep(timestep)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Times c_in on variance-exploding paths, and at AMED's stages as if at the level that the network is told; else unchanged.

        Idempotent: what it returns depends on its arguments and the step alone.
        """
        if self._table is None:
            if self.path.kind == "ve":
                raise ValueError("call set_timesteps before sampling")
            return sample
        self._input_was_scaled = True
        if not self._scales_input:
            return sample
        return (sample * self._input_scales[self._index_of(timestep)]).to(sample.dtype)

    # ------------------------------------------------------------------ stepping

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        per_token_timesteps: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """One row of the step table.

        Args:
            model_output: what the network returned, any dtype; computed with in float32, or float64 if `sample` is.
            timestep: the element of `timesteps` that the network was given.
            sample: the state that it saw, before `scale_model_input`.
            per_token_timesteps: (batch, tokens) times of conditioned tokens (LTX, which then passes the negated velocity);
                tokens whose time is still below `timestep` keep their state.
            generator: ignored; the ODE draws no noise.

        Raises:
            ValueError: before set_timesteps, past the end, if the two tensors differ in shape, or if the learned schedule was left (see
                [`add_noise`]) and `timestep` is still one of its own.
        """
        if self._table is None:
            raise ValueError("call set_timesteps before step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape; "
                "drop the learned variance of the output, if it has one, and pass the sample that the model saw"
            )
        index = self._index_of(timestep)
        if self._left_learned and index < len(self._table) and not self._lookup.is_step(index, timestep):
            raise ValueError(COPIED_TIMESTEPS)
        if self._step_index is None:
            self._begin(index)
        if per_token_timesteps is None:
            previous = self._executor.step(sample, model_output).to(model_output.dtype)
        else:
            previous = self._step_per_token(model_output, sample, per_token_timesteps)
        self._step_index += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _begin(self, index: int, fused: bool = True) -> None:
        """Start with row `index`."""
        if not index and self._table.first_prediction is not None and not self._start_was_scaled:
            raise ValueError(UNSCALED_START)
        if self._scales_input and not self._input_was_scaled and self.path.kind != "ve":
            raise ValueError(UNSCALED_INPUT)
        if index and self._schedule.lacks_history(index):
            self._say_once(LACKS_HISTORY.format(index))
        # The history before a later start is missing, so its tail gets a table of its own.
        table = self._schedule.table(self.path, mu=self._mu, first=index) if index else self._table
        self._executor = Executor(table, self._threshold, fused)
        self._step_index = index

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

    def _step_per_token(self, model_output, sample, per_token_timesteps):
        times = self.path.time(per_token_timesteps.to(sample.device).double())[..., None]
        own = float(self._table.network_times[self._step_index])
        held = times < own - 1e-6
        # Held tokens may sit at time 0, where no prediction converts; theirs is not used.
        p_q = conversion(self.path, self._table.form, self.config.prediction_type, times.clamp(min=self.path.t_min))
        return self._executor.step(sample, -model_output, p_q, held)

    # ------------------------------------------------------------------ noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""$\alpha x_0 + \sigma\varepsilon$ at the schedule's noise level for each of `timesteps`, else at the model's own.

        A pipeline that is to begin (`set_begin_index`) in a picture noised to a later level than the first is served without a learned schedule
        from here on, which is said: what was learned is for all steps together, and may end farther from the teacher than stock if some are
        left out.
        """
        if self._begin_index and self._step_index is None and self._leaves_learned:
            self._leave_learned()
        alpha, sigma = self._levels_of(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def _leave_learned(self) -> None:
        """Go on as without a learned schedule. The pipeline has its view of `timesteps` already, so their values change in place."""
        told, chosen = self.timesteps, self._choose(None, *self._asked)
        self._say_once(LEAVES_LEARNED.format(self._begin_index, self.num_inference_steps))
        self._serve(*chosen, told.device)
        with torch.inference_mode():  # outside it, timesteps that were set inside may not be changed
            self.timesteps = told.copy_(self.timesteps)
        self._leaves_learned, self._left_learned = False, True

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """[`add_noise`] under the name and argument order of flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""Training target of v-prediction, $\alpha\varepsilon - \sigma x_0$, on rectified flow $\varepsilon - x_0$."""
        if self.path.kind == "flow":
            return noise - sample
        alpha, sigma = self._levels_of(timesteps, sample)
        return alpha * noise - sigma * sample

    def _levels_of(self, timesteps, like):
        timesteps = torch.as_tensor(timesteps).reshape(-1)
        if self._table is not None and self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            times = self._table.times[index].detach().expand(len(timesteps))
        else:
            times = torch.stack([self._time_of(value) for value in timesteps.tolist()])
        alpha_sigma = torch.stack([self.path.alpha(times), self.path.sigma(times)]).to(like.device, like.dtype)
        return alpha_sigma.reshape(2, -1, *[1] * (like.ndim - 1))

    def _time_of(self, timestep: float) -> Tensor:
        """The noise level of a timestep of the schedule, else of the model."""
        if self._table is not None and timestep in self._lookup.values:
            return self._table.times[self._lookup.values.index(timestep)].detach()
        return self.path.time(float64(timestep))

    def __len__(self) -> int:
        return self.config.num_train_timesteps


# pipelines saved with this scheduler name the package, not the file, so that the file may move
LD3Scheduler.__module__ = "ld3_diffusers"
