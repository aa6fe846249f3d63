# SPDX-License-Identifier: Apache-2.0
"""Learning AMED's stages: losses and gradients against a direct computation, and what the learner keeps."""

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from ld3_diffusers import SolverSpec
from ld3_diffusers.amed import amed_schedule
from training.amed_learner import LARGEST_GRADIENT, AMEDLearner, AMEDRecipe
from training.amed_student import GuidedNetwork, Student
from training.amed_trajectories import Trajectories, refined_grid, teacher_trajectories
from training.learner import Problem
from training.rollout import PipelineRollout

from .amed_problems import PROMPTS, STUDENTS, Pairs, amed_step, guided, predictor_of, student_of, tiny_problem


STEPS = 2


def random_trajectories(problem: Problem, features: bool = False) -> Trajectories:
    """States that no teacher visited: stepwise losses know them only as starts and targets. Outputs are the network's there."""
    shape = problem.train.noise.shape
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(shape[0], STEPS + 1, *shape[1:], generator=generator, dtype=torch.float64).to(
        problem.train.noise
    )
    states[:, 0] = problem.train.noise
    network = GuidedNetwork(problem.rollout, features)
    student = Student(network, student_of(problem.rollout, STUDENTS["amed"], "static", STEPS).bare)
    outputs, seen = [], []
    _, _, conditioning = problem.train.batch(list(range(shape[0])), "cpu")
    for n in range(STEPS):
        progress = student.begin(states[:, 0], conditioning)
        progress.state = states[:, n]
        output, means = student.first_evaluation(progress, n)
        outputs.append(output)
        seen.append(means)
    network.close()
    return Trajectories(states, torch.stack(outputs, 1), torch.stack(seen, 1) if features else None)


class Bench:
    """A learner of a student with random trajectories."""

    def __init__(self, solver="amed", form="static", dtype=torch.float64, num_train=5, **recipe):
        self.problem = tiny_problem(num_train=num_train, dtype=dtype)
        self.student = student_of(self.problem.rollout, STUDENTS[solver], form, STEPS)
        predictor = predictor_of(self.student.bare, form, dtype)
        trajectories = random_trajectories(self.problem, form == "per_sample")
        self.problem.train.asked.clear()
        arguments = {"batch_size": 3, "num_epochs": 2, "validation_steps": 100, **recipe}
        self.learner = AMEDLearner(self.problem, self.student, predictor, trajectories, AMEDRecipe(**arguments), 0)


def by_hand(bench: Bench, predictor, indices, n):
    """The loss of step n for these trajectories, differentiable: squared distances in y = x / alpha, summed, by trajectory."""
    problem, path = bench.problem, bench.problem.path
    _, _, conditioning = problem.train.batch(indices, "cpu")
    states, times = bench.learner.trajectories.states[indices], bench.student.bare.times[::2]
    features = bench.learner.trajectories.features
    features = None if features is None else features[indices, n]
    prediction = predictor(features, *bench.student.levels[n], n)
    r, c, a = (value.reshape(-1, 1, 1, 1) for value in prediction)

    def network(x, timestep):
        return guided(problem.rollout.pipe, conditioning, x, timestep.flatten().expand(len(x)).repeat(2))

    after = amed_step(network, path, states[:, n], times[n], times[n + 1], r, c, a)
    return ((after - states[:, n + 1]) / path.alpha(times[n + 1])).square().sum() / len(indices)


# ---------------------------------------------------------------------- one batch


@pytest.mark.parametrize("form", ["static", "per_sample"])
def test_a_batch_is_one_adam_step_for_each_student_step(form):
    bench = Bench(form=form, micro_batch_size=2)
    predictor = copy.deepcopy(bench.learner.predictor)
    optimizer = torch.optim.Adam(predictor.parameters(), lr={"static": 0.05, "per_sample": 0.005}[form])
    entry = bench.learner.step()
    bench.student.network.close()
    indices = [i for part in bench.problem.train.asked for i in part]
    assert len(indices) == 3
    for n in range(STEPS):
        loss = by_hand(bench, predictor, indices, n)
        # states are compared in float32
        assert entry[f"step-{n}/loss"] == pytest.approx(loss.item(), rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert entry["loss"] == pytest.approx(sum(entry[f"step-{n}/loss"] for n in range(STEPS)), rel=1e-12)
    before = predictor_of(bench.student.bare, form, torch.float64)
    for found, expected, old in zip(*(each.parameters() for each in (bench.learner.predictor, predictor, before))):
        # by-hand gradients differ in the float32 of the states, and Adam makes steps of .005 out of small ones, too
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert not torch.equal(found, old)


def test_a_static_step_leaves_the_logits_of_others_alone(monkeypatch):
    bench = Bench(dtype=torch.float32)
    learner, seen = bench.learner, [[value.detach().clone() for value in bench.learner.predictor.logits]]
    step = learner.optimizer.step

    def watching():
        step()
        seen.append([value.detach().clone() for value in learner.predictor.logits])

    monkeypatch.setattr(learner.optimizer, "step", watching)
    learner.step()
    learner.step()
    assert len(seen) == 1 + 2 * STEPS
    for k, (before, after) in enumerate(zip(seen, seen[1:])):
        moved = [not torch.equal(a, b) for a, b in zip(before, after)]
        assert moved == [n == k % STEPS for n in range(STEPS)]


@pytest.mark.parametrize("solver", ["amed", "dpmpp"])
def test_single_step_students_begin_where_the_teacher_is_and_multistep_ones_where_they_are(solver, monkeypatch):
    bench = Bench(solver, dtype=torch.float32, batch_size=5)
    begins, step = [], bench.student.step

    def watching(progress, n, predictor, first=None):
        begins.append((progress.state, first is not None))
        result = step(progress, n, predictor, first)
        begins.append(progress.state)
        return result

    monkeypatch.setattr(bench.student, "step", watching)
    bench.learner.step()
    (_, known), end_of_first, (second, known_again), _ = begins
    [indices] = bench.problem.train.asked
    states = bench.learner.trajectories.states[indices]
    restarts = solver == "amed"
    assert known and known_again == restarts
    assert torch.equal(second, states[:, 1] if restarts else end_of_first)


def test_evaluations_of_a_batch():
    """Restarting students know the first of two evaluations, others only that of their first step."""
    for solver, forward in (("amed", STEPS), ("ipndm", 2 * STEPS - 1)):
        bench = Bench(solver, dtype=torch.float32)
        counted = bench.problem.rollout.evaluations
        before = counted.forward, counted.backward
        bench.learner.step()
        assert (counted.forward - before[0], counted.backward - before[1]) == (3 * forward, 3 * STEPS)


@pytest.mark.parametrize("solver", ["amed", "dpmpp"])
def test_micro_batches_change_only_rounding(solver):
    found = []
    for size in (None, 1, 2, 4):
        bench = Bench(solver, "per_sample", batch_size=5, micro_batch_size=size)
        gradients, optimizer, parameters = [], bench.learner.optimizer, list(bench.learner.predictor.parameters())
        optimizer.step = lambda: gradients.append([value.grad.clone() for value in parameters])
        losses = bench.learner.step()
        assert [len(part) for part in bench.problem.train.asked] == {None: [5], 1: [1] * 5, 2: [2, 2, 1], 4: [4, 1]}[
            size
        ]
        found.append((losses, gradients))
    for losses, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-12)
        for step, expected in zip(gradients, found[0][1]):
            for gradient, reference in zip(step, expected):
                assert float((gradient - reference).norm()) <= 1e-12 * float(reference.norm())


def test_an_epoch_has_every_trajectory_once_in_an_order_of_its_own():
    bench = Bench(dtype=torch.float32, num_train=7)
    asked = bench.problem.train.asked
    orders = []
    for _ in range(2):
        asked.clear()
        for _ in range(3):
            bench.learner.step()
        assert [len(part) for part in asked] == [3, 3, 1]
        orders.append([i for part in asked for i in part])
        assert sorted(orders[-1]) == list(range(7))
    assert orders[0] != orders[1] and bench.learner.finished


# ---------------------------------------------------------------------- what is kept


def test_the_weights_of_the_best_validation_are_returned(monkeypatch):
    bench = Bench(dtype=torch.float32, validation_steps=1)
    learner, losses, seen = bench.learner, iter([5.0, 3.0, math.nan, 4.0]), []

    def validation_loss():
        seen.append([value.detach().clone() for value in learner.predictor.parameters()])
        return next(losses)

    monkeypatch.setattr(learner, "validation_loss", validation_loss)
    learner.start(6.0)
    while not learner.finished:
        learner.step()
    assert learner.best_loss == 3.0
    best = list(learner.best_predictor().parameters())
    assert all(torch.equal(value, expected) for value, expected in zip(best, seen[1]))
    assert not all(torch.equal(value, expected) for value, expected in zip(best, seen[3]))


def test_a_start_that_is_never_beaten_is_returned(monkeypatch):
    bench = Bench(dtype=torch.float32, validation_steps=1)
    before = [value.detach().clone() for value in bench.learner.predictor.parameters()]
    monkeypatch.setattr(bench.learner, "validation_loss", lambda: 2.0)
    bench.learner.start(1.0)
    bench.learner.step()
    assert bench.learner.best_loss == 1.0
    assert all(torch.equal(a, b) for a, b in zip(bench.learner.best_predictor().parameters(), before))


def test_validation_is_the_distance_of_end_states_on_held_out_pairs():
    bench = Bench("dpmpp", "per_sample", dtype=torch.float32, micro_batch_size=2)
    learner, valid = bench.learner, bench.problem.valid
    noise, target, conditioning = valid.batch([0, 1, 2], "cpu")
    end = bench.student.run(learner.predictor, noise, conditioning)
    assert learner.validation_loss() == pytest.approx(float((end - target).square().mean()), rel=1e-5)
    assert valid.asked[-2:] == [[0, 1], [2]]
    assert learner.predictor.training


@pytest.mark.parametrize("solver", ["amed", "dpmpp"])
def test_gradients_that_are_not_finite_spoil_nothing(solver, monkeypatch):
    bench = Bench(solver, dtype=torch.float32, batch_size=5)
    learner = bench.learner
    learner.trajectories.states[2, 1] = float("nan")
    before = [value.detach().clone() for value in learner.predictor.logits]
    entry = learner.step()
    assert math.isnan(entry["step-0/loss"])
    assert torch.equal(learner.predictor.logits[0], before[0])  # 0 in place of nan
    infinite = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)
    gradients = [infinite, *[None] * (len(list(learner.predictor.parameters())) - 1)]
    monkeypatch.setattr(learner, "_differentiate", lambda *_: (math.inf, gradients))
    learner.step()
    assert learner.predictor.logits[0].grad.tolist() == [LARGEST_GRADIENT, -LARGEST_GRADIENT, 0]
    assert all(bool(torch.isfinite(value).all()) for value in learner.predictor.parameters())


def test_losses_that_stay_not_finite_end_the_run(monkeypatch):
    bench = Bench(dtype=torch.float32, num_epochs=100)
    learner, losses = bench.learner, iter([math.nan, 1.0, *[math.inf] * 10])
    monkeypatch.setattr(learner, "_learn", lambda parts: [next(losses)])
    for _ in range(11):
        learner.step()
    with pytest.raises(ValueError, match="the losses of 10 batches in a row are not finite"):
        learner.step()


@pytest.mark.parametrize("form", ["static", "per_sample"])
def test_a_continued_run_is_bit_for_bit_that_which_was_not_interrupted(form):
    whole = Bench("dpmpp", form, torch.float32, validation_steps=1)
    whole.learner.start(whole.learner.validation_loss())
    for _ in range(3):
        whole.learner.step()
        if whole.learner.done == 1:
            file = io.BytesIO()
            torch.save(whole.learner.state_dict(), file)
    other = Bench("dpmpp", form, torch.float32, validation_steps=1)
    file.seek(0)
    other.learner.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        other.learner.step()
    assert same(other.learner.state_dict(), whole.learner.state_dict())
    assert other.learner.done == 3


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------------------------------------------------------------------- it learns


@pytest.mark.slow
@pytest.mark.parametrize("form", ["static", "per_sample"])
def test_a_trained_teachers_student_comes_nearer_to_it(tmp_path, form):
    """fashion-sd, AMED-Solver with four evaluations: end states of held-out noise, against the stages of the bare solver."""
    folder = Path(__file__).parents[2] / "examples" / "teachers" / "fashion-sd"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    spec, nfe, points = SolverSpec("amed"), 4, 3
    with PipelineRollout(pipe, guidance_scale=3.0, checkpointing=False) as rollout:
        path = rollout.path
        embeddings = rollout.encode([f"a photo of a {name}" for name in ("sneaker", "bag", "coat")[: len(PROMPTS)]])
        shape = rollout.state_shape(embeddings)
        pairs = []
        for seed, count in ((1, 24), (2, 12)):
            noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
            pairs.append(Pairs(noise, torch.zeros_like(noise), embeddings))
            _, _, conditioning = pairs[-1].batch(list(range(count)), "cpu")
            with torch.no_grad():
                pairs[-1].end.copy_(rollout(20, noise, conditioning))
        problem = Problem(rollout, *pairs, path, accelerator=Accelerator(cpu=True))
        grid = refined_grid("time_uniform", path, nfe // 2, points, True)
        bare = amed_schedule(grid[:: points + 1], spec, path, "epsilon")
        network = GuidedNetwork(rollout, form == "per_sample")
        trajectories = teacher_trajectories(
            problem, network, grid, points, SolverSpec("dpmpp"), tmp_path, final=False, batch_size=12
        )
        predictor = predictor_of(bare, form, scale_dir=0.01, scale_time=0.0)
        recipe = AMEDRecipe(batch_size=6, num_epochs=3, validation_steps=3, learning_rate={"static": 0.2}.get(form))
        learner = AMEDLearner(problem, Student(network, bare), predictor, trajectories, recipe, 0)
        learner.start(math.inf)
        while not learner.finished:
            learner.step()
        network.close()
        by_solver = problem.mean_loss(bare, problem.valid)
    assert learner.best_loss < 0.9 * by_solver
