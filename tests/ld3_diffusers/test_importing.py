# SPDX-License-Identifier: Apache-2.0
"""Schedules published elsewhere."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.schedulers import AysSchedules

from ld3_diffusers import LD3Scheduler, import_pt, import_sigmas, import_times, scheduler_for
from ld3_diffusers.noise_path import RectifiedFlow


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TS_1 = [1, 0.76668, 0.48113, 0.18417, 0.001]  # LD3's published SD example, iPNDM, N = 4
TS_2 = [1, 0.76706, 0.48103, 0.18396, 0.001]


@pytest.fixture
def path():
    return LD3Scheduler(**SD).path


def test_two_time_lists(path):
    schedule = import_times(str(TS_1), str(TS_2), path=path, solver="ipndm", solver_order=2)
    scheduler = scheduler_for(schedule, UniPCMultistepScheduler(**SD).config)
    scheduler.set_timesteps(4)
    # network timestep of continuous t is 1000 t - 1, fractional
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t - 1 for t in TS_2[:-1]], abs=1e-4)
    assert scheduler.sigmas.tolist() == pytest.approx(
        path.sigma_edm(torch.tensor(TS_1, dtype=torch.float64)).tolist(), rel=1e-6
    )
    assert scheduler.learned_counts == [4]
    # what is saved can still be read by the stock class, which then samples without the learned schedule
    UniPCMultistepScheduler.from_config(scheduler.config).set_timesteps(4)


def test_second_list_defaults_to_the_first(path):
    schedule = import_times(TS_1, path=path)
    assert schedule.network_times.tolist() == TS_1[:-1]


def test_sigma_list_with_zero(path):
    sigmas = AysSchedules["StableDiffusionSigmas"]
    schedule = import_sigmas(sigmas, path=path, solver="dpmpp")
    assert schedule.nfe == 10 and float(schedule.times[-1]) == 0
    assert path.sigma_edm(schedule.times[1:]).tolist() == pytest.approx(sigmas[1:], rel=1e-9)
    assert float(path.timestep(schedule.times[1])) == pytest.approx(850, abs=1)  # AYS's own timestep list says 850


def test_flow_sigmas_are_times():
    schedule = import_sigmas(
        [1.0, 0.8, 0.5, 0.0], path=RectifiedFlow(), prediction_type="flow_prediction", solver="euler"
    )
    assert schedule.times.tolist() == [1.0, 0.8, 0.5, 0.0]


def test_pt_file(path, tmp_path):
    file = tmp_path / "best_v2.pt"
    both = torch.tensor(TS_1 + TS_2)
    torch.save({"params1": torch.ones(5), "params2": torch.zeros(5), "best_t_steps": both}, file)
    schedule = import_pt(file, path=path, solver="unipc")
    assert schedule.times.tolist() == pytest.approx(TS_1, abs=1e-7)
    assert schedule.network_times.tolist() == pytest.approx(TS_2[:-1], abs=1e-7)


class _Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_pt_file_with_more_than_tensors_is_not_executed(path, tmp_path, capsys):
    file = tmp_path / "hostile.pt"
    torch.save({"best_t_steps": _Hostile()}, file)
    with pytest.raises(ValueError, match="holds more than tensors"):
        import_pt(file, path=path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "times, message",
    [
        ("[1, 0.5", "not a list of numbers"),
        ("['a', 'b']", "not a list of numbers"),
        ([1.0], "at least a first and a last"),
        ([1.0, 0.2, 0.5, 0.001], r"times\[2\] = 0.5 is above"),
        ([1.0, float("nan"), 0.001], r"times\[1\] is not finite"),
        ([14.6, 6.4, 0.1], r"outside the path"),  # sigmas handed over as times
    ],
)
def test_bad_lists(path, times, message):
    with pytest.raises(ValueError, match=message):
        import_times(times, path=path)


def test_missing_and_foreign_pt_files(path, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        import_pt(tmp_path / "none.pt", path=path)
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="best_t_steps"):
        import_pt(tmp_path / "other.pt", path=path)
    (tmp_path / "damaged.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        import_pt(tmp_path / "damaged.pt", path=path)
