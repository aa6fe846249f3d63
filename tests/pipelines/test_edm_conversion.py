# SPDX-License-Identifier: Apache-2.0
"""EDM's pickles: D of the converted network is the reference's, and hostile, damaged or other files are refused in words."""

import builtins
import json
import os
import pickle
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from ld3_diffusers.inert_pickle import Instance, Refused
from pipelines.conversion.edm import edm_network, edm_pipeline, network_config
from pipelines.conversion.files import read_edm_pickle
from pipelines.convert import main
from pipelines.edm import vp_sigma
from tests.ld3_diffusers.amed_predictor_files import Persistent
from tests.ld3_diffusers.test_inert_pickle import HOSTILE, Calls, nested, pickled

from .edm_files import golden, make_wrapper, persistent, snapshot_bytes, write_edm


SMALL = "edm_ddpmpp_uncond"
CASES = [
    (name, wrapper)
    for name, wrappers in {
        "edm_ddpmpp_uncond": ("EDMPrecond", "VPPrecond"),
        "edm_ddpmpp_cond": ("EDMPrecond", "VPPrecond"),
        "edm_ncsnpp_uncond": ("EDMPrecond", "VEPrecond"),
        "edm_ncsnpp_cond": ("EDMPrecond", "VEPrecond"),
        "edm_adm_cond": ("EDMPrecond",),
        "edm_adm_uncond_2heads": ("EDMPrecond",),
        "edm_adm_iddpm": ("iDDPMPrecond",),
    }.items()
    for wrapper in wrappers
]


@pytest.fixture(scope="module")
def small():
    return golden(SMALL)


@pytest.fixture
def folder(tmp_path):
    """Where nothing may be left behind."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def convert_refused(file, folder, capsys, family="edm") -> str:
    """What the program says when it refuses a file: one line, exit code 2, and no trace."""
    before = set(os.listdir(folder / "in"))
    with pytest.raises(SystemExit) as exit:
        main([family, str(file), "--output_dir", str(folder / "out" / "converted")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert exit.value.code == 2 and len(lines) == 1
    assert os.listdir(folder / "out") == [] and set(os.listdir(folder / "in")) == before
    return lines[0]


# ---------------------------------------------------------------------- conversion


@pytest.mark.parametrize("name, wrapper", CASES)
def test_denoiser_is_the_references(tmp_path, name, wrapper):
    data = golden(name)
    network = edm_pipeline(str(write_edm(tmp_path / "a.pkl", data, wrapper))).unet
    given = {key: torch.tensor(data[f"{wrapper}/{key}"]) for key in ("x", "sigma", "out_f32")}
    labels = data.get(f"{wrapper}/class_labels")
    found = network.denoise(given["x"], given["sigma"], None if labels is None else torch.tensor(labels))
    tolerance = 2e-5 if "ncsnpp" in name else 5e-6
    assert float((found - given["out_f32"]).abs().max() / given["out_f32"].abs().max()) < tolerance


def test_every_tensor_arrives_under_its_name(tmp_path, small):
    network = edm_network(read_edm_pickle(write_edm(tmp_path / "a.pkl", small)))
    given = {key.removeprefix("param/model."): value for key, value in small.items() if key.startswith("param/")}
    found = network.state_dict()
    assert set(found) == set(given)
    assert all(np.array_equal(found[name].numpy(), given[name]) for name in given)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("wrapper, low, high", [("EDMPrecond", 0.002, 80.0), ("VPPrecond", None, 152.2)])
def test_range_of_noise_levels(tmp_path, small, wrapper, low, high):
    scheduler = edm_pipeline(str(write_edm(tmp_path / "a.pkl", small, wrapper))).scheduler
    assert isinstance(scheduler, EDMDPMSolverMultistepScheduler) and scheduler.config.sigma_data == 0.5
    low = low or float(vp_sigma(torch.tensor(1e-5).double()))
    assert scheduler.config.sigma_min == pytest.approx(low, rel=1e-6)
    assert scheduler.config.sigma_max == pytest.approx(high, rel=1e-3)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_protocols_and_names_of_either_numpy(tmp_path, small, protocol):
    content = snapshot_bytes(make_wrapper(small), protocol)
    if protocol == 3:  # whose names are lines, so that they can be exchanged
        assert b"cnumpy._core.multiarray\nscalar\n" in content
        content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    (tmp_path / "a.pkl").write_bytes(content)
    wrapper = read_edm_pickle(tmp_path / "a.pkl")
    block = wrapper.state["_modules"]["model"].state["_modules"]["enc"].state["_modules"]["16x16_block0"]
    assert block.state["skip_scale"] == 0.5**0.5
    edm_network(wrapper)


class StatefulModuleDict:
    """Pickled as a ModuleDict with this state."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return torch.nn.ModuleDict, (), self.state


def test_numpy_numbers_of_other_kinds(tmp_path):
    numbers = {"a": np.float32(0.25), "b": np.int64(-3), "c": np.float64(1e300), "d": np.bool_(True)}
    content = pickle.dumps({"ema": StatefulModuleDict(numbers)})
    (tmp_path / "a.pkl").write_bytes(content)
    assert read_edm_pickle(tmp_path / "a.pkl").state == {"a": 0.25, "b": -3, "c": 1e300, "d": True}
    big_endian = content.replace(b"\x8c\x01<", b"\x8c\x01>")
    assert big_endian != content
    (tmp_path / "a.pkl").write_bytes(big_endian)
    assert read_edm_pickle(tmp_path / "a.pkl").state["b"] == int.from_bytes(
        (-3).to_bytes(8, "little", signed=True), "big", signed=True
    )


SONG = {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)}
DHARIWAL = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)}


@pytest.mark.parametrize("network, defaults", [("SongUNet", SONG), ("DhariwalUNet", DHARIWAL)])
def test_arguments_that_were_left_out_are_the_classes_defaults(network, defaults):
    arguments = {"_init_kwargs": {"img_resolution": 64, "img_channels": 3}, "_init_args": ()}
    config = network_config(Instance("EDMPrecond", {**arguments, "_modules": {"model": Instance(network)}}))
    common = {"channel_mult_emb": 4, "dropout": 0.1, "augment_dim": 0, "num_class_embeds": None, "sample_size": 64}
    assert config.items() >= {**defaults, **common, "out_channels": 3, "sigma_data": 0.5}.items()


def test_source_in_the_file_is_never_run(folder, small, monkeypatch):
    never = folder / "never"
    monkeypatch.setattr(Persistent, "source", f"open({str(never)!r}, 'w')\n")
    file = write_edm(folder / "in" / "a.pkl", small)
    assert str(never).encode() in file.read_bytes()

    def forbidden(*_, **__):
        raise AssertionError("code was run")

    before = set(sys.modules)
    for name in ("exec", "eval"):
        monkeypatch.setattr(builtins, name, forbidden)
    read_edm_pickle(file)
    monkeypatch.undo()
    main(["edm", str(file), "--output_dir", str(folder / "out" / "converted")])
    assert not never.exists() and not {"torch_utils", "dnnlib"} & (set(sys.modules) - before)
    facts = json.loads((folder / "out" / "converted" / "conversion.json").read_text())
    assert facts["project"] == "NVlabs/edm" and facts["sources"][0]["size"] == file.stat().st_size


# ---------------------------------------------------------------------- other networks


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_blocks": 1}, "lacks 'dec.8x8_block1.norm2.weight'.* and 3 more"),
        ({"num_blocks": 3}, "lacks '.*block2"),
        ({"num_blocks": 10**6}, "num_blocks = 1000000, which must be an integer from 1 to"),
        ({"num_blocks": 65}, "65 blocks a level"),
        ({"num_blocks": True}, "num_blocks = True, which must be an integer"),
        ({"model_channels": 32}, r"of shape \(64, 9\)|of shape \(16, 9\), which must be \(32, 9\)"),
        ({"model_channels": 2}, "arguments that make no network"),
        ({"channel_mult": [1] * 20}, "short list"),
        ({"channel_mult": []}, "short list"),
        ({"channel_mult": ["2"]}, "must be an integer"),
        ({"img_resolution": 17}, "arguments that make no network"),
        ({"img_resolution": ...}, "img_resolution = None"),
        ({"label_dim": -1}, "label_dim = -1"),
        ({"label_dim": 10}, "lacks 'map_label.weight', 'map_label.bias'"),
        ({"decoder_type": "skip"}, "decoder_type = 'skip'; only 'standard'"),
        ({"encoder_type": "skip"}, "unknown encoder_type"),
        ({"resample_filter": [1, 3, 3, 1]}, "resample_filter of shape"),
        ({"resample_filter": [1, 2]}, "not the filter"),
        ({"dropout": 7.0}, "no probability"),
        ({"sigma_data": 0.0}, "sigma_data = 0.0, which must be a positive number"),
        ({"sigma_data": float("nan")}, "sigma_data = nan"),
        ({"beta_d": 20.0}, "beta_d = 20.0; only 19.9"),
        ({"spectral": 1}, "unknown argument 'spectral'"),
    ],
)
def test_other_arguments_are_refused(tmp_path, small, change, message):
    with pytest.raises(ValueError, match=message):
        edm_pipeline(str(write_edm(tmp_path / "a.pkl", small, **change)))


@pytest.mark.parametrize(
    "name",
    "num_blocks channel_mult resample_filter sigma_data dropout encoder_type embedding_type decoder_type label_dim".split(),
)
def test_arguments_that_would_take_forever_to_print(tmp_path, small, name):
    value = [nested(30)] if name in ("channel_mult", "resample_filter") else nested(30)
    file = write_edm(tmp_path / "a.pkl", small, **{name: value})
    started = time.monotonic()
    with pytest.raises(ValueError, match="was constructed with"):
        network_config(read_edm_pickle(file))
    assert time.monotonic() - started < 60  # printed whole they take hours, and busy machines are slow


def lose(wrapper):
    del wrapper.model.map_layer0._parameters["bias"]


def gain(wrapper):
    wrapper.model.map_layer9 = persistent("Linear")
    wrapper.model.map_layer9.register_parameter("weight", torch.nn.Parameter(torch.zeros(2)))


def reshape(wrapper):
    wrapper.model.map_layer0.weight = torch.nn.Parameter(torch.zeros(64, 17), requires_grad=False)


def spoil(wrapper):
    wrapper.model.map_layer0.weight.data[0, 0] = float("nan")


def count(wrapper):
    wrapper.model.map_layer0.weight = torch.nn.Parameter(torch.zeros(64, 16, dtype=torch.int64), requires_grad=False)


def blur(wrapper):
    for module in wrapper.modules():
        if "resample_filter" in module._buffers:
            module.resample_filter = torch.tensor([[[[0.3, 0.2], [0.2, 0.3]]]])


def nest(wrapper):
    module = wrapper.model
    for _ in range(9):
        module.deeper = persistent("Linear")
        module = module.deeper


def text_as_module(wrapper):
    wrapper.model._modules["map_layer0"] = "Linear"


def text_as_tensor(wrapper):
    wrapper.model.map_layer0._parameters["bias"] = "zeros"


def positional(wrapper):
    wrapper._init_args = (16, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lose, "lacks 'map_layer0.bias'"),
        (gain, "has the unknown 'map_layer9.weight'"),
        (reshape, r"map_layer0.weight of shape \(64, 17\), which must be \(64, 16\)"),
        (spoil, "map_layer0.weight that is not of finite numbers"),
        (count, "map_layer0.weight that is not of finite numbers"),
        (blur, "resample_filter that is not the filter it was constructed with"),
        (nest, "more modules in modules"),
        (text_as_module, "a str as 'model.map_layer0', where a module must be"),
        (text_as_tensor, "a str as 'model.map_layer0.bias', where a tensor must be"),
        (positional, "constructed in another way"),
    ],
)
def test_other_tensors_are_refused(tmp_path, small, change, message):
    wrapper = make_wrapper(small)
    change(wrapper)
    (tmp_path / "a.pkl").write_bytes(snapshot_bytes(wrapper))
    with pytest.raises(ValueError, match=message):
        edm_pipeline(str(tmp_path / "a.pkl"))


def test_tensors_that_share_their_bytes_are_refused(tmp_path, small):
    wrapper = read_edm_pickle(write_edm(tmp_path / "a.pkl", small))
    waiting, largest = [wrapper], torch.zeros(64 * 64 * 9)._typed_storage().__reduce__()[1][0]
    while waiting:
        state = waiting.pop().state
        waiting += [module for module in state["_modules"].values() if module is not None]
        for tensors in (state["_parameters"], state["_buffers"]):
            tensors |= {name: replace(tensor, storage=largest) for name, tensor in tensors.items() if tensor}
    with pytest.raises(Refused, match="share their bytes"):
        edm_network(wrapper)


def test_modules_in_a_circle_are_refused():
    module = Instance("Linear", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    module.state["_modules"] = {"a": module, "b": module}
    network = Instance("SongUNet", {"_parameters": {}, "_buffers": {}, "_modules": {"a": module}})
    arguments = {"_init_kwargs": {"img_resolution": 16, "img_channels": 3}, "_modules": {"model": network}}
    with pytest.raises(Refused, match="more modules in modules"):
        edm_network(Instance("EDMPrecond", {**arguments, "_parameters": {}, "_buffers": {}}))


def test_other_wrappers_are_refused(tmp_path, small):
    with pytest.raises(ValueError, match="'CLIPPrecond', which is none of EDMPrecond, "):
        edm_pipeline(str(write_edm(tmp_path / "a.pkl", small, "CLIPPrecond")))


def test_other_noise_levels_of_iddpm_are_refused(tmp_path):
    data = golden("edm_adm_iddpm")
    data["param/u"] = data["param/u"] * 1.01
    with pytest.raises(ValueError, match="other noise levels than iDDPM's"):
        edm_pipeline(str(write_edm(tmp_path / "a.pkl", data, "iDDPMPrecond")))


# ---------------------------------------------------------------------- hostile and damaged files

# Of AMED's reader, which has this machine: what names or does something that is refused before anything is looked for.
SHARED = [name for name in HOSTILE if HOSTILE[name][1].startswith(("names", "has the inst", "instr", "damaged", "is no p", "call", r"sets the state of a Name"))
          and name not in ("what may only be mentioned", "nothing", "text", "protocol 0", "zip archive")]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_hostile_pickles(folder, capsys, name):
    make, message = HOSTILE[name]
    never, file = folder / "never", folder / "in" / "a.pkl"
    file.write_bytes(make(str(never)))
    assert "nothing of it was executed" in convert_refused(file, folder, capsys)
    assert not never.exists()
    with pytest.raises(ValueError, match=message):
        read_edm_pickle(file)


PERSISTENT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
NUMPY = b"cnumpy\ndtype\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is no pickle"),
        (b"PK\x03\x04" + bytes(40), "is no pickle"),
        (pickle.dumps({"ema": 1}, 0), "is no pickle"),
        (pickle.dumps({"G_ema": 1}), "holds no network as its 'ema'"),
        (pickle.dumps({"ema": {"model": 1}}), "holds no network as its 'ema'"),
        (pickle.dumps([1]), "holds no network as its 'ema'"),
        (pickled(PERSISTENT, b"}\x85R"), "another form than version 6"),
        (pickled(NUMPY, b"\x8c\x02O8\x89\x88\x87R"), "a NumPy number of the type 'O8'"),
        (pickled(NUMPY, b"K\x01\x89\x88\x87R"), "a NumPy number of the type 1"),
        (pickled(b"cnumpy.core.multiarray\nscalar\n", b"NC\x01a\x86R"), "a NumPy number without a type"),
        (pickled(b"cnumpy.core.multiarray\nscalar\n", NUMPY, b"\x8c\x02f8\x89\x88\x87RC\x01a\x86R"), "no f8"),
        (pickled(NUMPY, b"\x8c\x02f8\x89\x88\x87R}\x8c\x01aK\x01sb"), "sets the state"),
        (pickled(b"ctorch.nn.modules.container\nModuleDict\n)\x81(K\x01tb"), "sets the state"),
    ],
)
def test_pickles_that_are_no_edm_network(folder, capsys, content, message):
    file = folder / "in" / "a.pkl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_edm_pickle(file)
    convert_refused(file, folder, capsys)


def test_code_in_the_place_of_weights(folder, capsys, small):
    never, wrapper = folder / "never", make_wrapper(small)
    torch.save(Calls(os.mkdir, str(never)), folder / "bytes", _use_new_zipfile_serialization=False)

    class Weight:
        def __reduce__(self):
            storage = Calls(torch.storage._load_from_bytes, (folder / "bytes").read_bytes())
            shape = tuple(small["param/model.map_layer0.bias"].shape)
            return torch._utils._rebuild_tensor_v2, (storage, 0, shape, (1,), False, {})

    wrapper.model.map_layer0._parameters["bias"] = Weight()
    file = folder / "in" / "a.pkl"
    file.write_bytes(snapshot_bytes(wrapper))
    assert "names 'posix.mkdir', which is refused" in convert_refused(file, folder, capsys)
    assert not never.exists()


def test_every_cut_of_a_file(folder, capsys, small):
    whole, file = snapshot_bytes(make_wrapper(small)), folder / "in" / "a.pkl"
    for cut in range(1, len(whole), len(whole) // 40):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or cut short"):
            read_edm_pickle(file)


def test_too_large_and_too_many_instructions(folder, small, monkeypatch):
    file = write_edm(folder / "in" / "a.pkl", small)
    monkeypatch.setattr("pipelines.conversion.files.MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1000 instructions"):
        read_edm_pickle(file)
    monkeypatch.setattr("pipelines.conversion.files.MAX_PICKLE_BYTES", 1000)
    with pytest.raises(ValueError, match="is larger than"):
        read_edm_pickle(file)
