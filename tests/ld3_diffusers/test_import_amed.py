# SPDX-License-Identifier: Apache-2.0
"""The predictor files of AMED's authors: genuine ones become schedulers, those with other contents are refused."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ld3_diffusers import AMEDPredictor, AMEDScheduler, LD3Scheduler, SolverSpec
from ld3_diffusers.amed import amed_schedule
from ld3_diffusers.amed_predictor_file import read_predictor_file
from ld3_diffusers.importing import import_amed
from tests.tiny_pipelines import PIPELINES

from .amed_predictor_files import SETTINGS, foreign_modules, make_model, write


ROOT = Path(__file__).parents[2]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0}

with np.load(ROOT / "tests" / "golden" / "amed.npz") as golden:
    NETWORK = {key.removeprefix("amed/network/"): golden[key] for key in golden.files if "/network/" in key}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def config():
    return LD3Scheduler(**SD).config


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "network-snapshot-000005.pkl", make_model())


def by_hand(model, config):
    """The scheduler that the original's settings and weights mean, with nothing of the importer."""
    path = LD3Scheduler(**SD).path
    predictor = AMEDPredictor(
        scale_dir=0.01,
        scale_time=0.2,
        num_steps=3,
        solver="dpmpp",
        solver_order=2,
        predict_x0=False,
        z_max=14.61464,
        z_min=0.0291675,
    )
    predictor.load_state_dict(model.state_dict())
    times = torch.linspace(1.0, 0.001, 4, dtype=torch.float64)
    schedule = amed_schedule(times, SolverSpec("dpmpp", 2, predict_x0=False, starting_scale="sigma"), path, "epsilon")
    scheduler = AMEDScheduler.from_config(
        config, schedules={"6": schedule.to_dict(path)}, solver="dpmpp", solver_order=2, predict_x0=False
    )
    scheduler.set_predictor(6, predictor)
    return scheduler


# ---------------------------------------------------------------------- genuine files


@pytest.mark.parametrize("scales", [(0, 0), (0.01, 0), (0, 0.2), (0.01, 0.2)])
def test_golden_predictors(tmp_path, scales):
    key = "scale_dir={},scale_time={}/".format(*scales)
    model = make_model(scale_dir=scales[0], scale_time=scales[1])
    state = {name: torch.from_numpy(NETWORK[f"{key}param/{name}"]).float() for name in model.state_dict()}
    model.load_state_dict(state)
    predictor = read_predictor_file(write(tmp_path / "a.pkl", model)).predictor
    hand = AMEDPredictor(scale_dir=scales[0], scale_time=scales[1])
    hand.load_state_dict(state)
    columns = ["r", *(name for name, scale in zip(("scale_dir", "scale_time"), scales) if scale)]
    for (z, z_next), out in zip(NETWORK["t_cur_next"], NETWORK[f"{key}out"]):
        features = torch.from_numpy(NETWORK["bottleneck"])
        found, same = predictor(features, z, z_next), hand(features, z, z_next)
        assert all(torch.equal(a, b) for a, b in zip(found, same))
        # the golden network is float64, the file's weights float32
        for i, name in enumerate(columns):
            torch.testing.assert_close(getattr(found, name), torch.from_numpy(out[:, i]), rtol=0, atol=1e-6)
        for name in {"scale_dir", "scale_time"} - set(columns):
            assert torch.equal(getattr(found, name), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path, protocol):
    if protocol == 2:  # which has no bytes
        with pytest.raises(ValueError, match="'_codecs.encode', which is refused"):
            read_predictor_file(write(tmp_path / "a.pkl", make_model(), protocol=2))
        return
    model = make_model()
    predictor = read_predictor_file(write(tmp_path / "a.pkl", model, protocol=protocol)).predictor
    for name, weight in model.state_dict().items():
        assert torch.equal(predictor.state_dict()[name], weight)


def test_settings(file, config):
    predictor, settings = read_predictor_file(file)
    assert settings == SETTINGS
    expected = {"num_steps": 3, "solver": "dpmpp", "solver_order": 2, "predict_x0": False, "afs": False}
    expected |= {"scale_dir": 0.01, "scale_time": 0.2, "z_max": 14.61464, "z_min": 0.0291675, "hidden_dim": 128}
    assert {name: predictor.config[name] for name in expected} == expected
    schedule = import_amed(file, config).learned_schedules[6]
    assert schedule.provenance == {
        "imported_from": "network-snapshot-000005.pkl",
        "amed_settings": SETTINGS,
        "guidance_scale": 7.5,
    }


@pytest.mark.parametrize(
    "settings, spec",
    [
        ({"sampler_stu": "amed", "max_order": 3}, SolverSpec("amed")),
        ({"sampler_stu": "dpm"}, SolverSpec("dpm2")),
        ({"sampler_stu": "euler", "afs": True}, SolverSpec("euler", afs=True)),
        ({"sampler_stu": "ipndm", "max_order": 4}, SolverSpec("ipndm", 4)),
        (
            {"sampler_stu": "dpmpp", "max_order": 3, "predict_x0": True, "lower_order_final": False},
            SolverSpec("dpmpp", 3, lower_order_final=False),
        ),
    ],
)
def test_students(tmp_path, config, settings, spec):
    scheduler = import_amed(write(tmp_path / "a.pkl", make_model(**settings)), config)
    (schedule,) = scheduler.learned_schedules.values()
    assert schedule.spec == replace(spec, starting_scale="sigma") and schedule.nfe == 6 - spec.afs


@pytest.mark.parametrize(
    "kind, rho, sigmas",
    [  # of the original, for 7 times
        ("polynomial", 7.0, [80, 30.1833, 9.7232, 2.5152, 0.47, 0.0515, 0.002]),
        ("logsnr", 7.0, [80, 13.6798, 2.3392, 0.4, 0.0684, 0.0117, 0.002]),
        ("time_uniform", 1.0, [80, 20.9655, 6.9502, 2.8237, 1.2867, 0.5272, 0.002]),
        ("time_uniform", 2.0, [80, 8.6725, 2.3043, 0.9263, 0.3843, 0.1098, 0.002]),
        ("discrete", 1.0, [14.6146, 5.9489, 2.9183, 1.6156, 0.9324, 0.4936, 0.0292]),
    ],
)
def test_step_ends(tmp_path, config, kind, rho, sigmas):
    edm = kind != "discrete"
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, **EDM} if edm else config
    model = make_model(schedule_type=kind, schedule_rho=rho, num_steps=7, guidance_type=None, sampler_stu="amed")
    file = write(tmp_path / "a.pkl", model, **(EDM if edm else {}))
    scheduler = import_amed(file, config)
    ends = scheduler.learned_schedules[12].times[::2]
    torch.testing.assert_close(
        scheduler.path.sigma_edm(ends), torch.tensor(sigmas, dtype=torch.float64), rtol=0, atol=6e-5
    )


def test_samples_as_the_same_made_by_hand(tmp_path):
    model = make_model()
    file = write(tmp_path / "a.pkl", model)
    pipe, call = PIPELINES["sd"]()
    call = {**call, "num_inference_steps": 6, "prompt": ["a", "b"], "negative_prompt": ["", ""]}
    config = pipe.scheduler.config
    images = []
    for scheduler in (import_amed(file, config), by_hand(model, config)):
        pipe.scheduler = scheduler
        scheduler.attach(pipe)
        images.append(pipe(**call, generator=torch.Generator().manual_seed(1)).images)
        scheduler.detach()
    assert torch.equal(*images)
    # predicted stages are in it: with other weights of the heads the same call ends elsewhere
    with torch.no_grad():
        model.fc_r.weight.add_(1.0)
    pipe.scheduler = import_amed(write(tmp_path / "b.pkl", model), config)
    pipe.scheduler.attach(pipe)
    other = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    assert float((other - images[0]).abs().max()) > 1e-3


def test_saved_and_loaded(file, config, tmp_path):
    scheduler = import_amed(file, config)
    scheduler.save_pretrained(tmp_path / "saved")
    loaded = AMEDScheduler.from_pretrained(tmp_path / "saved")
    assert loaded.config.schedules == scheduler.config.schedules
    assert loaded.predictors[6].digest() == scheduler.predictors[6].digest()


def test_static_form_is_what_zero_features_say(tmp_path, config):
    model = make_model(num_steps=6)
    static = import_amed(write(tmp_path / "a.pkl", model), config, form="static")
    schedule = LD3Scheduler.from_config(static.config).learned_schedules[10]  # plain numbers, for any pipeline
    assert not static.predictors and schedule.predictor is None
    path, weights = static.path, {name: weight.double() for name, weight in model.state_dict().items()}
    times = torch.linspace(1.0, 0.001, 6, dtype=torch.float64)
    z = path.sigma_edm(times)

    def layer(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def embedded(level):
        angles = level * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 3)
        return nn.functional.silu(layer("map_layer0", torch.cat([angles.sin(), angles.cos()])))

    zeros = torch.zeros(64, dtype=torch.float64)
    encoded = layer("enc_layer1", nn.functional.silu(layer("enc_layer0", zeros)))
    for n in range(5):
        v = torch.cat([encoded, embedded(z[n]), embedded(z[n + 1])])
        r, c, a = (torch.sigmoid(layer(name, v)) for name in ("fc_r", "fc_scale_dir", "fc_scale_time"))
        stage = z[n + 1] ** r * z[n] ** (1 - r)
        told = ((0.8 + 0.4 * a) * stage).clamp(z[n + 1], z[n])
        found = torch.stack(
            [path.sigma_edm(schedule.times[2 * n + 1]), path.sigma_edm(schedule.network_times[2 * n + 1])]
        )
        torch.testing.assert_close(found, torch.cat([stage, told]), rtol=2e-6, atol=0)
        torch.testing.assert_close(schedule.direction_scales[2 * n + 1 :][:1], 0.99 + 0.02 * c, rtol=0, atol=1e-7)
        assert z[n + 1] < found[0] < z[n]
    assert torch.equal(schedule.direction_scales[::2], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    "settings, scales",
    [
        ({"sampler_stu": "amed", "scale_time": True}, (0.01, 0.2)),
        ({"sampler_stu": "amed", "scale_time": False}, (0.01, 0.0)),
        ({"sampler_stu": "dpmpp", "scale_time": True, "predict_x0": False}, (0.01, 0.2)),
        ({"sampler_stu": "dpmpp", "scale_time": False, "predict_x0": True}, (0.05, 0.0)),
    ],
)
def test_first_release_whose_scales_were_no_options(tmp_path, settings, scales):
    model = make_model(**settings)
    del model.scale_dir
    predictor, found = read_predictor_file(write(tmp_path / "a.pkl", model))
    assert (predictor.config.scale_dir, predictor.config.scale_time) == scales
    assert (found["scale_dir"], found["scale_time"]) == scales


@pytest.mark.parametrize("change", ["no loss", "no levels in the loss"])
def test_levels_that_the_file_does_not_tell(tmp_path, config, change):
    model, file = make_model(), tmp_path / "a.pkl"
    if change == "no loss":
        with foreign_modules():
            file.write_bytes(pickle.dumps({"model": model}))
    else:
        write(file, model, sigma_min=None, sigma_max=None)
    predictor = import_amed(file, config).predictors[6]
    assert predictor.config.z_max is None and predictor.config.z_min is None


def test_other_models(file, config, tmp_path):
    with pytest.raises(ValueError, match="z_max=14.6146 and this schedule has 80"):
        import_amed(file, {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, **EDM})
    with pytest.raises(ValueError, match="rectified flow; train stages for it"):
        import_amed(file, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    with pytest.raises(ValueError, match="unknown form 'dynamic'"):
        import_amed(file, config, form="dynamic")
    model = make_model(max_order=4)
    with pytest.raises(ValueError, match="dpmpp has no order 4; use solver_order"):
        import_amed(write(tmp_path / "b.pkl", model), config)


@pytest.mark.slow
def test_the_example(tmp_path):
    model = make_model(sampler_stu="amed", afs=True, scale_time=0.0)
    file = write(tmp_path / "network-snapshot-000010.pkl", model)
    command = [sys.executable, "examples/import_amed_predictor.py", str(file)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    assert "per_sample: 5 evaluations of amed" in result.stdout and "static: timesteps [" in result.stdout


# ---------------------------------------------------------------------- wrong contents


def _without(layer):
    return lambda model: delattr(model, layer)


def _with(layer, module):
    return lambda model: setattr(model, layer, module())


def _weight(change, name="weight"):
    def apply(model):
        weight = getattr(model.enc_layer0, name)
        setattr(model.enc_layer0, name, nn.Parameter(change(weight.data), requires_grad=False))

    return apply


def _value(value):
    def change(weight):
        weight[..., 0] = value
        return weight

    return change


WRONG_WEIGHTS = {
    "missing layer": (_without("enc_layer1"), "lacks the layer 'enc_layer1'"),
    "missing head": (_without("fc_scale_time"), "lacks the layer 'fc_scale_time'"),
    "missing embedding": (_without("map_noise"), "embeds its times in another way"),
    "extra layer": (_with("fc_more", nn.Sigmoid), "has the unknown layer 'fc_more'"),
    "other layer": (_with("fc_r", nn.Sigmoid), "fc_r that is no linear layer"),
    "other embedding": (lambda model: setattr(model.map_noise, "endpoint", False), "embeds its times in another way"),
    "no bias": (lambda model: setattr(model.fc_r, "bias", None), "no tensor as fc_r.bias"),
    "extra weight": (
        lambda model: setattr(model, "more", nn.Parameter(torch.zeros(1), requires_grad=False)),
        "the unknown weight 'more'",
    ),
    "buffer": (lambda model: model.register_buffer("mean", torch.zeros(1)), "the unknown weight 'mean'"),
    "buffer of a layer": (lambda model: model.fc_r.register_buffer("mean", torch.zeros(1)), "fc_r with other weights"),
    "nan": (_weight(_value(float("nan"))), "float32 tensor of finite numbers"),
    "infinite": (_weight(_value(float("inf")), "bias"), "float32 tensor of finite numbers"),
    "float64": (_weight(torch.Tensor.double), "float32 tensor of finite numbers"),
    "int64": (_weight(torch.Tensor.long), "float32 tensor of finite numbers"),
    "transposed": (_weight(torch.t), "makes no predictor: bottleneck_input_dim must be a square"),
    "short": (_weight(lambda weight: weight[1:]), r"enc_layer0.bias of shape \(128,\), which must be \(127,\)"),
    "flat": (_weight(torch.flatten), "no 2-dimensional float32"),
    "short bias": (_weight(lambda bias: bias[1:], "bias"), r"bias of shape \(127,\), which must be \(128,\)"),
    "no module": (lambda model: model.__dict__.__setitem__("_buffers", None), "no PyTorch module"),
    "huge": (_weight(lambda weight: torch.zeros(5000, 64)), "makes no predictor: sizes of a predictor"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights(tmp_path, config, name):
    change, message = WRONG_WEIGHTS[name]
    model, file = make_model(), tmp_path / "a.pkl"
    change(model)
    with pytest.raises(ValueError, match=message) as refusal:
        import_amed(write(file, model), config)
    assert str(refusal.value).startswith(repr(str(file))) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("sampler_stu", "heun", "one of amed, dpm, euler, ipndm, dpmpp"),
        ("sampler_stu", ["amed"], "sampler_stu = a list"),
        ("schedule_type", "karras", "one of polynomial, logsnr, time_uniform, discrete"),
        ("schedule_type", None, "schedule_type = a NoneType"),
        ("schedule_rho", "7", "schedule_rho = '7', which must be a number"),
        ("schedule_rho", float("nan"), "schedule_rho = a float"),
        ("M", None, "M = a NoneType, which must be an integer"),
        ("num_steps", 4.0, "num_steps = 4.0, which must be an integer"),
        ("num_steps", 10**6, "num_steps = 1000000"),
        ("num_steps", True, "num_steps = a bool"),
        ("num_steps", 1, "num_steps = 1, which must be an integer from 2 to 501"),
        ("afs", 1, "afs = 1, which must be true or false"),
        ("predict_x0", "True", "predict_x0 = 'True', which must be true or false"),
        ("scale_dir", -0.5, "makes no predictor: scale_dir must be .* got -0.5"),
        ("scale_dir", 1.0, "makes no predictor: scale_dir must be .* below 1, got 1.0"),
        ("scale_time", float("inf"), "scale_time = a float"),
        ("scale_time", None, "scale_time = a NoneType"),
        ("max_order", 2.5, "max_order = 2.5, which must be an integer or None"),
        ("dataset_name", "x" * 10**5, "dataset_name = a str"),
        ("guidance_rate", {"a": 1}, "guidance_rate = a dict"),
    ],
)
def test_wrong_settings(tmp_path, config, setting, value, message):
    model, file = make_model(), tmp_path / "a.pkl"
    setattr(model, setting, value)
    with pytest.raises(ValueError, match=message) as refusal:
        import_amed(write(file, model), config)
    assert str(refusal.value).startswith(repr(str(file))) and len(str(refusal.value)) < 500


@pytest.mark.parametrize("setting", sorted(set(SETTINGS) - {"scale_dir"}))
def test_missing_settings(tmp_path, config, setting):
    model = make_model()
    delattr(model, setting)
    with pytest.raises(ValueError, match=f"has no setting '{setting}'"):
        import_amed(write(tmp_path / "a.pkl", model), config)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 80.0)])
def test_levels_that_are_no_range(tmp_path, config, ends):
    with pytest.raises(ValueError, match="which is no range"):
        import_amed(write(tmp_path / "a.pkl", make_model(), sigma_min=ends[0], sigma_max=ends[1]), config)
