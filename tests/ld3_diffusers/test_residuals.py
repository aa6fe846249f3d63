# SPDX-License-Identifier: Apache-2.0
"""Learned coefficients: every solver's rows on data predictions, residuals on them, tails, JSON, stability."""

import json
from dataclasses import replace

import pytest
import torch

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.residuals import composition, data_conversion, in_data_form, tail_of, with_residuals
from ld3_diffusers.schedule import Schedule, SolverSpec, check_checksum, interpolate
from ld3_diffusers.solvers.rows import Row
from ld3_diffusers.step_table import Executor, build_table

from .cases import PAIRS, PATHS, SOLVERS, grid, random_steps


SD, FLOW = PATHS["vp_discrete"], PATHS["flow"]
ROWS = 6


def residuals(rows=ROWS, window=ROWS, scale=0.02, seed=0):
    values = scale * torch.randn(rows, window, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    within = torch.arange(window)[None] <= torch.arange(rows)[:, None]
    return torch.where(within, values, 0.0)


def none(rows=ROWS):
    return residuals(rows, scale=0.0)


def schedule(path="vp_discrete", **spec):
    solver = SolverSpec(**spec).make()
    steps = random_steps(PATHS[path], 1 + solver.num_steps(ROWS, False), seed=4)
    times = solver.expand_to(PATHS[path], steps, ROWS)
    prediction_type = "flow_prediction" if path == "flow" else "epsilon"
    return Schedule(times, times[:-1] * 0.99, SolverSpec(**spec), PATHS[path].kind, prediction_type)


def sampled(table, x, batch_shape=(2, 5)):
    """Through a network that is not linear."""
    executor, x = Executor(table), x * table.start
    for _ in range(len(table)):
        x = executor.step(x, 0.3 * torch.tanh(x) + 0.1 * x)
    return x


def noise(*shape):
    return torch.randn(*(shape or (2, 5)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---------------------------------------------------------------------- rows on data predictions


@pytest.mark.parametrize("label, path", PAIRS)
def test_every_solver_is_itself_on_data_predictions(label, path):
    path, solver = PATHS[path], SOLVERS[label]
    times = solver.expand_to(path, random_steps(path, 1 + solver.num_steps(ROWS, False), seed=3), ROWS)
    options = {"prediction_type": "flow_prediction" if path.kind == "flow" else "epsilon"}
    network_times = times[:-1] * 0.98
    own = build_table(solver, path, times, network_times, **options)
    same = build_table(solver, path, times, network_times, residuals=none(), **options)
    assert same.form == "data"
    expected = sampled(own, noise())
    torch.testing.assert_close(sampled(same, noise()), expected, rtol=0, atol=1e-12 * max(1, expected.abs().max()))


@pytest.mark.parametrize(
    "label, path", [(label, path) for label, path in PAIRS if path in ("vp_linear", "ve", "flow")]
)
def test_on_data_predictions_consistent_solvers_carry_a_constant(label, path):
    path, solver = PATHS[path], SOLVERS[label]
    if solver.sum_rule > 1e-6:
        pytest.skip("does not keep the sum rules")
    times = solver.expand_to(path, random_steps(path, 1 + solver.num_steps(ROWS, False), seed=3), ROWS)
    levels, told = path.levels(times), times[:-1]
    rows = in_data_form(solver.rows(levels), *data_conversion(path, solver.form(path), told))
    for i, row in enumerate(rows):
        ratio = levels.sigma[i + 1] / levels.sigma[i]
        torch.testing.assert_close(row.state, ratio, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(sum(row.history), levels.alpha[i + 1] - ratio * levels.alpha[i], rtol=0, atol=1e-8)


def test_composition_of_two_steps_by_hand():
    rows = [Row(grid(0.5)[0], [grid(2.0)[0]]), Row(grid(0.25)[0], [grid(3.0)[0], grid(-1.0)[0]])]
    kappa, weights = composition(rows, grid(0, 0), grid(1, 1))
    assert kappa.tolist() == [1, 0.5, 0.125]
    assert weights.tolist() == [[0, 0], [2, 0], [0.25 * 2 - 1, 3]]
    # with m_1 = x_1 / 2 - D_1
    kappa, weights = composition(rows, grid(0, 0.5), grid(1, -1))
    assert kappa.tolist() == [1, 0.5, 0.125 + 3 * 0.25]
    assert weights[2].tolist() == [0.25 * 2 - 1 + 3 * 1.0, -3]


# ---------------------------------------------------------------------- residuals


def test_residuals_are_relative_to_their_row():
    rows = [Row(grid(0.5)[0], [grid(3.0)[0]]), Row(grid(0.25)[0], [grid(3.0)[0], grid(-1.0)[0]])]
    learned = with_residuals(rows, torch.tensor([[0.5, 0.0], [0.25, 0.5]]).double())
    assert [float(row.state) for row in learned] == [0.5, 0.25]
    torch.testing.assert_close(torch.stack(learned[0].history), grid(3 + 3 * 0.5, 0))
    torch.testing.assert_close(torch.stack(learned[1].history), grid(3 + 4 * 0.25, -1 + 4 * 0.5))
    # a window shorter than the solver's own history leaves the rest alone
    shorter = with_residuals(rows, grid(0.5, 0.25)[:, None])
    torch.testing.assert_close(torch.stack(shorter[1].history), grid(4, -1))


@pytest.mark.parametrize("path, solver", [("vp_discrete", "ipndm"), ("flow", "unipc"), ("edm", "dpmpp")])
def test_gradients_agree_with_finite_differences(path, solver):
    whole, given = schedule(path, solver=solver), residuals()
    whole = replace(whole, noise_path=PATHS[path].kind)

    def end(learned):
        return sampled(replace(whole, residuals=learned).table(PATHS[path]), noise()).sum()

    assert torch.autograd.gradcheck(end, (given.clone().requires_grad_(),), atol=1e-5, rtol=1e-4)


def test_a_step_costs_what_it_costs_without():
    """The fused path: one multiply-add into the ring and one product with it, however far back a row reaches."""
    table = replace(schedule(solver="unipc"), residuals=residuals()).table(SD)
    executor, x = Executor(table), noise().float()
    for i in range(ROWS):
        x = executor.step(x, x)
        assert executor.ring is not None and executor.ring.shape[0] == ROWS, i


# ---------------------------------------------------------------------- tails, truncation, transfer


def test_a_row_whose_history_is_missing_is_the_solver_s_own():
    given = residuals(window=3)
    tail = tail_of(given, 2)
    # row 2 reaches back to evaluations 1 and 0, row 3 to 1; row 4 is the first that the tail has all of
    assert not tail[:2].any() and torch.equal(tail[2:], given[4:])
    # where nothing was learned of the missing ones, nothing is missing
    narrow = residuals(window=1)
    assert torch.equal(tail_of(narrow, 3), narrow[3:]) and torch.equal(tail_of(given, 0), given)


@pytest.mark.parametrize("solver", ["unipc", "ipndm"])
@pytest.mark.parametrize("first", [1, 3])
def test_tails_of_a_schedule(solver, first):
    whole = schedule(solver=solver)
    learned, own = (replace(whole, residuals=each).table(SD, first=first) for each in (residuals(window=2), none()))
    assert torch.equal(learned.state, own.state) and torch.equal(learned.history[0], own.history[0])
    assert (learned.history[1:, :2] != own.history[1:, :2]).all()
    torch.testing.assert_close(
        sampled(own, noise()), sampled(whole.table(SD, first=first), noise()), rtol=0, atol=1e-10
    )


def test_in_a_pipeline_that_starts_late_the_whole_triangle_is_left_out_and_it_is_said(caplog):
    whole = replace(schedule(solver="unipc"), residuals=residuals())
    plain = LD3Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    learned = LD3Scheduler.from_config(plain.config, schedules={str(ROWS): whole.to_dict(SD)})
    bare = LD3Scheduler.from_config(plain.config, schedules={str(ROWS): replace(whole, residuals=None).to_dict(SD)})
    ends = []
    for scheduler in (learned, bare):
        scheduler.set_timesteps(ROWS)
        scheduler.set_begin_index(2)
        x = noise()
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("learned coefficients are left out, because sampling begins at step 2,")
    assert not replace(whole, residuals=residuals(window=1)).lacks_history(2)


def test_a_resolution_shift_moves_the_solver_s_part_and_keeps_the_residuals():
    whole = replace(schedule("flow", solver="unipc"), residuals=residuals())
    shifted, own = (replace(whole, residuals=each).table(FLOW, mu=0.8) for each in (residuals(), none()))
    total = own.history.abs().sum(1, keepdim=True)
    torch.testing.assert_close(shifted.history, own.history + total * whole.residuals)


def test_interpolated_schedules_are_the_solver_s_own():
    whole = replace(schedule(solver="dpmpp"), residuals=residuals())
    assert interpolate({ROWS: whole}, 4, SD).residuals is None


# ---------------------------------------------------------------------- JSON, and what is refused


@pytest.mark.parametrize("window", [1, 3, ROWS])
def test_json_keeps_every_bit(window):
    saved = replace(schedule(solver="ipndm"), residuals=residuals(window=window, scale=0.003))
    entry = saved.to_dict(SD)
    loaded = Schedule.from_dict(json.loads(json.dumps(entry, allow_nan=False)))
    assert torch.equal(loaded.residuals, saved.residuals)
    assert loaded.to_dict(SD) == entry
    check_checksum(loaded.table(SD), loaded.checksum)
    entry["residuals"][2][0] += 1e-4
    edited = Schedule.from_dict(entry)
    with pytest.raises(ValueError, match="its config was edited"):
        check_checksum(edited.table(SD), edited.checksum)


@pytest.mark.parametrize(
    "wrong",
    [
        [[0.0]] * (ROWS - 1),
        [[0.0, 0.0]] * ROWS,  # row 0 has one prediction
        [[None]] * ROWS,
        [0.0] * ROWS,
        [[0.0]] * 80,
        {"0": [0.0]},
        0.0,
    ],
)
def test_malformed_residuals(wrong):
    entry = {**schedule(solver="dpmpp").to_dict(SD), "residuals": wrong}
    with pytest.raises(ValueError, match="residuals"):
        Schedule.from_dict(entry)


def test_residuals_and_amed_s_scales_exclude_each_other():
    with pytest.raises(ValueError, match="direction_scales .AMED. or residuals, not both"):
        replace(schedule(solver="ipndm"), residuals=residuals(), direction_scales=torch.ones(ROWS))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda learned: learned[4, 0].fill_(1.0), "carry a constant prediction .* in row 4"),
        (lambda learned: learned[-1, :2].copy_(grid(8.0, -8.0)), "carry errors of predictions"),
    ],
)
def test_absurd_coefficients_are_neither_saved_nor_loaded(change, sentence):
    whole, wild = schedule(solver="unipc"), none()
    change(wild)
    wild = replace(whole, residuals=wild)
    with pytest.raises(ValueError, match=f"not stable: they {sentence}"):
        wild.to_dict(SD)
    entry = replace(whole, residuals=residuals()).to_dict(SD)
    plain = [row[: i + 1].tolist() for i, row in enumerate(wild.residuals)]
    entry = {**entry, "residuals": plain, "checksum": None}
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with pytest.raises(ValueError, match=rf"schedules\['{ROWS}'\]: the learned coefficients are not stable"):
        LD3Scheduler(**config, schedules={str(ROWS): entry})
    LD3Scheduler(**config, schedules={str(ROWS): {**entry, "residuals": None}})
