# SPDX-License-Identifier: Apache-2.0
"""The demo, which joins all programs."""

import json

import pytest

from tests.tiny_pipelines import PIPELINES
from training import demo, train_ld3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with all that the demo asks of a teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    pipe, _ = PIPELINES["sd"]()
    pipe.save_pretrained(folder)
    prompts = {"train": {"fox": ["a red fox"], "bird": ["a bird", "a blue bird"]}, "held_out": {"fox": ["one fox"]}}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "quality.json").write_text(json.dumps({"guidance_scale": 2.0, "accuracy": 0.9}))
    return folder


@pytest.mark.slow
def test_demo_is_interrupted_continues_and_reuses(teacher, tmp_path, monkeypatch, capsys):
    arguments = ["--teacher", str(teacher), "--nfe", "3", "--num_train", "3", "--num_valid", "2", "--num_unseen", "4"]
    arguments += ["--max_train_steps", "3", "--output_dir", str(tmp_path)]

    def interrupted(_argv):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_ld3, "main", interrupted)
        with pytest.raises(SystemExit) as stop:
            demo.main(arguments)
    assert stop.value.code == 130 and "continues from here" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"train", "valid", "unseen"}

    demo.main(arguments)
    first = capsys.readouterr().out
    assert first.count("is finished already") == 3  # the sets of the interrupted run
    results = json.loads((tmp_path / "nfe-3" / "results.json").read_text())
    assert results["rows"][0]["scheduler"] == "LD3 default" and results["rows"][0]["evaluations"] == 3
    assert len(results["rows"]) == 8 and results["samples"] == 4
    for name in ("comparison.png", "schedules.png", "table.md"):
        assert (tmp_path / "nfe-3" / name).stat().st_size > 300

    demo.main(arguments)
    assert "has this schedule for 3 evaluations already" in capsys.readouterr().out
    assert json.loads((tmp_path / "nfe-3" / "results.json").read_text()) == results


def test_demo_refuses_a_folder_that_is_no_teacher(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--teacher", "examples/teachers/fashion-edm"])
    assert "text-to-image teachers: it has no prompts.json" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as stop:
        demo.main(["--teacher", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
