# SPDX-License-Identifier: Apache-2.0
"""Both maps from free numbers to schedules: the published one against its authors' numbers, ours against what it promises."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ld3_diffusers.discretization import append_zero, discretization
from ld3_diffusers.noise_path import VE, RectifiedFlow, VPDiscrete, VPLinear, alphas_cumprod_from_config
from ld3_diffusers.schedule import Schedule, SolverSpec
from training.parameters import GapParameters, PublishedParameters


GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.npz"


def stable_diffusion():
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return VPDiscrete(alphas_cumprod_from_config(config).log() / 2)


PATHS = {"vp_linear": VPLinear(), "sd": stable_diffusion(), "ve": VE(), "flow": RectifiedFlow()}
PREDICTION = {"flow": "flow_prediction"}


def schedule(path, grid, nfe, spec, end="t_min"):
    """A grid for `nfe` evaluations; `end`: "t_min", "zero" (0 for its last level) or "before_zero" (0 after it)."""
    solver, rows = spec.make(), nfe + spec.afs
    steps = solver.num_steps(rows, end != "t_min")
    times = discretization(grid, path, steps - (end == "before_zero"))
    times = {"t_min": times, "zero": append_zero(times[:-1]), "before_zero": append_zero(times)}[end]
    times = solver.expand_to(path, times, rows) if solver.stages == 2 else times
    return Schedule(times, None, spec, path.kind, PREDICTION.get(path.kind, "epsilon"))


def randomise(parameters, seed, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters.parameters():
            value.copy_(spread * torch.randn(value.shape, generator=generator, dtype=torch.float64))


# ---------------------------------------------------------------------- published


@pytest.mark.parametrize("name", ["vp_linear", "sd"])
@pytest.mark.parametrize("mode", ["time", "lambda"])
def test_published_parameters_agree_with_the_authors_code(name, mode):
    golden = np.load(GOLDEN)
    prefix = f"vp_space/{name}/param/{mode}/"
    cases = sorted({key.rsplit("/", 1)[0] for key in golden if key.startswith(prefix)})
    assert len(cases) == 6
    path = PATHS["vp_linear"]
    if name == "sd":
        path = VPDiscrete(torch.from_numpy(golden["vp_space/sd/log_alpha_table"]))
    for case in cases:
        given, bent, t1, t2 = (torch.from_numpy(golden[f"{case}/{key}"]) for key in ("params1", "params2", "t1", "t2"))
        parameters = PublishedParameters(
            path,
            len(given) - 1,
            spec=SolverSpec("unipc"),
            prediction_type="epsilon",
            mode=mode,
            logit_window_bug=True,
        )
        parameters.load_state_dict({"times": given, "network_times": bent})
        times, network_times = parameters.both_times()
        torch.testing.assert_close(times.detach(), t1, atol=1e-12, rtol=0)
        torch.testing.assert_close(network_times.detach(), t2, atol=1e-12, rtol=0)


def published(mode="lambda", steps=6, **options):
    return PublishedParameters(
        VPLinear(), steps, spec=SolverSpec("dpmpp"), prediction_type="epsilon", mode=mode, **options
    )


def test_published_parameters_start_uniform_and_tied():
    for mode, grid in (("lambda", "logsnr"), ("time", "time_uniform")):
        found = published(mode).schedule()
        torch.testing.assert_close(found.times, discretization(grid, VPLinear(), 6), atol=1e-13, rtol=0)
        assert torch.equal(found.network_times, found.times[:-1])
        assert found.nfe == 6


def test_first_published_logit_is_dead_and_time_mode_is_reversed():
    parameters = published("time")
    parameters.schedule().times[3].backward()
    assert parameters.groups["times"].grad[0].abs() < 1e-15  # a rounding error, like all its other derivatives
    # The gap between t_0 and t_1 belongs to the last logit.
    with torch.no_grad():
        parameters.groups["times"][6] += 1
    gaps = -parameters.schedule().times.diff()
    assert gaps.argmax() == 0
    torch.testing.assert_close(gaps[0] / gaps[1], torch.tensor(np.e, dtype=torch.float64), atol=1e-12, rtol=0)


def test_published_window_bug_pins_network_times_of_equal_logits():
    for bug in (True, False):
        parameters = published("lambda", logit_window_bug=bug)
        with torch.no_grad():
            parameters.groups["network_times"].fill_(0.1)
        found = parameters.schedule()
        moved = VPLinear().lam(found.network_times) - VPLinear().lam(found.times[:-1])
        expected = torch.full_like(moved, 0.0 if bug else 0.1)
        expected[0] = 0
        torch.testing.assert_close(moved, expected, atol=1e-12, rtol=0)
    # With uneven logits it is unrelated to the gaps: the measured case leaves the path at its clean end.
    parameters = published("lambda", logit_window_bug=True)
    parameters.load_state_dict(
        {
            "times": torch.tensor([1.0, 3, -1, 1, 3, -1, 1], dtype=torch.float64),
            "network_times": torch.full((7,), 9.0, dtype=torch.float64),
        }
    )
    assert parameters.both_times()[1].min() < VPLinear().t_min


def test_published_network_times_outside_the_window_get_no_gradient():
    parameters = published("time")
    with torch.no_grad():
        parameters.groups["network_times"][2] = 9.0
    parameters.schedule().network_times.sum().backward()
    gradient = parameters.groups["network_times"].grad
    assert gradient[2] == 0 and gradient[0] == 0
    assert (gradient[[1, 3, 4, 5]] == 1).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "sigma"}, "use 'lambda' or 'time'"),
        ({"spec": SolverSpec("heun")}, "takes two"),
        ({"spec": SolverSpec("dpmpp", afs=True)}, "skips the first"),
        ({"path": RectifiedFlow()}, "mode='time'"),
    ],
)
def test_published_parameters_refuse(options, sentence):
    given = {"path": VPLinear(), "num_steps": 4, "spec": SolverSpec("dpmpp"), "prediction_type": "epsilon", **options}
    with pytest.raises(ValueError, match=sentence):
        PublishedParameters(given.pop("path"), given.pop("num_steps"), **given)


# ---------------------------------------------------------------------- default

CASES = [
    (path, solver, end, nfe, afs)
    for path in PATHS
    for solver in ("euler", "unipc", "heun", "dpm2")
    for end in ("t_min", "zero", "before_zero")
    for nfe, afs in ((1, False), (2, False), (5, False), (6, False), (5, True))
    if not (afs and path == "flow") and not (end == "before_zero" and nfe < 3)
]


@pytest.mark.parametrize(("path", "solver", "end", "nfe", "afs"), CASES)
def test_started_from_a_grid_it_is_that_grid_and_stays_a_schedule_anywhere(path, solver, end, nfe, afs):
    path = PATHS[path]
    initial = schedule(path, "time_uniform", nfe, SolverSpec(solver, afs=afs), end)
    parameters = GapParameters(initial, path)
    found = parameters.schedule()
    torch.testing.assert_close(found.times.detach(), initial.times, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.network_times.detach(), initial.network_times, atol=1e-12, rtol=1e-12)
    for seed in range(5):
        randomise(parameters, seed)
        found = parameters.schedule()
        table = found.table(path)  # checks order, range and that all is finite
        assert len(table) == nfe
        # Ends are exact, ties stay ties, everything else decreases strictly.
        assert found.times[0] == initial.times[0] and found.times[-1] == initial.times[-1]
        assert torch.equal(found.times.diff() == 0, initial.times.diff() == 0)
        assert (found.times[found.times > 0] >= path.t_min * (1 - 1e-12)).all()
        assert (found.network_times >= path.t_min * (1 - 1e-12)).all()


@pytest.mark.parametrize("grid", ["logsnr", "time_quadratic", "edm", "polynomial", "dmn"])
def test_any_discretization_can_be_started_from(grid):
    for path in (PATHS["sd"], PATHS["vp_linear"]):
        initial = schedule(path, grid, 7, SolverSpec("dpmpp"))
        found = GapParameters(initial, path).schedule()
        torch.testing.assert_close(found.times.detach(), initial.times, atol=1e-12, rtol=0)


def test_given_network_times_are_kept_and_fences_move_for_them():
    path = PATHS["sd"]
    times = discretization("logsnr", path, 5)
    lam = path.lam(times)
    # The second has gone past the middle of its gap, the third stays beyond that; the last is far towards clean data.
    u = lam[:-1] + torch.tensor([0.1, 0.7, 0.8, 0.0, 1.1]) * lam.diff()[0]
    u[-1] = u[-1].clamp(max=lam[-1])
    initial = Schedule(times, path.inverse_lam(u), SolverSpec("dpmpp"), path.kind)
    parameters = GapParameters(initial, path)
    torch.testing.assert_close(parameters.schedule().network_times.detach(), initial.network_times, atol=1e-12, rtol=0)
    randomise(parameters, 0)
    parameters.schedule().table(path)
    # One evaluation told what comes after the next level cannot be fenced in.
    u[1] = lam[3]
    u[2] = lam[3]
    with pytest.raises(ValueError, match="beyond their neighbouring levels"):
        GapParameters(Schedule(times, path.inverse_lam(u), SolverSpec("dpmpp"), path.kind), path)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("solver", "end"), [("dpmpp", "t_min"), ("unipc", "zero"), ("heun", "zero"), ("dpm2", "t_min")]
)
def test_gradients_agree_with_finite_differences(name, solver, end):
    path = PATHS[name]
    parameters = GapParameters(
        schedule(path, "time_uniform", 5, SolverSpec(solver), end), path, learn=("times", "network_times")
    )
    randomise(parameters, 1, spread=0.5)
    weights = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(times, network_times):
        parameters.load_state_dict({"times": times, "network_times": network_times})
        found = parameters.schedule()
        return float((torch.cat([found.times, found.network_times]) * weights).sum().detach())

    state = parameters.state_dict()
    found = parameters.schedule()
    (torch.cat([found.times, found.network_times]) * weights).sum().backward()
    for group, analytic in ((name, value_.grad) for name, value_ in parameters.groups.items()):
        for i in range(len(analytic)):
            sides = []
            for sign in (1, -1):
                moved = {key: tensor.clone() for key, tensor in state.items()}
                moved[group][i] += sign * 1e-6
                sides.append(value(**moved))
            numeric = (sides[0] - sides[1]) / 2e-6
            # VPDiscrete is piecewise: 1e-6 seldom crosses a knot.
            assert abs(numeric - float(analytic[i])) < 1e-6 * (path.t_max + abs(numeric)) + 1e-7


def test_every_network_time_has_a_gradient_at_the_start_even_at_the_edge_of_the_path():
    for path in PATHS.values():
        for solver in ("dpmpp", "dpm2", "heun"):
            parameters = GapParameters(schedule(path, "time_uniform", 5, SolverSpec(solver), "zero"), path)
            found = parameters.schedule().network_times
            (found * torch.arange(1, 6)).sum().backward()
            assert (parameters.groups["network_times"].grad != 0).all()


def test_the_last_level_before_zero_is_free_down_to_t_min():
    path = PATHS["sd"]
    parameters = GapParameters(schedule(path, "time_uniform", 4, SolverSpec("dpmpp"), "zero"), path)
    assert len(parameters.groups["times"]) == 4  # three gaps between levels, one to t_min
    with torch.no_grad():
        parameters.groups["times"][3] = -50.0
    last = parameters.schedule().times[-2]
    assert path.t_min < last < 1.01 * path.t_min
    fixed = GapParameters(schedule(path, "time_uniform", 4, SolverSpec("dpmpp"), "zero"), path, last_level="fixed")
    randomise(fixed, 0)
    assert abs(float(fixed.schedule().times[-2].detach()) - (0.001 + 0.25 * 0.999)) < 1e-12


def test_first_and_last_network_time_reach_the_ends_of_the_path():
    path = PATHS["vp_linear"]
    times = discretization("logsnr", path, 5, t_max=0.9)
    parameters = GapParameters(Schedule(times, None, SolverSpec("dpmpp"), path.kind), path)
    with torch.no_grad():
        parameters.groups["network_times"][0] = -20.0
        parameters.groups["network_times"][-1] = 20.0
    network_times = parameters.schedule().network_times.detach()
    torch.testing.assert_close(network_times[[0, -1]], torch.tensor([1.0, 1e-3], dtype=torch.float64))


def test_only_what_is_learned_is_a_parameter():
    path = PATHS["sd"]
    initial = schedule(path, "logsnr", 5, SolverSpec("unipc"))
    for learn in (("times",), ("network_times",)):
        parameters = GapParameters(initial, path, learn=learn)
        assert tuple(parameters.groups) == learn
        randomise(parameters, 0)
        found = parameters.schedule()
        assert torch.allclose(found.times, initial.times, atol=1e-12, rtol=0) == (learn == ("network_times",))
        assert torch.allclose(found.network_times, found.times[:-1], atol=1e-12, rtol=0) == (learn == ("times",))
    for learn in ((), ("weights",), ("times", "times")):
        with pytest.raises(ValueError, match="cannot learn"):
            GapParameters(initial, path, learn=learn)


def test_coefficients_are_residuals_within_a_window():
    path, given = PATHS["sd"], torch.ones(4, 3).double().tril() / 50
    initial = schedule(path, "logsnr", 4, SolverSpec("dpmpp"), "zero")
    plain = GapParameters(initial, path, learn=("coefficients",), coefficient_window=2)
    assert len(plain.groups["coefficients"]) == 1 + 2 + 2 + 2
    assert plain.schedule().residuals.shape == (4, 2) and not plain.schedule().residuals.any()
    randomise(plain, 0, spread=0.1)
    found = plain.schedule().residuals
    assert (found.detach() != 0).tolist() == [[True, False], [True, True], [True, True], [True, True]]
    # what is given stays, outside of the window too
    parameters = GapParameters(replace(initial, residuals=given), path, coefficient_window=1)
    assert torch.equal(parameters.schedule().residuals.detach(), given)
    randomise(parameters, 0, spread=0.1)
    moved = parameters.schedule().residuals.detach()
    assert torch.equal(moved[:, 1:], given[:, 1:]) and (moved[:, 0] != given[:, 0]).all()
    assert GapParameters(initial, path, learn=("times",)).schedule().residuals is None


def test_all_parameters_are_one_vector():
    path = PATHS["flow"]
    first, second = (GapParameters(schedule(path, "time_uniform", 5, SolverSpec("unipc")), path) for _ in range(2))
    randomise(first, 3)
    second.set_vector(first.vector())
    assert torch.equal(second.vector(), first.vector())
    assert torch.equal(second.schedule().residuals, first.schedule().residuals)


def test_state_round_trip_and_refusal():
    path = PATHS["sd"]
    first, second = (GapParameters(schedule(path, "logsnr", 5, SolverSpec("unipc")), path) for _ in range(2))
    randomise(first, 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.schedule().times, first.schedule().times)
    assert torch.equal(second.schedule().network_times, first.schedule().network_times)
    other = GapParameters(schedule(path, "logsnr", 6, SolverSpec("unipc")), path)
    with pytest.raises(ValueError, match="do not fit"):
        other.load_state_dict(first.state_dict())
