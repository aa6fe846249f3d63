# SPDX-License-Identifier: Apache-2.0
"""The default recipe differentiates no network: pipelines that are compiled, quantised or cached, or draw their own noise, are learned."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from ld3_diffusers import SolverSpec
from training.gradient_check import check_gradients
from training.initial import grid_schedule
from training.learner import Problem, learn, parameters_for
from training.learner_default import DefaultLearner
from training.recipe import DefaultRecipe
from training.sensitivity import evaluates_alone

from .rollouts import make, noise_for, schedule_for


RECIPE = DefaultRecipe(first_pairs=4, max_steps=3, micro_batch_size=4)


class Pairs:
    """Noises and where 12 evaluations end from them; `cached`: by what the network does then."""

    def __init__(self, rollout, count: int, first: int = 0):
        self.conditioning = rollout.encode()
        noise = noise_for(rollout, self.conditioning, first + count)[first:]
        with torch.no_grad():
            ends = [rollout(12, noise[i : i + 1], self.conditioning) for i in range(count)]
        self.noise, self.end = noise, torch.cat(ends)

    def __len__(self):
        return len(self.noise)

    def batch(self, indices, device):
        return self.noise[indices], self.end[indices], self.conditioning


def started(rollout):
    config = rollout.scheduler.config
    return grid_schedule("time_uniform", rollout.path, 3, SolverSpec("dpmpp", 2), config.prediction_type)


def learned(rollout):
    train, valid = Pairs(rollout, 4), Pairs(rollout, 4, 4)
    return learn(rollout, train, valid, started(rollout), RECIPE, path=rollout.path)


@pytest.fixture(scope="module")
def plainly():
    """The schedule learned with a network like any other, and what was asked of it."""
    with make("sd")[0] as rollout:
        result = learned(rollout)
        assert result.loss < 0.8 * result.initial_loss
        return result, copy.copy(rollout.evaluations)


def quantised(pipe) -> None:
    """As kernels for weights of few bits are: without derivatives."""
    forward = pipe.unet.forward

    @torch.no_grad()
    def without_derivatives(*args, **kwargs):
        return forward(*args, **kwargs)

    pipe.unet.forward = without_derivatives


def compiled(pipe) -> None:
    torch.compiler.reset()
    pipe.unet.compile(backend="eager")


@pytest.mark.parametrize("prepare", [quantised, compiled])
def test_the_same_is_learned_without_derivatives(plainly, prepare):
    rollout, _ = make("sd")
    with rollout:
        prepare(rollout.pipe)
        result = learned(rollout)
        torch.testing.assert_close(result.schedule.times, plainly[0].schedule.times, atol=1e-4, rtol=0)
        torch.testing.assert_close(result.schedule.residuals, plainly[0].schedule.residuals, atol=1e-3, rtol=0)
        assert rollout.evaluations == plainly[1] and rollout.evaluations.backward == 0
        if prepare is quantised:
            conditioning = rollout.encode()
            with pytest.raises(ValueError, match="no gradient reaches the network; .* or learn by the default recipe"):
                check_gradients(rollout, schedule_for(rollout), noise_for(rollout, conditioning), conditioning)


def test_cached_features_are_learned_with_by_whole_runs():
    """What a cache skips depends on the run so far, so that nothing of a run can be repeated alone."""
    rollout, _ = make("flux")
    with rollout:
        train, valid = Pairs(rollout, 4), Pairs(rollout, 4, 4)
        initial = started(rollout)
        noise, conditioning = train.noise[:1], train.conditioning
        assert evaluates_alone(rollout, initial, noise, conditioning)
        rollout.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        assert not evaluates_alone(rollout, initial, noise, conditioning)
        problem = Problem(rollout, train, valid, rollout.path)
        learner = DefaultLearner(problem, RECIPE, parameters_for(RECIPE, initial, rollout.path))
        before, count = rollout.evaluations.forward, len(learner.parameters.vector())
        learner.alone = False
        learner._linearised(range(4))
        assert rollout.evaluations.forward - before == 4 * 3 * (1 + count)
        result = learn(rollout, train, valid, initial, RECIPE, path=rollout.path)
        assert result.loss < 0.8 * result.initial_loss
        with pytest.raises(
            ValueError, match="call pipe.transformer.disable_cache.. first, or learn by the default recipe"
        ):
            rollout(initial, noise, conditioning)


def test_a_pipeline_that_draws_its_own_noise_is_learned_by_whole_runs():
    rollout, _ = make("dit")
    with rollout:
        assert not rollout.moves_noise
        result = learned(rollout)
        assert result.loss < 0.8 * result.initial_loss and rollout.evaluations.backward == 0
