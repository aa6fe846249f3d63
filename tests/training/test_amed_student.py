# SPDX-License-Identifier: Apache-2.0
"""AMED's student is the pipeline with its scheduler attached, and differentiable in one step at a time."""

import copy
from dataclasses import replace

import pytest
import torch

from ld3_diffusers import AMEDScheduler
from ld3_diffusers.amed import num_student_steps, static_schedule
from ld3_diffusers.amed_predictor import FORMS
from training.amed_student import RESTARTING

from .amed_problems import PROMPTS, STUDENTS, amed_step, guided, predictor_of, student_of, tiny_rollout
from .rollouts import close


def run(rollout, student, predictor, batch=len(PROMPTS)):
    """Noise and the student's end state, from prompts of their own."""
    conditioning = rollout.encode(list(PROMPTS[:batch]))
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(batch, *rollout.state_shape(conditioning), generator=generator)
    noise = noise.to(next(iter(conditioning.values())).dtype)
    end = student.run(predictor, noise, conditioning)
    student.network.close()
    rollout.close()
    return noise, end


def sampled(rollout, bare, predictor, noise, config=None):
    """What the pipeline makes of the same noise with the scheduler that would be saved."""
    pipe, path = rollout.pipe, rollout.path
    form = predictor.config.form
    schedule = static_schedule(bare, predictor, path) if form == "static" else bare
    scheduler = AMEDScheduler.from_config(pipe.scheduler.config, schedules={str(bare.nfe): schedule.to_dict(path)})
    pipe.scheduler = scheduler
    if form == "per_sample":
        scheduler.set_predictor(bare.nfe, predictor)
        scheduler.attach(pipe)
    arguments = dict(rollout.call_kwargs)
    prompts = list(PROMPTS[: len(noise)])
    found = pipe(
        prompts, num_inference_steps=bare.nfe, latents=noise, output_type="latent", return_dict=False, **arguments
    )
    scheduler.detach()
    return found[0]


# ---------------------------------------------------------------------- the student is the pipeline


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("solver", STUDENTS)
def test_same_end_state_as_the_pipeline_with_its_scheduler(solver, afs, form):
    rollout = tiny_rollout()
    student = student_of(rollout, replace(STUDENTS[solver], afs=afs), form)
    predictor = predictor_of(student.bare, form)
    noise, end = run(rollout, student, predictor)
    found = sampled(rollout, student.bare, predictor, noise)
    # Rows that are known before are taken by a fused multiply-add, which rounds otherwise.
    assert torch.equal(end, found) if form == "per_sample" else close(end, found, 1e-6)
    bare = predictor_of(student.bare, "static", scale_dir=0.0, scale_time=0.0)
    with torch.no_grad():
        for value in bare.logits:
            value.zero_()
    assert not close(end, sampled(rollout, student.bare, bare, noise), 1e-3)  # what is predicted matters


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "solver", "guidance", "config"),
    [
        ("sd", "amed", 1.0, {}),
        ("sd", "dpmpp", 1.0, {}),
        ("sdxl", "amed", 5.0, {}),
        ("sdxl", "ipndm", 1.0, {}),
        ("sd_controlnet", "dpmpp_noise", 4.0, {}),
        ("sd_controlnet", "amed", 1.0, {}),
        ("sd", "amed", 2.0, {"prediction_type": "v_prediction"}),
        ("sd", "dpmpp", 2.0, {"prediction_type": "sample"}),
        ("sd", "amed", 2.0, {"noise_path": "ve"}),
        ("sd", "dpmpp", 2.0, {"noise_path": "ve", "prediction_type": "v_prediction"}),
    ],
)
def test_same_end_state_in_other_pipelines_and_parametrisations(name, solver, guidance, config, form):
    rollout = tiny_rollout(name, torch.float64, guidance, **config)
    student = student_of(rollout, STUDENTS[solver], form)
    predictor = predictor_of(student.bare, form)
    noise, end = run(rollout, student, predictor)
    assert end.dtype == torch.float64
    assert close(end, sampled(rollout, student.bare, predictor, noise), 1e-12)


@pytest.mark.parametrize("solver", [name for name in STUDENTS if name != "dpmpp_noise"])
def test_static_stages_on_rectified_flow_with_a_resolution_shift(solver):
    """The first row is at s = 1, where z is infinite."""
    rollout = tiny_rollout("flux")
    student = student_of(rollout, STUDENTS[solver], "static")
    predictor = predictor_of(student.bare, "static")
    noise, end = run(rollout, student, predictor, batch=2)
    assert student.mu > 0.1
    assert close(end, sampled(rollout, student.bare, predictor, noise), 1e-6)


def test_rows_are_those_of_the_saved_schedule_where_a_pipeline_rounds_times_too():
    """Flux tells its network times in bfloat16, in which end states are too coarse to be compared."""
    rollout = tiny_rollout("flux", torch.bfloat16)
    student = student_of(rollout, STUDENTS["amed"], "static")
    predictor = predictor_of(student.bare, "static")
    conditioning = rollout.encode(list(PROMPTS))
    progress = student.begin(torch.zeros(len(PROMPTS), *rollout.state_shape(conditioning)), conditioning)
    saved = static_schedule(student.bare, predictor, rollout.path).table(rollout.path, mu=student.mu)
    for n in range(student.num_steps):
        with torch.no_grad():
            student.step(progress, n, predictor)
        for name in ("timesteps", "p", "q", "state", "history"):
            found, expected = getattr(progress.executor.table, name), getattr(saved, name)[2 * n : 2 * n + 2]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_networks_are_given_back_and_pipelines_without_a_bottleneck_refused():
    rollout = tiny_rollout()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in rollout.pipe.unet.modules()]
    student = student_of(rollout, STUDENTS["amed"], "per_sample")
    student.network.close()
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in rollout.pipe.unet.modules()]
    with pytest.raises(ValueError, match="without a bottleneck"):
        student_of(tiny_rollout("flux"), STUDENTS["amed"], "per_sample")
    with pytest.raises(ValueError, match="takes no latents"):
        student_of(tiny_rollout("ddpm", guidance=None), STUDENTS["amed"], "static")


# ---------------------------------------------------------------------- one step


class Stage:
    """A student of two steps in float64 with a batch at the beginning."""

    def __init__(self, solver="amed", form="static", afs=False, dtype=torch.float64):
        self.rollout = tiny_rollout(dtype=dtype)
        self.student = student_of(self.rollout, replace(STUDENTS[solver], afs=afs), form)
        self.predictor = predictor_of(self.student.bare, form, dtype).train()
        self.conditioning = self.rollout.encode(list(PROMPTS))
        shape = self.rollout.state_shape(self.conditioning)
        generator = torch.Generator().manual_seed(7)
        self.noise, self.elsewhere = (
            torch.randn(len(PROMPTS), *shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
        )

    def begin(self):
        return self.student.begin(self.noise, self.conditioning)

    @torch.no_grad()
    def values(self, n):
        features = torch.zeros(1, 8, 8)
        return [float(value) for value in self.predictor(features, *self.student.levels[n], n)]


@pytest.mark.parametrize("n", [0, 1])
def test_a_step_is_the_formula_of_the_paper(n):
    stage = Stage()
    progress = stage.begin()
    for k in range(n):
        stage.student.step(progress, k, stage.predictor)
    before = progress.state
    with torch.no_grad():
        after = stage.student.step(progress, n, stage.predictor)
        ends = stage.student.bare.times[::2]
        expected = amed_step(
            lambda x, t: guided(stage.rollout.pipe, stage.conditioning, x, t),
            stage.rollout.path,
            before,
            ends[n],
            ends[n + 1],
            *stage.values(n),
        )
    # timesteps are float32
    assert close(after, expected, 1e-7)


@pytest.mark.parametrize(("afs", "n"), [(False, 0), (False, 1), (True, 0)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", STUDENTS)
def test_gradients_agree_with_finite_differences(solver, form, afs, n):
    """Of one step, to which predictions before it and the bottleneck are data."""
    stage = Stage(solver, form, afs)
    parameters, progress = list(stage.predictor.parameters()), stage.begin()
    with torch.no_grad():
        for k in range(n):
            stage.student.step(progress, k, stage.predictor)
    generator = torch.Generator().manual_seed(9)
    cotangent = torch.randn(stage.noise.shape, generator=generator, dtype=torch.float64)

    def value():
        return (stage.student.step(copy.deepcopy(progress), n, stage.predictor) * cotangent).sum()

    gradients = torch.autograd.grad(value(), parameters, materialize_grads=True)
    slope = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    values = []
    # Fourth order, uphill, with steps that stand clear of the float32 in which pipelines hold timesteps.
    h = {"per_sample": 1e-4, "static": 4e-4}[form]
    with torch.no_grad():
        before = [parameter.clone() for parameter in parameters]
        for times in (1, -1, 2, -2):
            for parameter, origin, gradient in zip(parameters, before, gradients):
                parameter.copy_(origin + times * h / slope * gradient)
            values.append(float(value()))
    expected = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
    assert float(slope) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("solver", STUDENTS)
def test_gradients_stop_where_a_step_begins(solver):
    stage = Stage(solver, dtype=torch.float32)
    progress = stage.begin()
    for n in range(2):
        state = stage.student.step(progress, n, stage.predictor)
        found = torch.autograd.grad(state.sum(), list(stage.predictor.parameters()), allow_unused=True)
        assert [gradient is not None for gradient in found] == [k == n for k in range(2)]
        live = progress.live
        kept = [progress.state, live.times, live.network_times, live.direction_scales, *progress.executor.predictions]
        assert not any(value.requires_grad for value in kept)
        assert torch.equal(progress.state, state)
    expected = static_schedule(stage.student.bare, stage.predictor, stage.rollout.path)
    assert torch.equal(progress.live.times, expected.times)


@pytest.mark.parametrize("solver", STUDENTS)
def test_only_multistep_students_remember_what_happened_before(solver):
    """A restart from a given state is a new start there, whatever the first step did."""
    stage = Stage(solver, dtype=torch.float32)
    ends = []
    for noise in (stage.noise, stage.elsewhere):
        progress = stage.student.begin(noise, stage.conditioning)
        with torch.no_grad():
            stage.student.step(progress, 0, stage.predictor)
            progress.state = stage.elsewhere
            ends.append(stage.student.step(progress, 1, stage.predictor))
    assert torch.equal(*ends) == (STUDENTS[solver].solver in RESTARTING) == stage.student.restarts


@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_a_known_first_evaluation_makes_one_more(form):
    stage = Stage(form=form, dtype=torch.float32)
    progress, counted = stage.begin(), stage.rollout.evaluations
    unknown = stage.begin()
    for n in range(2):
        unknown.state = progress.state
        first = stage.student.first_evaluation(progress, n)
        assert (first[1] is None) == (form == "static")
        before = counted.forward, counted.backward
        state = stage.student.step(progress, n, stage.predictor, first)
        torch.autograd.grad(state.sum(), list(stage.predictor.parameters()), allow_unused=True)
        made = counted.forward - before[0], counted.backward - before[1]
        assert made == (len(PROMPTS), len(PROMPTS))
        with torch.no_grad():
            assert torch.equal(state, stage.student.step(unknown, n, stage.predictor))
    assert counted.recomputed == 0


def test_an_analytical_first_step_makes_one_evaluation_too():
    stage = Stage(afs=True, dtype=torch.float32)
    progress, counted = stage.begin(), stage.rollout.evaluations
    before = counted.forward
    stage.student.step(progress, 0, stage.predictor)
    assert counted.forward - before == len(PROMPTS)
    assert num_student_steps(stage.student.bare.nfe, True) == stage.student.num_steps == 2
