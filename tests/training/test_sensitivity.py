# SPDX-License-Identifier: Apache-2.0
"""Derivatives of end states by the numbers of a step table, against automatic differentiation, and what they cost."""

import math
from dataclasses import replace

import pytest
import torch

from ld3_diffusers.noise_path import VE, RectifiedFlow, VPLinear
from ld3_diffusers.schedule import Schedule, SolverSpec
from tests.training.toy import grid_schedule, single_gaussian, toy
from training import sensitivity
from training.sensitivity import coordinates, evaluates_alone, on_data_predictions, sensitivities, whole_table


PATHS = {"vp": VPLinear(), "ve": VE(sigma_min=0.02, sigma_max=10.0), "flow": RectifiedFlow()}
CASES = [
    ("vp", SolverSpec("dpmpp", 2)),
    ("vp", SolverSpec("ipndm", 3)),
    ("vp", SolverSpec("ipndm", 2, afs=True)),
    ("ve", SolverSpec("ipndm", 2)),
    ("ve", SolverSpec("heun")),
    ("flow", SolverSpec("unipc", 2)),
    ("flow", SolverSpec("euler")),
]


def problem(name, spec, nfe=4, batch=3):
    path = PATHS[name]
    rollout = toy(path)
    noise = torch.randn(batch, *rollout.network.means.shape[1:], generator=torch.Generator().manual_seed(1)).double()
    if spec.solver == "heun":
        steps = grid_schedule(path, "logsnr", 2, SolverSpec("euler")).times
        schedule = Schedule(spec.make().expand(path, steps), None, spec, path.kind)
    else:
        schedule = grid_schedule(path, "time_uniform" if name == "flow" else "logsnr", nfe + spec.afs, spec)
    rows = len(schedule.times) - 1
    residuals = 0.02 * torch.randn(rows, rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    within = torch.arange(rows)[None] <= torch.arange(rows)[:, None]
    return rollout, replace(schedule, residuals=torch.where(within, residuals, 0.0)), noise


@pytest.mark.parametrize("name, spec", CASES, ids=lambda case: getattr(case, "solver", case))
def test_derivatives_are_those_of_automatic_differentiation(name, spec, monkeypatch):
    rollout, schedule, noise = problem(name, spec)
    path = PATHS[name]
    # by what a schedule has, through the table's own derivatives by these
    free = schedule.times[1:-1].clone().requires_grad_()
    times = torch.cat([schedule.times[:1], free, schedule.times[-1:]])
    told = schedule.network_times.clone().requires_grad_()
    residuals = schedule.residuals.clone().requires_grad_()
    moving = replace(schedule, times=times, network_times=told, residuals=residuals)
    cotangent = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.grad((rollout(moving, noise, {}) * cotangent).sum(), (told, free, residuals))
    numbers = coordinates(whole_table(moving, path, 0.0), path)
    monkeypatch.setitem(sensitivity.CHANGE, torch.float64, 1e-6)
    errors = []
    for change in (1e-2, 1e-3):
        monkeypatch.setattr(sensitivity, "TIME_CHANGE", change)
        end, derivatives = sensitivities(rollout, schedule, path, noise, {}, torch.eye(len(numbers)), len(numbers))
        torch.testing.assert_close(end, rollout(schedule, noise, {}), rtol=0, atol=1e-12)
        by_number = (derivatives * cotangent).flatten(1).sum(1)
        found = torch.autograd.grad(numbers, (told, free, residuals), by_number, retain_graph=True)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-3, atol=1e-3 * float(expected[2].abs().max()))
        first = int(spec.afs)
        differences = [(mine - other).abs() / other[first:].norm() for mine, other in zip(found[:2], expected[:2])]
        assert change > 2e-3 or max(differences[0][first:].norm(), differences[1].norm()) < 2e-3
        errors.append(float(differences[0][first + 1 : -1].norm()))
    # Of second order where other times lie on both sides.
    assert errors[1] < max(0.03 * errors[0], 2e-5)


@pytest.mark.parametrize("nfe", [1, 3, 5, 8])
def test_costs_what_is_said(nfe):
    rollout, schedule, noise = problem("vp", SolverSpec("dpmpp", 2), nfe=nfe)
    numbers, path = 2 * nfe + nfe * nfe, PATHS["vp"]
    for directions in (2, 8):
        rollout.evaluations = 0
        sensitivities(rollout, schedule, path, noise, {}, torch.eye(numbers), directions)
        # From few numbers a state moves in fewer directions.
        along = [min(directions, i * nfe + 2 * i) for i in range(nfe)]
        assert rollout.evaluations / len(noise) == nfe + sum(along) + 2 * nfe <= 3 * nfe + directions * (nfe - 1)
    rollout.evaluations = 0
    _, derivatives = sensitivities(rollout, schedule, path, noise, {}, torch.zeros(numbers, 3), 2)
    assert rollout.evaluations / len(noise) == nfe and derivatives.shape[0] == 3 and not derivatives.any()


def test_few_directions_are_nearly_all():
    """A network with symmetric Jacobians; what the directions leave is not dropped."""
    rollout, schedule, noise = problem("flow", SolverSpec("unipc", 2), nfe=6, batch=8)
    numbers = torch.eye(2 * 6 + 36)

    def error(directions: int) -> float:
        found = sensitivities(rollout, schedule, PATHS["flow"], noise, {}, numbers, directions)[1]
        return float((found - exact).norm() / exact.norm())

    exact = sensitivities(rollout, schedule, PATHS["flow"], noise, {}, numbers, 48)[1]
    errors = [error(directions) for directions in (1, 2, 3, 8)]
    # Without the symmetry of Jacobians .033 with two directions; without what the last one tells of the others .37.
    assert errors[0] < 0.095 and errors[1] < 0.026 and errors[2] < 0.01 and errors[3] < 1e-5


def test_what_is_not_finite_stays_so():
    rollout, schedule, noise = problem("flow", SolverSpec("unipc", 2))
    network = rollout.network
    rollout.network = lambda x, t, path: network(x, t, path) * (math.nan if float(t) < 0.6 else 1.0)
    end, derivatives = sensitivities(rollout, schedule, PATHS["flow"], noise, {}, torch.eye(24), 4)
    assert not end.isfinite().any() and not derivatives.isfinite().all()


def test_coarse_states_leave_enough_of_the_derivatives():
    """Of a state that is kept in bfloat16, 8 bits are left, with errors that know nothing of what is differentiated."""
    path = PATHS["ve"]
    rollout, schedule = single_gaussian(path, 0.5), grid_schedule(path, "logsnr", 4, SolverSpec("dpmpp", 2))
    noise = torch.randn(256, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = sensitivities(rollout, schedule, path, noise, {}, torch.eye(24), 24)[1].flatten(1)
    network, visit = rollout.network, rollout.visit
    rollout.network = lambda x, t, path: network(x.double(), t, path).to(torch.bfloat16)

    def coarse(schedule, noise, conditioning, at_step):
        def rounded(i, state, output, result):
            at_step(i, state.to(torch.bfloat16), output, result)
            return result.to(torch.bfloat16).double()

        visit(schedule, noise, conditioning, rounded)

    rollout.visit = coarse
    rough = sensitivities(rollout, schedule, path, noise, {}, torch.eye(24), 24)[1].flatten(1).double()
    by_coefficients = exact[:20].flatten(), rough[:20].flatten()
    assert torch.nn.functional.cosine_similarity(*by_coefficients, dim=0) > 0.98
    for k in range(20):
        if exact[k].norm() > 0.1 * exact[:20].norm(dim=1).max():
            assert torch.nn.functional.cosine_similarity(exact[k], rough[k], dim=0) > 0.9, k


def test_evaluations_that_do_not_stand_alone_are_found_out():
    rollout, schedule, noise = problem("vp", SolverSpec("dpmpp", 2))
    assert evaluates_alone(rollout, schedule, noise, {})
    network, calls = rollout.network, []

    def cached(x, t, path):
        """Two of three evaluations return what the one before did."""
        calls.append(calls[-1] if len(calls) % 3 else network(x, t, path))
        return calls[-1]

    rollout.network = cached
    assert not evaluates_alone(rollout, schedule, noise, {})
    rollout.network, rollout.moves_noise = network, False
    assert not evaluates_alone(rollout, schedule, noise, {})


def test_a_schedule_on_data_predictions_is_the_same_schedule():
    path, plain = PATHS["ve"], grid_schedule(PATHS["ve"], "logsnr", 4, SolverSpec("ipndm", 2))
    own, same = plain.table(path), on_data_predictions(plain).table(path)
    assert own.form == "noise" and same.form == "data" and same.history.shape == (4, 4)
    narrow = replace(plain, residuals=torch.full((4, 1), 0.02))
    wide = on_data_predictions(narrow)
    assert wide.residuals.shape == (4, 4)
    assert torch.equal(wide.table(path).history, narrow.table(path).history)
