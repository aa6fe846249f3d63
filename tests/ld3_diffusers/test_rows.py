# SPDX-License-Identifier: Apache-2.0
"""What every row builder owes: sum rules, causality, gradients, batch axes, long tables, pure noise, two-stage bookkeeping."""

import pytest
import torch

from ld3_diffusers.noise_path import VE
from ld3_diffusers.solvers import make_solver, rows
from ld3_diffusers.step_table import build_table, sum_rule_error

from .cases import PAIRS, PATHS, SOLVERS, grid, random_steps


every_solver_on_every_path = pytest.mark.parametrize("label, path", PAIRS)
FLOW = PATHS["flow"]
CONTINUOUS = [(label, path) for label, path in PAIRS if path in ("vp_linear", "flow")]


def entries(levels_or_times, solver, path, first=0):
    """(N, 1 + W, ...) state and history weights."""
    table = solver.rows(path.levels(levels_or_times), first)
    width = max(len(row.history) for row in table)
    zero = torch.zeros_like(table[0].state)
    return torch.stack([torch.stack([r.state, *r.history, *[zero] * (width - len(r.history))]) for r in table])


@every_solver_on_every_path
def test_sum_rules(label, path):
    solver, path = SOLVERS[label], PATHS[path]
    for seed in range(2):
        times = solver.expand(path, random_steps(path, 8, seed))
        error = sum_rule_error(
            build_table(solver, path, times, prediction_type="epsilon" if path.kind != "flow" else "sample"), path
        )
        if label != "ipndm_v-4":  # tested below
            assert error <= solver.sum_rule, seed
        if label != "ipndm_v-4" and not label.endswith("tab"):
            assert solver.sum_rule == 1e-10


def test_how_far_tabulated_deis_is_from_the_sum_rule():
    # The rectangle sum counts both ends: a 10,000th of the mean of the integrand there, and misses as much inside.
    solver = SOLVERS["deis-3-tab"]
    for times in (grid(80, 79, 0.01), grid(80, 70, 50, 0.002), grid(80, 79.9, 79, 0.5)):
        assert (
            1e-2 < sum_rule_error(build_table(solver, VE(), times, prediction_type="epsilon"), VE()) < solver.sum_rule
        )


def test_ipndm_v_of_order_4_breaks_the_sum_rule():
    # Its weights sum to 1 + k2 q (h2/h3 - h1/h2): geometric steps keep the rule, others do not.
    solver, path = SOLVERS["ipndm_v-4"], VE()
    for ratio in (0.5, 0.8):
        table = build_table(
            solver, path, 10 * ratio ** torch.arange(7.0, dtype=torch.float64), prediction_type="epsilon"
        )
        assert sum_rule_error(table, path) < 1e-12
    times = grid(80.0, 60.0, 50.0, 30.0, 20.0)
    table = build_table(solver, path, times, prediction_type="epsilon")
    h, h1, h2, h3 = -10.0, -20.0, -10.0, -20.0
    k2 = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
    k2 *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    excess = k2 * h1 * (h1 + h2) / (h2 * (h2 + h3)) * (h2 / h3 - h1 / h2)
    assert table.history[3].sum().item() == pytest.approx(h * (1 + excess), rel=1e-12)
    assert abs(excess) > 0.1 and sum_rule_error(table, path) == pytest.approx(abs(h * excess), rel=1e-12)
    assert solver.sum_rule == float("inf")


def test_published_weights():
    # iPNDM's are Adams-Bashforth's; ipndm_v has 11/24 where Adams-Bashforth's last difference has 3/8.
    times = grid(6.0, 5.0, 4.0, 3.0, 2.0)
    for name, expected in (
        ("ipndm", [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
        ("abv", [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
        ("ipndm_v", [57 / 24, -65 / 24, 43 / 24, -11 / 24]),
    ):
        row = make_solver(name, order=4).rows(VE().levels(times))[3]
        torch.testing.assert_close(-torch.stack(row.history), grid(*expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", SOLVERS)
def test_causality(label):
    solver, path = SOLVERS[label], PATHS["vp_linear"]
    steps = random_steps(path, 7, seed=3)
    moved = torch.cat([steps[:5], steps[5:] * grid(0.9, 0.5)])
    times, other = solver.expand(path, steps), solver.expand(path, moved)
    same = int((times == other).sum()) - 1  # rows whose levels are all unmoved
    a, b = entries(times, solver, path), entries(other, solver, path)
    assert same >= 4 and torch.equal(a[:same], b[:same])
    assert not torch.allclose(a[same + (solver.name == "heun")], b[same + (solver.name == "heun")], rtol=1e-6, atol=0)


@pytest.mark.parametrize("label, path", CONTINUOUS)
def test_gradients(label, path):
    solver, path = SOLVERS[label], PATHS[path]
    steps = path.inverse_lam(
        grid(-1.7, -1.1, -0.8, 0.0, 0.7, 1.1, 2.0)
    ).requires_grad_()  # a step of each kind, and a group

    def build(steps):
        return entries(solver.expand(path, steps), solver, path)

    assert torch.autograd.gradcheck(build, steps, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("label, path", CONTINUOUS)
def test_batch_axes(label, path):
    solver, path = SOLVERS[label], PATHS[path]
    single = [solver.expand(path, random_steps(path, 7, seed)) for seed in range(3)]
    together = entries(torch.stack(single, 1), solver, path)
    apart = torch.stack([entries(times, solver, path) for times in single], -1)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label, path", CONTINUOUS)
@pytest.mark.parametrize("to_zero", [False, True])
def test_long_tables_are_built_row_by_row(label, path, to_zero, monkeypatch):
    solver, path = SOLVERS[label], PATHS[path]
    steps = random_steps(path, 40, seed=5)
    if path.kind == "flow" and "bh1" not in label:
        steps[0] = 1.0  # whose lambda is -inf: only the rows that see it may leave it out
    if to_zero:
        steps[-1] = 0.0
    if solver.stages == 2:
        times = solver.expand_to(path, steps, 2 * 39 - 3)
    else:
        times = steps
    grouped = entries(times, solver, path)
    monkeypatch.setattr(rows, "LOOK_BACK", len(times))
    torch.testing.assert_close(grouped, entries(times, solver, path), rtol=1e-9, atol=1e-12)


AT_PURE_NOISE = [label for label, path in PAIRS if path == "flow" and "bh1" not in label]


@pytest.mark.parametrize("label", AT_PURE_NOISE)
def test_flow_starts_at_pure_noise(label):
    solver = SOLVERS[label]

    def build(first):
        steps = grid(1.0, 0.85, 0.7, 0.5, 0.35, 0.2, 0.1)
        steps = torch.cat([steps.new_tensor([first]), steps[1:]]).requires_grad_()
        return entries(solver.expand(FLOW, steps), solver, FLOW), steps

    limit, steps = build(1.0)
    assert limit.isfinite().all()
    for entry in limit.flatten():
        if entry.requires_grad:
            (gradient,) = torch.autograd.grad(entry, steps, retain_graph=True)
            assert gradient.isfinite().all()
    # Formulas in lambda reach the limit as 1 / |lambda|, the others as 1 - s.
    distances = [(build(1 - 10.0**-k)[0] - limit).abs().max().item() for k in (3, 6, 12)]
    if solver.order > 1 and solver.name in ("dpmpp", "unipc"):
        for nearer, farther in zip(distances[1:], distances):
            assert 0 < nearer < 0.65 * farther
        assert distances[-1] < 0.1
    else:
        assert distances[0] < 0.02 and distances[-1] < 1e-10


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("unipc", {"variant": "bh1"}, "use solver_type='bh2'"),
        ("unipc", {"predict_x0": False}, "set predict_x0=True"),
        ("dpmpp", {"predict_x0": False}, "set predict_x0=True"),
        ("deis", {"variant": "logrho"}, "use solver_type='rhoab'"),
        ("deis", {"variant": "tab"}, "use solver_type='rhoab'"),
        ("euler", {"afs": True}, "set afs=False for flow models"),
    ],
)
def test_flow_refusals(name, options, match):
    afs = options.pop("afs", False)
    with pytest.raises(ValueError, match=match):
        build_table(
            make_solver(name, **options),
            FLOW,
            grid(1, 0.5, 0.2),
            prediction_type="flow_prediction",
            analytical_first_step=afs,
        )


@pytest.mark.parametrize("name", ["heun", "dpm2"])
@pytest.mark.parametrize("path", ["vp_linear", "ve", "flow"])
@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("num_rows", range(1, 8))
def test_two_stage_bookkeeping(name, path, to_zero, num_rows):
    solver, path = make_solver(name), PATHS[path]
    steps = solver.num_steps(num_rows, to_zero)
    ends = random_steps(path, steps + 1, seed=1) if steps > 0 else None
    if to_zero:
        ends[-1] = 0.0
    times = solver.expand_to(path, ends, num_rows)
    assert len(times) == num_rows + 1 and (times.diff() <= 0).all()
    full = 2 * steps - to_zero  # evaluations of that many steps
    assert full - num_rows in (0, 1)
    if full == num_rows:
        assert torch.equal(times, solver.expand(path, ends))
    levels = path.levels(times)
    rows_, euler = solver.rows(levels), make_solver("euler").rows(levels)
    two_stage = [i for i, row in enumerate(rows_) if len(row.history) == 2]
    pairs = steps - (full - num_rows) - to_zero
    assert two_stage == [2 * k + 1 for k in range(pairs)]
    for i in set(range(num_rows)) - set(two_stage):  # the first stages, the spare one and the step to zero
        torch.testing.assert_close(torch.stack(rows_[i].history), torch.stack(euler[i].history))
    build_table(solver, path, times, prediction_type="sample")


@pytest.mark.parametrize("path", ["vp_linear", "ve", "flow"])
@pytest.mark.parametrize("num_rows", range(1, 8))
def test_steps_of_amed_to_zero_have_a_stage_where_evaluations_allow_it(path, num_rows):
    solver, path = make_solver("amed"), PATHS[path]
    ends = random_steps(path, solver.num_steps(num_rows, True) + 1, seed=1)
    ends[-1] = 0.0
    times = solver.expand_to(path, ends, num_rows)
    rows = solver.rows(path.levels(times))
    assert len(rows) == num_rows and [len(row.history) for row in rows] == [1, 2] * (num_rows // 2) + [1] * (
        num_rows % 2
    )
    if num_rows % 2 == 0:
        z = path.levels(torch.stack([times[-3], times[-2], torch.full_like(times[0], path.t_min)])).z
        torch.testing.assert_close(z[1], (z[0] * z[2]).sqrt())


@pytest.mark.parametrize("label", SOLVERS)
@pytest.mark.parametrize("first", [1, 2, 5])
def test_tails_start_first_order_and_keep_parity(label, first):
    solver, path = SOLVERS[label], PATHS["vp_linear"]
    times = solver.expand(path, random_steps(path, 10, seed=7))
    whole, tail = entries(times, solver, path), entries(times[first:], solver, path, first)
    levels = path.levels(times[first:])
    # UniPC's corrector belongs to the row after; its first row is first-order like all others
    euler = make_solver("ddim" if solver.form(path) == "data" else "euler").rows(levels)[0]
    torch.testing.assert_close(tail[0][:2], torch.stack([euler.state, *euler.history]), rtol=1e-9, atol=1e-13)
    assert (tail[0][2:] == 0).all()
    width = min(whole.shape[1], tail.shape[1])
    torch.testing.assert_close(tail[4:, :width], whole[first + 4 :, :width], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("nonsense", {}, "unknown solver 'nonsense'; use one of abv"),
        (["euler"], {}, "unknown solver"),
        ("dpmpp", {"order": 4}, "use solver_order = 1 or 2 or 3"),
        ("dpmpp", {"order": 2.0}, "has no order 2.0"),
        ("heun", {"order": True}, "has no order True"),
        ("unipc", {"variant": "midpoint"}, "use one of bh2, bh1"),
    ],
)
def test_make_solver_refuses(name, options, match):
    with pytest.raises(ValueError, match=match):
        make_solver(name, **options)
