# SPDX-License-Identifier: Apache-2.0
"""AMED's steps: the authors' numbers, a direct computation with two states, EDM's variables, gradients, counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ld3_diffusers import AMEDPredictor, LD3Scheduler, Schedule, SolverSpec
from ld3_diffusers.amed import (
    STUDENTS,
    StepPrediction,
    amed_schedule,
    num_student_steps,
    static_schedule,
    step_levels,
    with_step,
)
from ld3_diffusers.noise_path import VE, shift_flow_time
from ld3_diffusers.solvers import make_solver
from ld3_diffusers.step_table import Executor, build_table

from .amed_steps import START, DirectSteps, by_table, network
from .cases import PATHS, grid


with np.load(Path(__file__).parents[1] / "golden" / "amed.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind == "f"}

SAMPLED = [key for key in GOLDEN if key.startswith(("amed/const/", "amed/persample/")) and "=" in key]
TABLE = ("times", "network_times", "timesteps", "state", "p", "q", "input_scale")


def batch_denoise(x, sigma):
    """E[x_0 | x] of the authors' mixture, at one noise level or at one for each sample."""
    mu, s, w = (GOLDEN[f"gmm/{part}"] for part in ("mu", "s", "w"))
    flat, sigma = x.flatten(1), sigma.reshape(-1, 1).expand(len(x), 1)
    variance = s**2 + sigma**2
    logits = w.log() - ((flat[:, None] - mu) ** 2).sum(-1) / (2 * variance) - flat.shape[1] / 2 * variance.log()
    means = (s[:, None] ** 2 * flat[:, None] + sigma[..., None] ** 2 * mu) / variance[..., None]
    return (torch.softmax(logits, -1)[..., None] * means).sum(1).reshape(x.shape)


def golden_run(key):
    """The schedule of bare steps, and what the authors' run predicted at each."""
    _, kind, name, text = key.split("/")
    options = {k: {"True": True, "False": False}.get(v, v) for k, v in (part.split("=") for part in text.split(","))}
    spec = SolverSpec(
        {"dpm": "dpm2"}.get(name, name),
        int(options["max_order"]) if "max_order" in options else None,
        predict_x0=options.get("predict_x0", True),
        lower_order_final=options.get("lower_order_final", True),
        afs=options["afs"],
        starting_scale="sigma",
    )
    values = GOLDEN["amed/const/r_c_a"]
    if kind == "persample":
        values = [GOLDEN[f"amed/persample/{part}"] for part in ("r", "scale_dir", "scale_time")]
    return amed_schedule(GOLDEN["amed/t_steps"], spec, VE(), "sample"), StepPrediction(*values)


def predicted(schedule, prediction, path):
    for n in range((len(schedule.times) - 1) // 2):
        schedule = with_step(schedule, n, prediction, path)
    return schedule


def start(table):
    return GOLDEN["latents"] * (table.start if table.start.ndim == 0 else table.start[:, None, None, None])


def test_every_run_is_compared():
    # amed, euler, dpm; ipndm of order 2 to 4; dpmpp of order 1 to 3 in both forms, lowered at the end or not: each with afs or not
    assert len(SAMPLED) == 2 * 2 * (3 + 3 + 3 * 2 * 2)


@pytest.mark.parametrize("key", SAMPLED, ids=[key.removeprefix("amed/") for key in SAMPLED])
def test_published_students(key):
    bare, prediction = golden_run(key)
    table = predicted(bare, prediction, VE()).table(VE())
    assert len(table) == bare.nfe
    executor, x = Executor(table), start(table)
    for t in table.network_times:
        x = executor.step(x, batch_denoise(x, t))
    # Rounding of states of size 80 grows by at most 25; measured agreement is 4e-13.
    torch.testing.assert_close(x, GOLDEN[key], rtol=0, atol=1e-11)


@pytest.mark.parametrize("key", SAMPLED, ids=[key.removeprefix("amed/") for key in SAMPLED])
def test_rows_that_become_known_on_the_way(key):
    live, prediction = golden_run(key)
    whole = predicted(live, prediction, VE()).table(VE())
    afs = int(live.spec.afs)
    if afs:  # its step sees no network, so it is known before
        live = with_step(live, 0, prediction, VE())
    executor, reference = Executor(live.table(VE()), fused=False), Executor(whole, fused=False)
    x = y = start(whole)
    for i in range(len(whole)):
        n, is_stage = divmod(i + afs, 2)
        output = batch_denoise(x, live.network_times[i + afs])
        if not is_stage:
            live = with_step(live, n, prediction, VE())
            executor.go_on_with(live.table(VE(), wanted=range(2 * n, 2 * n + 2)))
        x = executor.step(x, output)
        y = reference.step(y, batch_denoise(y, whole.network_times[i]))
        assert torch.equal(x, y), i


@pytest.mark.parametrize("key", [key for key in SAMPLED if "afs=False" in key and "order=1" not in key])
def test_wanted_rows_are_those_of_the_whole_table(key):
    bare, prediction = golden_run(key)
    schedule = predicted(bare, prediction, VE())
    for first in (0, 1, 2):
        whole = schedule.table(VE(), first=first)
        for row in range(first % 2, len(whole) - 1, 2):
            wanted = schedule.table(VE(), first=first, wanted=range(row, row + 2))
            for name in TABLE:
                mine, theirs = getattr(wanted, name), getattr(whole, name)[row : row + 2 + (name == "times")]
                assert torch.equal(mine, theirs), (name, first, row)
            width = wanted.history.shape[1]
            assert torch.equal(wanted.history, whole.history[row : row + 2, :width])
            assert (whole.history[row : row + 2, width:] == 0).all()


# Directly computed steps ----------------------------------------------------------------------------------------------

LEVELS = {"vp_discrete": (0.97, 0.7, 0.4, 0.15), "ve": (20.0, 6.0, 1.5, 0.3), "flow": (0.95, 0.7, 0.4, 0.1)}
PREDICTIONS = [
    *(("vp_discrete", kind) for kind in ("epsilon", "v_prediction", "sample")),
    *(("ve", kind) for kind in ("epsilon", "v_prediction", "sample")),
    *(("flow", kind) for kind in ("flow_prediction", "epsilon", "sample")),
]
SPECS = {
    **{name: SolverSpec(name) for name in ("amed", "dpm2", "euler")},
    **{f"ipndm-{order}": SolverSpec("ipndm", order) for order in (2, 3, 4)},
    **{f"dpmpp-{form}": SolverSpec("dpmpp", 2, predict_x0=form == "data") for form in ("data", "noise")},
}
CONSTANT = StepPrediction(0.4, 1.05, 0.93)
PER_SAMPLE = StepPrediction(grid(0.3, 0.45, 0.6, 0.7), grid(0.96, 1.04, 1.0, 1.02), grid(0.94, 1.03, 1.0, 0.98))
ON_PATHS = [
    (label, path, kind) for label in SPECS for path, kind in PREDICTIONS if (label, path) != ("dpmpp-noise", "flow")
]


def steps_on(path, label, kind, ends=None):
    return amed_schedule(grid(*(ends or LEVELS[path])), SPECS[label], PATHS[path], kind)


@pytest.mark.parametrize("label, path, kind", ON_PATHS)
@pytest.mark.parametrize("prediction", [CONSTANT, PER_SAMPLE], ids=["constant", "per_sample"])
def test_steps_with_two_states(label, path, kind, prediction):
    schedule = predicted(steps_on(path, label, kind), prediction, PATHS[path])
    x = float(schedule.times[0].max()) * START
    expected = DirectSteps(PATHS[path], kind)(schedule, x)
    torch.testing.assert_close(by_table(schedule.table(PATHS[path]), x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("label, path", [(a, b) for a, b, kind in ON_PATHS if kind == "epsilon"])
@pytest.mark.parametrize("prediction", [CONSTANT, PER_SAMPLE], ids=["constant", "per_sample"])
def test_the_end_in_clean_data(label, path, prediction):
    schedule = predicted(steps_on(path, label, "epsilon", (*LEVELS[path], 0.0)), prediction, PATHS[path])
    r = torch.as_tensor(prediction.r, dtype=torch.float64)
    z_last = PATHS[path].levels(schedule.times[-3:-1]).z
    floor = PATHS[path].levels(grid(PATHS[path].t_min)).z[0]
    torch.testing.assert_close(
        z_last[1], floor**r * z_last[0] ** (1 - r), rtol=1e-9, atol=0
    )  # as if it ended at t_min
    x = float(schedule.times[0].max()) * START
    expected = DirectSteps(PATHS[path], "epsilon")(schedule, x)
    torch.testing.assert_close(by_table(schedule.table(PATHS[path]), x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path, kind", PREDICTIONS)
def test_heun_scaled(path, kind):
    # No student of AMED; its row too scales the whole step.
    path, solver = PATHS[path], make_solver("heun")
    times = solver.expand(path, grid(*LEVELS[path.kind]))
    scales = grid(1, 1.05, 1, 0.9, 1, 1.02)
    table = build_table(solver, path, times, prediction_type=kind, direction_scales=scales)
    schedule = Schedule(times, None, SolverSpec("heun"), path.kind, kind, direction_scales=scales)
    x = float(times[0]) * START
    torch.testing.assert_close(by_table(table, x), DirectSteps(path, kind)(schedule, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("label, path, kind", ON_PATHS)
@pytest.mark.parametrize("ends", [(), (0.0,)], ids=["above_zero", "to_zero"])
def test_bare_steps_are_the_solver(label, path, kind, ends):
    bare, path = steps_on(path, label, kind, (*LEVELS[path], *ends)), PATHS[path]
    solver, doubled = bare.spec.make(), make_solver("dpm2").expand(path, bare.times[::2])
    if ends:  # where dpm2 itself has no stage
        doubled = torch.cat([doubled[:-1], bare.times[-2:]])
    torch.testing.assert_close(bare.times, doubled, rtol=1e-13, atol=0)
    assert torch.equal(bare.network_times, bare.times[:-1]) and (bare.direction_scales == 1).all()
    mine, theirs = bare.table(path), build_table(solver, path, bare.times, prediction_type=kind)
    for name in ("state", "history", "p", "q", "timesteps", "input_scale"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)
    # else pipelines that never ask for a scaled input would be refused
    assert torch.equal(mine.input_scale, path.input_scale(bare.times[:-1]))


@pytest.mark.parametrize("path", ["vp_discrete", "vp_linear", "vp_cosine", "ve", "flow"])
def test_the_stage_and_the_time_told(path):
    path = PATHS[path]
    ends = path.t_max * grid(0.98, 0.6, 0.2)
    r, a = grid(0.2, 0.5, 0.9), grid(0.9, 1.0, 1.1)
    bare = amed_schedule(ends, SolverSpec("euler"), path, "sample")
    schedule = with_step(bare, 1, StepPrediction(r, 1.0, a), path)
    z = path.levels(schedule.times).z
    torch.testing.assert_close(z[3], z[4] ** r * z[2] ** (1 - r), rtol=1e-9, atol=0)  # on flow z is s
    torch.testing.assert_close(path.levels(schedule.network_times).z[3], a * z[3], rtol=1e-9, atol=0)
    assert torch.equal(schedule.network_times[3, 1], schedule.times[3, 1])
    assert torch.equal(schedule.times[[0, 2, 4]], ends[:, None].expand(3, 3))
    assert step_levels(bare, 1, path) == (float(z[2, 0]), float(z[4, 0]))
    # It stays within the step, however far the factor goes.
    far = with_step(bare, 0, StepPrediction(grid(0.01, 0.99), 1.0, grid(1.9, 0.1)), path)
    assert torch.equal(far.network_times[1], ends[:2])


@pytest.mark.parametrize("final", [False, True])
def test_a_resolution_shift_moves_all_times(final):
    path, mu = PATHS["flow"], 0.8
    bare = amed_schedule(grid(1.0, 0.6, 0.2), SolverSpec("amed"), path, "flow_prediction", final=final)
    schedule = predicted(bare, CONSTANT, path)
    table, plain = schedule.table(path, mu=mu), schedule.table(path)
    for name in ("times", "network_times"):
        expected = getattr(plain, name) if final else shift_flow_time(getattr(plain, name), mu)
        assert torch.equal(getattr(table, name), expected)
    moved = replace(schedule, times=table.times, network_times=table.network_times)
    expected = DirectSteps(path, "flow_prediction")(moved, START)
    torch.testing.assert_close(by_table(table, START), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("label", SPECS)
@pytest.mark.parametrize("path", ["vp_discrete", "vp_linear", "vp_cosine"])
@pytest.mark.parametrize("prediction", [CONSTANT, PER_SAMPLE], ids=["constant", "per_sample"])
def test_variance_preserving_runs_are_those_of_edm(label, path, prediction):
    # The network wrapped as EDM wraps it: D(y; z) sees alpha y at the time where sigma/alpha is z.
    path, ve = PATHS[path], VE(sigma_max=200.0)
    schedule = predicted(
        amed_schedule(path.t_max * grid(0.97, 0.5, 0.2), SPECS[label], path, "epsilon"), prediction, path
    )
    edm = predicted(
        amed_schedule(path.sigma_edm(schedule.times[::2].reshape(3, -1)[:, 0]), SPECS[label], ve, "sample"),
        prediction,
        ve,
    )
    table, other = schedule.table(path), edm.table(ve)

    def column(value):
        return value if value.ndim == 0 else value[:, None]

    executor, y = Executor(other), 3 * START
    for z in other.network_times:
        t = path.inverse_sigma_edm(z)
        x = column(path.alpha(t)) * y
        y = executor.step(y, (x - column(path.sigma(t)) * network(x, t)) / column(path.alpha(t)))
    x = by_table(table, column(path.alpha(schedule.times[0])) * 3 * START) / column(path.alpha(schedule.times[-1]))
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


# Gradients, orders, counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label, path", [(a, b) for a, b, kind in ON_PATHS if kind == "epsilon"])
@pytest.mark.parametrize("batch", [(), (4,)], ids=["constant", "per_sample"])
def test_gradients_reach_the_predictions(label, path, batch):
    bare, path = steps_on(path, label, "epsilon"), PATHS[path]
    generator = torch.Generator().manual_seed(0)
    r, c, a = (
        (center + width * torch.rand(3, *batch, generator=generator, dtype=torch.float64)).requires_grad_()
        for center, width in ((0.4, 0.2), (0.97, 0.06), (0.95, 0.08))
    )

    def end(r, c, a):
        schedule = bare
        for n in range(3):
            schedule = with_step(schedule, n, StepPrediction(r[n], c[n], a[n]), path)
        return by_table(schedule.table(path), float(bare.times[0]) * START)

    assert torch.autograd.gradcheck(end, (r, c, a), eps=1e-6, atol=1e-5, rtol=1e-5, fast_mode=True)
    for gradient in torch.autograd.grad(end(r, c, a).sum(), (r, c, a)):
        assert (gradient != 0).all()


def test_a_factor_of_one_has_a_gradient():
    # where every predictor begins
    path = PATHS["vp_linear"]
    bare = amed_schedule(grid(0.9, 0.5, 0.2), SolverSpec("amed"), path, "epsilon")
    a = torch.ones((), dtype=torch.float64, requires_grad=True)
    told = with_step(bare, 0, StepPrediction(0.5, 1.0, a), path).network_times[1]
    (gradient,) = torch.autograd.grad(told, a)
    near = [with_step(bare, 0, StepPrediction(0.5, 1.0, 1 + e), path).network_times[1] for e in (1e-6, -1e-6)]
    assert float(gradient) == pytest.approx(float(near[0] - near[1]) / 2e-6, rel=1e-6)


def gaussian_error(solver, r, steps, spread=0.6):
    """Of a plain run of `LD3Scheduler` with data N(0, spread^2), whose trajectories are known."""
    s = LD3Scheduler(noise_path="vp_linear", solver=solver)
    path = s.path
    ends = path.inverse_lam(torch.linspace(-1.4, 0.9, steps + 1, dtype=torch.float64))
    schedule = amed_schedule(ends, SolverSpec(solver), path, "epsilon")
    for n in range(steps):
        schedule = with_step(schedule, n, StepPrediction(r), path)
    s.use_schedule(schedule)
    s.set_timesteps(2 * steps)

    def deviation(t):
        return (path.alpha(t) ** 2 * spread**2 + path.sigma(t) ** 2).sqrt()

    x = deviation(ends[0]) * START
    for i, t in enumerate(s.timesteps):
        time = schedule.network_times[i]  # the timestep is float32
        x = s.step(path.sigma(time) / deviation(time) ** 2 * x, t, x).prev_sample
    return float((x / deviation(ends[-1]) - START).abs().max())


@pytest.mark.parametrize("solver, r, order", [("amed", 0.5, 2), ("amed", 0.4, 1), ("dpm2", 0.5, 2), ("dpm2", 0.4, 2)])
def test_order_of_convergence(solver, r, order):
    coarse, fine = (gaussian_error(solver, r, steps) for steps in (40, 80))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("nfe, afs, steps", [(2, False, 1), (4, False, 2), (10, False, 5), (1, True, 1), (5, True, 3)])
def test_student_steps(nfe, afs, steps):
    assert num_student_steps(nfe, afs) == steps
    path = PATHS["vp_linear"]
    bare = amed_schedule(torch.linspace(1, 0.1, steps + 1), SolverSpec("amed", afs=afs), path, "epsilon")
    assert bare.nfe == nfe == len(bare.table(path))


@pytest.mark.parametrize(
    "nfe, afs, fix",
    [
        (5, False, "use 6 evaluations, or set afs"),
        (6, True, "use 7 evaluations, or drop afs"),
        (1, False, "use 2 evaluations, or set afs"),
        (0, True, "use 1 evaluations, or drop afs"),
        (-3, True, "use 1 evaluations, or drop afs"),
        (-4, False, "use 2 evaluations, or set afs"),
    ],
)
def test_counts_of_no_whole_steps(nfe, afs, fix):
    with pytest.raises(ValueError, match=f"and an even one without, not {nfe}; {fix}$"):
        num_student_steps(nfe, afs)


@pytest.mark.parametrize("solver", ["unipc", "heun", "deis", "nonsense"])
def test_solvers_of_no_amed_steps(solver):
    with pytest.raises(ValueError, match=f"{solver} is no solver of AMED steps; use one of {', '.join(STUDENTS)}"):
        amed_schedule(grid(1.0, 0.5), SolverSpec(solver), PATHS["ve"], "sample")


def test_flow_has_no_analytical_first_step():
    bare = amed_schedule(grid(1.0, 0.5, 0.2), SolverSpec("amed", afs=True), PATHS["flow"], "flow_prediction")
    with pytest.raises(ValueError, match="set afs=False for flow models"):
        bare.table(PATHS["flow"])


def test_a_detached_schedule_has_no_gradient():
    c = torch.ones((), dtype=torch.float64, requires_grad=True)
    path = PATHS["ve"]
    schedule = with_step(
        amed_schedule(grid(9.0, 3.0), SolverSpec("euler"), path, "sample"), 0, StepPrediction(0.5, c), path
    )
    assert schedule.table(path).differentiable and not schedule.detach().table(path).differentiable


@pytest.mark.parametrize("form", ["static", "per_sample"])
def test_static_schedules(form):
    path = PATHS["vp_linear"]
    torch.manual_seed(0)
    predictor = AMEDPredictor(form, scale_dir=0.1, scale_time=0.2, num_steps=3).double()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter)
    bare = amed_schedule(grid(0.9, 0.6, 0.3, 0.1), SolverSpec("amed"), path, "epsilon")
    static = static_schedule(bare, predictor, path)
    z = path.levels(bare.times[::2]).z
    for n in range(3):
        r, c, a = (value.detach().squeeze() for value in predictor(torch.zeros(1, 8, 8), z[n], z[n + 1], n))
        stage = z[n + 1] ** r * z[n] ** (1 - r)
        torch.testing.assert_close(path.levels(static.times[2 * n + 1]).z, stage, rtol=1e-9, atol=0)
        told = torch.minimum(torch.maximum(a * stage, z[n + 1]), z[n])
        torch.testing.assert_close(path.levels(static.network_times[2 * n + 1]).z, told, rtol=1e-9, atol=0)
        assert static.direction_scales[2 * n : 2 * n + 2].tolist() == [1.0, float(c)]
    assert static.times.ndim == 1 and not static.table(path).differentiable
    with pytest.raises(ValueError, match="trained for 3 steps and this schedule has 2"):
        static_schedule(amed_schedule(grid(0.9, 0.6, 0.3), SolverSpec("amed"), path, "epsilon"), predictor, path)
