# SPDX-License-Identifier: Apache-2.0
"""Learning AMED on a tiny Stable Diffusion: problems, students, and what they compute written by hand."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from ld3_diffusers import AMEDPredictor, LD3Scheduler, Schedule, SolverSpec
from ld3_diffusers.amed import amed_schedule
from ld3_diffusers.discretization import append_zero, discretization, discretization_to_zero
from tests.tiny_pipelines import PIPELINES
from training.amed_student import GuidedNetwork, Student
from training.learner import Problem
from training.rollout import PipelineRollout


PROMPTS = ("a red fox", "blue sea", "tea")
GUIDANCE = 2.0
STUDENTS = {
    "amed": SolverSpec("amed"),
    "dpm2": SolverSpec("dpm2"),
    "euler": SolverSpec("euler"),
    "ipndm": SolverSpec("ipndm", 3),
    "dpmpp": SolverSpec("dpmpp", 3),
    "dpmpp_noise": SolverSpec("dpmpp", 2, predict_x0=False),
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Random noises and end points; sample i has the prompt i modulo their number."""

    noise: Tensor
    end: Tensor
    embeddings: dict
    asked: list = field(default_factory=list)  # the indices of each batch

    def __len__(self) -> int:
        return len(self.noise)

    def batch(self, indices, device):
        self.asked.append(list(indices))
        rows = [i % len(PROMPTS) for i in indices]
        return self.noise[indices], self.end[indices], {key: value[rows] for key, value in self.embeddings.items()}

    def identity(self) -> list:
        return [len(self), float(self.noise.sum())]


def tiny_rollout(
    name: str = "sd", dtype=torch.float32, guidance: float | None = GUIDANCE, **config
) -> PipelineRollout:
    """Of a tiny pipeline in `dtype`, with `config` for its scheduler."""
    pipe, call = PIPELINES[name]()
    pipe.to(dtype)
    if config:
        pipe.scheduler = LD3Scheduler.from_config(pipe.scheduler.config, **config)
    given = {key: call[key] for key in ("height", "width", "image", "max_sequence_length") if key in call}
    return PipelineRollout(pipe, guidance_scale=guidance, checkpointing=False, **given)


def tiny_problem(num_train: int = 5, num_valid: int = 3, dtype=torch.float32) -> Problem:
    rollout = tiny_rollout(dtype=dtype)
    embeddings = rollout.encode(list(PROMPTS))
    shape = rollout.state_shape(embeddings)
    pairs = []
    for seed, count in ((1, num_train), (2, num_valid)):
        generator = torch.Generator().manual_seed(seed)
        noise, end = (torch.randn(count, *shape, generator=generator).to(dtype) for _ in range(2))
        pairs.append(Pairs(noise, end, embeddings))
    return Problem(rollout, *pairs, rollout.path, accelerator=Accelerator(cpu=True))


def step_ends(path, steps: int) -> Tensor:
    """(steps + 1,) uneven times down to 0."""
    if path.kind == "flow":
        return append_zero(torch.linspace(1, 0.2, steps, dtype=torch.float64))
    return discretization_to_zero("logsnr" if path.kind == "ve" else "time_uniform", path, steps, before_zero=False)


def student_of(rollout: PipelineRollout, spec: SolverSpec, form: str, steps: int = 2, to_zero: bool = True) -> Student:
    """A student whose network is to be closed after use."""
    path = rollout.path
    ends = step_ends(path, steps) if to_zero else discretization("time_uniform", path, steps)
    bare = amed_schedule(ends, spec, path, rollout.scheduler.config.prediction_type)
    return Student(GuidedNetwork(rollout, watches=form == "per_sample"), bare)


def predictor_of(bare: Schedule, form: str, dtype=torch.float32, **options) -> AMEDPredictor:
    """One whose answers differ much between steps and samples."""
    spec = bare.spec
    student = {
        "solver": spec.solver,
        "solver_order": spec.solver_order,
        "predict_x0": spec.predict_x0,
        "afs": spec.afs,
    }
    steps = (len(bare.times) - 1) // 2
    scales = {"scale_dir": 0.05, "scale_time": 0.1, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        predictor = AMEDPredictor(form=form, num_steps=steps, **scales, **student)
        with torch.no_grad():
            for value in predictor.logits if form == "static" else ():
                value += torch.randn(len(value))
            for layer in (predictor.enc_layer0, predictor.enc_layer1) if form == "per_sample" else ():
                layer.weight *= 4
    return predictor.to(dtype).eval()


# ---------------------------------------------------------------------- by hand


def guided(pipe, conditioning: dict, state: Tensor, timestep: Tensor, guidance: float = GUIDANCE) -> Tensor:
    """Stable Diffusion's guided noise prediction."""
    embeddings = torch.cat([conditioning["negative_prompt_embeds"], conditioning["prompt_embeds"]])
    output = pipe.unet(torch.cat([state, state]), timestep.float(), encoder_hidden_states=embeddings).sample
    without, with_prompt = output.chunk(2)
    return without + guidance * (with_prompt - without)


def amed_step(network, path, state: Tensor, start: Tensor, end: Tensor, r, c, a) -> Tensor:
    r"""One step of AMED-Solver in EDM's variables, on a variance-preserving path with a network that predicts noise.

    With $y = x/\alpha$, $d = \epsilon(x, t)$ and $d_s = (\tilde z/z_s) \epsilon(\alpha(\tilde t) y_s, \tilde t)$, where $\tilde z$ is $a z_s$ within the step:

    $$ z_s = z'^r z^{1-r}, \quad y_s = y + (z_s - z) d, \quad y' = y + c (z' - z) d_s. $$
    """
    floor = end.clamp(min=path.t_min)
    z, z_end = path.sigma_edm(start), path.sigma_edm(end)
    z_stage = path.sigma_edm(floor) ** r * z ** (1 - r)
    told = path.inverse_sigma_edm(a * z_stage).clamp(floor, start)
    y = state / path.alpha(start)
    stage = y + (z_stage - z) * network(state, path.timestep(start))
    direction = path.sigma_edm(told) / z_stage * network(path.alpha(told) * stage, path.timestep(told))
    return path.alpha(end) * (y + c * (z_end - z) * direction)
