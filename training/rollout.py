# SPDX-License-Identifier: Apache-2.0
r"""A Diffusers pipeline as a differentiable student.

A pipeline's `__call__` is wrapped in `torch.no_grad` by a decorator that keeps `__wrapped__`. Called unwrapped, with a
scheduler whose timesteps and step coefficients carry gradients, the pipeline *is* the student: casts, guidance, shapes and
extra networks are those that it will sample with, for every model family alike.
"""

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ld3_diffusers import LD3Scheduler, Schedule, SolverSpec

from .conditioning import Conditioning, batch_size, expanded, named_embeddings
from .decoding import decode
from .denoisers import Calls, Evaluations, denoisers, instrumented, replaced
from .denoisers import gradient_checkpointing as checkpointed_blocks
from .told_times import Told, find_told, watched


PROBES = 12  # evaluations that show how a pipeline rounds times; only those that do make them
OWN_ARGUMENTS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "latents",
    "generator",
    "output_type",
    "return_dict",
    "eta",
)
PROMPTS = ("prompt", "class_labels")  # what a pipeline is conditioned on, if anything


class _EndReached(Exception):
    """The sampler has taken its last step; the rest of the pipeline (decoding, numpy) is not wanted."""


class PipelineRollout:
    r"""Noise in, end state out, through the pipeline itself.

    Weights are frozen, networks in inference mode and the pipeline's scheduler an [`LD3Scheduler`] until [`close`], which the
    `with` statement calls; everything else is put back after each call. The end state is what the scheduler's last `step`
    returns, so that pipelines which end in numpy serve too. With `checkpointing`, what is kept for the backward pass is the
    states only: activations are recomputed, one more forward evaluation for each.

    Args:
        pipe: any text-to-image, text-to-video, class-conditional or unconditional pipeline with one sampling loop.
        guidance_scale, height, width: of the call; None: the pipeline's defaults.
        checkpointing: recompute each network call in the backward pass.
        gradient_checkpointing: and within that, each block of the network by itself, for one more forward evaluation; until
            [`close`].
        call_kwargs: further arguments of the pipeline's `__call__`, such as `true_cfg_scale`, a ControlNet's `image`, or
            `prompt` and `negative_prompt` as defaults of [`encode`].

    Attributes:
        scheduler: the [`LD3Scheduler`] in use.
        evaluations: counters `forward`, `recomputed` and `backward`; see [`Evaluations`].
        stock_scheduler: the one that the pipeline came with.
        moves_noise: whether the starting noise is a tensor; else the pipeline draws its own and `noise` is a LongTensor of seeds.

    Raises:
        ValueError: for pipelines that start from an image, that cannot be differentiated, or arguments they do not have.
    """

    def __init__(
        self,
        pipe,
        *,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        checkpointing: bool = True,
        gradient_checkpointing: bool = False,
        **call_kwargs,
    ):
        kind = type(pipe).__name__
        self.pipe = pipe
        self._function = getattr(type(pipe).__call__, "__wrapped__", None)
        if self._function is None:
            raise ValueError(
                f"{kind}.__call__ keeps no `__wrapped__` function under its torch.no_grad; put `@torch.no_grad()` on it, and no "
                "other decorator, to learn through it"
            )
        self.parameters = inspect.signature(self._function).parameters
        if "strength" in self.parameters or call_kwargs.get("denoising_end") or call_kwargs.get("denoising_start"):
            raise ValueError(
                f"{kind} does not sample from pure noise to data here; learn with the text-to-image pipeline of the family, "
                "without strength, denoising_start or denoising_end: its schedules serve the others by truncation"
            )
        chosen = {"guidance_scale": guidance_scale, "height": height, "width": width}
        arguments = {**call_kwargs, **{key: value for key, value in chosen.items() if value is not None}}
        for name in arguments:
            if name in OWN_ARGUMENTS:
                raise ValueError(f"{name} is set by the rollout; pass noise and a schedule to the call instead")
            if name not in self.parameters:
                raise ValueError(f"{kind}.__call__ has no argument {name!r}; drop it")
        self._prompts = {key: arguments.pop(key, None) for key in (*PROMPTS, "negative_prompt")}
        self._embeddings = {
            key: arguments.pop(key) for key in list(arguments) if key.endswith("_embeds") or key.endswith("_mask")
        }
        self.call_kwargs = arguments
        self.checkpointing = checkpointing
        self.evaluations = Evaluations()
        self.moves_noise = "latents" in self.parameters
        if not self.moves_noise and "generator" not in self.parameters:
            raise ValueError(
                f"{kind} takes neither latents nor a generator, so its starting noise cannot be chosen; use another"
            )
        self._prompt_name = next((name for name in PROMPTS if name in self.parameters), None)
        denoisers(pipe)  # complains if there are none
        # A scheduler of our own even where there was an LD3Scheduler: its schedules answer for some step counts only.
        self.scheduler = LD3Scheduler.from_config(pipe.scheduler.config, schedules=None)
        self._blocks = ExitStack()
        if gradient_checkpointing:
            self._blocks.enter_context(checkpointed_blocks(pipe))
        self.stock_scheduler = pipe.scheduler
        pipe.scheduler = self.scheduler
        modules = [component for component in pipe.components.values() if isinstance(component, nn.Module)]
        # weak references: text encoders may be freed before the rollout is closed
        self._training = [(weakref.ref(part), part.training) for module in modules for part in module.modules()]
        self._frozen = [weakref.ref(p) for module in modules for p in module.parameters() if p.requires_grad]
        for module in modules:
            module.eval().requires_grad_(False)
        self._start: tuple[tuple[int, ...], torch.dtype] | None = None
        self._told: Told | None = None

    def close(self) -> None:
        """Give the pipeline back as it came."""
        self.pipe.scheduler = self.stock_scheduler
        self._blocks.close()
        for reference, training in self._training:
            if (module := reference()) is not None:
                module.training = training
        for reference in self._frozen:
            if (parameter := reference()) is not None:
                parameter.requires_grad_(True)
        self._training, self._frozen = [], []

    def __enter__(self) -> "PipelineRollout":
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    @property
    def path(self):
        """The noise path of the model."""
        return self.scheduler.path

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def mu(self) -> float:
        """Resolution shift of the last call, in logit s; 0 where there is none."""
        return self.scheduler.mu

    @property
    def bounds_data(self) -> bool:
        """Whether the scheduler clips its data predictions, so that its rows are not linear."""
        return bool(self.scheduler.config.clip_sample or self.scheduler.config.thresholding)

    @property
    def guidance_scale(self) -> float | None:
        """As it will act: what was given, else the pipeline's default; None for pipelines without."""
        parameter = self.parameters.get("guidance_scale")
        default = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
        return self.call_kwargs.get("guidance_scale", default)

    # ------------------------------------------------------------------ running the pipeline

    def _run(self, nfe: int, arguments: dict[str, Any], on_step: Callable | None = None) -> None:
        """Call the pipeline unwrapped, quietly; see [`_observed`] for `on_step`, which ends the run by raising [`_EndReached`]."""
        pipe, arguments = (
            self.pipe,
            {**self.call_kwargs, **arguments, "num_inference_steps": nfe, "output_type": "latent"},
        )
        # An omitted negative prompt may default to "", which counts as a prompt given twice beside its embeddings.
        for name in ("prompt", "negative_prompt"):
            if name in self.parameters and name not in arguments:
                arguments[name] = None
        arguments = {name: value for name, value in arguments.items() if name in self.parameters}
        for network in denoisers(pipe).values():
            if getattr(network, "is_cache_enabled", False):
                network._reset_stateful_cache()  # of a run that ended before its time
        with ExitStack() as stack:
            stack.enter_context(replaced(pipe, "_progress_bar_config", {"disable": True}))
            if on_step is not None:
                stack.enter_context(replaced(self.scheduler, "step", _observed(self.scheduler.step, on_step)))
            try:
                self._function(pipe, **arguments)
            except _EndReached:
                pass

    def __call__(self, schedule: Schedule | int, noise: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """The end state, (batch, ...), in the pipeline's dtype.

        Differentiable in `schedule.times`, `schedule.network_times` and `noise` where gradients are enabled.

        Args:
            schedule: the schedule to follow, or a number of evaluations on the scheduler's own unlearned grid.
            noise: (batch, ...) unit-normal; the pipeline scales it. Without `moves_noise`: (batch,) LongTensor of seeds.
            conditioning: from [`encode`]; single rows serve the whole batch.

        Raises:
            ValueError: if the pipeline takes another number of steps, or never calls its network.
        """
        results: list[Tensor] = []
        nfe = schedule if isinstance(schedule, int) else schedule.nfe
        taken = 0

        def on_step(_state: Tensor, _output: Tensor, result: Tensor) -> None:
            nonlocal taken
            taken += 1
            if taken == nfe:
                results.append(result)
                raise _EndReached

        self._follow(schedule, noise, conditioning, on_step)
        if not results:
            raise ValueError(
                f"{type(self.pipe).__name__} took {taken} steps of {nfe}; it does not follow its scheduler's timesteps"
            )
        # DiT carries guidance's doubled batch through its scheduler; the halves are equal.
        return results[0][: len(noise)]

    def first_output(self, schedule: Schedule, noise: Tensor, conditioning: Conditioning | None) -> Tensor:
        """What the first evaluation of a schedule returns, (batch, ...): guided, in the prediction type; differentiable as a call."""
        outputs: list[Tensor] = []

        def on_step(_state: Tensor, output: Tensor, _result: Tensor) -> None:
            outputs.append(output)
            raise _EndReached

        self._follow(schedule, noise, conditioning, on_step)
        return outputs[0][: len(noise)]

    @torch.no_grad()
    def output(self, state: Tensor, time: float, conditioning: Conditioning | None) -> Tensor:
        """What the pipeline's networks return of any state, (batch, ...), when told `time`: guided, in the prediction type.

        Args:
            time: of the noise path, with its resolution shift where there is one.

        Raises:
            ValueError: for pipelines that draw their own noise, which no state can be handed to.
        """
        if not self.moves_noise:
            raise ValueError(
                f"{type(self.pipe).__name__} takes no latents, so its network cannot be asked of a given state"
            )
        prediction_type = self.scheduler.config.prediction_type
        single = Schedule([time, 0.0], None, SolverSpec("euler"), self.path.kind, prediction_type, final=True)
        # What the pipeline multiplies its latents by.
        return self.first_output(single, state / single.table(self.path).start.to(state), conditioning)

    @torch.no_grad()
    def visit(self, schedule: Schedule, noise: Tensor, conditioning: Conditioning | None, at_step: Callable) -> None:
        """Run a schedule and hand each evaluation to `at_step(i, state, output, result)`; nothing is differentiated.

        Args:
            at_step: gets the index of the row, the state that the network saw, what it returned (guided, in the prediction type)
                and the state that the row makes of these, each (batch, ...). A state that it returns takes the place of that
                result, so that the next evaluation is made there.

        Raises:
            ValueError: as a call.
        """
        batch, taken = len(noise), 0

        def on_step(state: Tensor, output: Tensor, result: Tensor) -> Tensor | None:
            nonlocal taken
            other = at_step(taken, state[:batch], output[:batch], result[:batch])
            taken += 1
            if taken == schedule.nfe:
                raise _EndReached
            if other is None:
                return None
            return other.to(result).repeat(len(result) // batch, *[1] * (result.ndim - 1))

        self._follow(schedule, noise, conditioning, on_step)
        if taken < schedule.nfe:
            raise ValueError(
                f"{type(self.pipe).__name__} took {taken} steps of {schedule.nfe}; it does not follow its scheduler's timesteps"
            )

    def _follow(self, schedule: Schedule | int, noise: Tensor, conditioning: Conditioning | None, on_step) -> None:
        """Run the pipeline on a schedule and count the evaluations."""
        if torch.is_grad_enabled():
            for name, network in denoisers(self.pipe).items():
                if getattr(network, "is_cache_enabled", False):
                    raise ValueError(
                        f"feature caching skips evaluations and gradients; call pipe.{name}.disable_cache() first, or learn by "
                        "the default recipe, which differentiates nothing"
                    )
        arguments = self._starting_arguments(noise, conditioning)
        nfe, calls = self._use(schedule), Calls(self.evaluations, len(noise))
        with instrumented(self.pipe, calls, self.checkpointing):
            self._run(nfe, arguments, on_step)
        if not calls.forward and torch.is_grad_enabled():
            raise ValueError(
                "the pipeline's networks were never called through `forward`, so that nothing can be differentiated; load it "
                "without torch.compile, or learn by the default recipe"
            )
        calls.finish(nfe)

    def _use(self, schedule: Schedule | int) -> int:
        learned = None if isinstance(schedule, int) else schedule
        nfe = schedule if learned is None else learned.nfe
        self.scheduler.use_schedule(learned, self._told)
        if not self.scheduler.config.use_dynamic_shifting:
            # Some pipelines scale their starting noise before they set the timesteps.
            self.scheduler.set_timesteps(nfe, device=self.device)
        return nfe

    def _starting_arguments(self, noise: Tensor, conditioning: Conditioning | None) -> dict[str, Any]:
        """Arguments of the pipeline's call for a batch of starting noises, or of seeds where it draws its own."""
        conditioning = self._embeddings if conditioning is None else conditioning
        arguments = self._arguments(conditioning, len(noise))
        if self.moves_noise:
            arguments["latents"] = noise.to(self.device, self._starting_state(conditioning)[1])
        elif noise.ndim != 1 or noise.is_floating_point():
            raise ValueError(
                f"{type(self.pipe).__name__} draws its own noise; pass a LongTensor with one seed a sample"
            )
        else:
            arguments["generator"] = [torch.Generator().manual_seed(int(seed)) for seed in noise]
        return arguments

    def _arguments(self, conditioning: Conditioning, batch: int) -> dict[str, Any]:
        arguments = dict(expanded(conditioning, batch, self.device))
        if "class_labels" in arguments:
            arguments["class_labels"] = arguments["class_labels"].tolist()
        if "batch_size" in self.parameters:
            arguments["batch_size"] = batch
        return arguments

    # ------------------------------------------------------------------ conditioning and noise

    def encode(self, prompts: list | None = None, negative_prompts: list[str] | str | None = None) -> Conditioning:
        """Conditioning of a batch, each prompt encoded once.

        The pipeline encodes as it does when it samples: it is run up to its first network call, and what its
        `encode_prompt` returned is kept. Pipelines that cannot be handed embeddings get the prompts themselves.

        Args:
            prompts: text, or for class-conditional pipelines labels, as numbers or names; None: those given to the rollout.
            negative_prompts: one for all or one each; None: as given to the rollout, else the pipeline's default.

        Returns:
            Keyword arguments of the pipeline's `__call__`; {} for unconditional pipelines.

        Raises:
            ValueError: if the pipeline is not conditioned on prompts, or needs some and has none.
        """
        if prompts is None:
            if self._embeddings:
                return dict(self._embeddings)
            prompts = self._prompts["prompt"] if self._prompts["prompt"] is not None else self._prompts["class_labels"]
        kind = type(self.pipe).__name__
        if self._prompt_name is None:
            if prompts is not None:
                raise ValueError(f"{kind} is unconditional; drop the prompts")
            return {}
        if prompts is None and self._prompt_name == "class_labels" and self.parameters["class_labels"].default is None:
            return {}  # whether its network is unconditional, the pipeline knows
        if prompts is None:
            raise ValueError(
                f"{kind} needs prompts or labels; give --prompts_file or --class_labels (or a list, to encode)"
            )
        prompts = [prompts] if isinstance(prompts, (str, int)) else list(prompts)
        if self._prompt_name == "class_labels":
            return {"class_labels": torch.tensor([self._label(label) for label in prompts])}

        arguments: dict[str, Any] = {"prompt": prompts}
        negative = self._prompts["negative_prompt"] if negative_prompts is None else negative_prompts
        if negative is not None:
            if "negative_prompt" not in self.parameters:
                raise ValueError(f"{kind} takes no negative prompt; drop it")
            arguments["negative_prompt"] = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        captured: list = []
        original = getattr(self.pipe, "encode_prompt", None)
        if original is None:
            return arguments

        def capture(*args, **kwargs):
            captured.append(original(*args, **kwargs))
            return captured[-1]

        def stop(*_args, **_kwargs):
            raise _EndReached

        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(replaced(self.pipe, "encode_prompt", capture))
            for module in denoisers(self.pipe).values():
                stack.enter_context(replaced(module, "forward", stop))
            self.scheduler.use_schedule(None)
            self._run(2, arguments)
        return named_embeddings(getattr(type(self.pipe), "encode_prompt"), captured, self.parameters) or arguments

    def _label(self, label) -> int:
        if isinstance(label, int) or str(label).strip().isdecimal():
            return int(label)
        names = getattr(self.pipe, "labels", None) or {}
        if label not in names:
            raise ValueError(f"{label!r} is neither a class number nor a label of this pipeline; use numbers")
        return names[label]

    def _starting_state(self, conditioning: Conditioning) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape, without the batch, and dtype of the state in which the pipeline starts; found by one step of a real run.

        How the pipeline rounds the time that its network is told is found on the way.
        """
        if self._start is None:
            batch = batch_size(conditioning) or 1
            arguments = self._arguments(conditioning, batch)
            if "generator" in self.parameters:
                arguments["generator"] = [torch.Generator().manual_seed(0) for _ in range(batch)]

            def on_step(state: Tensor, _output: Tensor, _result: Tensor) -> None:
                self._start = tuple(state.shape[1:]), state.dtype
                raise _EndReached

            with torch.no_grad():
                self.scheduler.use_schedule(None)
                self._run(2, arguments, on_step)
                self._told = self._find_told(arguments)
            if self._start is None:
                raise ValueError(
                    f"{type(self.pipe).__name__} never called its scheduler's step; it cannot follow a schedule"
                )
        return self._start

    def state_shape(self, conditioning: Conditioning | None = None) -> tuple[int, ...]:
        """Shape of one sample's state, and with `moves_noise` of its starting noise, as the pipeline takes it for `latents`."""
        return self._starting_state(self._embeddings if conditioning is None else conditioning)[0]

    def state_dtype(self, conditioning: Conditioning | None = None) -> torch.dtype:
        """In which the pipeline keeps its states between steps."""
        return self._starting_state(self._embeddings if conditioning is None else conditioning)[1]

    def _find_told(self, arguments: dict[str, Any]) -> Told | None:
        """What the pipeline does to timesteps on their way to the network; see [`find_told`]."""
        self.scheduler.use_schedule(None)
        with watched(list(denoisers(self.pipe).values()), _EndReached) as (given, embedded):
            self._run(PROBES, arguments)
        # Guidance by a second call is told the same time again.
        calls = max(1, len(given) // PROBES)
        return find_told(self.scheduler.timesteps, given[::calls], embedded[::calls]) if given else None

    def rounded(self, schedule: Schedule) -> Schedule:
        """The schedule with network times as the network was told them in the last call, which followed it."""
        return schedule if self._told is None else schedule.rounded(self.path, self._told, mu=self.mu)

    # ------------------------------------------------------------------ results

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1], differentiable; see [`decode`]."""
        return decode(self.pipe, latents, height=self.call_kwargs.get("height"), width=self.call_kwargs.get("width"))


def _observed(step: Callable, on_step: Callable) -> Callable:
    """`step` with `on_step(state before, output, state after)` called after it, whose return replaces the state unless None."""
    signature = inspect.signature(step)

    def observed(*args, **kwargs):
        result = step(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        other = on_step(given["sample"], next(iter(given.values())), result[0])
        if other is None:
            return result
        return (other,) if isinstance(result, tuple) else type(result)(prev_sample=other)

    observed.__signature__ = signature  # pipelines ask it for eta and generator
    return observed
