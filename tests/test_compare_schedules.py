# SPDX-License-Identifier: Apache-2.0
"""The comparison of examples/evaluation, from nothing to its tables, on a pipeline with random weights; and what its page tells to type."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny_pipelines import PIPELINES


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "evaluation" / "compare_schedules.py"
LITTLE = {
    "make_teacher_set": {"num_samples": 12, "num_inference_steps": 12, "max_sequence_length": 16},
    "train_ld3": {"num_train": 8, "num_valid": 4, "max_train_steps": 2, "train_batch_size": 4},
    "search_gits": {"num_train": 6, "num_valid": 4, "num_grid_points": 9},
    "search_oss": {"num_train": 2, "num_valid": 4, "num_grid_points": 9},
    "evaluate": {"metrics": ["mse"], "teacher_steps": 12, "save_images": 2, "local_errors": False}
    | {"max_sequence_length": 16},
}


@pytest.mark.slow
def test_everyone_is_compared_and_a_second_run_finds_all_done(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    PIPELINES["flux"]()[0].save_pretrained(tmp_path / "tiny-flux")
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "fashion-flux.yaml").read_text())
    recipe["common"]["pretrained_model_name_or_path"] = str(tmp_path / "tiny-flux")
    for program, little in LITTLE.items():
        recipe[program] |= little
        for key in ("output_dir", "teacher_set"):
            if key in recipe[program]:
                recipe[program][key] = recipe[program][key].replace("outputs/fashion-flux", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(
        sys, "argv", ["compare", "--config", str(tmp_path / "recipe.yaml"), "--nfe", "4", "--num_samples", "6"]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
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
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "learning 4 evaluations" not in capfd.readouterr().err
    again = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert again["rows"] == first["rows"]


def test_the_page_tells_the_command_that_is_tested_here():
    page = (SCRIPT.parent / "README.md").read_text()
    for recipe in ("fashion-sd", "fashion-flux"):
        command = f"PYTHONPATH=. .venv/bin/python examples/evaluation/compare_schedules.py --config training/recipes/{recipe}.yaml"
        assert command in page
