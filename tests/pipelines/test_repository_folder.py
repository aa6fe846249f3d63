# SPDX-License-Identifier: Apache-2.0
"""Folders of families load here without their code, and anywhere by the code in them, with the same weights and the same images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMDPMSolverMultistepScheduler, UNet2DModel
from huggingface_hub import HfApi

from ld3_diffusers import LD3Scheduler
from pipelines.adm import ADMClassifier, ADMPipeline, ADMUNet2DModel
from pipelines.edm import EDMPipeline, EDMUNet2DModel
from pipelines.ldm import LatentDiffusionPipeline, LDMClassEmbedder
from pipelines.repository import load_family, new_folder, save_repository
from training.teacher import load_teacher

from .ldm_networks import conditional, vq


ROOT = Path(__file__).parents[2]
BLOCKS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "layers_per_block": 1,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "sample_size": 8,
}


def edm():
    unet = EDMUNet2DModel(sample_size=8, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
    return EDMPipeline(unet, EDMDPMSolverMultistepScheduler(sigma_data=0.5))


def consistency():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    return EDMPipeline(unet, EDMDPMSolverMultistepScheduler(sigma_data=0.5), timestep_scale=1000.0)


def adm():
    unet = ADMUNet2DModel(
        **BLOCKS, up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), out_channels=6, upsample_type="resnet",
        num_attention_heads=2, num_class_embeds=4, attn_norm_num_groups=32,
    )  # fmt: skip
    classifier = ADMClassifier(**BLOCKS, num_classes=4, attention_head_dim=32)
    return ADMPipeline(unet, DDIMScheduler(beta_schedule="linear"), classifier)


def ldm():
    return LatentDiffusionPipeline(vq(), conditional(), DDIMScheduler(clip_sample=False), LDMClassEmbedder(4, 24))


FAMILIES = {"edm": edm, "consistency": consistency, "adm": adm, "ldm": ldm}
CALLS = {"edm": {}, "consistency": {}, "adm": {"class_labels": 1, "guidance_scale": 2.0}, "ldm": {"class_labels": 2, "guidance_scale": 3.0}}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    pipe = FAMILIES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt", **CALLS[name]
    ).images


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", ["repository", "plain"])
def test_loads_here_by_its_own_classes(tmp_path, name, how):
    pipe = make(name)
    save_repository(pipe, tmp_path / "a") if how == "repository" else pipe.save_pretrained(tmp_path / "a")
    for file in (tmp_path / "a").rglob("*.py"):  # which is not what is loaded
        file.write_text("raise SystemExit('code of the folder was run')")
    loaded = load_teacher(str(tmp_path / "a"))
    assert type(loaded) is type(pipe)
    assert {n: type(part) for n, part in loaded.components.items()} == {
        n: type(part) for n, part in pipe.components.items()
    }
    assert torch.equal(images(loaded, name), images(pipe, name))
    assert loaded.config["_name_or_path"] == str(tmp_path / "a")


ANYWHERE = """
import sys, torch
from diffusers import DiffusionPipeline
call = eval(sys.argv[2])
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not {"pipelines", "training", "ld3_diffusers"} & set(sys.modules)
torch.save(pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images, sys.argv[3])
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_loads_without_this_project_by_the_code_in_it(tmp_path, name):
    pipe = make(name)
    save_repository(pipe, tmp_path / "a")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert type(loaded).__module__.startswith("diffusers_modules.")
    assert torch.equal(images(loaded, name), images(pipe, name))
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "a")


@pytest.mark.slow
def test_loads_in_a_process_that_does_not_know_this_project(tmp_path):
    save_repository(make("ldm"), tmp_path / "a")
    arguments = [str(tmp_path / "a"), repr(CALLS["ldm"]), str(tmp_path / "images.pt")]
    subprocess.run(
        [sys.executable, "-c", ANYWHERE, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True
    )
    assert torch.equal(torch.load(tmp_path / "images.pt"), images(make("ldm"), "ldm"))


@pytest.mark.parametrize("name", FAMILIES)
def test_family_files_are_custom_pipelines(tmp_path, name):
    pipe, file = make(name), ROOT / "pipelines" / f"{'edm' if name == 'consistency' else name}.py"
    pipe.save_pretrained(tmp_path / "a")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "a", custom_pipeline=str(file), trust_remote_code=True)
    assert torch.equal(images(loaded, name), images(pipe, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_from_the_hub(tmp_path, hub, name):
    pipe = make(name)
    save_repository(pipe, tmp_path / "a")
    repo_id = f"user/teacher-{name}"
    api = HfApi(hub.endpoint, token=hub.token)
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path / "a")
    hub.requests.clear()
    loaded = load_teacher(repo_id)
    assert torch.equal(images(loaded, name), images(pipe, name))
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert "model_index.json" in fetched[0] and not any(".py" in request for request in fetched)
    anywhere = DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)
    assert torch.equal(images(anywhere, name), images(pipe, name))


def test_what_is_of_no_family_is_left_to_diffusers(tmp_path):
    assert load_family(str(ROOT / "examples" / "teachers" / "fashion-sd")) is None


def test_learned_schedulers_come_along(tmp_path):
    pipe = make("edm")
    pipe.scheduler = LD3Scheduler.from_config(pipe.scheduler.config, solver="ipndm")
    save_repository(pipe, tmp_path / "a")
    loaded = load_family(str(tmp_path / "a"))
    assert type(loaded.scheduler) is LD3Scheduler and torch.equal(images(loaded, "edm"), images(pipe, "edm"))


def test_dtype_and_variant(tmp_path):
    make("consistency").save_pretrained(tmp_path / "a", variant="fp16")
    loaded = load_family(str(tmp_path / "a"), variant="fp16", torch_dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16 and loaded.config.timestep_scale == 1000
    with pytest.raises(ValueError, match="has the variant 'bf16'"):
        load_family(str(tmp_path / "a"), variant="bf16")


@pytest.mark.parametrize(
    "part, entry, message",
    [
        ("unet", ["os", "system"], "the unet is a 'system' of 'os', which is not known here"),
        ("unet", ["diffusers", "DiffusionPipeline"], "is not known here"),
        ("unet", ["diffusers", "utils"], "is not known here"),
        ("unet", ["somewhere.else", "UNet2DModel"], "is not known here"),
        ("scheduler", [["a"], {}], "names no class of the scheduler"),
        ("scheduler", None, "names no scheduler"),
        ("scheduler", [None, None], "names no class of the scheduler"),
        ("scheduler", ["diffusers", "UNet2DModel"], "which is not known here"),
        ("unet", [None, None], "names no class of the unet"),
        ("unet", ["adm", "ADMClassifier"], "the unet is a 'ADMClassifier' of 'adm', which is not known here"),
        ("unet", ["diffusers", "DDIMScheduler"], "which is not known here"),
        ("timestep_scale", "abc", "has 'abc' for timestep_scale, which is a number"),
        ("timestep_scale", [1000], "has \\[1000\\] for timestep_scale"),
    ],
)
def test_parts_of_unknown_classes_are_refused(tmp_path, part, entry, message):
    make("consistency").save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: entry}))
    with pytest.raises(ValueError, match=message):
        load_family(str(tmp_path / "a"))


def test_a_missing_part_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    make("consistency").save_pretrained(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / "unet")
    monkeypatch.chdir(tmp_path)  # where `teacher/unet` has the form of a repository's name
    with pytest.raises(ValueError, match="'teacher' has no folder 'unet'; is it complete"):
        load_family("teacher")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        save_repository(make("consistency"), tmp_path / "a")
    with pytest.raises(ValueError, match="is none of EDMPipeline"):
        save_repository(
            DiffusionPipeline.from_pretrained(ROOT / "examples" / "teachers" / "fashion-sd"), tmp_path / "b"
        )
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["mine"]


def test_links_and_dots_are_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    for name, real in (("link", "real"), ("dangling", "later"), ("a/../b", "b")):
        save_repository(make("consistency"), name)
        assert load_family(str(tmp_path / real)).config.timestep_scale == 1000
    assert sorted(os.listdir()) == ["b", "dangling", "later", "link", "real"]
    with pytest.raises(ValueError, match="'new/..' is not an empty folder"):
        save_repository(make("consistency"), "new/..")
    assert not Path("new").exists()


def test_folders_that_cannot_be_made_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "disk")
        with pytest.raises(ValueError, match="is a mount point, which cannot be replaced"):
            new_folder(tmp_path / "disk")
    with (
        monkeypatch.context() as patch
    ):  # the folder itself may be written to, not the one that it would be renamed in
        patch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
        with pytest.raises(ValueError, match="cannot write into"):
            new_folder(tmp_path / "disk")
        with pytest.raises(ValueError, match="cannot write into"):
            new_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write into .*file'"):
        new_folder(tmp_path / "file" / "a")


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt(*os.listdir(tmp_path))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="^.a.partial$"):
        patch.setattr("pipelines.repository.shutil.copyfile", killed)
        save_repository(make("consistency"), tmp_path / "a")
    assert os.listdir(tmp_path) == []
    (tmp_path / ".a.partial").mkdir()  # by what cannot be caught
    (tmp_path / ".a.partial" / "old").touch()
    save_repository(make("consistency"), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and not (tmp_path / "a" / "old").exists()
