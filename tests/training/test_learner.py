# SPDX-License-Identifier: Apache-2.0
"""Learning on problems whose network is known in closed form."""

import math
import random
from dataclasses import replace

import pytest
import torch

from ld3_diffusers import residuals
from ld3_diffusers.noise_path import VE, VPLinear
from ld3_diffusers.schedule import Schedule, SolverSpec
from tests.training.toy import ToyPairs, grid_schedule, make_pairs, perfect_gain, single_gaussian, toy
from training.checkpoint import checkpoint_folders
from training.initial import best_grid, candidates, grid_search, saved_schedule
from training.initial import grid_schedule as initial_grid
from training.learner import Problem, learn, parameters_for
from training.learner_adam import AdamLearner
from training.learner_default import DefaultLearner, surely_better
from training.learner_published import PublishedLearner
from training.parameters import PublishedParameters
from training.recipe import AdamRecipe, DefaultRecipe, PublishedRecipe, make_recipe


PATH = VPLinear()
DPMPP = SolverSpec("dpmpp", 2)


@pytest.fixture(scope="module")
def mixture():
    rollout = toy(PATH)
    return rollout, *(make_pairs(rollout, count, seed) for count, seed in ((32, 100), (32, 200), (256, 300)))


def losses_of(problem_pairs, rollout, *schedules):
    problem = Problem(rollout, problem_pairs, problem_pairs, PATH)
    return [problem.mean_loss(schedule, problem_pairs) for schedule in schedules]


# ---------------------------------------------------------------------- what learning achieves


@pytest.mark.parametrize(
    "recipe", [DefaultRecipe(), AdamRecipe(max_steps=150, learn="times,network_times")], ids=lambda recipe: recipe.name
)
def test_learning_beats_every_hand_made_grid_on_fresh_noise(mixture, recipe):
    rollout, train, valid, test = mixture
    grids = candidates(PATH, 5, DPMPP, "epsilon", final_sigmas_type="sigma_min")
    problem = Problem(rollout, train, valid, PATH)
    start = next(iter(grid_search(problem, grids)))
    result = learn(rollout, train, valid, grids[start], recipe, path=PATH)
    learned, *by_hand = losses_of(test, rollout, result.schedule, *grids.values())
    assert learned < 0.5 * min(by_hand)
    assert result.loss < 0.5 * result.initial_loss
    assert result.loss == pytest.approx(min(entry["valid_loss"] for entry in result.history if "valid_loss" in entry))
    assert len(result.history) <= recipe.max_steps


@pytest.mark.parametrize("name", ["default", "adam"])
@pytest.mark.parametrize("final", ["sigma_min", "zero"])
def test_one_gaussian_is_solved_as_well_as_by_trying_all_times(final, name):
    """Euler in two steps has one free time; the end point is a known multiple of the start."""
    path, std = VE(sigma_min=0.02, sigma_max=10.0), 0.5
    rollout = single_gaussian(path, std)
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = 10.0 * noise * perfect_gain(path, std, 10.0, 0.02 if final == "sigma_min" else 0.0)
    pairs = ToyPairs(noise, end)
    spec = SolverSpec("euler")
    problem = Problem(rollout, pairs, pairs, path)
    last = 0.02 if final == "sigma_min" else 0.0

    def loss_at(middle):
        return problem.mean_loss(Schedule([10.0, middle, last], None, spec, "ve"), pairs)

    tried = torch.logspace(1, -1.7, 2000, base=10, dtype=torch.float64)[1:-1]
    found = torch.tensor([loss_at(float(t)) for t in tried[::20]])
    near = int(found.argmin()) * 20
    fine = {float(t): loss_at(float(t)) for t in tried[max(near - 20, 0) : near + 21]}
    optimum = min(fine, key=fine.get)
    assert 0.1 < optimum < 5  # inside

    start = Schedule([10.0, 3.0 if optimum < 1 else 0.5, last], None, spec, "ve")
    recipe = DefaultRecipe(max_steps=60) if name == "default" else AdamRecipe(max_steps=200, batch_size=None)
    result = learn(rollout, pairs, pairs, start, replace(recipe, learn=("times",)), path=path)
    assert result.loss <= fine[optimum] * 1.001 + 1e-12
    if name == "adam":  # derivatives by finite changes end near an optimum that is this flat, not at it
        assert float(result.schedule.times[1]) == pytest.approx(optimum, rel=0.01)


def test_halving_finds_the_grid_that_all_pairs_find_for_less(mixture):
    rollout, train, valid, _ = mixture
    grids = candidates(PATH, 5, DPMPP, "epsilon", final_sigmas_type="sigma_min")
    problem = Problem(rollout, train, valid, PATH)
    counts, single = [], {name: [schedule] for name, schedule in grids.items()}
    for search in (lambda: next(iter(grid_search(problem, grids))), lambda: best_grid(problem, single, 8)):
        rollout.evaluations = 0
        counts.append((search(), rollout.evaluations))
    assert len(grids) == 5 and counts[0] == (counts[1][0], 32 * 5 * 5)
    assert counts[1][1] == 5 * (4 * 5 + (8 - 4) * 3 + (16 - 8) * 2)  # each round, the pairs not yet tried
    problem.rollout = lambda schedule, noise, conditioning: noise * math.nan
    with pytest.raises(ValueError, match="no hand-made grid has a finite loss; use another solver"):
        best_grid(problem, single)


@pytest.mark.parametrize("best", range(-3, 4))
def test_the_damping_is_searched_from_what_was_best(mixture, best, monkeypatch):
    """Where the loss falls up to one damping and rises from there, that one is found; where none is better, all were tried."""
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    problem = Problem(rollout, train, valid, PATH)
    recipe = DefaultRecipe(directions=50)
    learner = DefaultLearner(problem, recipe, parameters_for(recipe, initial, PATH))
    _, gradient, hessian = learner._linearised(range(16))
    before, tried, worst = learner.parameters.vector(), [], 0.0

    def losses(held_out):
        moved = learner.parameters.vector() - before
        if not moved.any():
            return torch.full((1, len(held_out)), 10.0)
        # what damping led here
        powers = torch.arange(-3, 4)
        steps = [torch.linalg.solve(hessian + torch.diag(10.0**p * hessian.diagonal()), -gradient) for p in powers]
        tried.append(int(powers[torch.stack([(moved - step).norm() for step in steps]).argmin()]))
        return torch.full((1, len(held_out)), worst + abs(tried[-1] - best))

    monkeypatch.setattr(learner, "_held_out_losses", losses)
    monkeypatch.setattr(learner, "_linearised", lambda pairs: (1.0, gradient, hessian))
    assert learner.step()["damping"] == 10.0**best and learner.damping == best
    assert len(tried) <= 2 + abs(best) + (best >= 0)
    learner.parameters.set_vector(before)
    tried.clear()
    assert learner.step()["damping"] == 10.0**best and len(tried) <= 3
    learner.parameters.set_vector(before)
    tried.clear()
    worst = 11.0
    assert learner.step() == {"loss": 1.0, "valid_loss": 10.0, "damping": 0.0, "pairs": 32, "directions": 50}
    assert sorted(tried) == list(range(-3, 4)) and learner.damping == best and learner.stopped


def test_a_step_that_fails_is_tried_along_more_directions_while_there_are_more(mixture, monkeypatch):
    rollout, train, valid, _ = mixture
    problem = Problem(rollout, train, valid, PATH)
    recipe = DefaultRecipe(directions=3, first_pairs=16)
    learner = DefaultLearner(
        problem, recipe, parameters_for(recipe, grid_schedule(PATH, "time_uniform", 4, DPMPP), PATH)
    )
    before, count = learner.parameters.vector(), len(learner.parameters.vector())

    def losses(held_out):
        return torch.full((1, len(held_out)), 1.0 if torch.equal(learner.parameters.vector(), before) else 2.0)

    monkeypatch.setattr(learner, "_held_out_losses", losses)
    monkeypatch.setattr(
        learner, "_linearised", lambda pairs: (1.0, torch.ones(count).double(), torch.eye(count).double())
    )
    # Before the last of 4 rows: 1 + 2 + 3 coefficients of predictions, 3 of states, 3 network times.
    assert learner._most_directions() == 12 < count
    found = []
    while not learner.finished:
        found.append(learner.step()["directions"])
    # Half the pairs may be at fault; then 3, 6 and 12 directions of all.
    assert len(train) == 32 and found == [3, 3, 6, 12]
    learner.stopped, learner.alone, learner.directions = False, False, 1
    assert "directions" not in learner.step() and learner.stopped


def test_a_network_that_overflows_is_refused_by_a_sentence():
    rollout = toy(PATH)
    pairs = make_pairs(rollout, 4, 1)
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    learner = DefaultLearner(
        Problem(rollout, pairs, pairs, PATH), DefaultRecipe(), parameters_for(DefaultRecipe(), initial, PATH)
    )
    network = rollout.network
    rollout.network = lambda x, t, path: network(x, t, path) * (math.inf if float(t) < 0.5 else 1.0)
    with pytest.raises(ValueError, match="derivatives are not finite; learn in bfloat16 or float32"):
        learner.step()


def test_a_curve_whose_counts_are_exact_is_left_alone():
    """Its losses are 0, of which there is no logarithm."""
    path, std = VE(sigma_min=0.02, sigma_max=10.0), 0.5
    rollout = single_gaussian(path, std)
    initial = {nfe: grid_schedule(path, "logsnr", nfe, SolverSpec("euler")) for nfe in (3, 4)}
    curve = parameters_for(DefaultRecipe(), initial, path).learned()
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = ToyPairs(noise, rollout(curve.schedule(3, path), noise, {}))
    result = learn(rollout, pairs, pairs, initial, DefaultRecipe(max_steps=2), path=path)
    assert result.loss <= result.initial_loss < 1e-12


def test_a_curve_that_starts_from_one_keeps_what_that_has_learned(mixture):
    recipe, initial = DefaultRecipe(), {nfe: grid_schedule(PATH, "logsnr", nfe, DPMPP) for nfe in (3, 4, 5, 6)}
    parameters = parameters_for(recipe, initial, PATH)
    generator = torch.Generator().manual_seed(0)
    moved = 0.1 * torch.randn(len(parameters.vector()), generator=generator, dtype=torch.float64)
    parameters.set_vector(parameters.vector() + moved)
    learned = {schedule.nfe: schedule.detach() for schedule in parameters.schedules()}
    again = parameters_for(recipe, learned, PATH)
    assert len(again.vector()) == len(moved)
    times_alone = parameters_for(DefaultRecipe(learn="times"), learned, PATH)
    for parameters in (again, times_alone):
        for schedule in parameters.schedules():
            expected = learned[schedule.nfe]
            # Lengths of steps are fitted up to a factor for each count, the rest exactly.
            torch.testing.assert_close(schedule.times, expected.times, rtol=0.01, atol=0)
            torch.testing.assert_close(schedule.network_times, expected.network_times, rtol=0.01, atol=0)
            torch.testing.assert_close(schedule.residuals, expected.residuals)


@pytest.mark.parametrize(
    "nfe, grid, solver",
    [
        (1, "time_uniform", DPMPP),
        (2, "time_uniform_before_zero", DPMPP),
        (3, "time_uniform_before_zero", SolverSpec("heun")),
    ],
)
def test_few_evaluations_leave_coefficients_to_learn(mixture, nfe, grid, solver):
    rollout, train, valid, _ = mixture
    initial = initial_grid(grid, PATH, nfe, solver, "epsilon")
    result = learn(rollout, train, valid, initial, DefaultRecipe(max_steps=2), path=PATH)
    assert result.schedule.nfe == nfe and result.loss < result.initial_loss


def test_adam_passes_over_coefficients_that_no_scheduler_takes(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "logsnr", 4, DPMPP)
    learner = AdamLearner(Problem(rollout, train, valid, PATH), AdamRecipe(), initial, seed=0)
    learner.start(1.0)
    with torch.no_grad():
        learner.parameters.groups["coefficients"].fill_(9.0)
    learner.average = learner.parameters.state_dict()
    assert learner._validate() == math.inf and learner.worse == 1
    assert not learner.best_schedule().residuals.any()


@pytest.mark.parametrize("solver", ["euler", "ipndm"])
def test_with_coefficients_one_gaussian_is_solved_exactly(solver, monkeypatch):
    # Its mean is 0: no prediction is the constant that stable coefficients must carry.
    monkeypatch.setattr(residuals, "LARGEST_DEVIATION", math.inf)
    path, std = VE(sigma_min=0.02, sigma_max=10.0), 0.5
    rollout = single_gaussian(path, std)
    noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = ToyPairs(noise, 10.0 * noise * perfect_gain(path, std, 10.0, 0.0))
    start = Schedule([10.0, 2.0, 0.3, 0.0], None, SolverSpec(solver), "ve")
    result = learn(rollout, pairs, pairs, start, DefaultRecipe(max_steps=10), path=path)
    assert result.initial_loss > 1e-4 and result.loss < 1e-12 * result.initial_loss
    fixed = learn(rollout, pairs, pairs, start, DefaultRecipe(learn="coefficients", max_steps=10), path=path)
    assert fixed.loss < 1e-12 * fixed.initial_loss
    torch.testing.assert_close(fixed.schedule.times, start.times, rtol=1e-12, atol=0)
    assert fixed.schedule.residuals.any()


def test_network_times_alone_also_learn(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_quadratic", 4, DPMPP)
    result = learn(rollout, train, valid, initial, AdamRecipe(learn="network_times", max_steps=60), path=PATH)
    torch.testing.assert_close(result.schedule.times, initial.times, atol=1e-12, rtol=0)
    assert result.loss < 0.9 * result.initial_loss


@pytest.mark.parametrize(
    "options", [{"averaging": 0.9}, {"relaxation": 1e-3}, {"times_first": 0.5}, {"warmup_steps": 5}]
)
def test_options_of_adam_also_learn(mixture, options):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_quadratic", 4, DPMPP)
    result = learn(rollout, train, valid, initial, AdamRecipe(max_steps=40, **options), path=PATH)
    assert result.loss < result.initial_loss


def test_batches_cover_every_pair_and_do_not_depend_on_micro_batches(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_quadratic", 4, DPMPP)
    seen = []

    class Recorded:
        def __len__(self):
            return len(train)

        def batch(self, indices, device):
            seen.extend(indices)
            return train.batch(indices, device)

    recipe = AdamRecipe(max_steps=8, batch_size=8, micro_batch_size=None)
    whole = learn(rollout, Recorded(), valid, initial, recipe, path=PATH)
    assert sorted(seen) == sorted(2 * list(range(32)))
    parts = learn(rollout, train, valid, initial, replace(recipe, micro_batch_size=3), path=PATH)
    torch.testing.assert_close(parts.schedule.times, whole.schedule.times, atol=1e-10, rtol=0)


def test_published_micro_batches_change_only_rounding(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    recipe = replace(RECIPES["published"], radius=1e-2, shift_lr=100.0)
    whole, parts = (
        learn(rollout, train, valid, initial, replace(recipe, micro_batch_size=size), path=PATH) for size in (None, 4)
    )
    assert [entry["loss"] for entry in parts.history] == pytest.approx([entry["loss"] for entry in whole.history])
    torch.testing.assert_close(parts.schedule.times, whole.schedule.times, atol=1e-10, rtol=0)


def test_patience_stops(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_quadratic", 4, DPMPP)
    recipe = AdamRecipe(max_steps=100, lr_times=10.0, validation_steps=1, patience=3)
    result = learn(rollout, train, valid, initial, recipe, path=PATH)
    assert len(result.history) < 100
    assert all(entry["valid_loss"] >= result.loss for entry in result.history[-3:])


# ---------------------------------------------------------------------- losses that are not finite


def broken(rollout, when):
    calls = iter(range(10**9))

    def broken_rollout(schedule, noise, conditioning):
        end = rollout(schedule, noise, conditioning)
        return end * (float("nan") if when(next(calls)) else 1.0)

    return broken_rollout


def test_single_bad_iterations_are_skipped_and_many_end_in_a_sentence(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_quadratic", 4, DPMPP)
    recipe = AdamRecipe(max_steps=12, validation_steps=100, micro_batch_size=None)
    result = learn(broken(rollout, lambda call: call == 5), train, valid, initial, recipe, path=PATH)
    assert result.loss < result.initial_loss
    assert sum("grad_norm" not in entry for entry in result.history) == 1
    with pytest.raises(ValueError, match="10 times in a row"):
        learn(broken(rollout, lambda call: call >= 3), train, valid, initial, recipe, path=PATH)
    with pytest.raises(ValueError, match="initial schedule's loss is not finite"):
        learn(broken(rollout, lambda call: True), train, valid, initial, recipe, path=PATH)
    published = PublishedRecipe(micro_batch_size=None)
    with pytest.raises(ValueError, match="no way to go on"):
        learn(broken(rollout, lambda call: call >= 3), train, valid, initial, published, path=PATH)


# ---------------------------------------------------------------------- the published procedure


def test_one_published_iteration_is_the_hand_computed_update(mixture):
    rollout, train, valid, _ = mixture
    steps, lr_x = 4, 12 / 4
    initial = grid_schedule(PATH, "time_uniform", steps, DPMPP)
    recipe = PublishedRecipe(mode="time", rounds_v1=0, rounds_v2=1, lr_network_times=0.1, batch_size=2)
    learner = PublishedLearner(Problem(rollout, train, valid, PATH), recipe, initial, 0)
    learner._begin_round()
    learner._iterate([0, 1])

    parameters = PublishedParameters(PATH, steps, spec=DPMPP, prediction_type="epsilon", mode="time")
    noise, target, _ = train.batch([0, 1], "cpu")
    x = noise.clone().requires_grad_()
    losses = ((rollout(parameters.schedule(), x, {}) - target) ** 2).flatten(1).mean(1)
    losses.mean().backward()
    with torch.no_grad():
        gradients = {}
        for name, value in parameters.groups.items():
            gradients[name] = value.grad / max(1.0, float(value.grad.norm()) + 1e-6)
        # RMSprop from rest: the average square is 1 % of the square; its momentum is the step itself.
        g = gradients["times"]
        parameters.groups["times"] -= 0.005 * g / ((0.01 * g**2).sqrt() + 1e-8)
        parameters.groups["network_times"] -= 0.1 / steps * gradients["network_times"]
        bound = 0.001 * 48 / steps**2
        moved = x - lr_x * x.grad
        away = (moved - noise).flatten(1)
        away = away * (bound / away.norm(dim=1, keepdim=True)).clamp(max=1)
        moved = noise + away.view_as(noise)
        new = ((rollout(parameters.schedule(), moved, {}) - target) ** 2).flatten(1).mean(1)
        kept = torch.where((new < losses).view(-1, 1, 1, 1), moved, noise)
    for name, value in parameters.groups.items():
        torch.testing.assert_close(learner.parameters.groups[name], value, atol=1e-12, rtol=1e-9)
    for i in range(2):
        torch.testing.assert_close(learner.moved["train"].get(i, noise[i]), kept[i], atol=1e-12, rtol=1e-9)


def test_moved_noise_stays_in_the_ball_and_only_improvements_are_kept(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    recipe = PublishedRecipe(mode="time", rounds_v1=1, rounds_v2=1, radius=1e-2, shift_lr=100.0)
    learner = PublishedLearner(Problem(rollout, train, valid, PATH), recipe, initial, 0)
    bound = 1e-2 * 48 / 16
    assert learner.bound == bound
    while not learner.finished:
        before = dict(learner.moved["valid"])
        schedule = learner.parameters.schedule().detach()
        learner.step()
        if learner.batch == 0:  # a round has ended: validation noises were moved with the times as they are
            schedule = learner.parameters.schedule().detach()
            for i in range(len(valid)):
                noise, target, _ = valid.batch([i], "cpu")
                old = before.get(i, noise[0])[None]
                new = learner.moved["valid"].get(i, noise[0])[None]
                with torch.no_grad():
                    falls = [((rollout(schedule, z, {}) - target) ** 2).mean() for z in (old, new)]
                assert torch.equal(old, new) or falls[1] < falls[0]
    moved = 0
    for which, pairs in (("train", train), ("valid", valid)):
        for i, noise in learner.moved[which].items():
            distance = float((noise - pairs.noise[i]).norm())
            assert distance <= bound * (1 + 1e-9)
            moved += distance > 0
    assert moved > 32


def test_published_rounds_learn_times_first_and_end_where_they_should(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    recipe = PublishedRecipe(mode="time", rounds_v1=1, rounds_v2=1, batch_size=16)
    learner = PublishedLearner(Problem(rollout, train, valid, PATH), recipe, initial, 0)
    for expected in ((0, 1), (1, 0)):
        learner.step()
        assert (learner.round, learner.batch) == expected
        assert (learner.offsets == 0).all() and not (learner.times == 1).all()
    learner.step()
    assert not (learner.offsets[1:-1] == 0).any()
    learner.step()
    assert learner.finished
    result = learn(rollout, train, valid, initial, replace(recipe, no_v1=True), path=PATH)
    torch.testing.assert_close(result.schedule.times, initial.times, atol=1e-12, rtol=0)
    assert len(result.history) == recipe.steps(32) == 4


def test_published_patience_enlarges_validation_first_and_then_lowers_the_rates(mixture):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    recipe = PublishedRecipe(mode="time", valid_batch_size=4, rounds_v1=0, rounds_v2=1, patience=2)
    learner = PublishedLearner(Problem(rollout, train, valid, PATH), recipe, initial, 0)
    learner._begin_round()
    first = learner._validate()
    assert first == pytest.approx(learner._validation_loss(4), rel=1e-12)
    kept = learner.best["times"].clone()
    for expected in (1, 0):
        with torch.no_grad():
            learner.times.copy_(torch.tensor([1.0, 5, -5, 5, -5], dtype=torch.float64))
        learner._validate()
        assert learner.worse == expected
    assert learner.whole_validation and torch.equal(learner.times.detach(), kept)
    assert learner.best_loss == pytest.approx(learner._validation_loss(32), rel=1e-12)
    assert learner.rms.param_groups[0]["lr"] == 0.005
    for _ in range(2):
        with torch.no_grad():
            learner.times.copy_(torch.tensor([1.0, 5, -5, 5, -5], dtype=torch.float64))
        learner._validate()
    assert learner.rms.param_groups[0]["lr"] == pytest.approx(0.004)
    assert learner.sgd.param_groups[0]["lr"] == pytest.approx(0.8 * 0.1 / 4)
    learner.sgd.param_groups[0]["lr"] = 1e-6
    for _ in range(5):
        assert not learner.finished
        learner._decay_rates()
    assert learner.finished


# ---------------------------------------------------------------------- interruption


RECIPES = {
    "default": DefaultRecipe(max_steps=8, first_pairs=8, directions=1, micro_batch_size=5),
    "adam": AdamRecipe(max_steps=14, batch_size=6, validation_steps=3, averaging=0.9, relaxation=1e-3),
    "published": PublishedRecipe(mode="time", rounds_v1=1, rounds_v2=1, batch_size=6, valid_batch_size=8, patience=2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(mixture, name, tmp_path):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    recipe = RECIPES[name]
    options = {
        "path": PATH,
        "seed": 3,
        "checkpointing_steps": 1 if name == "default" else 2,
        "checkpoints_total_limit": 2,
    }
    whole = learn(rollout, train, valid, initial, recipe, checkpoint_dir=tmp_path / "whole", **options)
    total = len(whole.history)
    if name == "default":
        assert whole.history[0]["directions"] < whole.history[-1]["directions"]
    rng = random.Random(1)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        kills = sorted(rng.sample(range(1, total), 2))

        def kill(done, entry):
            if kills and done == kills[0]:
                kills.pop(0)
                raise KeyboardInterrupt

        result = None
        while result is None:
            try:
                result = learn(
                    rollout,
                    train,
                    valid,
                    initial,
                    recipe,
                    checkpoint_dir=folder,
                    resume_from_checkpoint="latest",
                    callback=kill,
                    **options,
                )
            except KeyboardInterrupt:
                assert len(checkpoint_folders(folder)) <= 2
        assert torch.equal(result.schedule.times, whole.schedule.times)
        assert torch.equal(result.schedule.network_times, whole.schedule.network_times)
        assert result.history == whole.history
        assert (result.initial_loss, result.loss) == (whole.initial_loss, whole.loss)


def test_checkpoints_are_whole_pruned_and_of_one_run(mixture, tmp_path):
    rollout, train, valid, _ = mixture
    initial = grid_schedule(PATH, "time_uniform", 4, DPMPP)
    options = {"path": PATH, "checkpoint_dir": tmp_path, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    recipe = AdamRecipe(max_steps=6)
    learn(rollout, train, valid, initial, recipe, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    with pytest.raises(ValueError, match="its seed is 0, this run's 1"):
        learn(rollout, train, valid, initial, recipe, seed=1, resume_from_checkpoint="checkpoint-4", **options)
    with pytest.raises(ValueError, match="its settings is"):
        learn(rollout, train, valid, initial, AdamRecipe(max_steps=7), resume_from_checkpoint="latest", **options)
    with pytest.raises(ValueError, match="is no checkpoint"):
        learn(rollout, train, valid, initial, recipe, resume_from_checkpoint="checkpoint-5", **options)


# ---------------------------------------------------------------------- recipes and starting points


def test_recipes_refuse_what_they_do_not_have():
    assert make_recipe("default", {"learn": "times"}).learn == ("times",)
    for name, values, sentence in (
        ("mine", {}, "unknown recipe"),
        ("default", {"rounds_v1": 2}, "has no rounds_v1"),
        ("default", {"learn": "noise"}, "cannot learn"),
        ("default", {"max_steps": 0}, "max_steps must be positive"),
        ("default", {"coefficient_window": 0}, "coefficient_window must be positive"),
        ("default", {"batch_size": 4}, "has no batch_size"),
        ("adam", {"averaging": 1.0}, "averaging must be in"),
        ("published", {"rounds_v1": 0, "rounds_v2": 0}, "at least one round"),
        ("published", {"radius": -1.0}, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_recipe(name, values)


def test_grids_end_as_asked_and_a_saved_schedule_starts_another(tmp_path):
    import json

    for solver in ("dpmpp", "heun", "dpm2"):
        for final in ("zero", "sigma_min"):
            found = candidates(PATH, 5, SolverSpec(solver), "epsilon", final_sigmas_type=final)
            assert {schedule.nfe for schedule in found.values()} == {5}
            assert {float(schedule.times[-1]) for schedule in found.values()} == {0.0 if final == "zero" else 1e-3}
    known = grid_schedule(PATH, "time_quadratic", 4, DPMPP)
    config = {"schedules": {"4": known.to_dict(PATH)}}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    found = saved_schedule(tmp_path, PATH, 4, SolverSpec("unipc"), "epsilon")
    assert torch.equal(found.times, known.times) and found.spec.solver == "unipc"
    with pytest.raises(ValueError, match="no schedule for 5 evaluations, only for 4"):
        saved_schedule(tmp_path, PATH, 5, DPMPP, "epsilon")
    with pytest.raises(ValueError, match="prediction type 'epsilon', this model 'v_prediction'"):
        saved_schedule(tmp_path, PATH, 4, DPMPP, "v_prediction")
    with pytest.raises(ValueError, match="made for dpmpp"):
        saved_schedule(tmp_path, PATH, 4, SolverSpec("heun"), "epsilon")
    with pytest.raises(ValueError, match="cannot read"):
        saved_schedule(tmp_path / "nowhere", PATH, 4, DPMPP, "epsilon")


def test_the_default_recipe_stops_when_a_gain_is_within_its_error():
    before = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    assert surely_better(before - 0.1, before) and not surely_better(before, before)
    noisy = torch.tensor([[1.0, -1.0, 1.0, -0.9]], dtype=torch.float64)  # better in the mean, by less than its error
    assert not surely_better(before - noisy, before)
    # Of several counts each weighs by its own size: the second, which is small, has doubled.
    both = torch.cat([before, 0.01 * before])
    assert not surely_better(torch.cat([before - 0.1, 0.02 * before]), both)
