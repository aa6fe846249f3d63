# SPDX-License-Identifier: Apache-2.0
"""AMED's student (arXiv:2312.00094), one step at a time, through the pipeline itself.

The numbers are those of `AMEDScheduler` in the pipeline: the same rows of the step table, and the network as the pipeline calls it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ld3_diffusers import AMEDPredictor, Schedule, SolverSpec
from ld3_diffusers.amed import StepPrediction, step_levels, with_step
from ld3_diffusers.attachment import Attachment
from ld3_diffusers.step_table import Executor, StepTable

from .conditioning import Conditioning
from .rollout import PipelineRollout


RESTARTING = ("amed", "dpm2", "euler")  # single-step students, which learn each step from where the teacher is


class GuidedNetwork:
    """A pipeline's network with its guidance, at any state and time: each evaluation is a sampling of one step through the pipeline.

    Args:
        rollout: of the pipeline.
        watches: whether samples may have times of their own, and the bottleneck is watched; see [`Attachment`].

    Raises:
        ValueError: for a pipeline that takes no latents, or `watches` without a bottleneck.
    """

    def __init__(self, rollout: PipelineRollout, watches: bool):
        if not rollout.moves_noise:
            raise ValueError(
                f"{type(rollout.pipe).__name__} takes no latents, so that it cannot be started where a step begins; use another pipeline"
            )
        self.rollout = rollout
        self._times: Tensor | None = None
        self.attachment = Attachment(rollout.pipe, self._timesteps) if watches else None

    def close(self) -> None:
        if self.attachment is not None:
            self.attachment.remove()

    def _timesteps(self, given: Tensor) -> Tensor:
        if self._times is None:
            return given.reshape(-1)[:1]
        return self.rollout.path.timestep(self._times).to(given)

    def __call__(self, state: Tensor, told: Tensor, input_scale: Tensor, conditioning: Conditioning) -> Tensor:
        """Its output, (batch, ...), differentiable in the state and the time.

        Args:
            state: (batch, ...) on the path.
            told: () or (batch,) float64: the time that it is told, any resolution shift applied.
            input_scale: the same: what the state is multiplied by before the network sees it.
        """
        path, config = self.rollout.path, self.rollout.scheduler.config
        self._times = told if told.ndim else None
        shared = told.detach().mean() if told.ndim else told
        times = torch.stack([shared, torch.zeros_like(shared)])
        schedule = Schedule(times, shared[None], SolverSpec("euler"), path.kind, config.prediction_type, final=True)
        table = schedule.table(path)
        factor = input_scale / (table.start * table.input_scale[0])  # the pipeline applies these two
        factor = factor.to(state.device, state.dtype).reshape(-1, *[1] * (state.ndim - 1))
        self.forget()
        try:
            return self.rollout.first_output(schedule, factor * state, conditioning)
        finally:
            self._times = None

    def forget(self) -> None:
        """Evaluations before count no more: the next [`features`] are those of the one that follows."""
        if self.attachment is not None:
            self.attachment.calls = 0

    def features(self, batch: int) -> Tensor | None:
        """Of the last evaluation, see [`Attachment.features`]; None if the bottleneck is not watched."""
        return None if self.attachment is None else self.attachment.features(batch)


@dataclass
class Progress:
    """A batch of samples on its way.

    Attributes:
        noise: the starting noise; `state`, where it is.
        live: the schedule as predicted so far.
        executor: with the predictions that a multistep solver needs.
    """

    noise: Tensor
    state: Tensor
    conditioning: Conditioning
    live: Schedule
    executor: Executor | None = None


class Student:
    """Steps of a schedule of AMED steps, `bare`, whose stages a predictor places."""

    def __init__(self, network: GuidedNetwork, bare: Schedule):
        self.network, self.bare = network, bare
        self.path = network.rollout.path
        self.num_steps = (len(bare.times) - 1) // 2
        self.restarts = bare.spec.solver in RESTARTING
        self.levels = [step_levels(bare, n, self.path) for n in range(self.num_steps)]
        self._bare_tables: list[StepTable] = []

    @property
    def mu(self) -> float:
        return self.network.rollout.mu

    def _table(self, schedule: Schedule, n: int) -> StepTable:
        return schedule.table(self.path, mu=self.mu, wanted=range(2 * n, 2 * n + 2))

    def begin(self, noise: Tensor, conditioning: Conditioning) -> Progress:
        if not self._bare_tables:
            self.network.rollout.state_shape(conditioning)  # after it the shift is known
            self._bare_tables = [self._table(self.bare, n) for n in range(self.num_steps)]
        noise = noise.to(self.network.rollout.state_dtype(conditioning))
        return Progress(noise, noise * float(self._bare_tables[0].start), conditioning, self.bare)

    @torch.no_grad()
    def first_evaluation(self, progress: Progress, n: int) -> tuple[Tensor, Tensor | None]:
        """The network's output at the beginning of step n, and the bottleneck's features."""
        table = self._bare_tables[n]
        output = self.network(progress.state, table.network_times[0], table.input_scale[0], progress.conditioning)
        return output, self.network.features(len(output))

    def step(
        self,
        progress: Progress,
        n: int,
        predictor: AMEDPredictor,
        first: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """The state after step n, differentiable in the predictor's parameters; `progress` is there then, without gradients.

        Args:
            first: the step's [`first_evaluation`], where it is known.
        """
        skips_first = self.bare.spec.afs and n == 0
        if skips_first:
            prediction = StepPrediction(*(value.squeeze() for value in predictor(None, *self.levels[n], n)))
        else:
            output, features = self.first_evaluation(progress, n) if first is None else first
            prediction = predictor(features, *self.levels[n], n)
        live = with_step(progress.live, n, prediction, self.path)
        table = self._table(live, n)
        executor = progress.executor or Executor(table, fused=False)
        executor.go_on_with(table)
        if skips_first:
            state = progress.noise * table.start.to(progress.noise)
        else:
            state = executor.step(progress.state, output).to(progress.noise.dtype)  # as a scheduler rounds
        output = self.network(state, table.network_times[-1], table.input_scale[-1], progress.conditioning)
        result = executor.step(state, output).to(progress.noise.dtype)
        executor.predictions = [known.detach() for known in executor.predictions]
        progress.executor, progress.state = executor, result.detach()
        progress.live = replace(
            live,
            times=live.times.detach(),
            network_times=live.network_times.detach(),
            direction_scales=live.direction_scales.detach(),
        )
        return result

    @torch.no_grad()
    def run(self, predictor: AMEDPredictor, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """The end state from the starting noise, through all steps."""
        progress = self.begin(noise, conditioning)
        for n in range(self.num_steps):
            self.step(progress, n, predictor)
        return progress.state

    def scale_at_end(self, n: int) -> float:
        """alpha at the end of step n: losses are of y = x / alpha, EDM's variable; on rectified flow 1."""
        return float(self.path.scale(self._bare_tables[n].times[-1]))
