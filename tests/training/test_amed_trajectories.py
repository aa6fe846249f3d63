# SPDX-License-Identifier: Apache-2.0
"""The teacher's trajectories: its grid, what is recorded on it, and how that is kept."""

import pytest
import torch

from ld3_diffusers import LD3Scheduler, Schedule, SolverSpec
from ld3_diffusers.noise_path import VE
from training.amed_student import GuidedNetwork
from training.amed_trajectories import refined_grid, teacher_trajectories
from training.initial import named_grid

from .amed_problems import guided, tiny_problem
from .rollouts import close


TINY = LD3Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").path
PATHS = {"vp": TINY, "ve": VE(0.002, 80.0), "flow": LD3Scheduler(noise_path="flow").path}
CLOSED_FORMS = {
    "vp": ("logsnr", "time_uniform", "time_quadratic", "polynomial", "edm", "discrete", "poly"),
    "ve": ("logsnr", "polynomial", "edm"),
    "flow": ("time_uniform", "flow_linear", "time_quadratic", "edm"),
}


# ---------------------------------------------------------------------- the grid


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CLOSED_FORMS.items() for name in names])
def test_a_refined_grid_is_the_same_grid_with_more_steps(kind, name, points, to_zero):
    path = PATHS[kind]
    grid = refined_grid(name, path, 3, points, to_zero)
    assert torch.equal(grid, named_grid(name, path, 3 * (points + 1), to_zero))
    own = named_grid(name, path, 3, to_zero)
    torch.testing.assert_close(grid[:: points + 1], own, rtol=1e-9, atol=1e-12)


def test_an_exponent_is_that_of_both_grids():
    grid = refined_grid("polynomial", TINY, 3, 2, True, rho=3.0)
    torch.testing.assert_close(grid[::3], named_grid("polynomial", TINY, 3, True, 3.0), rtol=1e-9, atol=1e-12)
    sigma = TINY.sigma_edm(grid[:-1]) ** (1 / 3)
    torch.testing.assert_close(sigma.diff(), sigma.diff()[:1].expand(8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize(("name", "steps"), [("dmn", 4), ("ays", 10), ("ays", 4)])
def test_grids_that_are_no_formula_are_refined_evenly_in_lambda(name, steps, to_zero):
    """AYS interpolates log sigma, so that between two levels of its table it is refined so by itself."""
    grid, own = refined_grid(name, TINY, steps, 3, to_zero), named_grid(name, TINY, steps, to_zero)
    torch.testing.assert_close(grid[::4], own, rtol=1e-9, atol=1e-12)
    assert len(grid) == 4 * steps + 1 and bool((grid.diff() < 0).all())
    gaps = TINY.lam(grid[:-1] if to_zero else grid).diff()
    if name == "dmn" or steps == 10:
        whole = gaps[: 4 * (steps - 1)].view(-1, 4)
        torch.testing.assert_close(whole, whole[:, :1].expand(-1, 4), rtol=1e-6, atol=0)


def test_a_step_to_clean_data_is_refined_down_to_where_the_path_ends():
    grid = refined_grid("dmn", TINY, 3, 3, True)
    floor = TINY.lam(torch.tensor(TINY.t_min, dtype=torch.float64))
    lam = TINY.lam(grid[8:12])
    share = torch.arange(4, dtype=torch.float64) / 4
    torch.testing.assert_close(lam, lam[0] + share * (floor - lam[0]), rtol=1e-9, atol=0)
    assert grid[-1] == 0


# ---------------------------------------------------------------------- what is recorded


STEPS, POINTS = 2, 2


def record(problem, folder, watches=True, solver=SolverSpec("dpmpp"), to_zero=True, batch_size=3):
    grid = refined_grid("time_uniform", problem.path, STEPS, POINTS, to_zero)
    network = GuidedNetwork(problem.rollout, watches)
    try:
        return teacher_trajectories(
            problem, network, grid, POINTS, solver, folder, final=False, batch_size=batch_size
        )  # fmt: skip
    finally:
        network.close()


def in_the_pipeline(problem, grid, solver):
    """The starting state and that after each row, by the pipeline's own callback; and the times of the rows."""
    pipe, path = problem.rollout.pipe, problem.path
    times = solver.make().expand(path, grid)
    scheduler = LD3Scheduler.from_config(pipe.scheduler.config)
    scheduler.use_schedule(Schedule(times, None, solver, path.kind, "epsilon"))
    noise, _, conditioning = problem.train.batch(list(range(len(problem.train))), "cpu")
    states, stock = [noise], pipe.scheduler

    def keep(_pipe, _i, _t, values):
        states.append(values["latents"])
        return values

    pipe.scheduler = scheduler
    pipe(
        **conditioning,
        latents=noise,
        num_inference_steps=len(times) - 1,
        callback_on_step_end=keep,
        output_type="latent",
        **problem.rollout.call_kwargs,
    )
    pipe.scheduler = stock
    return states, times, conditioning


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("solver", ["heun", "dpm2", "euler", "ipndm", "dpmpp", "unipc"])
def test_states_outputs_and_features_are_those_of_the_pipeline(tmp_path, solver, to_zero):
    problem, spec = tiny_problem(num_train=4), SolverSpec(solver)
    found = record(problem, tmp_path, solver=spec, to_zero=to_zero)
    grid = refined_grid("time_uniform", problem.path, STEPS, POINTS, to_zero)
    states, times, conditioning = in_the_pipeline(problem, grid, spec)
    rows = (POINTS + 1) * (2 if solver in ("heun", "dpm2") else 1)
    assert len(times) - 1 == STEPS * rows - (to_zero and rows > POINTS + 1)
    expected = torch.stack([states[0], states[rows], states[-1]], 1)
    assert close(found.states, expected, 1e-5)
    unet, seen = problem.rollout.pipe.unet, []
    hook = unet.mid_block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        for n in range(STEPS):
            assert times[n * rows] == grid[n * (POINTS + 1)]
            timestep = problem.path.timestep(times[n * rows])
            output = guided(problem.rollout.pipe, conditioning, found.states[:, n], timestep)
            assert close(found.outputs[:, n], output, 1e-5)
            assert close(found.features[:, n], seen[n][4:].mean(1), 1e-5)  # of the conditional half
    hook.remove()
    assert found.states.dtype == found.outputs.dtype == found.features.dtype == torch.float32
    output, features = found.first([2, 0], 1, "cpu")
    assert torch.equal(output, found.outputs[[2, 0], 1]) and torch.equal(features, found.features[[2, 0], 1])


def test_recorded_outputs_are_what_a_student_would_evaluate(tmp_path):
    problem = tiny_problem(num_train=3)
    found = record(problem, tmp_path)
    grid = refined_grid("time_uniform", problem.path, STEPS, POINTS, True)
    network = GuidedNetwork(problem.rollout, True)
    _, _, conditioning = problem.train.batch([0, 1, 2], "cpu")
    with torch.no_grad():
        for n, time in enumerate(grid[:-1:3]):
            output = network(found.states[:, n], time, torch.ones((), dtype=torch.float64), conditioning)
            assert torch.equal(found.outputs[:, n], output)
            assert torch.equal(found.features[:, n], network.features(3))
    network.close()


# ---------------------------------------------------------------------- keeping


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_same_request_is_read_and_another_one_made_anew(tmp_path):
    problem = tiny_problem()
    counted = problem.rollout.evaluations
    first = record(problem, tmp_path)
    made = counted.forward
    assert made == 5 * STEPS * (POINTS + 1)
    again = record(problem, tmp_path)
    assert counted.forward == made
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("states", "outputs", "features"))
    [kept] = files(tmp_path)
    assert kept.name == "trajectories.safetensors"

    # What was recorded with features serves without; else it is recorded without.
    assert torch.equal(record(problem, tmp_path, watches=False).states, first.states) and counted.forward == made
    assert record(problem, tmp_path / "static", watches=False).features is None and counted.forward == 2 * made
    for change in ({"solver": SolverSpec("euler")}, {"to_zero": False}):
        before = counted.forward
        other = record(problem, tmp_path, **change)
        assert counted.forward == before + made
        assert not torch.equal(other.states, first.states)
    assert len(files(tmp_path)) == 4
    before = counted.forward
    record(problem, tmp_path)
    assert counted.forward == before  # not made anew for the others
    kept.write_bytes(b"damaged")
    assert torch.equal(record(problem, tmp_path).states, first.states) and counted.forward == before + made


def test_a_killed_recording_continues(tmp_path, monkeypatch):
    problem, whole = tiny_problem(), record(tiny_problem(), tmp_path / "whole", batch_size=2)
    visit, begun = problem.rollout.visit, []

    def killed(schedule, noise, *rest):
        begun.append(len(noise))
        if len(begun) == 3:
            raise KeyboardInterrupt
        visit(schedule, noise, *rest)

    monkeypatch.setattr(problem.rollout, "visit", killed)
    with pytest.raises(KeyboardInterrupt):
        record(problem, tmp_path / "parts", batch_size=2)
    assert len(list((tmp_path / "parts").rglob(".parts-*/*.safetensors"))) == 2
    found = record(problem, tmp_path / "parts", batch_size=2)
    assert begun == [2, 2, 1, 1]
    assert all(torch.equal(getattr(found, name), getattr(whole, name)) for name in ("states", "outputs", "features"))
    assert [file.name for file in files(tmp_path / "parts")] == ["trajectories.safetensors"]


def test_trajectories_that_are_not_finite_are_refused(tmp_path):
    problem = tiny_problem()
    with torch.no_grad():
        next(problem.rollout.pipe.unet.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match="trajectories are not finite; use --mixed_precision no or bf16"):
        record(problem, tmp_path)
