# SPDX-License-Identifier: Apache-2.0
"""The comparison of examples/evaluation, from nothing to its tables, on a pipeline with random weights; and what its page tells to type."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.tiny_pipelines import PIPELINES


ROOT = Path(__file__).parent.parent
EVALUATION = ROOT / "examples" / "evaluation"
FEW = ["--num_train", "8", "--train_batch_size", "4", "--max_train_steps", "2"]
LITTLE = {
    "make_teacher_set": {"num_samples": 12, "num_inference_steps": 12, "max_sequence_length": 16},
    "train_ld3": {"num_train": 8, "num_valid": 4},
    "search_gits": {"num_train": 6, "num_valid": 4, "num_grid_points": 9},
    "search_oss": {"num_train": 2, "num_valid": 4, "num_grid_points": 9},
    "train_amed": {"num_train": 4, "num_valid": 4, "num_train_epochs": 1, "num_intermediate_points": 1}
    | {"discretization": "polynomial"},
    "evaluate": {"metrics": ["mse"], "teacher_steps": 12, "save_images": 2, "local_errors": False}
    | {"max_sequence_length": 16},
}


def little_recipe(name, teacher, folder, without=()):
    """A recipe of training/recipes with another teacher, little work, and its results in `folder`."""
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / f"{name}.yaml").read_text())
    recipe["common"]["pretrained_model_name_or_path"] = str(teacher)
    for program, little in LITTLE.items():
        if program not in recipe:
            continue
        recipe[program] |= {key: value for key, value in little.items() if key not in without}
        for key in ("output_dir", "teacher_set"):
            if key in recipe[program]:
                recipe[program][key] = recipe[program][key].replace(f"outputs/{name}", str(folder))
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def script(monkeypatch):
    """A program of examples/evaluation by name, as a module."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(EVALUATION))
    monkeypatch.setattr(importlib.import_module("compare_schedules"), "BUDGET", FEW)
    monkeypatch.setattr(importlib.import_module("compare_edm"), "LD3", FEW)
    return importlib.import_module


@pytest.mark.slow
def test_everyone_is_compared_and_a_second_run_finds_all_done(script, tmp_path, capfd):
    PIPELINES["flux"]()[0].save_pretrained(tmp_path / "tiny-flux")
    recipe = little_recipe("fashion-flux", tmp_path / "tiny-flux", tmp_path)
    arguments = ["--config", str(recipe), "--nfe", "4", "--num_samples", "6"]
    script("compare_schedules").main(arguments)
    first = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    names = {row["name"] for row in first["rows"]}
    searched = {f"GITS {solver}{kind}" for solver in ("UniPC", "iPNDM") for kind in ("", " rescored")}
    assert names == searched | {"LD3", "OSS Euler", "OSS UniPC", "DMN UniPC", "FlowMatchEuler", "FlowMatchHeun"} | {
        "UniPC",
        "DPM++ 2M",
        "DPM++ 2S",
    }
    assert first["subject"] == "LD3" and not first["absent"]

    capfd.readouterr()
    script("compare_schedules").main(arguments)
    assert "learning 4 evaluations" not in capfd.readouterr().err
    again = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert again["rows"] == first["rows"]


@pytest.mark.slow
def test_all_students_of_amed_are_compared(script, tmp_path):
    PIPELINES["sd"]()[0].save_pretrained(tmp_path / "tiny-sd")
    recipe = little_recipe("fashion-sd", tmp_path / "tiny-sd", tmp_path, without=["max_sequence_length"])
    script("compare_amed").main(["--config", str(recipe), "--nfe", "6", "--num_samples", "4"])
    results = json.loads((tmp_path / "evaluation" / "amed" / "results.json").read_text())
    students = ["AMED-Solver", "AMED iPNDM", "AMED DPM++", "AMED Euler", "AMED DPM-2"]
    kinds = ["per sample", "static", "bare stages"]
    names = {row["name"] for row in results["rows"]}
    assert names == {f"{student} {kind}" for student in students for kind in kinds} | {"LD3", "UniPC"} | {
        "DPM-2",
        "iPNDM",
        "DPM++",
        "Euler",
    }
    assert results["subject"] == "LD3"


@pytest.mark.slow
def test_everyone_is_compared_on_edms_home_ground(script, tmp_path):
    PIPELINES["edm"]()[0].save_pretrained(tmp_path / "tiny-edm")
    recipe = little_recipe("fashion-edm", tmp_path / "tiny-edm", tmp_path, without=["max_sequence_length"])
    script("compare_edm").main(["--config", str(recipe), "--nfe", "4", "5", "--num_samples", "6"])
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    searched = {f"GITS {solver}{kind}" for solver in ("UniPC", "iPNDM") for kind in ("", " rescored")}
    unlearned = {"Heun", "DPM++", "UniPC", "iPNDM", "DEIS", "Euler", "DPM++ 2M", "DPM++ 3M"}
    assert {row["name"] for row in results["rows"]} == {"LD3", "AMED iPNDM"} | searched | unlearned
    assert not results["absent"]


@pytest.mark.slow
def test_coefficients_and_the_curve_are_compared_with_what_came_before(script, tmp_path, monkeypatch):
    generalised = script("compare_generalised")
    monkeypatch.setattr(generalised, "CURVE", ["--curve", "--max_train_steps", "1"])
    monkeypatch.setattr(generalised, "REFINED", ["--max_train_steps", "1"])
    published = [
        "--recipe",
        "published",
        "--mode",
        "time",
        "--train_batch_size",
        "4",
        "--rounds_v1",
        "1",
        "--rounds_v2",
        "1",
    ]
    monkeypatch.setattr(generalised, "published", lambda *_: published)
    PIPELINES["flux"]()[0].save_pretrained(tmp_path / "tiny-flux")
    recipe = little_recipe("fashion-flux", tmp_path / "tiny-flux", tmp_path, without=["discretization"])
    generalised.main(["--config", str(recipe), "--nfe", "3", "4", "--num_samples", "6"])
    results = json.loads((tmp_path / "evaluation" / "generalised" / "results.json").read_text())
    learned = {"generalised", "curve", "curve refined", "times alone", "LD3 published"}
    searched = {"GITS UniPC rescored", "GITS iPNDM", "AMED iPNDM"}
    assert {row["name"] for row in results["rows"]} > learned | searched and results["subject"] == "generalised"
    # No analytical first step for flow models, and so no odd number of evaluations for AMED.
    assert [(missing["name"], missing["nfe"]) for missing in results["absent"]] == [("AMED iPNDM", 3)]


def test_costs_are_shown_as_shares_of_the_published_ones(script):
    cost = script("compare_cost")
    published = {"loss": 0.02, "share_of_farthest": 0.25, "evaluations": 2000.0, "seconds": 40.0}
    end = {"loss": 0.01, "share_of_farthest": 0.5, "evaluations": 1500.0, "seconds": 10.0, "iterations": 6}
    row = {"nfe": 4, "published": published, "default_reaches": None, "default_ends": end}
    header, rule, *lines = cost.table([row, {**row, "default_reaches": end}]).splitlines()
    assert {line.count("|") for line in (header, rule, *lines)} == {13}
    of_end = "10.00 (0.50) | 6 | 1,500 (0.750) | 10 (0.250)"
    assert lines[0] == f"| 4 | 20.00 (0.25) | 2,000 | 40 | not reached |  |  |  | {of_end} |"
    assert lines[1].count(of_end) == 2
    assert cost.distance_of(torch.tensor([1.0, 3.0])) == {"loss": 2.0, "share_of_farthest": 0.75}


@pytest.mark.slow
def test_costs_parts_and_robustness_are_measured(script, tmp_path, monkeypatch, capsys):
    """Each of the smaller programs once, on a Stable Diffusion with random weights."""
    cost, ablation, robustness = (script(name) for name in ("compare_cost", "ablation", "robustness"))
    of_published = [
        "--recipe",
        "published",
        "--mode",
        "time",
        "--rounds_v1",
        "1",
        "--rounds_v2",
        "1",
        "--num_train",
        "4",
    ]
    monkeypatch.setattr(script("compare_generalised"), "published", lambda *_: of_published)
    monkeypatch.setattr(cost, "UNSEEN", 4)
    monkeypatch.setitem(LITTLE["make_teacher_set"], "num_samples", 16)
    monkeypatch.setattr(robustness, "STRENGTHS", (0.7,))
    monkeypatch.setattr(robustness, "FINE", 6)
    ways = {name: ablation.WAYS[name] for name in ("times", ablation.SUBJECT)}
    monkeypatch.setattr(ablation, "WAYS", ways)
    PIPELINES["sd"]()[0].save_pretrained(tmp_path / "tiny-sd")
    recipe = little_recipe("fashion-sd", tmp_path / "tiny-sd", tmp_path, without=["max_sequence_length"])
    config = ["--config", str(recipe), "--nfe", "3"]

    cost.main([*config, "--loss", "huber"])
    [row] = json.loads((tmp_path / "evaluation" / "cost-huber.json").read_text())
    published, reached, end = row["published"], row["default_reaches"], row["default_ends"]
    assert reached["loss"] <= published["loss"] and reached["iterations"] <= end["iterations"] <= 6
    assert all(1 / 4 <= each["share_of_farthest"] <= 1 for each in (published, reached, end))
    # 12 grids from 4 pairs, 6 from 4 more, then at most 6 iterations of 8 pairs at 22 evaluations, and six tries of 4 pairs.
    assert 0 < reached["evaluations"] <= end["evaluations"] <= 3 * 8 * 12 + 6 * (8 * 22 + 8 * 3 * 4)
    assert 0 < reached["seconds"] <= end["seconds"]
    # Backward counts as two and recomputation as one: at least two epochs of 4 pairs.
    assert published["evaluations"] >= 2 * 4 * 3 * 4
    # What is measured stays, unless it was by another recipe.
    monkeypatch.setattr(cost, "measured", lambda options, nfe, judge: {**row, "published": end})
    cost.main([*config, "--loss", "huber"])
    assert json.loads((tmp_path / "evaluation" / "cost-huber.json").read_text()) == [row]
    older = {**row, "recipes": {**row["recipes"], "default": "DefaultRecipe(max_steps=1)"}}
    (tmp_path / "evaluation" / "cost-huber.json").write_text(json.dumps([older]))
    cost.main([*config, "--loss", "huber"])
    assert json.loads((tmp_path / "evaluation" / "cost-huber.json").read_text()) == [{**row, "published": end}]

    ablation.main([*config, "--num_samples", "6"])
    results = json.loads((tmp_path / "evaluation" / "ablation" / "results.json").read_text())
    assert {each["name"] for each in results["rows"]} == set(ways) and results["subject"] == ablation.SUBJECT

    learned = ablation.folder_of(tmp_path / "ablation", ablation.SUBJECT)
    more = ["--schedules", str(learned), "--guidance_scales", "2", "--num_samples", "6"]
    robustness.main([*config, *more])
    lines = (tmp_path / "evaluation" / "robustness" / "robustness.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]][0] == "| guidance 2" and len(lines) == 4
    assert lines[3].startswith("| image to image, strength 0.7, from t = ")


def test_the_page_tells_the_command_that_is_tested_here():
    page = (EVALUATION / "README.md").read_text()
    for recipe in ("fashion-sd", "fashion-flux"):
        command = f"PYTHONPATH=. .venv/bin/python examples/evaluation/compare_schedules.py --config training/recipes/{recipe}.yaml"
        assert command in page
    for name, recipe in (
        ("compare_generalised", "flux"),
        ("compare_cost", "flux"),
        ("ablation", "flux"),
        ("robustness", "sd"),
    ):
        command = f"PYTHONPATH=. .venv/bin/python examples/evaluation/{name}.py --config training/recipes/fashion-{recipe}.yaml"
        assert command in page
    assert "PYTHONPATH=. .venv/bin/python examples/evaluation/compare_edm.py --num_samples 256\n" in page
    amed = (
        "PYTHONPATH=. .venv/bin/python examples/evaluation/compare_amed.py --config training/recipes/fashion-sd.yaml"
    )
    assert amed in page
