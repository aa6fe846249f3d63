# SPDX-License-Identifier: Apache-2.0
"""Local errors on a Gaussian, whose exact steps are known in closed form, and through tiny pipelines."""

import math
from dataclasses import replace

import pytest
import torch

from ld3_diffusers.discretization import discretization, discretization_to_zero
from ld3_diffusers.noise_path import VE, RectifiedFlow, VPLinear, shift_flow_time
from ld3_diffusers.schedule import Schedule, SolverSpec
from tests.training.rollouts import make, noise_for, schedule_for
from tests.training.toy import Mixture, ToyRollout, perfect_gain
from training.local_error import local_errors, refined, step_ends


STD = 0.6
PATHS = {"vp": VPLinear(), "ve": VE(0.002, 20.0), "flow": RectifiedFlow()}


def gaussian(path, mu=0.0) -> ToyRollout:
    """The exact network of one Gaussian around 0."""
    return ToyRollout(Mixture(torch.zeros(1, 4), torch.tensor([STD]), torch.ones(1)), path, mu)


def noise(batch=8):
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def schedule(path, times, solver="euler", order=None, **options):
    prediction = "flow_prediction" if path.kind == "flow" else "epsilon"
    return Schedule(times, None, SolverSpec(solver, order), path.kind, prediction, **options)


def exact_euler_errors(path, times, network_times=None):
    """The same from the Gaussian's exact ODE and the formula of one Euler step in y = x / scale."""
    start = noise() * (times[0] if path.kind == "ve" else 1.0)
    told = times[:-1] if network_times is None else network_times
    network, found = Mixture(torch.zeros(1, 4), torch.tensor([STD]), torch.ones(1)), []
    for first, last, t in zip(times[:-1], times[1:], told):
        x = start * perfect_gain(path, STD, float(times[0]), float(first))
        target = start * perfect_gain(path, STD, float(times[0]), float(last))
        output = network(x, t, path)
        if path.kind == "flow":
            result = x + (last - first) * output
        else:
            alpha, sigma, alpha_, sigma_ = path.alpha(first), path.sigma(first), path.alpha(last), path.sigma(last)
            result = alpha_ / alpha * x + (sigma_ - alpha_ * sigma / alpha) * output
        variance = path.alpha(last) ** 2 + path.sigma(last) ** 2
        found.append(((result - target) ** 2).mean() / variance)
    return torch.stack(found)


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_euler_on_a_gaussian_makes_its_exact_one_step_errors(name, to_zero):
    path = PATHS[name]
    grid = "time_uniform" if name == "flow" else "polynomial"
    times = discretization_to_zero(grid, path, 5, before_zero=False) if to_zero else discretization(grid, path, 5)
    found = local_errors(gaussian(path), schedule(path, times), noise(), substeps=64)
    torch.testing.assert_close(found, exact_euler_errors(path, times), rtol=5e-3, atol=1e-9)


def test_the_network_is_asked_at_the_schedules_own_times():
    path = PATHS["vp"]
    times = discretization("logsnr", path, 5)
    told = times[:-1] * torch.tensor([0.99, 0.97, 1.02, 0.9, 1.05])
    moved = replace(schedule(path, times), network_times=told)
    found = local_errors(gaussian(path), moved, noise(), substeps=64)
    torch.testing.assert_close(found, exact_euler_errors(path, times, told), rtol=5e-3, atol=1e-9)
    assert (found - exact_euler_errors(path, times)).abs().max() > 1e-4


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpmpp", 2), ("ipndm_v", 3)])
def test_order_of_the_local_error(solver, order):
    """A step of an order p method of size h is off by h^(p + 1), in squares h^(2p + 2)."""
    path, middle = PATHS["vp"], []
    for steps in (32, 64):
        times = discretization("logsnr", path, steps)
        student = schedule(path, times, solver, order if solver != "euler" else None)
        teacher = SolverSpec("dpmpp", 3, lower_order_final=False)
        found = local_errors(gaussian(path), student, noise(), substeps=16, solver=teacher)
        middle.append(float(found[steps // 2]))
    assert math.log2(middle[0] / middle[1]) == pytest.approx(2 * order + 2, abs=0.5)


@pytest.mark.parametrize("mu", [0.8, -0.5])
def test_a_flow_from_pure_noise_with_a_resolution_shift(mu):
    path, times = PATHS["flow"], torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1], dtype=torch.float64)
    found = local_errors(gaussian(path, mu), schedule(path, times), noise(), substeps=64)
    shifted = shift_flow_time(times, mu)
    torch.testing.assert_close(found, exact_euler_errors(path, shifted), rtol=5e-3, atol=1e-9)
    final = local_errors(gaussian(path, mu), schedule(path, times, final=True), noise(), substeps=64)
    torch.testing.assert_close(final, exact_euler_errors(path, times), rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("to_zero", [False, True])
def test_two_stage_steps_err_where_they_end(to_zero):
    path = PATHS["vp"]
    spec = SolverSpec("heun")
    ends = discretization("logsnr", path, 4)
    ends = torch.cat([ends[:-1], torch.zeros(1, dtype=torch.float64)]) if to_zero else ends
    student = schedule(path, spec.make().expand(path, ends), "heun")
    assert step_ends(student) == ([1, 3, 5, 6] if to_zero else [1, 3, 5, 7])
    found = local_errors(gaussian(path), student, noise(), substeps=64)
    assert found.isnan().nonzero().flatten().tolist() == ([0, 2, 4] if to_zero else [0, 2, 4, 6])

    # Heun's first step by hand: y' = y + (z' - z)(d + d') / 2 in y = x / alpha, z = sigma / alpha.
    x, network = noise(), gaussian(path).network
    z, (alpha, alpha_) = path.sigma_edm(ends[:2]), path.alpha(ends[:2])
    d = network(x, ends[0], path)
    stage = alpha_ * (x / alpha + (z[1] - z[0]) * d)
    result = alpha_ * (x / alpha + (z[1] - z[0]) * (d + network(stage, ends[1], path)) / 2)
    error = (result - x * perfect_gain(path, STD, float(ends[0]), float(ends[1]))).square().mean()
    assert float(found[1]) == pytest.approx(float(error), rel=5e-3)


def test_a_spare_evaluation_of_a_two_stage_solver_is_a_step():
    path, solver = PATHS["vp"], SolverSpec("dpm2").make()
    for rows in range(2, 9):
        for to_zero in (False, True):
            steps = solver.num_steps(rows, to_zero)
            ends = discretization("logsnr", path, steps)
            ends = torch.cat([ends[:-1], torch.zeros(1, dtype=torch.float64)]) if to_zero else ends
            made = schedule(path, solver.expand_to(path, ends, rows), "dpm2")
            torch.testing.assert_close(made.times[1:][step_ends(made)], ends[1:], rtol=0, atol=0)


def test_levels_of_the_teacher():
    path = PATHS["vp"]
    student = schedule(path, [1.0, 0.5, 0.2, 0.0])
    teacher, ends = refined(student, path, 4, SolverSpec("dpmpp", 3))
    levels = teacher.times
    assert levels[[0, 4, 8, 12]].tolist() == [1.0, 0.5, 0.2, 0.0] and ends == [3, 7, 11] and levels[11] == path.t_min
    for part in (slice(0, 5), slice(4, 9), slice(8, 12)):  # uniform in lambda
        gaps = path.lam(levels[part]).diff()
        torch.testing.assert_close(gaps, gaps.mean().expand(len(gaps)))
    # From t_min there is no level left to ask a network at.
    teacher, ends = refined(schedule(path, [1.0, path.t_min, 0.0]), path, 4, SolverSpec("dpmpp", 3))
    assert len(teacher.times) == 6 and ends == [3, 4]
    flow, _ = refined(schedule(PATHS["flow"], [1.0, 0.6, 0.2]), PATHS["flow"], 4, SolverSpec("euler"))
    assert flow.times[:5].tolist() == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    with pytest.raises(ValueError, match="8 is usual"):
        refined(student, path, 1)


def test_an_analytical_first_step_counts_to_the_first_entry():
    path = PATHS["ve"]
    times = discretization("polynomial", path, 4)
    student = schedule(path, times)
    afs = replace(student, spec=SolverSpec("euler", afs=True))
    found = local_errors(gaussian(path), afs, noise(), substeps=64)
    plain = local_errors(gaussian(path), student, noise(), substeps=64)
    assert len(found) == 3
    # The teacher's levels differ before the second of the times, and so, in the fourth digit, does where it gets.
    torch.testing.assert_close(found[1:], plain[2:], rtol=1e-3, atol=0)
    # Its noise prediction x / sqrt(1 + sigma^2), then Euler's step from where that led.
    start = noise() * times[0]
    x = start + (times[1] - times[0]) * start / (1 + times[0] ** 2).sqrt()
    result = x + (times[2] - times[1]) * gaussian(path).network(x, times[1], path)
    error = (result - start * perfect_gain(path, STD, float(times[0]), float(times[2]))).square().mean()
    assert float(found[0]) == pytest.approx(float(error / (1 + times[2] ** 2)), rel=5e-3)


@pytest.mark.parametrize("name", ["sd", "flux", "ddpm"])
def test_through_a_pipeline(name):
    """Finer steps err less, and the first entry is the difference of two plain runs."""
    rollout, _ = make(name)
    with torch.no_grad():
        conditioning = rollout.encode()
    start = noise_for(rollout, conditioning, 2)
    coarse = schedule_for(rollout, 2, "euler", shift=0.0)
    fine, _ = refined(coarse, rollout.path, 4, SolverSpec("euler"))
    errors = [
        local_errors(rollout, student, start, conditioning, substeps=4, solver=SolverSpec("euler"))
        for student in (coarse, fine)
    ]
    assert errors[0].shape == (2,) and errors[1].shape == (8,) and (errors[0] > 0).all()
    assert errors[1].max() < errors[0].max()
    if name == "flux":
        assert rollout.mu > 0

    # The first entry by hand: two runs of the pipeline from the same noise.
    half = replace(coarse, times=coarse.times[:2], network_times=coarse.network_times[:1])
    whole, _ = refined(half, rollout.path, 4, SolverSpec("euler"))
    with torch.no_grad():
        difference = rollout(half, start, conditioning).double() - rollout(whole, start, conditioning).double()
    end = shift_flow_time(coarse.times[1], rollout.mu)
    variance = rollout.path.alpha(end) ** 2 + rollout.path.sigma(end) ** 2
    torch.testing.assert_close(errors[0][0], difference.square().mean() / variance, rtol=1e-4, atol=0)
