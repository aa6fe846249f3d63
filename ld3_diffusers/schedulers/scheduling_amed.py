# SPDX-License-Identifier: Apache-2.0
"""`AMEDScheduler`: schedules whose steps have a learned stage, the same for all samples or predicted for each."""

import copy
import functools
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..amed import STUDENT_KEYS, StepPrediction, step_levels, with_step
from ..attachment import Attachment
from ..noise_path import NoisePath
from ..schedule import Schedule, SolverSpec
from .scheduling_ld3 import UNSCALED_INPUT, LD3Scheduler


if TYPE_CHECKING:  # Diffusers' models import accelerate and transformers
    from ..amed_predictor import AMEDPredictor


PREDICTOR_FOLDER = "predictor-{nfe}"  # beside the scheduler's config


class AMEDScheduler(LD3Scheduler):
    r"""An [`LD3Scheduler`] that also serves AMED's schedules whose stages are predicted for each sample.

    AMED (Zhou et al., "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps", arXiv:2312.00094): see [`amed`] for the steps and
    [`AMEDPredictor`] for the network. Static schedules need nothing: their numbers stand in the config, and [`LD3Scheduler`] serves
    them as well. Where stages are predicted, attach the scheduler to its pipeline:

        pipe.scheduler = AMEDScheduler.from_pretrained("user/amed")
        pipe.scheduler.attach(pipe)
        images = pipe(prompts, num_inference_steps=5).images
        pipe.scheduler.detach()

    Once a step, the predictor's few numbers cross from the device to the host, where rows of the step table are made. A tail (img2img)
    that begins with a stage has it where the bare solver would.

    Args:
        as [`LD3Scheduler`]; the entries of `schedules` may have `predictor`, `{"folder": ..., "digest": ...}`.

    Raises:
        ValueError: as [`LD3Scheduler`].
    """

    runs_predictors = True

    @functools.wraps(LD3Scheduler.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._predictors: dict[int, "AMEDPredictor"] = {}
        self._attachment: Attachment | None = None
        self._live: Schedule | None = None  # the schedule as predicted so far
        self._sample_timesteps: Tensor | None = None  # (batch,) for the evaluation to come, if samples differ

    # ------------------------------------------------------------------ predictors

    @property
    def predictors(self) -> Mapping[int, "AMEDPredictor"]:
        """The predictors by number of evaluations."""
        return dict(self._predictors)

    def set_predictor(self, nfe: int, predictor: "AMEDPredictor") -> None:
        """Let a copy of `predictor` place the stages of the learned schedule for `nfe` evaluations, whose step ends stay.

        Raises:
            ValueError: if there is no such schedule of AMED steps, or the predictor was trained for another one.
        """
        schedule = self._schedules.get(nfe)
        if schedule is None or schedule.direction_scales is None:
            raise ValueError(f"there is no schedule of AMED steps for {nfe} evaluations; see `ld3_diffusers.amed`")
        check_predictor(predictor, schedule, self.path)
        predictor = copy.deepcopy(predictor).eval().requires_grad_(False)
        if schedule.spec.afs:  # its first step sees no network, so it is the same for all samples
            with torch.no_grad():
                prediction = predictor(None, *step_levels(schedule, 0, self.path))
                prediction = StepPrediction(*(value.squeeze() for value in prediction))
                schedule = with_step(schedule, 0, prediction, self.path)
        entry = {"folder": PREDICTOR_FOLDER.format(nfe=nfe), "digest": predictor.digest()}
        schedule = replace(schedule, predictor=entry, checksum=None)
        self._schedules[nfe], self._predictors[nfe] = schedule, predictor
        entries = {**self.config.schedules, str(nfe): schedule.to_dict(self.path)}
        self.register_to_config(schedules=entries)
        self._cache.clear()

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, *, predictors=None, **kwargs):
        """As [`LD3Scheduler.from_config`], with the predictors that its schedules were saved with.

        Args:
            predictors: a mapping by number of evaluations, of which the schedules take theirs; without, they have none.

        Raises:
            ValueError: as there, or if one is not the predictor that its schedule names.
        """
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        for nfe, schedule in scheduler._schedules.items():
            if schedule.predictor is not None and nfe in (predictors or {}):
                scheduler._take(nfe, copy.deepcopy(predictors[nfe]))
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, subfolder=None, return_unused_kwargs=False, **kwargs):
        """Load from a folder or a Hub repository, with its predictors, as [`LD3Scheduler.from_pretrained`].

        Raises:
            OSError, ValueError: as there; a `ValueError` also if a predictor is missing or is not the one that its schedule was
                saved with.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, subfolder, return_unused_kwargs, **kwargs)
        scheduler = loaded[0] if return_unused_kwargs else loaded
        places = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
        options = {name: kwargs[name] for name in places if name in kwargs}
        for nfe, schedule in scheduler._schedules.items():
            if schedule.predictor is not None:
                scheduler._load_predictor(nfe, pretrained_model_name_or_path, subfolder, options)
        return loaded

    def _load_predictor(self, nfe: int, name: str | os.PathLike, subfolder: str | None, options: dict) -> None:
        from ..amed_predictor import AMEDPredictor

        folder = PREDICTOR_FOLDER.format(nfe=nfe)  # not the config's word, which could point anywhere
        place = folder if subfolder is None else f"{subfolder}/{folder}"
        try:
            config = AMEDPredictor.load_config(name, subfolder=place, **options)
            if not isinstance(config, dict) or "quantization_config" in config:  # which would choose code to run
                raise ValueError("its config.json holds no mapping of a predictor's options")
            # Not on the meta device, where weights that the file lacks would stay.
            predictor = AMEDPredictor.from_pretrained(
                name, subfolder=place, use_safetensors=True, low_cpu_mem_usage=False, **options
            )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the predictor for {nfe} evaluations cannot be read from {place!r} of {str(name)!r}: {reason}; download the whole "
                "repository"
            ) from error
        self._take(nfe, predictor, f"{place!r} of {str(name)!r}")

    def _take(self, nfe: int, predictor: "AMEDPredictor", origin: str = "this") -> None:
        """Let the predictor that the schedule was saved with place its stages."""
        schedule = self._schedules[nfe]
        if predictor.digest() != schedule.predictor.get("digest"):
            raise ValueError(
                f"{origin} is not the predictor that the schedule for {nfe} evaluations was saved with; download both from one revision"
            )
        check_predictor(predictor, schedule, self.path)
        self._predictors[nfe] = predictor.eval().requires_grad_(False)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """The config, and the predictors beside it.

        Raises:
            ValueError: if a predictor is not there, because this was made from a config alone.
        """
        for nfe, schedule in self._schedules.items():
            if schedule.predictor is not None and nfe not in self._predictors:
                raise ValueError(missing_predictor(nfe))
        if self._predictors:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
        # The config comes last: in a new folder one is there when all that it names is, each file whole.
        for nfe, predictor in self._predictors.items():
            folder = Path(save_directory, PREDICTOR_FOLDER.format(nfe=nfe))
            with tempfile.TemporaryDirectory(prefix=".predictor-", dir=save_directory) as partial:
                predictor.save_pretrained(partial)
                folder.mkdir(exist_ok=True)
                for file in Path(partial).iterdir():
                    os.replace(file, folder / file.name)
        super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)

    def use_schedule(self, schedule, told=None) -> None:
        if schedule is not None and schedule.predictor is not None:
            raise ValueError("a schedule with predicted stages is served from the config only; see `set_predictor`")
        super().use_schedule(schedule, told)

    # ------------------------------------------------------------------ the pipeline

    def attach(self, pipe) -> None:
        """Watch the bottleneck of a pipeline's denoiser, and hand each sample's time to that and to every ControlNet.

        To be called again after networks were exchanged; before the first call of a compiled network. Static schedules need it not
        and are not changed by it.

        Raises:
            ValueError: for a pipeline with another scheduler, or whose denoiser has no bottleneck.
        """
        if pipe.scheduler is not self:
            raise ValueError("this is not the pipeline's scheduler; set pipe.scheduler to it first")
        self.detach()
        self._attachment = Attachment(pipe, self._timesteps_for)

    def detach(self) -> None:
        """Undo [`attach`]: the networks are as they were."""
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = None

    def __getstate__(self):
        """Copies are not attached."""
        return {**self.__dict__, "_attachment": None}

    # ------------------------------------------------------------------ sampling

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None) -> None:
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        self._live = self._sample_timesteps = None
        if self._schedule.predictor is None:
            return
        nfe = self._schedule.nfe
        if nfe not in self._predictors:
            raise ValueError(missing_predictor(nfe))
        if self._attachment is None:
            raise ValueError(
                f"the stages of the schedule for {nfe} evaluations are predicted for each sample, from the denoiser's bottleneck; call "
                "scheduler.attach(pipe) first"
            )
        self._predictors[nfe].to(device)
        self._attachment.calls = 0  # an earlier run may have been broken off
        self._live = self._schedule

    def _timesteps_for(self, given: Tensor) -> Tensor:
        """(batch,) times for a network call that the pipeline gave this one; (1,) where all samples have the same."""
        if self._sample_timesteps is None or not self._is_due(given):
            return given.reshape(-1)[:1]
        return self._sample_timesteps.to(given if given.is_floating_point() else torch.float32)

    def _is_due(self, given: Tensor) -> bool:
        """Whether a network is called for the stage that was predicted, not by another pipeline after a run that was broken off."""
        return self._lookup.is_step(self._step_index, given.reshape(-1)[:1])

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        if self._sample_timesteps is None:
            return super().scale_model_input(sample, timestep)
        self._input_was_scaled = True
        scale = self._executor.table.input_scale[1].to(torch.promote_types(sample.dtype, torch.float32))
        scale = scale.to(sample.device, non_blocking=True).repeat(len(sample) // len(scale))
        return (sample * scale.reshape(-1, *[1] * (sample.ndim - 1))).to(sample.dtype)

    def _levels_of(self, timesteps, like):
        times = None
        if self._live is not None and self._step_index is not None and self._step_index < len(self._table):
            times = self._executor.table.times[self._executor.done - self._executor.first]
        if times is None or times.ndim == 0:
            return super()._levels_of(timesteps, like)
        alpha_sigma = torch.stack([self.path.alpha(times), self.path.sigma(times)]).to(like.device, like.dtype)
        return alpha_sigma.reshape(2, -1, *[1] * (like.ndim - 1))

    def step(self, model_output, timestep, sample, *args, **kwargs):
        if self._live is None:
            return super().step(model_output, timestep, sample, *args, **kwargs)
        afs = int(self._schedule.spec.afs)
        if self._step_index is None:
            self._begin(self._index_of(timestep), fused=False)
            self._begin_row = self._step_index
            self._first_row = self._begin_row + (afs if self._begin_row else 0)
        if self._attachment is None or not self._attachment.calls:
            raise ValueError(
                "the pipeline's denoiser was not called as it was attached; call scheduler.attach(pipe) after exchanging it"
            )
        n, is_stage = divmod(self._step_index + afs, 2)
        if is_stage:
            self._attachment.calls, self._sample_timesteps = 0, None
        else:
            self._predict(n, len(sample))
        return super().step(model_output, timestep, sample, *args, **kwargs)

    @torch.no_grad()
    def _predict(self, n: int, batch: int) -> None:
        """Place the stage of step n, whose first evaluation was made, and fill in its two rows."""
        predictor = self._predictors[self._schedule.nfe]
        prediction = predictor(self._attachment.features(batch), *step_levels(self._schedule, n, self.path), n)
        self._live = with_step(self._live, n, prediction, self.path)
        row = 2 * n - self._first_row
        table = self._live.table(self.path, mu=self._mu, first=self._begin_row, wanted=range(row, row + 2))
        self._executor.go_on_with(table)
        if not self._input_was_scaled and self.path.kind != "ve" and bool((table.input_scale[1] != 1).any()):
            raise ValueError(UNSCALED_INPUT)
        self._sample_timesteps = table.timesteps[1]


def check_predictor(predictor: "AMEDPredictor", schedule: Schedule, path: NoisePath) -> None:
    """Raises a `ValueError` that says in what a predictor was trained for another schedule."""
    known, spec = predictor.config, schedule.spec
    if known.form == "static":
        raise ValueError(
            "a static predictor is no network to ask; make a schedule of it with `ld3_diffusers.amed.static_schedule`"
        )
    student = SolverSpec(**{name: known[name] for name in STUDENT_KEYS}, solver_type=spec.solver_type)
    if student.make() != spec.make() or student.afs != spec.afs:  # None, the default order, may be written out
        different = {name: (known[name], getattr(spec, name)) for name in STUDENT_KEYS}
        told = ", ".join(
            f"{name}={theirs!r} (here {own!r})" for name, (theirs, own) in different.items() if theirs != own
        )
        raise ValueError(
            f"the predictor was trained for {told}; use the predictor that belongs to this schedule, or train one with "
            "training.train_amed"
        )
    steps = (len(schedule.times) - 1) // 2
    if known.num_steps not in (None, steps):
        raise ValueError(
            f"the predictor was trained for num_steps={known.num_steps} and this schedule has {steps} steps; use the predictor that "
            "belongs to it"
        )
    z = path.levels(schedule.times).z
    for name, value in (("z_max", float(z[0])), ("z_min", float(z[-1]))):
        if known[name] is not None and not math.isclose(known[name], value, rel_tol=1e-3, abs_tol=1e-6):
            raise ValueError(
                f"the predictor was trained on noise levels with {name}={known[name]:.6g} and this schedule has {value:.6g}: they are of "
                "different models or end differently; use the predictor that belongs to it"
            )


def missing_predictor(nfe: int) -> str:
    return (
        f"the predictor of the schedule for {nfe} evaluations is not there, a config alone has none; load the folder or repository with "
        "AMEDScheduler.from_pretrained, or give it to set_predictor"
    )


# pipelines saved with this scheduler name the package, not the file, so that the file may move
AMEDScheduler.__module__ = "ld3_diffusers"
