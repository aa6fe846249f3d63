# SPDX-License-Identifier: Apache-2.0
"""The predictor files of AMED's authors, genuine in form and hostile."""

import builtins
import copyreg
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ld3_diffusers import AMEDPredictor, AMEDScheduler, LD3Scheduler, SolverSpec
from ld3_diffusers.amed import amed_schedule
from ld3_diffusers.amed_predictor_file import read_predictor_file
from ld3_diffusers.importing import import_amed
from ld3_diffusers.inert_pickle import PERSISTENCE, Refused, StoredTensor, load_pickle
from tests.tiny_pipelines import PIPELINES

from .amed_predictor_files import SETTINGS, foreign_modules, make_model, predictor_bytes, write


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
    schedule = amed_schedule(times, SolverSpec("dpmpp", 2, predict_x0=False), path, "epsilon")
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
    assert schedule.spec == spec and schedule.nfe == 6 - spec.afs


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


# ---------------------------------------------------------------------- plain data and tensors


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back(tmp_path, protocol):
    shared = ["x", 1.5]
    data = {
        "integers": [0, 255, 65536, -1, 2**100, -(2**100)],
        "rest": (
            None,
            True,
            False,
            1e300,
            "ä" * 300,
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, 4),
            [],
            {},
            {"a": {"b": []}},
        ),
        "set": {"a", "b"},
        "twice": [shared, shared],
        "ordered": OrderedDict(z=1, a=2),
        "many": list(range(3000)),
    }
    if protocol > 2:
        data["bytes"] = [b"", b"abc", b"abc" * 1000]
    (tmp_path / "a").write_bytes(pickle.dumps(data, protocol))
    found = load_pickle(tmp_path / "a", PERSISTENCE, wanted="this", max_bytes=2**20, max_opcodes=10_000)
    assert found == data and found["twice"][0] is found["twice"][1]
    assert list(found["ordered"]) == ["z", "a"]


TENSORS = {
    "whole": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(3, 4).T,
    "part": lambda: torch.randn(6, 8)[1:5:2, 2::3],
    "scalar": lambda: torch.tensor(2.5, dtype=torch.float64),
    "empty": lambda: torch.empty(0, 3),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "bool": lambda: torch.tensor([True, False]),
    "int64": lambda: torch.arange(5),
    "parameter": lambda: nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back(tmp_path, name):
    tensor = TENSORS[name]()
    (tmp_path / "a").write_bytes(pickle.dumps([tensor]))
    (found,) = load_pickle(tmp_path / "a", PERSISTENCE, wanted="this", max_bytes=2**20, max_opcodes=100)
    assert found.tensor().dtype == tensor.dtype and torch.equal(found.tensor(), tensor.detach())


def storage(values: torch.Tensor) -> bytes:
    return values._typed_storage().__reduce__()[1][0]


@pytest.mark.parametrize(
    "offset, size, stride, message",
    [
        (0, (2**30,), (0,), "larger than its storage"),
        (0, (2**30, 2**30), (0, 0), "larger than its storage"),
        (0, (11,), (1,), "larger than its storage"),
        (1, (10,), (1,), "larger than its storage"),
        (0, (2,), (10,), "larger than its storage"),
        (10, (1,), (1,), "larger than its storage"),
        (-1, (2,), (1,), "no possible shape"),
        (0, (2,), (-1,), "no possible shape"),
        (0, (2, 2), (1,), "no possible shape"),
        (0, (1,) * 9, (1,) * 9, "no possible shape"),
        (0, (2.0,), (1,), "no possible shape"),
        (0, ("2",), (1,), "no possible shape"),
        (2**70, (1,), (1,), "no possible shape"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(offset, size, stride, message):
    with pytest.raises(Refused, match=message):
        StoredTensor(storage(torch.randn(10)), offset, size, stride).tensor()


def test_damaged_storages():
    whole = storage(torch.arange(10.0))
    assert torch.equal(StoredTensor(whole, 0, (10,), (1,)).tensor(), torch.arange(10.0))
    for cut in range(len(whole)):
        with pytest.raises(Refused):
            StoredTensor(whole[:cut], 0, (1,), (1,)).tensor()
    at = len(whole) - 48  # where the number of values stands
    assert whole[at : at + 8] == struct.pack("<q", 10)
    for numel in (2**62, -1, 9, 11):
        with pytest.raises(Refused, match="storage is damaged"):
            StoredTensor(whole[:at] + struct.pack("<q", numel) + whole[at + 8 :], 0, (1,), (1,)).tensor()


# ---------------------------------------------------------------------- hostile files


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def doubled(levels: int) -> bytes:
    """t = (t, t), so often that to hash it takes 2**levels steps."""
    return b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(levels))


SYSTEM = b"cos\nsystem\n"
DICT = b"ccollections\nOrderedDict\n"
HOSTILE = {  # of the path of a file that must not appear -> content, refusal
    "os.system": (lambda path: pickle.dumps(Calls(os.system, f"touch {path}")), r"names 'posix.system'"),
    "eval": (lambda path: pickle.dumps(Calls(eval, f"open({path!r}, 'w')")), "names 'builtins.eval'"),
    "exec": (lambda path: pickle.dumps(Calls(exec, f"open({path!r}, 'w')")), "names 'builtins.exec'"),
    "open": (lambda path: pickle.dumps(Calls(open, path, "w")), "names '_?io.open'"),
    "old form of a call": (lambda path: b"\x80\x02(" + b"X" + struct.pack("<I", len(path)) + path.encode() + b"ios\nmkdir\n.", "instruction INST"),
    "call of a class": (lambda path: b"\x80\x02(" + SYSTEM + text("x") + b"o.", "names 'os.system'"),
    "pickle in a pickle": (
        lambda path: pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, path)))),
        "names '_pickle.loads'",
    ),
    "chain of getattr": (
        lambda path: pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
        "names 'builtins.getattr'",
    ),
    "copyreg": (lambda path: pickle.dumps(Calls(copyreg._reconstructor, deque, object, None)), "names 'copyreg._recon"),
    "torch.load": (lambda path: pickle.dumps(Calls(torch.load, path)), "names 'torch.serialization.load'"),
    "a class that is not listed": (lambda path: pickle.dumps(deque([1])), "names 'collections.deque'"),
    "a name with dots": (lambda path: pickled(text("collections"), text("OrderedDict.fromkeys"), b"\x93"), "names 'coll"),
    "a name that is no text": (lambda path: pickled(b"K\x01", text("system"), b"\x93"), "int where only text"),
    "state of a listed class": (lambda path: pickled(DICT, b"}", text("a"), b"K\x01sb"), "sets the state of a Name"),
    "state of a dict": (lambda path: pickled(DICT, b")R}", text("a"), b"K\x01sb"), "sets the state of a dict"),
    "__setstate__": (
        lambda path: pickled(b"ctorch.nn.modules.activation\nSigmoid\n)\x81", text("a"), b"b"),
        "sets the state of a Instance",
    ),
    "slots": (
        lambda path: pickled(b"ctorch.nn.modules.activation\nSigmoid\n)\x81N}\x86b"),
        "sets the state of a Instance",
    ),
    "what may only be mentioned": (lambda path: pickled(b"csolvers_amed\named_sampler\n)R"), "calls solvers_amed.amed"),
    "call of a dict": (lambda path: pickled(b"})R"), "calls a dict"),
    "call without a tuple": (lambda path: pickled(DICT, b"]R"), "calls collections.OrderedDict"),
    "other arguments": (lambda path: pickled(DICT, b"N\x85R"), "arguments that it never has"),
    "text as a tensor's bytes": (
        lambda path: pickled(b"ctorch.storage\n_load_from_bytes\n", text("a"), b"\x85R"),
        "a str as if it were a bytes",
    ),
    "another persistence": (
        lambda path: pickled(b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R"),
        "another form than version 6",
    ),
    "persistent id": (lambda path: pickled(text("a"), b"Q"), "instruction BINPERSID"),
    "persistent id as text": (lambda path: b"\x80\x02Pa\n.", "instruction PERSID"),
    "registered extension": (lambda path: pickled(b"\x82\x01"), "instruction EXT1"),
    "buffers from elsewhere": (lambda path: b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    "keywords": (lambda path: pickled(DICT, b")}\x92"), "instruction NEWOBJ_EX"),
    "nothing": (lambda path: b"", "is no pickle"),
    "text": (lambda path: b"not a pickle", "is no pickle"),
    "protocol 0": (lambda path: pickle.dumps({"model": 1}, 0), "is no pickle"),
    "zip archive": (lambda path: b"PK\x03\x04" + bytes(40), "is no pickle"),
    "unknown instruction": (lambda path: pickled(b"\xff"), "damaged or cut short"),
    "nothing on the stack": (lambda path: pickled(), "damaged or cut short"),
    "no mark": (lambda path: pickled(b"t"), "damaged or cut short"),
    "nothing in the memo": (lambda path: pickled(b"h\x07"), "damaged or cut short"),
    "key without value": (lambda path: pickled(b"}(", text("a"), b"u"), "damaged or cut short"),
    "long integer": (lambda path: pickled(b"\x8b", struct.pack("<i", 10**6), b"\x01" * 10**6), "integer of 7999993 bits"),
    "length of an integer": (lambda path: pickled(b"\x8b\xff\xff\xff\x7f"), "damaged or cut short"),
    "negative length": (lambda path: pickled(b"\x8b\xff\xff\xff\xff"), "damaged or cut short"),
    "length of bytes": (lambda path: pickled(b"\x8e", struct.pack("<Q", 2**62)), "damaged or cut short"),
    "length beyond all": (lambda path: pickled(b"\x8e", struct.pack("<Q", 2**64 - 1)), "damaged or cut short"),
    "length of text": (lambda path: pickled(b"\x8d", struct.pack("<Q", 2**40)), "damaged or cut short"),
    "no text": (lambda path: pickled(b"\x8c\x01\xff"), "damaged or cut short"),
    "place in the memo": (lambda path: pickled(b"]r\xff\xff\xff\xff"), "no AMED_predictor"),
    "flood of the memo": (lambda path: pickled(b"]", b"\x94" * 10**6), "more than 50000 instructions"),
    "deep lists": (lambda path: pickled(b"]" * 10_000, b"a" * 9_999), "no AMED_predictor"),
    "deep tuples": (lambda path: pickled(b")", b"\x85" * 20_000), "no AMED_predictor"),
    "deep key": (lambda path: pickled(b"})", b"\x85" * 20_000, b"K\x01s"), "a tuple where only text"),
    "key that takes forever": (lambda path: pickled(doubled(100), b"}h\x64K\x01s"), "a tuple where only text"),
    "element that takes forever": (lambda path: pickled(doubled(100), b"\x8f(h\x64\x90"), "a tuple where only text"),
    "keys of one hash": (lambda path: pickled(b"}K\x01K\x01s"), "a int where only text"),
    "items of a number": (lambda path: pickled(b"K\x01", text("a"), b"K\x01s"), "fills in a int"),
    "appended to a tuple": (lambda path: pickled(b")K\x01a"), "fills in a tuple"),
    "no predictor": (lambda path: pickle.dumps({"model": {"fc_r": 1}}), "no AMED_predictor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, config, name):
    make, message = HOSTILE[name]
    never, file = tmp_path / "never", tmp_path / "network-snapshot-000005.pkl"
    file.write_bytes(make(str(never)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as refusal:
            import_amed(file, config)
        assert tracemalloc.get_traced_memory()[1] < 2**25  # of files of at most 1 MB
    finally:
        tracemalloc.stop()
    assert not never.exists()
    sentence = str(refusal.value)
    assert (
        sentence.startswith(repr(str(file))) and "\n" not in sentence and "pass a network-snapshot-*.pkl" in sentence
    )


def test_every_hostile_pickle_that_calls_something_would_have_been_executed(tmp_path):
    """The corpus is alive: Python's own loader runs it."""
    for name in ("os.system", "eval", "exec", "open", "old form of a call", "pickle in a pickle"):
        never = tmp_path / "never"
        pickle.loads(HOSTILE[name][0](str(never)))
        assert never.exists(), name
        never.rmdir() if never.is_dir() else never.unlink()


def test_source_text_is_never_run(tmp_path, config, monkeypatch):
    never = tmp_path / "never"
    model = make_model()
    monkeypatch.setattr("tests.ld3_diffusers.amed_predictor_files.Persistent.source", f"open({str(never)!r}, 'w')")
    file = write(tmp_path / "a.pkl", model)
    assert str(never).encode() in file.read_bytes()

    def forbidden(*_, **__):
        raise AssertionError("code was run")

    for name in ("exec", "eval", "compile"):
        monkeypatch.setattr(builtins, name, forbidden)
    before = set(sys.modules)
    read_predictor_file(file)
    monkeypatch.undo()
    assert not never.exists() and not {"torch_utils", "dnnlib", "solvers_amed"} & (set(sys.modules) - before)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_the_place_of_weights(tmp_path, config, zipped):
    never, model = tmp_path / "never", make_model()
    torch.save(Calls(os.mkdir, str(never)), tmp_path / "bytes", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "bytes").read_bytes()

    class Weight:
        def __reduce__(self):
            storage = Calls(torch.storage._load_from_bytes, content)
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1, 20), (20, 1), False, OrderedDict())

    model.fc_r._parameters["weight"] = Weight()
    file = write(tmp_path / "a.pkl", model)
    with pytest.raises(ValueError, match="'posix.mkdir', which is refused" if not zipped else "damaged or cut short"):
        import_amed(file, config)
    assert not never.exists()


def test_every_cut_of_a_file(tmp_path):
    whole, file = predictor_bytes(make_model()), tmp_path / "a.pkl"
    for cut in range(0, len(whole), 173):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is no pickle" if not cut else "damaged or cut short"):
            read_predictor_file(file)


def test_changed_bytes_never_raise_anything_else(tmp_path):
    whole, file = predictor_bytes(make_model()), tmp_path / "a.pkl"
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        content = bytearray(whole)
        for place in torch.randint(len(whole), (4,), generator=generator):
            content[place] = int(torch.randint(256, (1,), generator=generator))
        file.write_bytes(content)
        try:
            read_predictor_file(file)
        except ValueError as refusal:
            assert str(refusal).startswith(repr(str(file)))


def test_files_that_are_too_large_or_missing(tmp_path, config, monkeypatch):
    monkeypatch.setattr("ld3_diffusers.amed_predictor_file.MAX_BYTES", 2**20)
    file = tmp_path / "a.pkl"
    with open(file, "wb") as stream:
        stream.truncate(2**20 + 1)
    with pytest.raises(ValueError, match="is larger than 1 MiB"):
        import_amed(file, config)
    with pytest.raises(ValueError, match="there is no file .*give the path of a network-snapshot"):
        import_amed(tmp_path / "b.pkl", config)
    with pytest.raises(ValueError, match="there is no file"):
        import_amed(tmp_path, config)


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
