# SPDX-License-Identifier: Apache-2.0
"""The config of `LD3Scheduler`: from stock configs, to them and back, on disk, and refused."""

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
    schedulers,
)

from ld3_diffusers import LD3Scheduler
from tests.schedules import FLOW, SD_BETAS, outputs, plausible_schedule, run, scheduler_with
from tests.tiny_pipelines import PIPELINES


KARRAS = [
    e.name
    for e in schedulers.KarrasDiffusionSchedulers
    if e.name not in ("DPMSolverSDEScheduler", "EDMEulerScheduler")
]


@pytest.mark.parametrize("name", KARRAS)
@pytest.mark.parametrize("betas", [{}, SD_BETAS])
def test_every_stock_config_keeps_its_noise(name, betas):
    stock = getattr(schedulers, name)(**betas)
    s = LD3Scheduler.from_config(stock.config)
    assert s.config.noise_path == "vp_discrete" and s.config.prediction_type == "epsilon"
    torch.testing.assert_close(s.alphas_cumprod, stock.alphas_cumprod, rtol=1e-6, atol=0)
    s.set_timesteps(6)
    assert len(s.timesteps) == 6


@pytest.mark.parametrize(
    ("stock", "wanted"),
    [
        (FlowMatchEulerDiscreteScheduler(), {**FLOW, "shift": 1.0, "flow_grid": "flow_match_euler"}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {**FLOW, "shift": 3.0}),  # SD3
        (
            FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
            {**FLOW, "use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02},
        ),
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
            {**FLOW, "shift": 5.0, "flow_grid": "unipc"},  # Wan
        ),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            {**FLOW, "shift": 3.0, "flow_grid": "dpmpp"},  # Sana
        ),
        (EDMEulerScheduler(sigma_max=50.0), {"noise_path": "edm", "sigma_max": 50.0, "sigma_data": 0.5}),
        (
            EulerDiscreteScheduler(
                timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
            ),
            {"noise_path": "ve", "prediction_type": "v_prediction", "sigma_max": 700.0},  # SVD
        ),
        (
            DDIMScheduler(**SD_BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True),
            {**SD_BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        (HeunDiscreteScheduler(), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}),
        (EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1), {"steps_offset": 1}),  # SDXL
        (EulerDiscreteScheduler(use_karras_sigmas=True), {"use_karras_sigmas": True}),
        (DEISMultistepScheduler(solver_order=3), {"solver_order": 3}),
    ],
)
def test_typical_configs(stock, wanted):
    config = LD3Scheduler.from_config(stock.config).config
    assert {key: config[key] for key in wanted} == wanted


def schedules_of(scheduler):
    return json.dumps(scheduler.config["schedules"], sort_keys=True)


@pytest.mark.parametrize("name", ["UniPCMultistep", "EulerDiscrete", "DPMSolverMultistep", "FlowMatchEulerDiscrete"])
@pytest.mark.parametrize("config", [SD_BETAS, FLOW | {"shift": 3.0}])
def test_through_a_stock_scheduler_and_back(name, config, tmp_path):
    first = scheduler_with((4, 5), "dpmpp", 3, config=config)
    stock = getattr(schedulers, name + "Scheduler").from_config(first.config)
    for scheduler in (stock, type(stock).from_config(stock.config)):
        back = LD3Scheduler.from_config(scheduler.config)
        assert schedules_of(back) == schedules_of(first)
        assert back.config.noise_path == first.config.noise_path
        for key in (*SD_BETAS, "prediction_type"):
            assert back.config[key] == first.config[key]
        for nfe in (4, 5):
            back.set_timesteps(nfe)
            first.set_timesteps(nfe)
            x, rest = outputs(nfe)
            assert all(torch.equal(a, b) for a, b in zip(run(first, x, rest), run(back, x, rest)))


def test_saved_bit_for_bit(tmp_path):
    first = scheduler_with((3, 7), "unipc", 3, provenance={"teacher": "a/b", "guidance_scale": 7.5, "sizes": (1, 2)})
    first.save_pretrained(tmp_path)
    back = LD3Scheduler.from_pretrained(tmp_path)
    assert dict(back.config) | {"_use_default_values": 0} == dict(first.config) | {"_use_default_values": 0}
    for nfe in (3, 7):
        assert torch.equal(back._schedules[nfe].times, plausible_schedule(back.path, nfe).times)
        assert torch.equal(back._schedules[nfe].network_times, plausible_schedule(back.path, nfe).network_times)
    text = (tmp_path / "scheduler_config.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and "_class_name" in text
    # A repository of ours also opens as a stock scheduler, which keeps the schedules.
    stock = UniPCMultistepScheduler.from_pretrained(tmp_path)
    assert stock.config["beta_end"] == first.config["beta_end"]
    assert schedules_of(LD3Scheduler.from_config(stock.config)) == schedules_of(first)


def walk(value):
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from walk(child)


def test_config_is_plain_and_its_own():
    path = LD3Scheduler(**SD_BETAS).path
    entry = plausible_schedule(path, 5, provenance={"pair": (1, 2)}).to_dict(path)
    s = LD3Scheduler(**SD_BETAS, schedules={5: entry})
    assert list(s.config["schedules"]) == ["5"] and s.config["schedules"]["5"]["provenance"]["pair"] == [1, 2]
    for value in walk(s.config["schedules"]):
        assert isinstance(value, (dict, list, str, int, float, type(None)))
        assert not isinstance(value, float) or math.isfinite(value)
    other = LD3Scheduler.from_config(s.config)
    entry["times"][1] = 0.123
    s.config["schedules"]["5"]["times"][2] = 0.456
    assert other.config["schedules"]["5"]["times"] == path_times(path)


def path_times(path):
    return plausible_schedule(path, 5).times.tolist()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_saved_inside_a_pipeline(name, tmp_path):
    pipe, call = PIPELINES[name]()
    pipe.scheduler = scheduler_with((5,), "dpmpp", 3, config=pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["ld3_diffusers", "LD3Scheduler"]
    back = DiffusionPipeline.from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    assert type(back.scheduler) is LD3Scheduler and schedules_of(back.scheduler) == schedules_of(pipe.scheduler)
    a, b = (p(**call, generator=torch.Generator().manual_seed(0))[0] for p in (pipe, back))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Refusals --------------------------------------------------------------------------------------------------------------


def entry(path=None, **changes):
    path = path or LD3Scheduler(**SD_BETAS).path
    return {**plausible_schedule(path, 5).to_dict(path), "checksum": None, **changes}


RISING, NAN = [1.0, 0.5, 0.6, 0.3, 0.1, 0.0], [1.0, float("nan"), 0.6, 0.3, 0.1, 0.0]
BAD = {
    "schedules must map": {"schedules": [1]},
    r"times\[2\] = 0.6 is above": {"schedules": {"5": entry(times=RISING)}},
    "with finite numbers|times must be a finite number": {"schedules": {"5": entry(times=NAN)}},
    "plain JSON with": {"schedules": {"5": entry(times=torch.ones(6))}},
    "needs N . 1 times": {"schedules": {"5": entry(times=[1.0, 0.0])}},
    "'times' of a schedule must be a list": {"schedules": {"5": entry(times="abc")}},
    "rename the key to '5'": {"schedules": {"4": entry()}},
    "decimal string": {"schedules": {"five": entry()}},
    "learned for prediction_type='v_prediction'": {"schedules": {"5": entry(prediction_type="v_prediction")}},
    "learned for noise_path='flow'": {"schedules": {"5": entry(noise_path="flow")}},
    "builds another step table": {"schedules": {"5": entry(checksum=1.0)}},
    r"schedules\['5'\]: unknown solver": {"schedules": {"5": entry(solver="magic")}},
    "unknown schedule entries": {"schedules": {"5": entry(magic=1)}},
    "use_karras_sigmas would choose a stock grid": {"schedules": {"5": entry()}, "use_karras_sigmas": True},
    "unknown solver 'magic'": {"solver": "magic"},
    "unipc has no order 7": {"solver_order": 7},
    "unipc has no solver_type 'magic'": {"solver_type": "magic"},
    "unknown noise_path": {"noise_path": "magic"},
    "unknown beta_schedule": {"beta_schedule": "magic"},
    "no prediction type 'magic'": {"prediction_type": "magic"},
    "beta_start must be a finite number": {"beta_start": "a"},
    "beta_end must be a finite number": {"beta_end": float("nan")},
    "shift must be positive": {"shift": -1.0},
    "num_train_timesteps must be a positive integer": {"num_train_timesteps": -1},
    "ipndm does not extrapolate": {"clip_sample": True, "solver": "ipndm"},
    "sigma_min must be below": {"noise_path": "edm", "sigma_min": 3.0, "sigma_max": 1.0},
}

# Inherited from a config, these are preferences of another scheduler and dropped with a warning.
ONLY_EXPLICIT = ("use_karras_sigmas would choose a stock grid", "ipndm does not extrapolate")


@pytest.mark.parametrize("sentence", BAD)
@pytest.mark.parametrize("on_disk", [False, True])
def test_bad_configs_are_refused_in_a_sentence(sentence, on_disk, tmp_path):
    config = {**SD_BETAS, **BAD[sentence]}
    if not on_disk:
        with pytest.raises(ValueError, match=sentence):
            LD3Scheduler(**config)
    elif sentence not in ONLY_EXPLICIT and not any(isinstance(v, torch.Tensor) for v in walk(config)):
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=sentence):
            LD3Scheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{not json", '{"solver": ["a"]}', "[1, 2]", '{"trained_betas": "abc"}'])
def test_corrupt_files(text, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(ValueError, match="not valid JSON|wrong type|a mapping"):
        LD3Scheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "explicit",
    [
        {"use_karras_sigmas": True},
        {"timestep_spacing": "trailing"},
        {"solver": "dpmpp"},
        {"solver_order": 3},
        {"prediction_type": "v_prediction"},
    ],
)
def test_explicit_options_that_contradict_a_learned_schedule(explicit):
    config = scheduler_with((5,), "unipc", 2).config
    with pytest.raises(ValueError, match="schedule"):
        LD3Scheduler.from_config(config, **explicit)
    assert LD3Scheduler.from_config(config, **explicit, schedules=None).learned_counts == []
    assert LD3Scheduler.from_config(config, discretization="poly", rho=3.0).learned_counts == [5]


def test_inherited_options_that_contradict_are_dropped():
    stock = EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True, timestep_spacing="trailing")
    s = scheduler_with((5,), config=stock.config)
    s.set_timesteps(5)
    assert s.timesteps[0] == pytest.approx(float(s.path.timestep(plausible_schedule(s.path, 5).network_times[0])))


@pytest.mark.parametrize("option", ["invert_sigmas", "stochastic_sampling"])
def test_stock_schedulers_that_cannot_be_followed(option):
    with pytest.raises(ValueError, match=option):
        LD3Scheduler.from_config(FlowMatchEulerDiscreteScheduler(**{option: True}).config)
    with pytest.raises(ValueError, match=option):
        LD3Scheduler.from_config(FlowMatchEulerDiscreteScheduler().config, **{option: True})


def test_the_exponent_of_a_stock_grid_is_not_that_of_a_named_one():
    stored = {key: value for key, value in EDMEulerScheduler(rho=5.0).config.items() if not key.startswith("_")}
    assert LD3Scheduler.from_config(stored).config.rho == 5.0
    for config in (stored, LD3Scheduler.from_config(stored).config):
        assert LD3Scheduler.from_config(config, discretization="logsnr").config.rho is None
        named = LD3Scheduler.from_config(config, discretization="polynomial", rho=3.0)
        assert named.config.rho == 3.0
        assert LD3Scheduler.from_config(named.config, discretization="polynomial").config.rho == 3.0
