# SPDX-License-Identifier: Apache-2.0
"""OSS against its recursion written out step by step, and against all schedules there are."""

import itertools
import math

import pytest
import torch

from ld3_diffusers import Schedule, SolverSpec
from ld3_diffusers.noise_path import RectifiedFlow, VPLinear
from tests.training.rollouts import make, noise_for
from tests.training.test_gits import teacher
from tests.training.toy import Mixture, ToyRollout
from training.oss import combined_path, optimal_paths


LEVELS, STEPS = 12, 5
EULER = SolverSpec("euler")
PATHS = [VPLinear(), RectifiedFlow()]


def toy(path) -> ToyRollout:
    return ToyRollout(Mixture.random(components=4, dim=6, spread=1.5, seed=3), path)


def grid(path) -> torch.Tensor:
    return torch.linspace(path.t_max, path.t_min, LEVELS + 1, dtype=torch.float64)


def noises(count, dim=6):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def authors_coordinates(rollout, times):
    """s by the authors' numbering, 0 clean to N noise, and the velocity there."""
    path = rollout.path
    alpha, sigma = path.alpha(times).flip(0), path.sigma(times).flip(0)
    total = alpha + sigma

    def velocity(i, z):
        t = times.flip(0)[i]
        output = rollout.network((z * total[i])[None], t, path)[0]
        x = z * total[i]
        clean = x - sigma[i] * output if path.kind == "flow" else (x - sigma[i] * output) / alpha[i]
        return (z - clean) / (sigma[i] / total[i])

    return sigma / total, total, velocity


def literal_lists(rollout, times, noise, num_steps, power):
    """One sample, in the authors' numbering; lists of 1, ..., num_steps steps from N down to 0."""
    s, total, velocity = authors_coordinates(rollout, times)
    last = len(s) - 1
    start = noise / total[last]  # x is the noise itself on both paths
    y = [None] * last + [start]
    for i in range(last, 0, -1):
        y[i - 1] = y[i] + (s[i - 1] - s[i]) * velocity(i, y[i])
    best, lists = [math.inf] * last + [-math.inf], []
    states, origins = [start] * (last + 1), []
    origin = [last] * (last + 1)
    for k in range(num_steps):
        following, origin = list(states), list(origin)
        for i in range(last, 0, -1) if k else [last]:
            v = velocity(i, states[i])
            for j in range(i - 1, -1, -1):
                w = states[i] + (s[j] - s[i]) * v
                cost = float((w - y[j]).abs().pow(power).mean())
                if cost < best[j]:
                    best[j], origin[j], following[j] = cost, i, w
        states = following
        origins.append(origin)
        way = [0]
        for back in reversed(origins):
            way.append(back[way[-1]])
        lists.append(way[::-1])
    return lists, best[0]


@pytest.mark.parametrize("power", [2.0, 1.0])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_paths_are_those_of_the_literal_recursion(path, power):
    rollout, noise, times = toy(path), noises(7), grid(path)
    paths = optimal_paths(rollout, teacher(path, times, EULER), noise, {}, STEPS, cost_power=power)
    different = set()
    for sample, own in zip(noise, paths):
        literal, _ = literal_lists(rollout, times, sample, STEPS, power)
        for k, way in enumerate(literal):
            assert own[k, : k + 2].tolist() == [LEVELS - i for i in way]
            assert (own[k, k + 2 :] == -1).all()
        different.add(tuple(own[-1].tolist()))
    assert len(different) > 1  # the samples do not all want the same


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_the_best_of_all_schedules_is_a_lower_bound(path):
    rollout, times, steps = toy(path), grid(path), 3
    s, total, velocity = authors_coordinates(rollout, times)
    gains = []
    for sample in noises(3):
        start = sample / total[-1]

        def end(way, start=start):
            z = start
            for i, j in itertools.pairwise(way):
                z = z + (s[j] - s[i]) * velocity(i, z)
            return z

        target = end(range(LEVELS, -1, -1))
        every = [[LEVELS, *inner, 0] for inner in itertools.combinations(range(LEVELS - 1, 0, -1), steps - 1)]
        costs = [float((end(way) - target).square().mean()) for way in every]
        [literal, searched] = literal_lists(rollout, times, sample, steps, 2.0)
        evenly = float((end([LEVELS, LEVELS * 2 // 3, LEVELS // 3, 0]) - target).square().mean())
        assert min(costs) <= searched * (1 + 1e-12)
        gains.append(evenly - searched)
        way = optimal_paths(rollout, teacher(path, times, EULER), sample[None], {}, steps)[0, -1].tolist()
        assert [LEVELS - i for i in way] == literal[-1]
    assert min(gains) > -1e-12 and max(gains) > 0.01 * evenly  # and it is a useful one


def test_the_first_step_count_is_one_jump_and_the_last_the_whole_grid():
    path = VPLinear()
    times = torch.linspace(1.0, 0.01, 5, dtype=torch.float64)
    paths = optimal_paths(toy(path), teacher(path, times, EULER), noises(4), {}, 4)
    assert paths[:, 0, :2].tolist() == [[0, 4]] * 4
    # with as many steps as the teacher the whole way costs nothing
    assert paths[:, -1].tolist() == [[0, 1, 2, 3, 4]] * 4


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_through_a_pipeline_the_whole_grid_is_found_again(name):
    """Guidance, resolution shift and casts are the pipeline's: with all steps the student is the teacher."""
    rollout, _ = make(name)
    with rollout:
        conditioning = rollout.encode()
        noise, path = noise_for(rollout, conditioning, 2), rollout.path
        # far apart, so that the steps of this random network differ by more than rounding
        times = torch.linspace(0.9, 0.1, 4, dtype=torch.float64)
        schedule = Schedule(times, None, EULER, path.kind, rollout.scheduler.config.prediction_type)
        paths = optimal_paths(rollout, schedule, noise, conditioning, 3)
    assert paths[:, 0, :2].tolist() == [[0, 3]] * 2
    assert (paths[:, -1].diff(dim=1) >= 0).all() and (paths[:, -1, -1] == 3).all()
    assert paths[:, -1].tolist() == [[0, 1, 2, 3]] * 2


def test_lists_are_combined_by_their_middle():
    # by the authors' numbering [10, 7, 2, 0], [10, 6, 5, 0], [10, 3, 1, 0]: the middles are 6 and 2
    paths = torch.tensor([[0, 3, 8, 10], [0, 4, 5, 10], [0, 7, 9, 10]])
    assert combined_path(paths, 11) == [0, 4, 8, 10]
    # of two: (7 + 6) // 2 = 6 and (2 + 5) // 2 = 3
    assert combined_path(paths[:2], 11) == [0, 4, 7, 10]


def test_samples_that_want_fewer_steps_leave_no_level_twice():
    assert combined_path(torch.tensor([[0, 0, 0, 5, 10]]), 11) == [0, 1, 2, 5, 10]
    assert combined_path(torch.tensor([[0, 0, 0, 3, 3]]), 4 + 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        (SolverSpec("ipndm"), {}, "use an euler teacher, not ipndm"),
        (EULER, {"num_steps": LEVELS + 1}, "schedules of 1 to 12 steps, not 13"),
        (EULER, {"cost_power": 0.0}, "cost_power must be a positive number"),
    ],
)
def test_impossible_searches_are_refused(spec, options, sentence):
    path = VPLinear()
    with pytest.raises(ValueError, match=sentence):
        optimal_paths(
            toy(path), teacher(path, grid(path), spec), noises(1), {}, **{"num_steps": 2, **options}
        )  # fmt: skip
