# SPDX-License-Identifier: Apache-2.0
"""One curve for every count: its functions, its schedules, JSON, and the scheduler that it serves."""

import json

import pytest
import torch

from ld3_diffusers import LD3Scheduler, ScheduleCurve, SolverSpec, list_variants
from ld3_diffusers.schedule import Schedule
from ld3_diffusers.schedule_curve import basis

from .cases import PATHS, grid


KINDS = {"vp_discrete": "epsilon", "edm": "epsilon", "flow": "flow_prediction"}


def curve(path="flow", scale=0.1, window=3, shape=(5, 3), **options):
    generator = torch.Generator().manual_seed(0)
    shapes = {"times": shape, "network_times": shape, "residuals": (window, *shape)}
    sizes = {"times": 10, "network_times": 10, "residuals": 0.1}
    matrices = {
        name: scale * sizes[name] * torch.randn(*each, generator=generator, dtype=torch.float64)
        for name, each in shapes.items()
    }
    given = {"counts": (3, 10), "spec": SolverSpec("unipc", 2), "prediction_type": KINDS[path]} | options
    return ScheduleCurve(matrices, noise_path=PATHS[path].kind, **given)


def scheduler(path="flow", **options):
    of_path = {
        "flow": {"noise_path": "flow"},
        "vp_discrete": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "edm": {"noise_path": "edm", "sigma_data": 0.5},
    }[path]
    return LD3Scheduler(**of_path, prediction_type=KINDS[path], **options)


def test_functions_of_position_and_count():
    both = basis(4, (3, 10), 3, 2)
    nu = (1 / 4 - 1 / 10) / (1 / 3 - 1 / 10)
    # steps at 0, 1/3, 2/3, 1; knots at 0, 1/2, 1
    hats = torch.tensor([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 2 / 3, 1 / 3], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(both, torch.stack([hats, nu * hats], -1).flatten(1))
    for nfe, expected in ((3, 1.0), (10, 0.0)):
        powers = basis(nfe, (3, 10), 1, 3)
        torch.testing.assert_close(powers[0], grid(1, expected, expected))
        torch.testing.assert_close(basis(nfe, (3, 10), 5, 1).sum(1), torch.ones(nfe, dtype=torch.float64))


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("path", KINDS)
def test_it_is_a_schedule_for_every_count_whatever_its_numbers(path, to_zero):
    for scale in (0.0, 0.1, 3.0):
        drawn = curve(path, scale, to_zero=to_zero)
        for nfe in range(3, 11):
            found = drawn.schedule(nfe, PATHS[path])
            table = found.table(PATHS[path])  # checks order, range and that all is finite
            assert len(table) == found.nfe == nfe
            assert found.times[0] == PATHS[path].t_max
            assert found.times[-1] == (0 if to_zero else PATHS[path].t_min)
            assert found.residuals.shape == (nfe, 3) and bool(found.residuals.any()) == (scale > 0)


def test_zeros_are_a_uniform_grid_of_the_solver_itself():
    path = PATHS["vp_discrete"]
    found = curve("vp_discrete", 0.0).schedule(4, path)
    uniform = torch.linspace(float(path.lam(grid(1.0))), float(path.lam(grid(1e-3))), 5, dtype=torch.float64)
    torch.testing.assert_close(path.lam(found.times[:-1]), uniform[:-1])
    torch.testing.assert_close(found.network_times, found.times[:-1])
    assert not found.residuals.any()
    assert curve("vp_discrete", window=0).schedule(4, path).residuals is None


def test_values_move_what_they_are_of():
    path, knots = PATHS["flow"], torch.zeros(2, 1, dtype=torch.float64)
    matrices = {"times": knots, "network_times": knots, "residuals": torch.zeros(2, 2, 1)}
    moved = {name: matrix.double().clone() for name, matrix in matrices.items()}
    moved["times"][1] = 1.0  # the last step longer
    moved["network_times"][0], moved["residuals"][0, 0], moved["residuals"][1, 1] = 20.0, 0.25, 0.5
    options = {"counts": (2, 4), "noise_path": "flow", "prediction_type": "flow_prediction"}
    before, after = (ScheduleCurve(each, **options).schedule(3, path) for each in (matrices, moved))
    share = torch.softmax(grid(0, 0.5, 1), 0) * (1 - 3e-4) + 1e-4
    torch.testing.assert_close(after.times[:-1], 1 - 0.999 * torch.cat([grid(0), share.cumsum(0)[:-1]]))
    # told half a step ahead; by half as much of the logit in the middle, and not at all at the end
    half = 0.5 * 0.999 * share
    torch.testing.assert_close(
        after.network_times, after.times[:-1] - half * torch.tanh(grid(20, 10, 0)), rtol=1e-9, atol=1e-9
    )
    assert after.residuals.tolist() == [[0.25, 0], [0.125, 0.25], [0, 0.5]]
    assert torch.equal(before.network_times, before.times[:-1])


def test_gradients_agree_with_finite_differences():
    drawn, path = curve("vp_discrete"), PATHS["vp_discrete"]
    names = list(drawn.matrices)
    shapes = [drawn.matrices[name].shape for name in names]

    def numbers(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        each = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        table = ScheduleCurve(each, (3, 10), drawn.spec).schedule(5, path).table(path)
        return torch.cat([table.state, table.history.flatten(), table.timesteps / 1000])

    vector = torch.cat([drawn.matrices[name].flatten() for name in names]).requires_grad_()
    assert torch.autograd.gradcheck(numbers, (vector,), eps=1e-7, atol=1e-5)


# ---------------------------------------------------------------------- JSON and the scheduler


@pytest.mark.parametrize("path", KINDS)
def test_saved_bit_for_bit_and_served_for_every_count(path, tmp_path):
    drawn = curve(path, 0.03, provenance={"teacher": "a/b"})
    entry = drawn.to_dict(PATHS[path])
    again = ScheduleCurve.from_dict(json.loads(json.dumps(entry, allow_nan=False)))
    assert again.to_dict(PATHS[path]) == entry
    scheduler(path, curve=entry).save_pretrained(tmp_path)
    loaded = LD3Scheduler.from_pretrained(tmp_path)
    assert loaded.served_counts == list(range(3, 11)) and loaded.learned_counts == []
    for nfe in range(3, 11):
        loaded.set_timesteps(nfe)
        expected = drawn.schedule(nfe, PATHS[path]).table(PATHS[path])
        assert torch.equal(loaded.timesteps, expected.timesteps.float())
        assert torch.equal(loaded._table.history, expected.history)
        assert loaded.learned_schedule(nfe).provenance == {"teacher": "a/b"}
    for nfe in (2, 11):
        assert loaded.learned_schedule(nfe) is None
        with pytest.raises(
            ValueError, match=f"no schedule was learned for {nfe} .* num_inference_steps = 3 to 10, or"
        ):
            loaded.set_timesteps(nfe)
    assert "3 to 10 evaluations: unipc, one curve, teacher='a/b'" in repr(loaded)
    (variant,) = list_variants(tmp_path)
    assert variant.nfe == tuple(range(3, 11)) and variant.solver == "unipc"


def test_a_schedule_of_its_own_comes_before_the_curve():
    path, drawn = PATHS["flow"], curve()
    own = Schedule([1.0, 0.7, 0.3, 0.0], None, SolverSpec("dpmpp"), "flow", "flow_prediction")
    both = scheduler(curve=drawn.to_dict(path), schedules={"3": own.to_dict(path)})
    assert both.served_counts == list(range(3, 11)) and both.learned_counts == [3]
    both.set_timesteps(3)
    torch.testing.assert_close(both.sigmas, torch.tensor([1.0, 0.7, 0.3, 0.0]))
    both.set_timesteps(4)
    torch.testing.assert_close(both.sigmas, drawn.schedule(4, path).times.float())
    with pytest.raises(ValueError, match="num_inference_steps = 3 or 3 to 10, or load with interpolate=True"):
        both.set_timesteps(12)


def test_counts_beyond_the_curve_are_interpolated_from_its_ends():
    path, drawn = PATHS["flow"], curve()
    own = Schedule([1.0, 0.9, 0.7, 0.3, 0.0], None, SolverSpec("dpmpp"), "flow", "flow_prediction")
    for schedules in (None, {"4": own.to_dict(path)}):
        loaded = scheduler(curve=drawn.to_dict(path), schedules=schedules, interpolate=True)
        for nfe, end in ((2, 3), (12, 10)):
            loaded.set_timesteps(nfe)
            known = drawn.schedule(end, path).times
            torch.testing.assert_close(loaded.schedule.times[[0, -2]], known[[0, -2]])
            assert loaded.schedule.nfe == nfe and loaded.schedule.spec == drawn.spec


def test_a_curve_without_coefficients_is_saved_and_served():
    path, drawn = PATHS["flow"], curve(window=0)
    loaded = scheduler(curve=json.loads(json.dumps(drawn.to_dict(path))))
    expected = drawn.schedule(5, path)
    assert torch.equal(loaded.learned_schedule(5).times, expected.times)
    assert loaded.learned_schedule(5).residuals is None


def test_who_asks_for_no_learned_schedule_gets_none():
    learned = scheduler(curve=curve().to_dict(PATHS["flow"]))
    plain = LD3Scheduler.from_config(learned.config, schedules=None)
    assert plain.learned_curve is None and plain.served_counts == []
    plain.set_timesteps(20)
    with pytest.raises(ValueError, match="contradicts the learned curve, which was learned with solver='unipc'"):
        LD3Scheduler.from_config(learned.config, solver="dpmpp")
    with pytest.raises(ValueError, match="use_karras_sigmas would choose a stock grid"):
        LD3Scheduler.from_config(learned.config, use_karras_sigmas=True)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"times": [[1.0]]}, "must have one shape"),
        ({"times": None}, "'times' of the curve must be a matrix of finite numbers"),
        ({"network_times": [[0.0] * 65] * 5}, "'network_times' of the curve must be a matrix"),
        ({"residuals": [[0.0]]}, "'residuals' of the curve must be a list of at most 64 such matrices"),
        ({"counts": [3]}, "'counts' of the curve must be two numbers"),
        ({"counts": [5, 3]}, "'counts' of the curve must be two numbers"),
        ({"counts": [1, 3]}, "'counts' of the curve must be two numbers"),
        ({"counts": [3, 1000]}, "'counts' of the curve must be two numbers"),
        ({"to_zero": None}, "'to_zero' of the curve must be true or false"),
        ({"knots": 5}, r"unknown entries \['knots'\]"),
        ({"solver": "heun", "solver_order": None, "solver_type": None}, "must make one evaluation a step"),
        ({"afs": True}, "must make one evaluation a step"),
        ({"solver": "magic"}, "unknown solver"),
        ({"noise_path": "ve"}, "learned for noise_path='ve' but this model has 'flow'"),
        ({"prediction_type": "epsilon"}, "learned for prediction_type='epsilon'"),
        ({"checksum": 1.0}, "builds another step table"),
        ({"residuals": [[[9.0] * 3] * 5], "checksum": None}, "not stable"),
        ({"provenance": []}, "'provenance' of the curve must be a mapping"),
    ],
)
def test_what_is_no_curve_is_refused_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        scheduler(curve={**curve().to_dict(PATHS["flow"]), **change})


def test_only_plain_json():
    entry = curve().to_dict(PATHS["flow"])
    with pytest.raises(ValueError, match="curve must be plain JSON with finite numbers"):
        scheduler(curve={**entry, "times": [[float("nan")] * 3] * 5})
    with pytest.raises(ValueError, match="curve must be a mapping, got list"):
        scheduler(curve=[entry])


def test_another_path_or_count():
    with pytest.raises(ValueError, match="learned on a 'flow' noise path"):
        curve().schedule(4, PATHS["vp_linear"])
    with pytest.raises(ValueError, match="serves 3 to 10 evaluations, not 12"):
        curve().schedule(12, PATHS["flow"])
