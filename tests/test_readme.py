# SPDX-License-Identifier: Apache-2.0
"""What the README tells a user to type is run here, the long commands with fewer pairs and steps."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ld3_diffusers import LD3Scheduler, find_schedules, load_scheduler
from pipelines import convert
from tests.pipelines.edm_files import golden, write_edm
from tests.tiny_pipelines import PIPELINES
from training import make_reference
from training.references import load_reference


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODULES = ["training.make_teacher_set", "training.train_ld3", "training.publish"]
MORE_MODULES = [
    "training.search_gits",
    "training.search_oss",
    "training.sample",
    "training.evaluate",
]  # for fashion-flux
# Recipe: the small teacher that takes the place of its own one, and what else the recipe says that this has not. A Flux with random
# weights is not only fast: its few samples have no outliers, so that a learned schedule wins on any of them.
STAND_INS = {"fashion-flux": ("tiny-flux", []), "sd15": ("tiny-sd", ["--variant="]), "flux-dev": ("tiny-flux", [])}
SHORTER = {
    "tiny-sd": {
        "training.make_teacher_set": ["--num_samples", "32"],
        "training.train_ld3": ["--nfe", "5", "--num_train", "22", "--num_valid", "10"],
        "training.publish": ["--nfe", "5", "--num_samples", "24"],
    },
    "tiny-flux": {
        "training.make_teacher_set": ["--num_samples", "32", "--max_sequence_length", "16"],
        "training.train_ld3": ["--nfe", "5", "--num_train", "22", "--num_valid", "10"],
        "training.publish": ["--nfe", "5", "--num_samples", "24"],
        "training.search_gits": ["--nfe", "5", "--num_train", "8", "--num_valid", "4", "--num_grid_points", "12"],
        "training.search_oss": ["--nfe", "5", "--num_train", "4", "--num_valid", "4", "--num_grid_points", "12"],
        "training.sample": ["--seeds", "0-15", "--max_sequence_length", "16"],
        "training.evaluate": ["--seeds", "0-15", "--max_sequence_length", "16", "--metrics", "mse", "--nfe", "5"],
    },
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(recipe, of_curves=False):
    """Module and arguments of the programs, as the README gives them for a recipe; those about curves apart."""
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if f"/{recipe}.yaml" in line]
    lines = [line for line in lines if any("/curve" in word or word == "--curve" for word in line) == of_curves]
    return [(line[line.index("-m") + 1], line[line.index("-m") + 2 :]) for line in lines]


def instead(recipe, module, folder):
    """Arguments that put a small teacher, little work and a temporary folder in the place of a recipe's own."""
    teacher, more = STAND_INS[recipe]
    places = {
        "training.make_teacher_set": ["--output_dir", folder / "pairs"],
        "training.train_ld3": ["--teacher_set", folder / "pairs", "--output_dir", folder / "schedules"],
        "training.publish": ["--schedules", folder / "schedules"],
        "training.search_gits": ["--teacher_set", folder / "pairs", "--output_dir", folder / "gits"],
        "training.search_oss": ["--teacher_set", folder / "pairs", "--output_dir", folder / "oss"],
        "training.sample": ["--scheduler", folder / "schedules" / "published", "--output_dir", folder / "samples"],
        "training.evaluate": ["--schedulers", folder / "schedules" / "published", "stock"]
        + ["--output_dir", folder / "evaluation"],
    }[module]
    given = [*map(str, places), *SHORTER[teacher][module], *more]
    source = folder / teacher if teacher.startswith("tiny") else ROOT / "examples" / "teachers" / teacher
    given += ["--teacher", str(source), "--mixed_precision", "no"]
    if module == "training.make_teacher_set":
        given += ["--resolution", "32", "--guidance_scale", "3", "--num_inference_steps", "20", "--dataset_name="]
        given += ["--prompts_file", "examples/prompts.txt"]
    if module == "training.train_ld3":
        given += ["--report_to", "none"]
    if module == "training.publish":
        given += ["--dataset_name=", "--prompts_file", "examples/prompts_unseen.txt", "--base_model", BASE_MODEL]
    return given


def test_the_readme_has_every_program_for_every_recipe():
    for recipe in STAND_INS:
        more = MORE_MODULES if recipe == "fashion-flux" else []
        assert [module for module, _ in commands(recipe)] == MODULES + more


@pytest.mark.slow
@pytest.mark.parametrize("recipe", STAND_INS)
def test_the_commands_from_start_to_repository(recipe, tmp_path, hub, monkeypatch):
    monkeypatch.chdir(ROOT)
    hub.tokens["hf_you"] = "you"
    for kind in ("sd", "flux"):
        PIPELINES[kind]()[0].save_pretrained(tmp_path / f"tiny-{kind}")
    for module, given in commands(recipe):
        given = given + instead(recipe, module, tmp_path)
        given += ["--hub_token", "hf_you"] if "--push_to_hub" in given else []
        if recipe == "fashion-flux" and module == "training.train_ld3":  # once through the launcher
            launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", module, *given]
            subprocess.run(launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=600)
        else:
            importlib.import_module(module).main(given)
    published = LD3Scheduler.from_pretrained(tmp_path / "schedules" / "published")
    (nfe,) = published.learned_counts
    if recipe == "fashion-flux":
        assert not hub.repos
        for search in ("gits", "oss"):
            assert LD3Scheduler.from_pretrained(tmp_path / search).learned_counts == [5]
        assert len(list((tmp_path / "samples" / "images").glob("*.png"))) == 16
        assert (tmp_path / "samples" / "grid.png").is_file()
        results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
        names = {row["name"] for row in results["rows"]}
        assert results["subject"] == "published" and {"published", "UniPC", "FlowMatchEuler"} <= names
        return
    (repository,) = hub.repos
    assert repository == f"you/{recipe}-schedules"
    assert LD3Scheduler.from_pretrained(repository).config.schedules == published.config.schedules
    (found,) = find_schedules(base_model=BASE_MODEL, nfe=nfe)
    assert found.repo_id == repository


@pytest.mark.slow
def test_the_commands_that_learn_and_refine_a_curve(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    PIPELINES["flux"]()[0].save_pretrained(tmp_path / "tiny-flux")
    made = commands("fashion-flux")[0]
    make_teacher_set = importlib.import_module(made[0])
    make_teacher_set.main([*made[1], *instead("fashion-flux", made[0], tmp_path)])
    shorter = [
        "--num_train",
        "4",
        "--num_valid",
        "4",
        "--report_to",
        "none",
        "--max_train_steps",
        "1",
        "--allow_worse",
    ]
    (learn, of_curve), (refine, of_refined) = commands("fashion-flux", of_curves=True)
    assert "--curve" in of_curve and of_refined[of_refined.index("--init") + 1] == of_curve[-1]
    given = ["--teacher", str(tmp_path / "tiny-flux"), "--teacher_set", str(tmp_path / "pairs"), *shorter]
    assert ["3", "10"] == of_curve[of_curve.index("--nfe") + 1 : of_curve.index("--num_train")]
    importlib.import_module(learn).main(
        [*of_curve, *given, "--nfe", "4", "6", "--output_dir", str(tmp_path / "curve")]
    )
    importlib.import_module(refine).main(
        [*of_refined, *given, "--init", str(tmp_path / "curve"), "--output_dir", str(tmp_path / "refined")]
    )
    assert LD3Scheduler.from_pretrained(tmp_path / "curve").served_counts == [4, 5, 6]
    assert LD3Scheduler.from_pretrained(tmp_path / "refined").learned_counts == [4, 6]


@pytest.mark.slow
def test_the_commands_that_learn_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    little = {
        "training.make_teacher_set": ["--num_samples", "8", "--num_inference_steps", "8", "--train_batch_size", "4"]
        + ["--output_dir", str(tmp_path / "pairs")],
        "training.train_amed": ["--teacher_set", str(tmp_path / "pairs"), "--output_dir", str(tmp_path / "amed")]
        + ["--nfe", "4", "--num_train", "4", "--num_valid", "4", "--num_train_epochs", "1", "--allow_worse"]
        + ["--num_intermediate_points", "1", "--report_to", "none"],
    }
    given = commands("fashion-sd")
    assert [module for module, _ in given] == list(little)
    for module, arguments in given:
        importlib.import_module(module).main([*arguments, *little[module]])
    scheduler = load_scheduler(tmp_path / "amed")
    assert scheduler.learned_counts == [4] and set(scheduler.predictors) == {4}


@pytest.mark.slow
def test_the_commands_from_a_public_checkpoint_to_a_table(tmp_path, monkeypatch):
    """A pickle as EDM writes them, of a small network, in the place of the one that would be fetched."""
    monkeypatch.chdir(ROOT)
    checkpoint = write_edm(tmp_path / "edm-cifar10-32x32-uncond-vp.pkl", golden("edm_ddpmpp_uncond"))
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if "-m pipelines.convert" in line]
    given = shlex.split(line)[3:]
    assert given[1:3] == [checkpoint.name, "--download"]
    convert.main([given[0], str(checkpoint), *given[3:], "--output_dir", str(tmp_path / "teacher")])
    statistics = ROOT / "examples" / "teachers" / "reference" / "statistics.npz"
    little = {
        "training.make_teacher_set": ["--num_samples", "12", "--num_inference_steps", "8"]
        + ["--output_dir", str(tmp_path / "pairs")],
        "training.train_ld3": ["--nfe", "4", "--num_train", "8", "--num_valid", "4", "--loss", "l2", "--allow_worse"]
        + ["--teacher_set", str(tmp_path / "pairs"), "--output_dir", str(tmp_path / "schedules")]
        + ["--report_to", "none"],
        "training.evaluate": ["--schedulers", str(tmp_path / "schedules"), "--nfe", "4", "--seeds", "0-127"]
        + ["--feature_network", "examples/teachers/fashion_classifier.py:features_of_images"]
        + ["--reference", str(statistics), "--output_dir", str(tmp_path / "evaluation")],
    }
    programs = commands("cifar10")
    assert [module for module, _ in programs] == list(little)
    for module, arguments in programs:
        importlib.import_module(module).main([*arguments, *little[module], "--teacher", str(tmp_path / "teacher")])
    table = (tmp_path / "evaluation" / "table.md").read_text()
    assert "9.31" in table and "Not like for like" in table


def test_the_command_that_makes_a_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for i, pixels in enumerate(torch.randint(256, (100, 32, 32, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    (line,) = [
        shlex.split(line) for block in blocks("bash") for line in block.splitlines() if "make_reference" in line
    ]
    given = line[line.index("training.make_reference") + 1 :]
    make_reference.main([*given, "--images", str(tmp_path), "--output", str(tmp_path / "photos.npz")])
    assert load_reference(tmp_path / "photos.npz").moments.count == 100


@pytest.mark.slow
def test_the_python_examples(monkeypatch, hub):
    monkeypatch.chdir(ROOT)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["image"].size == (32, 32)


@pytest.mark.slow
def test_the_example_script():
    command = [sys.executable, "examples/import_published_schedule.py"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    assert "LD3: timesteps [999.0, 766.06, 480.03, 182.96]" in result.stdout
    assert "AYS: timesteps [999.0, 850" in result.stdout
