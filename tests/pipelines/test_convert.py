# SPDX-License-Identifier: Apache-2.0
"""The conversion program on each family: folders that load and compute the same, records of their origin, and refusals without a trace."""

import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from ld3_diffusers import LD3Scheduler
from pipelines.conversion.files import identify, read_state_dict
from pipelines.convert import CONSISTENCY_TIMESTEP_SCALE, main
from pipelines.edm import EDMUNet2DModel
from pipelines.repository import load_family
from tests.ld3_diffusers.test_inert_pickle import Calls

from .edm_files import golden, write_edm
from .ldm_networks import compvis_unet, compvis_vae, conditional, vq
from .test_edm_conversion import convert_refused, folder  # noqa: F401


def public(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix("param/"): torch.tensor(value) for key, value in golden(name).items() if key.startswith("param/")}  # fmt: skip


def ldm_checkpoint() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parts = {
        "model.diffusion_model.": compvis_unet(conditional(), [False, True]),
        "first_stage_model.": compvis_vae(vq()),
    }
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    return {**state, "cond_stage_model.embedding.weight": torch.randn(5, 24), "betas": torch.linspace(1e-4, 2e-2, 10)}


# ---------------------------------------------------------------------- the families


@pytest.mark.parametrize("how", ["fp32", "fp16"])
def test_edm(tmp_path, capsys, how):
    data = golden("edm_ddpmpp_cond")
    file = write_edm(tmp_path / "edm-tiny.pkl", data)
    main(["edm", str(file), "--output_dir", str(tmp_path / "a" / "b"), "--dtype", how])
    pipe = load_family(str(tmp_path / "a" / "b"))
    assert type(pipe.unet) is EDMUNet2DModel and os.listdir(tmp_path / "a") == ["b"]
    given = {key: torch.tensor(data[f"EDMPrecond/{key}"]) for key in ("x", "sigma", "class_labels", "out_f32")}
    found = pipe.unet.float().requires_grad_(False).denoise(given["x"], given["sigma"], given["class_labels"])
    tolerance = 5e-6 if how == "fp32" else 5e-3
    assert float((found - given["out_f32"]).abs().max() / given["out_f32"].abs().max()) < tolerance
    stored = safetensors.torch.load_file(tmp_path / "a" / "b" / "unet" / "diffusion_pytorch_model.safetensors")
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[how]
    assert stored["map_layer0.weight"].dtype == dtype
    facts = json.loads((tmp_path / "a" / "b" / "conversion.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts["sources"] == [{"name": "edm-tiny.pkl", "size": file.stat().st_size, "sha256": sha256}]
    assert facts["arguments"] == {"dtype": how} and str(tmp_path) not in json.dumps(facts)
    assert sha256 in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_adm(tmp_path, guided):
    torch.save(public("guided_unet_cond"), tmp_path / "unet.pt")
    torch.save(public("guided_classifier_attention"), tmp_path / "classifier.pt")
    unet, classifier = (golden(name) for name in ("guided_unet_cond", "guided_classifier_attention"))
    size = unet["config"]["kwargs"]["image_size"]
    width = unet["config"]["kwargs"]["num_head_channels"]
    given = ["--image_size", str(size), "--num_head_channels", str(width)]
    given += ["--classifier", str(tmp_path / "classifier.pt")] if guided else []
    main(["adm", str(tmp_path / "unet.pt"), "--output_dir", str(tmp_path / "a"), *given])
    pipe = load_family(str(tmp_path / "a"))
    x, t, y = (torch.tensor(unet[f"raw/{key}"]) for key in ("x", "timesteps", "y"))
    found, expected = pipe.unet(x, t, class_labels=y).sample, torch.tensor(unet["raw/out_f32"])
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-6
    assert (pipe.classifier is not None) == guided and pipe.scheduler.config.clip_sample
    if guided:
        x, t = (torch.tensor(classifier[f"raw/{key}"]) for key in ("x", "timesteps"))
        logits, expected = pipe.classifier(x, t), torch.tensor(classifier["raw/logits_f32"])
        assert float((logits - expected).abs().max() / expected.abs().max()) < 5e-6
    facts = json.loads((tmp_path / "a" / "conversion.json").read_text())
    assert len(facts["sources"]) == 1 + guided and facts["arguments"]["num_head_channels"] == width


def test_adm_of_another_noise_schedule(tmp_path, capsys):
    torch.save(public("guided_unet_cond"), tmp_path / "unet.pt")
    given = ["adm", str(tmp_path / "unet.pt"), "--image_size", "16", "--num_head_channels", "32"]
    given += ["--noise_schedule", "cosine", "--output_dir", str(tmp_path / "a")]
    with pytest.raises(SystemExit):
        main([*given, "--noise_path", "vp_linear"])
    assert "is that of linear betas" in capsys.readouterr().err and not (tmp_path / "a").exists()
    main(given)
    found = load_family(str(tmp_path / "a")).scheduler
    t = torch.tensor([0, 500, 999]) + 1.0
    cosine = (torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    assert torch.allclose(found.alphas_cumprod[[0, 500]], cosine[:2], rtol=1e-3)


def test_adm_on_the_path_of_ameds_authors(tmp_path):
    torch.save(public("guided_unet_cond"), tmp_path / "unet.pt")
    given = ["--image_size", "16", "--num_head_channels", "32", "--noise_path", "vp_linear"]
    main(["adm", str(tmp_path / "unet.pt"), "--output_dir", str(tmp_path / "a"), *given])
    scheduler = LD3Scheduler.from_config(load_family(str(tmp_path / "a")).scheduler.config, solver="unipc")
    path = scheduler.path
    ends = [float(path.sigma_edm(torch.tensor(t, dtype=torch.float64))) for t in (path.t_max, path.t_min)]
    assert ends == pytest.approx([152.2, 0.0105], rel=2e-3) and scheduler.config.clip_sample
    scheduler.set_timesteps(4)  # the grid of counts that were not learned, which Diffusers does not have for this path
    assert float(scheduler.timesteps[0]) == 999


@torch.no_grad()
def test_consistency(tmp_path):
    data = golden("cm_unet_uncond")
    torch.save(
        public("cm_unet_uncond"), tmp_path / "cm.pt", _use_new_zipfile_serialization=False
    )  # as before torch 1.6
    given = ["--image_size", str(data["config"]["kwargs"]["image_size"])]
    given += ["--num_head_channels", str(data["config"]["kwargs"]["num_head_channels"])]
    main(["consistency", str(tmp_path / "cm.pt"), "--output_dir", str(tmp_path / "a"), *given])
    pipe = load_family(str(tmp_path / "a"))
    assert pipe.config.timestep_scale == CONSISTENCY_TIMESTEP_SCALE == 1000
    x, t = torch.tensor(data["raw/x"]), torch.tensor(data["raw/timesteps"])
    found, expected = pipe.unet(x, t).sample, torch.tensor(data["raw/out_f32"])
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


class ModelCheckpoint:
    """A class of Lightning, whose state a checkpoint keeps."""

    def __init__(self):
        self.best_model_score = np.float64(0.5)


class AttributeDict(dict):
    pass


@pytest.fixture
def lightning():
    """Lightning's modules by name, which exist only while a checkpoint is written."""
    places = {
        "pytorch_lightning.callbacks.model_checkpoint": ModelCheckpoint,
        "pytorch_lightning.utilities.parsing": AttributeDict,
    }
    for module, kind in places.items():
        kind.__module__, kind.__qualname__ = module, kind.__name__
        for depth in range(1, module.count(".") + 2):
            sys.modules[".".join(module.split(".")[:depth])] = types.ModuleType(module)
        setattr(sys.modules[module], kind.__name__, kind)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_lightning"]:
        del sys.modules[name]


def test_ldm_with_what_lightning_keeps(tmp_path, lightning):
    content = {
        "state_dict": ldm_checkpoint(),
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "state": ModelCheckpoint()}},
        "hyper_parameters": AttributeDict(a=1),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "model.ckpt")
    main(["ldm", str(tmp_path / "model.ckpt"), "--output_dir", str(tmp_path / "a"), "--image_size", "16"])
    pipe = load_family(str(tmp_path / "a"))
    assert torch.equal(
        pipe.class_embedder.embedding.weight, content["state_dict"]["cond_stage_model.embedding.weight"]
    )
    assert torch.allclose(pipe.scheduler.betas, content["state_dict"]["betas"], rtol=1e-6)


def test_safetensors(tmp_path):
    state = {name: tensor.contiguous() for name, tensor in ldm_checkpoint().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    found = read_state_dict(tmp_path / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


# ---------------------------------------------------------------------- refusals


def torch_file(content, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def archive(content, compression=zipfile.ZIP_STORED, **others) -> bytes:
    """An archive of torch.save, packed again."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_file(content))) as source,
        zipfile.ZipFile(stream, "w", compression) as target,
    ):
        for member in source.infolist():
            target.writestr(member.filename, others.get(member.filename.split("/")[-1], source.read(member)))
    return stream.getvalue()


def nested_key() -> bytes:
    """A dict whose key is a tuple of the same tuple twice, and so on."""
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    return b"\x80\x02})" + doubled + b"K\x01s."


def nested_list() -> bytes:
    return b"\x80\x02]" + b"".join(
        b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)
    )


def old_file(content: bytes) -> bytes:
    """A file of torch.save before 1.6 with this pickle as what was saved."""
    whole = torch_file({}, _use_new_zipfile_serialization=False)
    stream = io.BytesIO(whole)
    for _ in range(3):
        list(pickletools.genops(stream))
    return whole[: stream.tell()] + content + pickle.dumps([], 2)


def encrypted(content: bytes) -> bytes:
    """An archive whose directory says that its first part, data.pkl, is encrypted."""
    entry = content.index(b"PK\x01\x02")
    return content[: entry + 8] + b"\x01" + content[entry + 9 :]


def expanded(shape):
    return torch.zeros(1).expand(shape)


TENSORS = {
    "code in an archive": (lambda path: torch_file(Calls(os.mkdir, path)), "names 'posix.mkdir'"),
    "code among tensors": (lambda path: torch_file({"a": torch.zeros(2), "b": Calls(os.mkdir, path)}), "names 'posix.mkdir'"),
    "code in an old file": (lambda path: torch_file(Calls(os.mkdir, path), _use_new_zipfile_serialization=False), "names 'posix.mkdir'"),
    "eval in an archive": (lambda path: torch_file(Calls(eval, f"open({path!r}, 'w')")), "names '.*eval'"),
    "a builtin in the namesake's place": (lambda path: torch_file(Calls(getattr, defaultdict, "fromkeys")), "names '"),
    "plain pickle": (lambda path: pickle.dumps(Calls(os.mkdir, path)), "neither a file of torch.save nor"),
    "pickle code as data.pkl": (lambda path: archive([1], **{"data.pkl": pickle.dumps(Calls(os.mkdir, path), 2)}), "names 'posix.mkdir'"),
    "zip bomb": (lambda path: archive({"a": torch.zeros(10**6)}, zipfile.ZIP_DEFLATED), "compressed parts"),
    "another archive": (lambda path: archive_of({"model.ckpt": b"x"}), "unpack 'model.ckpt' from it"),
    "an empty archive": (lambda path: archive_of({}), "is neither|did not write"),
    "cut short": (lambda path: torch_file({"a": torch.zeros(10**5)})[:-1000], "is neither a file|is damaged"),
    "damaged": (lambda path: archive({"a": torch.zeros(2)}, **{"data.pkl": b"\x80\x02}q"}), "is damaged"),
    "no tensors": (lambda path: torch_file([1, 2]), "holds no state dict"),
    "nothing": (lambda path: torch_file({}), "holds no state dict"),
    "a number": (lambda path: torch_file({"a": 1}), "has a int as 'a', where a tensor must be"),
    "a number as name": (lambda path: torch_file({1: torch.zeros(2)}), "has a Tensor as 1"),
    "sparse": (lambda path: torch_file({"a": torch.eye(3).to_sparse()}), "no plain tensor|is damaged or refused"),
    "strides of zero": (lambda path: torch_file({"a": expanded((2**20, 2**20))}), "larger than the file"),
    "one storage, many names": (lambda path: torch_file(dict.fromkeys("abcdefgh", torch.zeros(1000))), "larger than the file"),
    "text": (lambda path: b"<html>", "neither a file of torch.save"),
    "empty": (lambda path: b"", "neither a file of torch.save"),
    "tuples that take forever to hash": (lambda path: archive([1], **{"data.pkl": nested_key()}), "hold more than 1000 values"),
    "in an old file": (lambda path: old_file(nested_key()), "hold more than 1000 values"),
    "wide tuples": (lambda path: archive([1], **{"data.pkl": b"\x80\x02})(" + b"K\x01" * 40 + b"tq\x00(" + b"h\x00" * 40 + b"ts."}), "hold more than 1000 values"),
    "lists that take forever to print": (lambda path: archive([1], **{"data.pkl": nested_list() + b")R."}), "calls what is no name"),
    "such lists for a storage": (lambda path: archive([1], **{"data.pkl": nested_list() + b"\x85Q."}), "storage in another form"),
    "encrypted": (lambda path: encrypted(torch_file({"a": torch.zeros(2)})), "is damaged"),
    "without values": (lambda path: torch_file({"a": torch.zeros(2, device="meta")}), "no plain tensor"),
    "another network": (lambda path: torch_file(OrderedDict(a=torch.zeros(2))), "input_blocks.0.0.weight is missing"),
}  # fmt: skip


def archive_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_and_damaged_files_of_tensors(folder, capsys, name):  # noqa: F811
    make, message = TENSORS[name]
    never, file = folder / "never", folder / "in" / "a.pt"
    file.write_bytes(make(str(never)))
    assert re.search(message, convert_refused(file, folder, capsys, "consistency"))
    assert not never.exists()


def test_the_hostile_files_would_have_been_executed(tmp_path):
    """The corpus is alive: Python's own loader runs it."""
    for name in ("code in an archive", "code in an old file", "eval in an archive"):
        never, file = tmp_path / "never", tmp_path / "a.pt"
        file.write_bytes(TENSORS[name][0](str(never)))
        torch.load(file, weights_only=False)
        assert never.exists(), name
        never.rmdir() if never.is_dir() else never.unlink()


def test_damaged_safetensors(folder, capsys):  # noqa: F811
    file = folder / "in" / "a.safetensors"
    file.write_bytes(safetensors.torch.save({"a": torch.zeros(100)})[:-10])
    assert "is a damaged .safetensors file" in convert_refused(file, folder, capsys, "consistency")


def test_refusals_of_arguments(folder, capsys):  # noqa: F811
    data = golden("edm_ddpmpp_uncond")
    file = write_edm(folder / "in" / "a.pkl", data)

    def refused(*arguments, family="edm") -> str:
        with pytest.raises(SystemExit) as exit:
            main([family, str(file), *arguments])
        assert exit.value.code == 2 and not (folder / "new").exists()
        return capsys.readouterr().err

    new = ("--output_dir", str(folder / "new"))
    assert "is not an empty folder" in refused("--output_dir", str(folder / "in"))
    assert "--size is 3" in refused(*new, "--size", "3")
    assert f"sha256 {identify(file).sha256}" in refused(*new, "--sha256", "00")
    assert "--num_heads must be at least 1" in refused(*new, "--num_heads", "0", family="adm")
    assert "exclude each other" in refused(*new, "--num_heads", "1", "--num_head_channels", "8", family="ldm")
    assert "neither a file of torch.save" in refused(*new, family="ldm")
    file = folder / "in" / "nothing.pkl"
    assert "there is no file" in refused(*new)
    assert "'nothing.pkl' is neither an http" in refused(*new, "--download")


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch, capsys):  # noqa: F811
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    file = write_edm(folder / "in" / "a.pkl", golden("edm_ddpmpp_uncond"))
    monkeypatch.setattr("pipelines.repository.shutil.copyfile", full)
    assert "No space left on device" in convert_refused(file, folder, capsys)


def test_weights_that_cannot_be_written_are_told_in_words(folder, monkeypatch, capsys):  # noqa: F811
    def full(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: No space left on device")

    file = write_edm(folder / "in" / "a.pkl", golden("edm_ddpmpp_uncond"))
    monkeypatch.setattr("pipelines.edm.EDMUNet2DModel.save_pretrained", full)
    assert "cannot write " in convert_refused(file, folder, capsys)


SMALL_DISK = """
import resource, sys
from pipelines.convert import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # Python ignores the signal
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_full_disk_is_told_in_words(folder):  # noqa: F811
    file = write_edm(folder / "in" / "a.pkl", golden("edm_ddpmpp_uncond"))
    command = [sys.executable, "-c", SMALL_DISK, "edm", str(file), "--output_dir", str(folder / "out" / "converted")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and os.listdir(folder / "out") == []


@pytest.mark.parametrize(
    "family, state, options, message",
    [
        ("ldm", ldm_checkpoint, ("--num_head_channels", "1000"), "num_head_channels 1000 does not divide"),
        ("ldm", ldm_checkpoint, ("--image_size", "17"), "image_size 17 is not divisible by 2"),
        ("ldm", lambda: {**ldm_checkpoint(), "betas": -torch.ones(10)}, (), "betas are no list of numbers"),
        (
            "adm",
            lambda: public("guided_unet_cond"),
            ("--num_head_channels", "32", "--image_size", "17"),
            "17 is not div",
        ),
    ],
)
def test_impossible_numbers_are_refused_in_words(folder, capsys, family, state, options, message):  # noqa: F811
    torch.save(state(), folder / "in" / "a.pt")
    with pytest.raises(SystemExit) as exit:
        main([family, str(folder / "in" / "a.pt"), "--output_dir", str(folder / "out" / "a"), *options])
    assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(folder / "out") == []


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ZeroDivisionError, IndexError])
def test_what_building_a_network_raises_is_a_refusal(folder, capsys, monkeypatch, error):  # noqa: F811
    def fails(*_, **__):
        raise error("some shape")

    torch.save({"a": torch.zeros(2)}, folder / "in" / "a.pt")
    for name, family in (("adm_unet", "adm"), ("consistency_unet", "consistency")):
        monkeypatch.setattr(f"pipelines.convert.{name}", fails)
        message = convert_refused(folder / "in" / "a.pt", folder, capsys, family)
        assert "a.pt' makes no such network: some shape" in message
    monkeypatch.setattr("pipelines.conversion.ldm.pipeline_of", fails)
    assert "makes no latent diffusion: some shape" in convert_refused(folder / "in" / "a.pt", folder, capsys, "ldm")


@pytest.mark.slow
def test_as_a_program(tmp_path):
    file = write_edm(tmp_path / "a.pkl", golden("edm_ddpmpp_uncond"))
    command = [sys.executable, "-m", "pipelines.convert", "edm", str(file), "--output_dir", str(tmp_path / "a")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "EDMPipeline" in done.stdout and (tmp_path / "a" / "edm.py").is_file()
