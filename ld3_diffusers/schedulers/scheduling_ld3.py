# SPDX-License-Identifier: Apache-2.0
"""`LD3Scheduler`: learned (and hand-made) schedules of any solver, inside any Diffusers pipeline."""

import copy
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..discretization import append_zero, discretization, stock_times
from ..noise_path import float64, shift_flow_time
from ..schedule import Schedule, SolverSpec, check_checksum, interpolate
from ..step_table import Executor, StepTable, check_times, conversion
from .pipeline_defaults import default_grid
from .stock_config import GRID_FLAGS, make_noise_path, stock_overrides
from .thresholding import make_threshold


class LD3Scheduler(SchedulerMixin, ConfigMixin):
    r"""Runs a step table: any solver at any times, with the network told times of its own.

    This model inherits from [`SchedulerMixin`] and [`ConfigMixin`]. LD3 (Tong et al., "Learning to Discretize Denoising
    Diffusion ODEs", arXiv:2405.15506) learns two time vectors for a frozen model: where the solver steps (`sigmas`) and what
    time the network is told (`timesteps`). A config holds one such schedule for each learned number of network evaluations;
    without any it is a stock-like scheduler for every count.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, prediction_type:
            as in stock schedulers: what the model was trained with.
        noise_path: "vp_discrete" (the betas), "vp_linear", "vp_cosine", "ve", "edm" (VE with EDM's preconditioning) or "flow".
        solver, solver_order, solver_type, predict_x0, lower_order_final, afs, starting_scale: see [`SolverSpec`]; they serve
            step counts without a learned schedule. A `solver_type` of another solver means this solver's default.
        schedules: mapping from the number of evaluations, a decimal string, to a [`Schedule`] as plain JSON.
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
        self._schedules = {}
        if schedules is not None:
            schedules = _normalised_keys(schedules)
            self.register_to_config(schedules=schedules)
            self._schedules = {int(nfe): self._parse(nfe, entry) for nfe, entry in schedules.items()}
        if self._schedules and any(self.config[flag] for flag in GRID_FLAGS):
            raise ValueError(
                f"{[flag for flag in GRID_FLAGS if self.config[flag]]} would choose a stock grid, but a learned schedule brings "
                "its own times; drop the option, or pass schedules=None"
            )
        self._threshold = make_threshold(self.config)
        if self._threshold is not None:
            for spec in [self.spec, *(s.spec for s in self._schedules.values())]:
                if spec.make().form(self.path) != "data":
                    raise ValueError(
                        f"clip_sample and thresholding bound the data prediction, which {spec.solver} does not extrapolate; "
                        "use ddim, dpmpp or unipc with predict_x0=True, or switch them off"
                    )
        self._override: Schedule | None = None
        self._cache: dict[tuple, tuple[Schedule, StepTable, float]] = {}
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.sigmas = self.path.sigma_edm(self.path.time(self.timesteps.double())).float()
        if noise_path == "flow":
            self.sigmas = self.timesteps / num_train_timesteps
        self._table: StepTable | None = None
        self._executor: Executor | None = None
        self._step_index = self._begin_index = None

    # ------------------------------------------------------------------ making and loading

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """From the config of this or any stock scheduler; what the model was trained with is taken over, never guessed.

        Raises:
            ValueError: for a stock scheduler that cannot be followed, or options that contradict a learned schedule.
        """
        if isinstance(config, dict):
            kwargs = {**stock_overrides(dict(config), kwargs), **kwargs}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, subfolder=None, return_unused_kwargs=False, **kwargs):
        """Load from a folder or a Hub repository, as [`SchedulerMixin.from_pretrained`].

        Raises:
            ValueError: if the file is not JSON or describes no valid schedule.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, return_unused_kwargs, **kwargs)
        except OSError as error:
            if "not a valid JSON" in str(error):
                raise ValueError(
                    f"the scheduler config in {str(pretrained_model_name_or_path)!r} is not valid JSON; save or download it again"
                ) from error
            raise
        except TypeError as error:
            raise ValueError(
                f"the scheduler config in {str(pretrained_model_name_or_path)!r} has an entry of the wrong type ({error}); "
                "save or download it again"
            ) from error

    def _parse(self, nfe: str, entry) -> Schedule:
        try:
            schedule = Schedule.from_dict(entry)
            for name, mine, its in (
                ("prediction_type", self.config.prediction_type, schedule.prediction_type),
                ("noise_path", self.config.noise_path, schedule.noise_path),
            ):
                if mine != its:
                    raise ValueError(
                        f"it was learned for {name}={its!r} but this model has {mine!r}; use a schedule made for this model"
                    )
            check_times(schedule.times, schedule.network_times, self.path)
        except ValueError as error:
            raise ValueError(f"schedules[{nfe!r}]: {error}") from error
        if schedule.nfe != int(nfe):
            raise ValueError(
                f"schedules[{nfe!r}] makes {schedule.nfe} network evaluations; rename the key to {str(schedule.nfe)!r}"
            )
        return schedule

    @property
    def learned_counts(self) -> list[int]:
        """Numbers of evaluations with a learned schedule."""
        return sorted(self._schedules)

    def use_schedule(self, schedule: Schedule | None) -> None:
        """Serve `schedule`, whose times may require grad, in place of the config's; None goes back to the config."""
        self._override = schedule
        self._cache.clear()

    def check(self, pipe) -> None:
        """Compare the provenance of the learned schedules with a pipeline.

        Raises:
            ValueError: naming what differs: the denoiser's class or channels, guidance distillation or prediction type.
        """
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if denoiser is None:
            raise ValueError("this pipeline has neither a unet nor a transformer; check the schedule against its model card")
        actual = {
            "denoiser": type(denoiser).__name__,
            "in_channels": denoiser.config.get("in_channels"),
            "dtype": str(denoiser.dtype).removeprefix("torch."),
            "teacher": getattr(pipe.config, "_name_or_path", None) or denoiser.config.get("_name_or_path"),
        }
        for nfe, schedule in sorted(self._schedules.items()):
            facts = schedule.provenance
            different = [
                f"{key} {facts[key]!r} (here {value!r})"
                for key, value in actual.items()
                if key in facts and value is not None and facts[key] != value
            ]
            if different:
                raise ValueError(
                    f"the schedule for {nfe} evaluations was learned with another {', '.join(different)}; "
                    "results may differ from its card: learn one for this pipeline, or sample without check()"
                )

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}(noise_path={self.config.noise_path!r}, solver={self.spec.solver!r}"]
        for nfe, schedule in sorted(self._schedules.items()):
            facts = ", ".join(f"{k}={v!r}" for k, v in schedule.provenance.items() if isinstance(v, (str, int, float)))
            lines.append(f"  {nfe} evaluations: {schedule.spec.solver}, {facts or 'no provenance'}")
        return "\n".join([*lines, ")"])

    # ------------------------------------------------------------------ times

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
        given = timesteps if timesteps is not None else sigmas
        if num_inference_steps is None:
            if given is None:
                raise ValueError("pass num_inference_steps, the number of network evaluations")
            num_inference_steps = len(given)
        if isinstance(num_inference_steps, bool) or int(num_inference_steps) != num_inference_steps or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be a positive integer, got {num_inference_steps!r}")
        num_inference_steps = int(num_inference_steps)
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("this flow scheduler shifts with the resolution; pass `mu`, or set use_dynamic_shifting=False")

        self._schedule, self._table, self._mu = self._choose(num_inference_steps, timesteps, sigmas, mu)
        self.num_inference_steps = num_inference_steps
        self.timesteps = self._table.timesteps.to(device=device, dtype=torch.float32)
        self._timesteps_on_host = self._table.timesteps.detach().float().tolist()
        levels = self.path.levels(self._table.times)
        self.sigmas = levels.z.to(device=device, dtype=torch.float32)
        scale = self.path.input_scale(self._table.network_times)
        self._input_scales = scale if scale.requires_grad else scale.tolist()
        self._executor = None
        self._step_index = self._begin_index = None

    def _choose(self, nfe, timesteps, sigmas, mu) -> tuple[Schedule, StepTable, float]:
        learned = self._override or self._schedules.get(nfe)
        if learned is None and self._schedules and self.config.discretization is None:
            if not self.config.interpolate:
                raise ValueError(
                    f"no schedule was learned for {nfe} evaluations; use num_inference_steps = "
                    f"{' or '.join(map(str, self.learned_counts))}, or load with interpolate=True"
                )
            learned = interpolate(self._schedules, nfe, self.path)
        if learned is not None:
            if learned.nfe != nfe:
                raise ValueError(f"the schedule in use makes {learned.nfe} evaluations; set num_inference_steps to that")
            for name, grid in (("timesteps", timesteps), ("sigmas", sigmas)):
                if grid is not None and default_grid(grid, nfe) is None:
                    raise ValueError(f"custom {name} contradict the learned schedule; drop them, or load with schedules=None")
            mu = 0.0 if learned.final else self._logit_shift(mu)
            key = (nfe, mu)
        else:
            key = (nfe, mu, *(None if grid is None else tuple(map(float, grid)) for grid in (timesteps, sigmas)))
        if key not in self._cache:
            if learned is None:
                learned, mu = self._hand_made(nfe, timesteps, sigmas, mu), 0.0
            elif learned.checksum is not None:
                check_checksum(learned.table(self.path), learned.checksum)
            chosen = learned, learned.table(self.path, mu=mu), mu
            if chosen[1].differentiable:
                return chosen
            self._cache = {**dict(list(self._cache.items())[-7:]), key: chosen}
        return self._cache[key]

    def _logit_shift(self, mu: float | None) -> float:
        """The shift of the times of rectified flow, in logit s."""
        if self.config.noise_path != "flow":
            return 0.0
        if self.config.shift_terminal:
            raise ValueError(
                "shift_terminal stretches the times in a way that does not transfer; learn on final times (Schedule.final)"
            )
        if not self.config.use_dynamic_shifting:
            return float(torch.log(float64(self.config.shift)))
        return float(mu) if self.config.time_shift_type == "exponential" else float(torch.log(float64(mu)))

    def _hand_made(self, nfe, timesteps, sigmas, mu) -> Schedule:
        """The schedule of an unlearned grid."""
        solver, path, config = self.spec.make(), self.path, self.config
        rows = nfe + int(self.spec.afs)
        to_zero = config.final_sigmas_type == "zero"
        steps = solver.num_steps(rows, to_zero)
        if steps != nfe:  # a pipeline's default grid is meant for a step an evaluation
            timesteps, sigmas = (self._resized(grid, nfe, steps) for grid in (timesteps, sigmas))
        network_times = None
        if timesteps is None and (sigmas is None or path.kind == "flow"):
            if config.discretization is not None:
                grid = discretization(config.discretization, path, steps - to_zero, rho=config.rho)
                grid = append_zero(grid) if to_zero else grid
                if path.kind == "flow":
                    grid = shift_flow_time(grid, self._logit_shift(mu))
            else:
                convention = "multistep" if solver.name in ("dpmpp", "unipc", "deis") else "euler"
                grid, stock_timesteps = stock_times(
                    config, path, steps, spacing_convention=convention, flow_grid=config.flow_grid, mu=mu, sigmas=sigmas
                )
                network_times = path.time(stock_timesteps)
        else:
            levels = path.time(float64(timesteps)) if timesteps is not None else path.inverse_sigma_edm(float64(sigmas))
            network_times = levels
            if timesteps is not None and sigmas is not None:
                levels = float64(sigmas) if path.kind == "flow" else path.inverse_sigma_edm(float64(sigmas))
            grid = append_zero(levels) if to_zero else torch.cat([levels, float64([path.t_min])])
        times = solver.expand_to(path, grid, rows)
        network_times = network_times if solver.stages == 1 else None
        return Schedule(times, network_times, self.spec, config.noise_path, config.prediction_type, final=True)

    def _resized(self, grid, nfe, steps):
        if grid is None:
            return None
        candidate = default_grid(grid, nfe)
        if candidate is None:
            raise ValueError(
                f"{self.spec.solver} takes {steps} steps in {nfe} evaluations and cannot use a custom grid of {nfe}; "
                "use `discretization`, or a solver with one evaluation a step"
            )
        resized = candidate(steps)
        return resized * 1000 if float(grid[0]) > 2 else resized

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the starting noise."""
        if self._table is None:
            return float(self.path.t_max) if self.path.kind == "ve" else 1.0
        start = self._table.start
        return start if start.requires_grad else float(start)

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
        if isinstance(timestep, Tensor):
            storage = self.timesteps.untyped_storage()
            if timestep.untyped_storage().data_ptr() == storage.data_ptr() and timestep.numel() == 1:
                return timestep.storage_offset() - self.timesteps.storage_offset()
        value = float(timestep)
        index, nearest = min(enumerate(self._timesteps_on_host), key=lambda pair: abs(pair[1] - value))
        # a pipeline may have cast the time to bfloat16, which keeps 8 bits
        if abs(nearest - value) > 2**-8 * max(abs(value), 1e-2):
            raise ValueError(f"{value:g} is none of this schedule's timesteps; pass an element of `scheduler.timesteps`")
        return index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Times c_in on variance-exploding paths, else unchanged. Idempotent: it has no state."""
        if self.path.kind != "ve":
            return sample
        if self._table is None:
            raise ValueError("call set_timesteps before sampling")
        index = self._step_index if self._step_index is not None else self.index_for_timestep(timestep)
        return (sample * self._input_scales[index]).to(sample.dtype)

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
            ValueError: before set_timesteps, past the end, or if the two tensors differ in shape.
        """
        if self._table is None:
            raise ValueError("call set_timesteps before step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape; "
                "drop the learned variance of the output, if it has one, and pass the sample that the model saw"
            )
        if self._step_index is None:
            index = self._begin_index if self._begin_index is not None else self.index_for_timestep(timestep)
            self._step_index = index
            # The history before a later start is missing, so its tail gets a table of its own.
            table = self._schedule.table(self.path, mu=self._mu, first=index) if index else self._table
            self._executor = Executor(table, self._threshold)
        if per_token_timesteps is None:
            previous = self._executor.step(sample, model_output).to(model_output.dtype)
        else:
            previous = self._step_per_token(model_output, sample, per_token_timesteps)
        self._step_index += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _step_per_token(self, model_output, sample, per_token_timesteps):
        times = self.path.time(per_token_timesteps.to(sample.device).double())[..., None]
        own = float(self._table.network_times[self._step_index])
        held = times < own - 1e-6
        # Held tokens may sit at time 0, where no prediction converts; theirs is not used.
        p_q = conversion(self.path, self._table.form, self.config.prediction_type, times.clamp(min=self.path.t_min))
        return self._executor.step(sample, -model_output, p_q, held)

    # ------------------------------------------------------------------ noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""$\alpha x_0 + \sigma\varepsilon$ at the schedule's noise level for each of `timesteps`, else at the model's own."""
        alpha, sigma = self._levels_of(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

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
            times = torch.stack([self._time_of(t) for t in timesteps])
        shape = (-1, *[1] * (like.ndim - 1))
        return (part.to(like.device, like.dtype).reshape(shape) for part in (self.path.alpha(times), self.path.sigma(times)))

    def _time_of(self, timestep):
        if self._table is not None:
            for i, value in enumerate(self._timesteps_on_host):
                if value == float(timestep):
                    return self._table.times[i].detach()
        return self.path.time(timestep.double().cpu())

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _normalised_keys(schedules) -> dict[str, Any]:
    """A deep copy with decimal strings as keys: JSON has no others."""
    if not isinstance(schedules, dict):
        raise ValueError(f"schedules must map a number of evaluations to a schedule, got {type(schedules).__name__}")
    bad = [key for key in schedules if not str(key).isdecimal() or int(key) < 1]
    if bad:
        raise ValueError(f"schedules has the keys {bad}; use the number of network evaluations as a decimal string")
    return {str(int(key)): copy.deepcopy(entry) for key, entry in schedules.items()}


# pipelines saved with this scheduler name the package, not the file, so that the file may move
LD3Scheduler.__module__ = "ld3_diffusers"
