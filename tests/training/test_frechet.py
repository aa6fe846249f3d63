# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance against the formula, scipy and torchmetrics; streamed moments; the bootstrap."""

import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from training.comparison import paired_interval
from training.features import StoredFeatures
from training.frechet import Moments, frechet_distance, frechet_influence


def draw(count: int, dim: int = 6, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)) / dim**0.5
    return torch.randn(count, dim, generator=generator) @ mixing * (1 + shift) + 3 + shift


def direct(x: torch.Tensor, y: torch.Tensor) -> float:
    (m1, c1), (m2, c2) = ((z.double().mean(0), torch.cov(z.double().T).reshape(2 * z.shape[1:])) for z in (x, y))
    root = scipy.linalg.sqrtm((c1 @ c2).numpy())
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root.real.trace())


@pytest.mark.parametrize(("dim", "count"), [(1, 4), (6, 40), (64, 80)])
def test_distance_is_the_formula_with_a_matrix_square_root(dim, count):
    x, y = draw(count, dim), draw(2 * count, dim, shift=0.3, seed=5)
    found = frechet_distance(Moments.of([x]), Moments.of([y]))
    assert found == pytest.approx(direct(x, y), rel=1e-6)


def test_distance_of_known_gaussians():
    """Commuting covariances: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2."""
    a = Moments(None, torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 4.0])).double())
    b = Moments(None, torch.tensor([3.0, 4.0]).double(), torch.diag(torch.tensor([9.0, 0.0])).double())
    assert frechet_distance(a, b) == pytest.approx(25 + 4 + 4, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_distance_agrees_with_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 6

        def forward(self, features):
            return features

    x, y = draw(50), draw(70, shift=0.2, seed=3)
    metric = FrechetInceptionDistance(feature=Identity(), input_img_size=(1,)).set_dtype(torch.float64)
    metric.inception.eval()
    # It looks at the number of rows only.
    metric.update(x.double(), real=False)
    metric.update(y.double(), real=True)
    assert frechet_distance(Moments.of([x]), Moments.of([y])) == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_moments_are_those_of_all(offset):
    x = draw(101) + offset
    streamed = Moments.of(x.split([1, 30, 0, 69, 1]))
    assert streamed.count == 101
    assert torch.allclose(streamed.mean, x.double().mean(0), rtol=1e-14)
    assert torch.allclose(streamed.covariance, torch.cov(x.double().T), rtol=1e-9, atol=1e-12)


def test_too_few_or_broken_features_are_refused():
    small, large = Moments.of([draw(6)]), Moments.of([draw(50)])
    with pytest.raises(ValueError, match="6 <= 6; use kid, or at least 7 samples"):
        frechet_distance(small, large)
    with pytest.raises(ValueError, match="6 <= 6"):
        frechet_distance(large, small)
    with pytest.raises(ValueError, match="6 <= 6"):
        frechet_influence(StoredFeatures(draw(6)), large)
    with pytest.raises(ValueError, match="6 and 3 dimensions"):
        frechet_distance(large, Moments.of([draw(50, 3)]))
    for chunks, sentence in (([draw(1)], "at least 2"), ([], "at least 2"), ([draw(9) * float("nan")], "not finite")):
        with pytest.raises(ValueError, match=sentence):
            Moments.of(chunks)
    with pytest.raises(ValueError, match="not finite"):
        frechet_influence(StoredFeatures(draw(9) * float("inf")), large)


@pytest.mark.parametrize(("dim", "count"), [(1, 9), (6, 60), (24, 30)])
def test_influence_is_the_derivative_in_the_samples_weights(dim, count):
    x, reference = draw(count, dim, shift=0.3), Moments.of([draw(500, dim, seed=9)])
    weights = torch.full((count,), 1 / count, dtype=torch.float64, requires_grad=True)
    shares = weights / weights.sum()
    mean = shares @ x.double()
    z = x.double() - mean
    covariance = (z.T * shares) @ z * count / (count - 1)
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = vectors * values.sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ covariance @ root).sqrt().sum()
    distance = (mean - reference.mean).square().sum() + covariance.trace() + reference.covariance.trace() - 2 * trace
    assert float(distance.detach()) == pytest.approx(frechet_distance(Moments.of([x]), reference), rel=1e-9)
    (gradient,) = torch.autograd.grad(distance, weights)
    found = frechet_influence(StoredFeatures(x, chunk_size=17), reference)
    torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-7 * float(gradient.abs().max()))


def test_directions_that_nothing_varies_in_have_no_influence():
    x = torch.cat([draw(60), torch.zeros(60, 1)], 1)
    flat = Moments.of([torch.cat([draw(500, seed=9), torch.zeros(500, 1)], 1)])
    found = frechet_influence(StoredFeatures(x), flat)
    torch.testing.assert_close(found, frechet_influence(StoredFeatures(x[:, :6]), Moments.of([draw(500, seed=9)])))


def test_equal_contenders_have_no_paired_difference_and_near_ones_a_small_one():
    reference = Moments.of([draw(2000, seed=9)])
    x = draw(300, shift=0.1)
    near, other = x + 0.02 * draw(300, seed=7), draw(300, shift=0.1, seed=8)
    a, again, b, c = (frechet_influence(StoredFeatures(z), reference) for z in (x, x.clone(), near, other))
    assert torch.equal(a, again)
    assert float((a - b).std()) < 0.5 * float((a - c).std())


def test_an_interval_by_influences_covers_a_big_sets_distance_and_is_as_wide_as_fresh_sets_scatter():
    reference = Moments.of([draw(20000, dim=3, seed=9)])
    sets = [draw(400, 3, shift=0.3, seed=100 + k) for k in range(200)]
    fresh = torch.tensor([frechet_distance(Moments.of([x]), reference) for x in sets], dtype=torch.float64)
    truth = frechet_distance(Moments.of([draw(200000, 3, shift=0.3, seed=77)]), reference)
    spreads, covered = [], 0
    for x, distance in zip(sets[:40], fresh):
        influence = frechet_influence(StoredFeatures(x), reference)
        spreads.append(float(influence.std()) / 20)
        _, low, high = paired_interval(distance + influence, torch.zeros(400))
        covered += low <= truth <= high
    assert sum(spreads) / 40 == pytest.approx(float(fresh.std()), rel=0.15)
    assert covered >= 34  # of 40 at 95 %: fewer has a probability of 0.003
