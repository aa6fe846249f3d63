# SPDX-License-Identifier: Apache-2.0
"""What `AMEDScheduler` refuses, in one sentence each: malformed entries, missing, foreign and damaged predictors."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from ld3_diffusers import AMEDScheduler, LD3Scheduler, Schedule
from ld3_diffusers.schedulers.scheduling_amed import check_predictor
from tests.schedules import SD_BETAS

from .amed_schedulers import PATH, bare, pipeline, predicting, sample, scheduler_with, static
from .amed_steps import random_predictor


@pytest.mark.parametrize(
    "edit, match",
    [
        ({"direction_scales": [1.0] * 3}, "a schedule of 5 times needs 4 direction_scales, got 3"),
        ({"direction_scales": []}, "a schedule of 5 times needs 4 direction_scales, got 0"),
        ({"direction_scales": [1.0] * 3 + ["1"]}, "'direction_scales' of a schedule must be a list of finite numbers"),
        ({"direction_scales": [[1.0]] * 4}, "'direction_scales' of a schedule must be a list of finite numbers"),
        (
            {"direction_scales": [1.0] * 3 + [float("nan")]},
            "'direction_scales' of a schedule must be a list of finite",
        ),
        ({"direction_scales": 1.0}, "'direction_scales' of a schedule must be a list of finite numbers"),
        ({"direction_scales": [1.0] * 2000}, "'direction_scales' of a schedule holds 2000 values and may hold 1001"),
        ({"predictor": "predictor-4"}, "'predictor' of a schedule must be a mapping with a folder and a digest"),
        ({"predictor": {}}, "'predictor' of a schedule must be a mapping with a folder and a digest"),
        ({"predictor": {"folder": "a"}}, "'predictor' of a schedule must be a mapping with a folder and a digest"),
        (
            {"predictor": {"folder": "a", "digest": 5}},
            "'predictor' of a schedule must be a mapping with a folder and a",
        ),
        (
            {"predictor": {"folder": "a", "digest": "b"}, "direction_scales": None},
            "a schedule with a 'predictor' needs direction_scales, and two rows for each of its steps",
        ),
        (
            {"predictor": {"folder": "a", "digest": "b"}, "times": [1.0, 0.6, 0.3, 0.1], "direction_scales": [1.0] * 3}
            | {"network_times": [1.0, 0.6, 0.3]},
            "a schedule with a 'predictor' needs direction_scales, and two rows for each of its steps",
        ),
    ],
)
def test_malformed_entries(edit, match):
    entry = bare().to_dict(PATH) | edit
    with pytest.raises(ValueError, match=match) as error:
        Schedule.from_dict(entry)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="schedules"):
        AMEDScheduler.from_config(SD_BETAS, schedules={"4": entry})


def test_a_config_alone_has_no_predictor(tmp_path):
    scheduler = AMEDScheduler.from_config(predicting().config)
    for use in (lambda: scheduler.set_timesteps(4), lambda: scheduler.save_pretrained(tmp_path / "new")):
        with pytest.raises(ValueError, match="the predictor of the schedule for 4 evaluations is not there"):
            use()
    assert not (tmp_path / "new").exists()
    scheduler.set_predictor(4, random_predictor())
    sample(pipeline(scheduler), 4)
    with pytest.raises(ValueError, match="served from the config only"):
        scheduler.use_schedule(scheduler.learned_schedules[4])


def test_predicted_schedules_in_the_plain_scheduler(tmp_path):
    scheduler = predicting()
    scheduler.save_pretrained(tmp_path)
    for load in (lambda: LD3Scheduler.from_config(scheduler.config), lambda: LD3Scheduler.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="predicted for each sample; load it with AMEDScheduler") as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("nfe", [5, 6, "4"])
def test_no_schedule_to_predict(nfe):
    plain = replace(static(6), direction_scales=None, checksum=None)
    with pytest.raises(ValueError, match=f"there is no schedule of AMED steps for {nfe} evaluations"):
        scheduler_with(bare(4), plain).set_predictor(nfe, random_predictor())


Z = PATH.levels(bare().times).z


@pytest.mark.parametrize(
    "options, match",
    [
        ({"form": "static", "num_steps": 2}, "a static predictor is no network to ask; make a schedule of it with"),
        ({"solver": "ipndm"}, r"trained for solver='ipndm' \(here 'amed'\); use"),
        ({"solver_order": 3}, "amed has no order 3"),
        ({"afs": True}, r"trained for afs=True \(here False\); use"),
        ({"num_steps": 3}, "trained for num_steps=3 and this schedule has 2"),
        ({"z_max": 80.0, "z_min": float(Z[-1])}, "noise levels with z_max=80 and this schedule has 14.6"),
        ({"z_max": float(Z[0]), "z_min": 0.0}, "noise levels with z_min=0 and this schedule has 0.029"),
    ],
)
def test_predictors_of_another_schedule(options, match):
    predictor = random_predictor(**options)
    with pytest.raises(ValueError, match=match) as error:
        check_predictor(predictor, bare(), PATH)
    assert "\n" not in str(error.value)
    scheduler = scheduler_with(bare())
    before = json.dumps(scheduler.config.schedules)
    with pytest.raises(ValueError, match=match):
        scheduler.set_predictor(4, predictor)
    assert not scheduler.predictors and json.dumps(scheduler.config.schedules) == before


def test_forms_and_orders_of_the_student_are_told_apart():
    schedule = bare(solver="dpmpp")
    check_predictor(random_predictor(solver="dpmpp", solver_order=2), schedule, PATH)  # the default written out
    for options, match in (({"predict_x0": False}, "predict_x0=False"), ({"solver_order": 3}, "solver_order=3")):
        with pytest.raises(ValueError, match=match):
            check_predictor(random_predictor(solver="dpmpp", **options), schedule, PATH)


def test_a_predictor_of_this_schedule():
    check_predictor(random_predictor(num_steps=2, z_max=float(Z[0]) * (1 + 1e-4), z_min=float(Z[-1])), bare(), PATH)


def saved_folder(tmp_path):
    predicting(num_steps=2).save_pretrained(tmp_path)
    return tmp_path / "predictor-4", "config.json", "diffusion_pytorch_model.safetensors"


CONFIG_EDITS = [
    {"hidden_dim": 10**9},
    {"num_steps": 10**9},
    {"hidden_dim": 64},
    {"noise_channels": 5},
    {"bottleneck_input_dim": 65},
    {"scale_dir": 0.0},
    {"scale_dir": "0.01"},
    {"scale_time": 0.3},
    {"form": "static"},
    {"form": ["static"]},
    {"num_steps": 3},
    {"solver": "ipndm"},
    {"z_max": "80"},
    {"z_max": [80]},
    {"quantization_config": []},
    {"quantization_config": {"quant_method": "quanto"}},
    {"z_min": 10**400},
]


@pytest.mark.parametrize("edit", CONFIG_EDITS, ids=str)
def test_predictors_with_an_edited_config(edit, tmp_path):
    folder, config, _ = saved_folder(tmp_path)
    (folder / config).write_text(json.dumps(json.loads((folder / config).read_text()) | edit))
    with pytest.raises(ValueError, match="predictor") as error:
        AMEDScheduler.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and "'predictor-4'" in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_predictors(kept, tmp_path):
    folder, _, weights = saved_folder(tmp_path)
    content = (folder / weights).read_bytes()
    (folder / weights).write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match="the predictor for 4 evaluations cannot be read from 'predictor-4'") as error:
        AMEDScheduler.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_predictors_without_a_readable_config(content, tmp_path):
    folder, config, _ = saved_folder(tmp_path)
    (folder / config).write_bytes(content)
    with pytest.raises(ValueError, match="the predictor for 4 evaluations cannot be read from 'predictor-4'") as error:
        AMEDScheduler.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", [(), (1,), (2,)], ids=["folder", "config", "weights"])
def test_predictors_that_are_missing(lost, tmp_path):
    folder, *names = saved_folder(tmp_path)
    shutil.rmtree(folder) if not lost else (folder / names[lost[0] - 1]).unlink()
    with pytest.raises(ValueError, match="cannot be read from 'predictor-4'.*; download the whole repository"):
        AMEDScheduler.from_pretrained(tmp_path)


def test_predictors_that_were_exchanged(tmp_path):
    saved_folder(tmp_path / "a")
    predicting(seed=1, num_steps=2).save_pretrained(tmp_path / "b")
    shutil.rmtree(tmp_path / "a" / "predictor-4")
    shutil.move(tmp_path / "b" / "predictor-4", tmp_path / "a" / "predictor-4")
    with pytest.raises(ValueError, match="is not the predictor that the schedule for 4 evaluations was saved with"):
        AMEDScheduler.from_pretrained(tmp_path / "a")


def test_predictors_that_lack_a_weight(tmp_path):
    folder, _, weights = saved_folder(tmp_path)
    tensors = load_file(folder / weights)
    del tensors["fc_r.bias"]
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not the predictor that the schedule for 4 evaluations was saved with"):
        AMEDScheduler.from_pretrained(tmp_path)
    (folder / weights).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(tensors))  # a pickle is not looked at
    with pytest.raises(ValueError, match="cannot be read from 'predictor-4'"):
        AMEDScheduler.from_pretrained(tmp_path)


def test_the_folder_named_in_a_config_is_not_followed(tmp_path):
    saved_folder(tmp_path)
    file = tmp_path / "scheduler_config.json"
    config = json.loads(file.read_text())
    config["schedules"]["4"]["predictor"]["folder"] = "/etc"
    file.write_text(json.dumps(config))
    assert sorted(AMEDScheduler.from_pretrained(tmp_path).predictors) == [4]
