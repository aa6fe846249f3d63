# SPDX-License-Identifier: Apache-2.0
"""One learned schedule: JSON and back, the checksum, transfer, tails, interpolation, malformed entries."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ld3_diffusers.noise_path import RectifiedFlow, VPLinear, shift_flow_time
from ld3_diffusers.schedule import Schedule, SolverSpec, check_checksum, interpolate, table_checksum
from ld3_diffusers.step_table import build_table

from .cases import PATHS, grid, random_steps


SD, FLOW = PATHS["vp_discrete"], PATHS["flow"]


def schedule(path="vp_discrete", rows=6, **spec):
    times = random_steps(PATHS[path], rows + 1, seed=4)
    network_times = times[:-1] * 0.987
    prediction_type = "flow_prediction" if path == "flow" else "epsilon"
    return Schedule(times, network_times, SolverSpec(**spec), path, prediction_type, provenance={"teacher": "a/b"})


def assert_same_table(a, b):
    for name in ("times", "network_times", "timesteps", "state", "history", "p", "q", "start"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize(
    "path, spec",
    [
        ("vp_discrete", {"solver": "unipc", "solver_order": 3, "solver_type": "bh1"}),
        ("vp_discrete", {"solver": "dpmpp", "predict_x0": False, "lower_order_final": False}),
        ("vp_discrete", {"solver": "ipndm", "solver_order": 4, "afs": True, "starting_scale": "sigma"}),
        ("flow", {"solver": "deis", "solver_type": "rhoab"}),
    ],
)
def test_json_keeps_every_bit(path, spec):
    saved = schedule(path, **spec)
    entry = saved.to_dict(PATHS[path])
    loaded = Schedule.from_dict(json.loads(json.dumps(entry, allow_nan=False)))
    assert torch.equal(loaded.times, saved.times) and torch.equal(loaded.network_times, saved.network_times)
    assert loaded.spec == saved.spec and loaded.provenance == saved.provenance and loaded.nfe == saved.nfe
    assert loaded.to_dict(PATHS[path]) == entry
    assert_same_table(loaded.table(PATHS[path]), saved.table(PATHS[path]))
    check_checksum(loaded.table(PATHS[path]), loaded.checksum)


@pytest.mark.parametrize("key, index", [("times", i) for i in range(7)] + [("network_times", i) for i in range(6)])
def test_checksum_catches_an_edited_time(key, index):
    entry = schedule(solver="unipc", solver_order=3).to_dict(SD)
    entry[key][index] *= 1 - 1e-3
    edited = Schedule.from_dict(entry)
    with pytest.raises(ValueError, match="its config was edited"):
        check_checksum(edited.table(SD), edited.checksum)


@pytest.mark.parametrize(
    "edit", [{"solver": "dpmpp", "solver_type": None}, {"solver_order": 2}, {"solver_type": "bh1"}]
)
def test_checksum_catches_an_edited_solver(edit):
    entry = schedule(solver="unipc", solver_order=3, solver_type="bh2").to_dict(SD) | edit
    with pytest.raises(ValueError, match="its config was edited"):
        check_checksum(Schedule.from_dict(entry).table(SD), entry["checksum"])


def test_checksum_absent_or_of_equal_tables():
    table = schedule().table(SD)
    check_checksum(table, None)
    check_checksum(table, table_checksum(table) * (1 + 1e-12))  # another machine's rounding
    with pytest.raises(ValueError):
        check_checksum(table, math.nan)


def test_shift_adds_mu_in_logit():
    mu, plain = 0.9, schedule("flow", solver="unipc", solver_order=2)
    table = plain.table(FLOW, mu=mu)
    torch.testing.assert_close(table.times.logit(), plain.times.logit() + mu, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(table.network_times.logit(), plain.network_times.logit() + mu, rtol=1e-9, atol=1e-9)
    shifted = (shift_flow_time(part, mu) for part in (plain.times, plain.network_times))
    assert_same_table(table, build_table(plain.spec.make(), FLOW, *shifted, prediction_type="flow_prediction"))


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("first", [1, 3, 4])
def test_tails(afs, first):
    whole = schedule(solver="ipndm", solver_order=4, afs=afs)
    table, tail = whole.table(SD), whole.table(SD, first=first)
    assert len(tail) == whole.nfe - first and tail.first_prediction is None
    assert torch.equal(tail.times, table.times[first:]) and torch.equal(tail.timesteps, table.timesteps[first:])
    assert (tail.history[0, 1:] == 0).all()
    cut = first + afs
    direct = build_table(
        whole.spec.make(), SD, whole.times[cut:], whole.network_times[cut:], prediction_type="epsilon"
    )
    assert_same_table(tail, direct)


def test_tails_of_two_stage_solvers_keep_their_parity():
    solver = SolverSpec("dpm2").make()
    times = solver.expand(SD, random_steps(SD, 4, seed=1))
    whole = Schedule(times, spec=SolverSpec("dpm2"))
    table, tail = whole.table(SD), whole.table(SD, first=1)
    torch.testing.assert_close(tail.history[1:], table.history[2:])  # a first stage, then a second as in the whole
    assert (tail.history[0, 1:] == 0).all()


def test_another_kind_of_path():
    with pytest.raises(ValueError, match="learned on a 'vp_discrete' noise path and cannot run on a 'flow' one"):
        schedule().table(FLOW)


def test_interpolation():
    uniform = Schedule(SD.inverse_lam(torch.linspace(-2.4, 3.0, 9, dtype=torch.float64)))
    six = interpolate({8: uniform, 4: schedule(rows=4)}, 6, SD)  # of two as near, the larger
    torch.testing.assert_close(
        SD.lam(six.times), torch.linspace(-2.4, 3.0, 7, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    network = SD.lam(uniform.network_times)
    torch.testing.assert_close(SD.lam(six.network_times)[[0, -1]], network[[0, -1]], rtol=1e-9, atol=1e-9)
    assert six.nfe == 6 and six.checksum is None
    torch.testing.assert_close(interpolate({8: uniform}, 8, SD).times, uniform.times, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nfe", [1, 3, 7])
def test_interpolation_keeps_a_clean_end(nfe):
    flow = Schedule(grid(1.0, 0.8, 0.5, 0.2, 0.0), noise_path="flow", prediction_type="flow_prediction")
    other = interpolate({4: flow}, nfe, FLOW)
    assert other.nfe == nfe and other.times[0] == 1 and other.times[-1] == 0
    if nfe == 3:
        torch.testing.assert_close(other.times, grid(1.0, 0.65, 0.2, 0.0))
    assert len(other.table(FLOW)) == nfe


@pytest.mark.parametrize("spec", [{"solver": "heun"}, {"solver": "ipndm", "afs": True}])
def test_interpolation_refused(spec):
    with pytest.raises(ValueError, match="stages cannot be interpolated; use num_inference_steps = 3 or 6"):
        interpolate({6: schedule(**spec), 3: schedule(rows=3, **spec)}, 5, SD)


@pytest.mark.parametrize(
    "entry, match",
    [
        ([0.5], "must be a mapping with 'times', got list"),
        ({}, "needs 'times'"),
        ({"times": None}, "needs 'times'"),
        ({"times": "1, 0.5"}, "'times' of a schedule must be a list of finite numbers"),
        ({"times": [1.0, None]}, "'times' of a schedule must be a list of finite numbers"),
        ({"times": [1.0, math.nan]}, "'times' of a schedule must be a list of finite numbers"),
        ({"times": [1.0, True]}, "'times' of a schedule must be a list of finite numbers"),
        ({"times": [1.0, 0.5], "network_times": [[1.0]]}, "'network_times' of a schedule"),
        ({"times": [1.0, 0.5], "sigmas": [1.0]}, r"unknown schedule entries \['sigmas'\]"),
        ({"times": [1.0, 0.5], "solver": "dpm"}, "unknown solver 'dpm'; use one of"),
        ({"times": [1.0, 0.5], "solver": ["unipc"]}, "'solver' of a schedule must be a string"),
        ({"times": [1.0, 0.5], "solver": "unipc", "solver_order": 7}, "unipc has no order 7"),
        (
            {"times": [1.0, 0.5], "solver": "unipc", "solver_order": "2"},
            "'solver_order' of a schedule must be an integer",
        ),
        ({"times": [1.0, 0.5], "solver": "unipc", "solver_type": "midpoint"}, "unipc has no solver_type"),
        ({"times": [1.0, 0.5], "starting_scale": "one"}, "unknown starting_scale 'one'"),
    ],
)
def test_malformed_entries(entry, match):
    with pytest.raises(ValueError, match=match) as error:
        Schedule.from_dict(entry)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("times", [1.0, 10**400], "a list of finite numbers"),
        ("checksum", "12.5", "a finite number"),
        ("solver_order", 2.0, "an integer"),
        ("afs", "False", "true or false"),
        ("final", 0, "true or false"),
        ("noise_path", 3, "a string"),
        ("provenance", ["teacher"], "a mapping"),
    ],
)
def test_entries_of_the_wrong_type(key, value, what):
    entry = {"times": [1.0, 0.5, 0.001], "solver": "unipc", key: value}
    with pytest.raises(ValueError, match=f"'{key}' of a schedule must be {what}"):
        Schedule.from_dict(entry)


def test_final_times_are_not_shifted():
    path = RectifiedFlow()
    schedule = Schedule(
        [1.0, 0.5, 0.0], spec=SolverSpec("euler"), noise_path="flow", prediction_type="flow_prediction"
    )
    assert float(schedule.table(path, mu=1.0).times[1]) == pytest.approx(math.e * 0.5 / (math.e * 0.5 + 0.5))
    assert float(replace(schedule, final=True).table(path, mu=1.0).times[1]) == 0.5


def test_checksum_sees_a_small_change_of_one_late_time():
    path = VPLinear()
    times = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.001], dtype=torch.float64)
    moved = times.clone()
    moved[3] *= 1 + 1e-5
    saved, other = (Schedule(t, noise_path=path.kind).table(path) for t in (times, moved))
    check_checksum(saved, table_checksum(saved))
    with pytest.raises(ValueError, match="another step table"):
        check_checksum(other, table_checksum(saved))


def test_shipped_schedules_load_on_processors_that_round_float32_otherwise():
    code = "import sys; from ld3_diffusers import load_scheduler; [load_scheduler(path) for path in sys.argv[1:]]"
    folders = sorted(map(str, Path("examples/schedules").glob("fashion-*")))
    assert folders
    # Without vector instructions, which fuse multiplication and addition, betas have other last bits.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-c", code, *folders], env=environment, check=True)


def test_rounded_times_stay_on_the_path():
    path = PATHS["vp_discrete"]
    schedule = Schedule([0.999, 0.5, 0.1], spec=SolverSpec("ddim"))
    rounded = schedule.rounded(path, lambda t: t.bfloat16().double())  # bfloat16(998) is 1000, before the path begins
    assert float(rounded.network_times[0]) == path.t_max
    rounded.table(path)
    assert float(path.timestep(rounded.network_times[1])) == pytest.approx(500, abs=1e-9)  # from 499
