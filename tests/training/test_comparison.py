# SPDX-License-Identifier: Apache-2.0
"""Schedulers side by side, the report, and the demo that joins all programs."""

import json
import math

import pytest
import torch

from tests.tiny_pipelines import PIPELINES
from training import demo, make_teacher_set, train_ld3
from training.comparison import Contender, best_by_name, paired_interval, sample, stock_contenders
from training.report import pick_columns, table, wins_everywhere, write_whole
from training.teacher_set import TeacherSet


def contender(name, distances, setting=""):
    return Contender(name, None, 5, setting, 5, torch.tensor(distances, dtype=torch.float64))


def test_paired_interval_is_students():
    own, other = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([2.0, 2.5, 6.0, 3.5])
    difference = other - own
    half = 3.182446305 * float(difference.std()) / math.sqrt(4)  # t of 3 degrees of freedom at 97.5 %
    mean, low, high = paired_interval(other, own)
    assert (mean, low, high) == pytest.approx((1.0, 1.0 - half, 1.0 + half), rel=1e-6)
    assert paired_interval(own, own) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="the same two or more samples"):
        paired_interval(own, own[:1])
    with pytest.raises(ValueError, match="not finite"):
        paired_interval(torch.tensor([1.0, math.nan]), own[:2])


def test_a_win_needs_the_whole_interval():
    learned = contender("LD3", [1.0, 2.0, 3.0, 4.0])
    ahead, unclear = contender("A", [2.0, 3.1, 4.0, 5.0]), contender("B", [1.1, 1.9, 3.2, 4.0])
    assert wins_everywhere(learned, [ahead]) and not wins_everywhere(learned, [ahead, unclear])
    text = table(learned, [ahead])
    assert "| A |  | 5 | 3525.000 | +1025.000 [+945.439, +1104.561] | 1.41 |" in text


def test_each_stock_scheduler_enters_with_its_best_setting():
    contenders = [contender("A", [3.0], "leading"), contender("B", [2.0]), contender("A", [1.0], "trailing")]
    assert [(c.name, c.setting) for c in best_by_name(contenders)] == [("A", "trailing"), ("B", "")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with all that the demo asks of a teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    pipe, _ = PIPELINES["sd"]()
    pipe.save_pretrained(folder)
    prompts = {"train": {"fox": ["a red fox"], "bird": ["a bird", "a blue bird"]}, "held_out": {"fox": ["one fox"]}}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "reference").mkdir()
    (folder / "reference" / "reference.json").write_text(json.dumps({"samples": {"guidance_scale": 2.0}}))
    return folder


@pytest.mark.parametrize("nfe, heun", [(4, 5), (5, 5)])
def test_stock_schedulers_make_the_evaluations_they_are_listed_with(teacher, tmp_path, nfe, heun):
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    make_teacher_set.main(
        [
            "--teacher",
            str(teacher),
            "--output_dir",
            str(tmp_path / "set"),
            "--num_samples",
            "3",
            "--guidance_scale",
            "2",
        ]
        + ["--num_inference_steps", "6", "--prompts_file", str(tmp_path / "prompts.txt"), "--train_batch_size", "2"]
    )
    pairs = TeacherSet.load(tmp_path / "set")
    pipe, _ = PIPELINES["sd"]()
    contenders = list(stock_contenders(pipe.scheduler.config, nfe))
    before = pipe.scheduler
    for each in contenders:
        sample(pipe, each, pairs, guidance_scale=2.0, batch_size=2)
    assert pipe.scheduler is before
    assert {c.name: c.evaluations for c in contenders} == {
        **dict.fromkeys(["UniPC", "DPM++ 2M", "DPM++ 2M Karras", "DEIS", "Euler", "DDIM"], nfe),
        "Heun": heun,
    }
    end = pairs.batch([2])[1]
    for each in contenders:
        assert each.ends.shape == (3, *end.shape[1:])
        assert float(each.distances[2]) == pytest.approx(float((each.ends[2] - end[0]).square().mean()), rel=1e-6)


def test_files_are_whole_or_absent(tmp_path):
    def failing(file):
        file.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "new" / "table.md", failing)
    assert not list((tmp_path / "new").iterdir())
    write_whole(tmp_path / "table.md", lambda file: file.write_text("whole"))
    assert (tmp_path / "table.md").read_text() == "whole"


def test_shown_samples_have_different_prompts():
    prompts = [0, 1, 2, 3, 0, 1, 2, 3]
    assert pick_columns(prompts, 3) == [0, 1, 2]
    assert pick_columns(prompts[3:], 10) == [0, 1, 2, 3]


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
    assert "has a schedule for 3 evaluations already" in capsys.readouterr().out
    assert json.loads((tmp_path / "nfe-3" / "results.json").read_text()) == results


def test_demo_refuses_a_folder_that_is_no_teacher(tmp_path):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--teacher", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
