# SPDX-License-Identifier: Apache-2.0
"""Times of `LD3Scheduler`: resolution shifts, grids of the caller, the analytical first step, times of single tokens."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.noise_path import shift_flow_time
from ld3_diffusers.step_table import Executor
from tests.schedules import FLOW, SD_BETAS, outputs, plausible_schedule, run, scheduler_with


# Rectified flow --------------------------------------------------------------------------------------------------------


def logit(timesteps):
    s = timesteps.double() / 1000
    return torch.log(s / (1 - s))


@pytest.mark.parametrize("kind", ["exponential", "linear", "static"])
def test_resolution_shifts_add_in_logit(kind):
    config = (
        FLOW | {"shift": 3.0} if kind == "static" else FLOW | {"use_dynamic_shifting": True, "time_shift_type": kind}
    )
    s = scheduler_with((5,), config=config)
    schedule = plausible_schedule(s.path, 5)
    mus = {"exponential": (0.8, 0.8), "linear": (2.0, math.log(2)), "static": (None, math.log(3))}
    given, mu = mus[kind]
    s.set_timesteps(5, mu=given)
    moved = logit(s.timesteps) - logit(s.path.timestep(schedule.network_times))
    torch.testing.assert_close(moved, torch.full_like(moved, mu), rtol=0, atol=1e-4)
    inner = logit(s.sigmas[1:-1] * 1000) - logit(schedule.times[1:-1] * 1000)
    torch.testing.assert_close(inner, torch.full_like(inner, mu), rtol=0, atol=1e-4)
    assert s.sigmas[0] == 1 and s.sigmas[-1] == 0
    # a tail is shifted alike
    x, rest = outputs(3, dtype=torch.float64)
    expected = Executor(schedule.table(s.path, mu=mu, first=2)).step(x, rest[0])
    torch.testing.assert_close(s.step(rest[0], s.timesteps[2], x)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_missing_mu_and_a_final_schedule():
    config = FLOW | {"use_dynamic_shifting": True, "shift_terminal": 0.1}
    s = scheduler_with((5,), config=config)
    with pytest.raises(ValueError, match="final"):
        s.set_timesteps(5, mu=1.0)
    s = scheduler_with((5,), config=FLOW | {"use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="pass `mu`"):
        s.set_timesteps(5)
    schedule = plausible_schedule(s.path, 5)
    final = type(schedule)(
        schedule.times, schedule.network_times, schedule.spec, "flow", "flow_prediction", final=True
    )
    s = LD3Scheduler(**config, schedules={"5": final.to_dict(s.path)})
    for mu in (None, 1.0):  # nothing is left to shift
        s.set_timesteps(5, mu=mu)
        np.testing.assert_allclose(s.sigmas, schedule.times, rtol=1e-6)


def test_pipeline_default_grids_are_no_users_grids():
    s = scheduler_with((6,), config=FLOW)
    n = 6
    for grid in ({"sigmas": np.linspace(1.0, 1 / n, n)}, {"sigmas": np.linspace(1.0, 0.0, n + 1)[:-1]}):
        s.set_timesteps(**grid)
        np.testing.assert_allclose(s.sigmas, plausible_schedule(s.path, n).times, rtol=1e-6)
    cogview4 = np.linspace(1000, 1.0, n).astype(np.int64).astype(np.float32)
    s.set_timesteps(timesteps=cogview4, sigmas=cogview4 / 1000)
    np.testing.assert_allclose(s.sigmas, plausible_schedule(s.path, n).times, rtol=1e-6)
    for name, grid in (("sigmas", [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]), ("timesteps", [999, 800, 600, 400, 200, 10])):
        with pytest.raises(ValueError, match=f"custom {name} contradict"):
            s.set_timesteps(**{name: grid})


def test_custom_grids_without_a_learned_schedule():
    s = LD3Scheduler(**SD_BETAS)
    s.set_timesteps(timesteps=[901.5, 500.25, 100.0])
    assert s.timesteps.tolist() == [901.5, 500.25, 100.0] and s.num_inference_steps == 3
    np.testing.assert_allclose(s.sigmas[1], s.path.sigma_edm(s.path.time(torch.tensor(500.25).double())), rtol=1e-6)
    s.set_timesteps(sigmas=[14.0, 3.0, 0.5, 0.0])  # the final 0 of EulerDiscreteScheduler's lists
    np.testing.assert_allclose(s.sigmas, [14.0, 3.0, 0.5, 0.0], rtol=1e-6)
    s.set_timesteps(timesteps=[900.0, 400.0], sigmas=[10.0, 2.0])
    np.testing.assert_allclose(s.sigmas, [10.0, 2.0, 0.0], rtol=1e-6)
    assert s.timesteps.tolist() == [900.0, 400.0]
    for bad in ({"timesteps": [100.0, 500.0]}, {"sigmas": [1.0, float("nan")]}, {"timesteps": [500.0, -1.0]}):
        with pytest.raises(ValueError, match=r"times\["):
            s.set_timesteps(**bad)
    with pytest.raises(ValueError, match="got 3 timesteps for 5 evaluations"):
        s.set_timesteps(5, timesteps=[901.5, 500.25, 100.0])
    with pytest.raises(ValueError, match="got 2 sigmas for 3 evaluations"):
        s.set_timesteps(timesteps=[901.5, 500.25, 100.0], sigmas=[3.0, 1.0])
    with pytest.raises(ValueError, match="heun takes 2 steps in 3 evaluations"):
        LD3Scheduler(solver="heun").set_timesteps(timesteps=[901.5, 500.25, 100.0])
    assert s.timesteps.tolist() == [900.0, 400.0]

    flow = LD3Scheduler(**FLOW, shift=3.0)
    flow.set_timesteps(sigmas=[1.0, 0.6, 0.2], timesteps=[990.0, 700.0, 300.0])
    np.testing.assert_allclose(
        flow.sigmas[:-1], shift_flow_time(torch.tensor([1.0, 0.6, 0.2]).double(), math.log(3)), rtol=1e-6
    )
    assert flow.timesteps.tolist() == [990.0, 700.0, 300.0]


def test_a_users_sigmas_win_over_a_named_discretization():
    s = LD3Scheduler(**FLOW, discretization="time_uniform")
    s.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))  # the pipeline's default, not the user's
    np.testing.assert_allclose(s.sigmas, [1.0, 0.667, 0.334, 0.001, 0.0], atol=1e-6)
    s.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.2])
    np.testing.assert_allclose(s.sigmas, [1.0, 0.9, 0.5, 0.2, 0.0], atol=1e-6)


# Analytical first step -------------------------------------------------------------------------------------------------


def test_analytical_first_step_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="set afs=False"):
        LD3Scheduler(**FLOW, afs=True).set_timesteps(5)
    s = scheduler_with((5,), "dpmpp", options={"afs": True})
    with pytest.raises(ValueError, match="afs=False"):
        s.init_noise_sigma  # noqa: B018  a pipeline that asks before set_timesteps
    s.set_timesteps(5)
    x, rest = outputs(5)
    with pytest.raises(ValueError, match="does not multiply by init_noise_sigma"):
        run(s, x, rest)
    assert s.init_noise_sigma != 1 and run(s, x, rest)[-1].shape == x.shape


def test_analytical_first_step_replaces_one_evaluation():
    """Equal to the run of one evaluation more whose first output is the scaled noise itself."""
    s = scheduler_with((5,), "dpmpp", 3, options={"afs": True})
    schedule = plausible_schedule(s.path, 5, "dpmpp", 3, afs=True)
    spec = type(schedule.spec)("dpmpp", 3)
    longer = Executor(type(schedule)(schedule.times, schedule.network_times, spec).table(s.path))
    noise, rest = outputs(5, dtype=torch.float64)
    # the first output converts with alpha and sigma of the network's time, the analytical one with the level's
    table = longer.table
    alpha, sigma = s.path.alpha(schedule.times[0]), s.path.sigma(schedule.times[0])
    first = ((1 - sigma) / alpha - table.p[0]) / table.q[0] * noise
    y = longer.step(noise, first)
    s.set_timesteps(5)
    x = noise * s.init_noise_sigma
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    for t, output in zip(s.timesteps, rest):
        x, y = s.step(output, t, x)[0], longer.step(y, output)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


# Per-token times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_per_token_times(solver):
    stock = FlowMatchEulerDiscreteScheduler()
    s = LD3Scheduler.from_config(stock.config, solver=solver, solver_order=1)
    stock.set_timesteps(5)
    s.set_timesteps(5)
    x, rest = outputs(5, (2, 6, 3))
    y = x
    conditioned = torch.zeros(2, 6, dtype=torch.bool)
    conditioned[:, :2] = True
    for t, u, output in zip(s.timesteps, stock.timesteps, rest):
        tokens = torch.where(conditioned, torch.zeros(()), t)
        x_next = s.step(-output, t, x, per_token_timesteps=tokens, return_dict=False)[0]
        y = stock.step(-output, u, y, per_token_timesteps=tokens, return_dict=False)[0]
        assert torch.equal(x_next[conditioned], x[conditioned]) and not torch.equal(x_next, x)
        x = x_next
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    # tokens that are all free take the ordinary step
    s.set_timesteps(5)
    plain = s.step(output, s.timesteps[0], x)[0]
    s.set_timesteps(5)
    tokens = s.timesteps[0].expand(2, 6)
    torch.testing.assert_close(s.step(-output, s.timesteps[0], x, per_token_timesteps=tokens)[0], plain)
