# SPDX-License-Identifier: Apache-2.0
"""The code that a card gives to use a schedule runs as it stands."""

import pytest

from pipelines.repository import save_repository
from tests.schedules import scheduler_with
from tests.tiny_pipelines import PIPELINES
from training.model_card import usage_code


@pytest.mark.parametrize("name", ["sd", "edm"])
def test_the_code_runs(name, tmp_path, capsys):
    pipe, call = PIPELINES[name]()
    teacher, schedules = tmp_path / "teacher", tmp_path / "schedules"
    save_repository(pipe, teacher) if name == "edm" else pipe.save_pretrained(teacher)
    scheduler_with((3, 5), "euler", None, config=pipe.scheduler.config).save_pretrained(schedules)
    labels = "class_labels" in call
    run = {"prompts": ["7" if labels else "a red fox"], "disjoint": ["seeds"] if labels else ["seeds", "prompts"]}
    certificate = {
        "pipeline": type(pipe).__name__,
        "call_settings": {} if labels else {"guidance_scale": 2.0},
        "runs": {"0": run},
        "counts": {"3": {}, "5": {}},
        "dtype": "float32",
        "solver": {},
    }
    video = usage_code({**certificate, "pipeline": "WanPipeline"}, "user/wan", "user/schedules")
    assert video.splitlines()[-1].startswith("video = pipe(") and video.endswith(".frames[0]")
    found = {}
    exec(usage_code(certificate, str(teacher), str(schedules)), found)
    assert found["image"].size == (pipe.unet.config.sample_size * (1 if labels else 2),) * 2
    assert found["pipe"].scheduler.num_inference_steps == 3
