# SPDX-License-Identifier: Apache-2.0
"""The program, on a tiny Stable Diffusion with random weights: what it writes, what it refuses, and that it resumes."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler

from ld3_diffusers import LD3Scheduler
from tests.tiny_pipelines import PIPELINES
from training import make_teacher_set, train_ld3
from training.certificate import shared_facts
from training.certification import pair_arguments
from training.learning_arguments import RECIPE_ARGUMENTS, RECIPE_FLAGS, parser
from training.recipe import RECIPES
from training.teacher_set import TeacherSet, prompt_hash


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a pipeline and a teacher set of 8 pairs."""
    folder = tmp_path_factory.mktemp("room")
    pipe, _ = PIPELINES["sd"]()
    pipe.save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    make_teacher_set.main(
        [
            "--teacher",
            str(folder / "sd"),
            "--output_dir",
            str(folder / "pairs"),
            "--num_samples",
            "8",
            "--resolution",
            "32",
        ]
        + ["--num_inference_steps", "20", "--prompts_file", str(folder / "prompts.txt"), "--guidance_scale", "2"]
    )
    return folder


OF_RECIPES = {
    "adam": [
        "--max_train_steps",
        "6",
        "--validation_steps",
        "2",
        "--train_batch_size",
        "4",
        "--checkpointing_steps",
        "2",
    ],
    "default": ["--max_train_steps", "3", "--first_pairs", "2"],
}


def arguments(room, output, *more, nfe=3, recipe="adam"):
    given = ["--teacher", str(room / "sd"), "--output_dir", str(output), "--nfe", str(nfe), "--recipe", recipe]
    if "--no_set" not in more:
        given += ["--teacher_set", str(room / "pairs"), "--num_train", "5", "--num_valid", "3"]
    given += ["--solver", "dpmpp", "--report_to", "none", "--checkpoints_total_limit", "1", *OF_RECIPES[recipe]]
    return given + [argument for argument in more if argument != "--no_set"]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("recipe, steps", [("adam", 6), ("default", 3)])
def test_learns_saves_and_serves_several_counts_from_one_folder(room, tmp_path, recipe, steps):
    output = tmp_path / "schedules"
    train_ld3.main(arguments(room, output, recipe=recipe))
    assert files(output) == {
        "scheduler_config.json",
        "nfe-3/schedule.png",
        "nfe-3/training_log.jsonl",
        f"nfe-3/checkpoint-{steps}/learner.pt",
    }
    log = [json.loads(line) for line in (output / "nfe-3" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    first = LD3Scheduler.from_pretrained(output)
    assert first.learned_counts == [3]
    UniPCMultistepScheduler.from_pretrained(output)  # a stock class reads it, too
    facts = first.config.schedules["3"]["provenance"]
    assert facts["loss"] < facts["best_grid_loss"]
    assert facts["loss"] == min(entry["valid_loss"] for entry in log if "valid_loss" in entry)
    assert facts["guidance_scale"] == 2 and facts["height"] == 32 and facts["recipe"] == recipe
    residuals = first.learned_schedules[3].residuals
    assert residuals.shape == (3, 3) and residuals.any()
    assert facts["teacher_name"] == "sd" and facts["teacher_solver"] == "unipc" and facts["teacher_steps"] == 20
    fox, bird = sorted([prompt_hash("a red fox"), prompt_hash("a blue bird")])
    assert facts["learned_on"] == {
        "train": {"seeds": [0, 4], "prompts": [fox, bird]},
        "valid": {"seeds": [5, 7], "prompts": [fox, bird]},
    }
    assert str(tmp_path) not in (output / "scheduler_config.json").read_text()

    train_ld3.main(arguments(room, output, "--solver", "unipc", nfe=2, recipe=recipe))
    both = LD3Scheduler.from_pretrained(output)
    assert both.learned_counts == [2, 3]
    assert both.config.schedules["3"] == first.config.schedules["3"]
    assert both.config.schedules["2"]["solver"] == "unipc"

    # Starting from what was learned begins at its loss, and need not lose it.
    again = tmp_path / "again"
    train_ld3.main(arguments(room, again, "--discretization", str(output), recipe=recipe))
    assert LD3Scheduler.from_pretrained(again).config.schedules["3"]["provenance"]["initial_loss"] == facts["loss"]


@pytest.mark.parametrize("recipe", ["adam", "default"])
def test_the_saved_schedule_samples_as_it_was_judged(room, tmp_path, recipe):
    output = tmp_path / "schedules"
    train_ld3.main(arguments(room, output, recipe=recipe))
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LD3Scheduler.from_pretrained(output)
    pipe.scheduler.check(pipe)
    pairs = TeacherSet.load(room / "pairs")
    noise, target, conditioning = pairs.batch([5, 6, 7])
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent", "height": 32, "width": 32}
    end = pipe(**conditioning, latents=noise, **call).images
    facts = pipe.scheduler.config.schedules["3"]["provenance"]
    assert float(((end - target) ** 2).mean()) == pytest.approx(facts["loss"], rel=1e-4)


@pytest.mark.parametrize("recipe, killed, left", [("adam", 5, 4), ("default", 2, 2)])
def test_an_interrupted_run_continues_to_the_same_file(room, tmp_path, monkeypatch, recipe, killed, left):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_ld3.main(arguments(room, whole, recipe=recipe))
    real = train_ld3.learn

    def interrupted(*args, callback, **options):
        def kill(done, entry):
            callback(done, entry)
            if done == killed:
                raise KeyboardInterrupt

        return real(*args, callback=kill, **options)

    monkeypatch.setattr(train_ld3, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_ld3.main(arguments(room, broken, recipe=recipe))
    assert files(broken) == {f"nfe-3/checkpoint-{left}/learner.pt"}
    monkeypatch.setattr(train_ld3, "learn", real)
    train_ld3.main(arguments(room, broken, "--resume_from_checkpoint", "latest", recipe=recipe))
    for name in ("scheduler_config.json", "nfe-3/training_log.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_an_interrupted_run_on_a_model_with_a_resolution_shift_continues_to_the_same_schedule(tmp_path):
    pipe, _ = PIPELINES["flux"]()
    pipe.save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    given = ["--teacher", str(tmp_path / "flux"), "--nfe", "3", "--init", "flow_linear", "--allow_worse"]
    given += ["--prompts_file", str(tmp_path / "prompts.txt"), "--resolution", "32", "--teacher_steps", "8"]
    given += ["--num_train", "4", "--num_valid", "2", "--report_to", "none", "--max_train_steps", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_ld3.main([*given, "--output_dir", str(whole)])
    (broken / "nfe-3").mkdir(parents=True)
    shutil.copytree(whole / "nfe-3" / "checkpoint-1", broken / "nfe-3" / "checkpoint-1")
    shutil.copytree(whole / "teacher_set", broken / "teacher_set")
    train_ld3.main([*given, "--output_dir", str(broken), "--resume_from_checkpoint", "latest"])
    schedules = [LD3Scheduler.from_pretrained(folder).config.schedules for folder in (whole, broken)]
    assert schedules[0] == schedules[1] and schedules[0]["3"]["provenance"]["mu"] != 0


def test_several_counts_in_one_run_and_those_that_are_done_are_left(room, tmp_path, capsys):
    together, apart = tmp_path / "together", tmp_path / "apart"
    train_ld3.main(arguments(room, together, "--nfe", "2", "3"))
    train_ld3.main(arguments(room, apart, nfe=3))
    both = LD3Scheduler.from_pretrained(together)
    assert both.learned_counts == [2, 3]
    assert both.config.schedules["3"] == LD3Scheduler.from_pretrained(apart).config.schedules["3"]

    before = (together / "scheduler_config.json").read_bytes()
    capsys.readouterr()
    train_ld3.main(arguments(room, together, "--nfe", "2", "3", "--resume_from_checkpoint", "latest"))
    assert capsys.readouterr().out.count("evaluations already") == 2
    assert (together / "scheduler_config.json").read_bytes() == before
    again = arguments(room, together, "--nfe", "2", "--resume_from_checkpoint", "latest", "--seed", "1")
    assert "its seed is 0, this run's 1" in refused(capsys, again)  # another run: its checkpoints are not continued


def test_a_teacher_set_is_made_where_none_is_given(room, tmp_path):
    output, recipe = tmp_path / "schedules", tmp_path / "recipe.yaml"
    recipe.write_text(
        "num_train: 3\nnum_valid: 2\nteacher_steps: 8\nresolution: 32\nguidance_scale: 1.5\nlearning_rate: 0.1\n"
    )
    given = ["--no_set", "--prompts_file", str(room / "prompts.txt"), "--config", str(recipe), "--allow_worse"]
    train_ld3.main(arguments(room, output, *given, "--final_sigmas_type", "sigma_min"))
    made = TeacherSet.load(output / "teacher_set")
    assert len(made) == 5 and made.provenance["guidance_scale"] == 1.5
    assert made.provenance["final_sigmas_type"] == "sigma_min"
    facts = LD3Scheduler.from_pretrained(output).config.schedules["3"]["provenance"]
    assert facts["recipe_settings"]["lr_times"] == 0.1 and facts["train_pairs"] == 3


def test_published_recipe_and_pixel_loss(room, tmp_path):
    output = tmp_path / "schedules"
    given = arguments(room, output, "--recipe", "published", "--mode", "time", "--rounds_v1", "1", "--rounds_v2", "1")
    for name in ("--max_train_steps", "--validation_steps"):
        at = given.index(name)
        del given[at : at + 2]
    with pytest.warns(
        UserWarning, match="the teacher set ends as final_sigmas_type=zero, these schedules as sigma_min"
    ):
        train_ld3.main([*given, "--loss", "l1", "--loss_space", "pixel", "--allow_worse"])
    entry = LD3Scheduler.from_pretrained(output).config.schedules["3"]
    assert entry["provenance"]["recipe"] == "published" and entry["times"][-1] == 0.001
    assert entry["provenance"]["loss_space"] == "pixel"


def refused(capsys, given):
    with pytest.raises(SystemExit) as error:
        train_ld3.main(given)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--nfe", "0"], "--nfe must name different counts of at least 1, got 0"),
        (["--nfe", "3", "3"], "--nfe must name different counts of at least 1, got 3 3"),
        (["--true_cfg_scale", "2"], "is for a teacher set made here"),
        (["--teacher", "nowhere"], "neither an existing folder nor a Hub id"),
        (["--solver_order", "7"], "dpmpp has no order 7"),
        (["--solver_type", "bh1"], "dpmpp has no solver_type 'bh1'"),
        (["--discretization", "random"], "neither a folder with a schedule nor one of"),
        (["--recipe", "published", "--discretization", "edm"], "starts from its own uniform grid"),
        (["--recipe", "published", "--final_sigmas_type", "zero"], "drop --final_sigmas_type zero"),
        (["--recipe", "published", "--solver", "heun"], "choose another --solver"),
        (["--recipe", "published", "--afs"], "drop --afs"),
        (["--learn", "noise"], "cannot learn"),
        (["--recipe", "default", "--curve", "--nfe", "3", "70"], "several numbers of evaluations, 2 to 64"),
        (["--recipe", "default", "--curve", "--nfe", "1", "5"], "several numbers of evaluations, 2 to 64"),
        (["--recipe", "default", "--loss", "lpips"], "use --loss stlpips, or --recipe adam"),
        (["--recipe", "default", "--curve", "--nfe", "3", "5", "--last_level", "fixed"], "drop --last_level"),
        (["--rounds_v1", "3"], "belongs to the recipe 'published'"),
        (["--no_v1"], "belongs to the recipe 'published'"),
        (["--loss", "stlpips", "--loss_space", "latent"], "compares images"),
        (["--resolution", "64"], "is for a teacher set made here"),
        (["--teacher_set", "nowhere"], "is not there"),
        (["--num_train", "7"], "make a larger teacher set"),
        (["--guidance_scale", "7.5"], "was made with guidance_scale=2.0, not 7.5"),
        (["--resume_from_checkpoint", "checkpoint-9"], "is no checkpoint"),
        (["--resume_from_checkpoint", "checkpoint-9", "--nfe", "3", "4"], "a checkpoint is of one count"),
        (["--checkpoints_total_limit", "0"], "must be at least 1"),
        (["--seed", "-1"], "must not be negative"),
        (["--micro_batch_size", "0"], "micro_batch_size must be positive"),
        (["--config", "nowhere.yaml"], "cannot read the recipe"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(room, tmp_path, capsys, given, sentence):
    output = tmp_path / "schedules"
    assert sentence in refused(capsys, arguments(room, output, *given))
    assert not files(output) if output.exists() else True


def test_a_schedule_that_loses_is_not_saved(room, tmp_path, capsys):
    output = tmp_path / "schedules"
    given = arguments(room, output, "--discretization", "edm", "--learning_rate", "1e-12", "--learn", "times")
    assert "does not beat the grid" in refused(capsys, given)
    assert not (output / "scheduler_config.json").exists()
    train_ld3.main([*given, "--allow_worse"])
    facts = LD3Scheduler.from_pretrained(output).config.schedules["3"]["provenance"]
    assert facts["start"] == "edm" and facts["loss"] >= facts["best_grid_loss"]


def test_one_count_that_loses_does_not_keep_others_from_being_learned(room, tmp_path, capsys, monkeypatch):
    output = tmp_path / "schedules"
    real = train_ld3.refuse_worse

    def refuse(nfe, loss, rivals):
        real(nfe, loss, dict.fromkeys(rivals, 0.0) if nfe == 2 else rivals)

    monkeypatch.setattr(train_ld3, "refuse_worse", refuse)
    said = refused(capsys, arguments(room, output, "--nfe", "2", "3"))
    assert "the schedule learned for 2 evaluations does not beat" in said
    assert LD3Scheduler.from_pretrained(output).learned_counts == [3]


def test_a_new_run_in_a_folder_leaves_no_checkpoint_of_the_old_one(room, tmp_path):
    output = tmp_path / "schedules"
    train_ld3.main(arguments(room, output))
    train_ld3.main(arguments(room, output, "--learning_rate", "0.01", "--max_train_steps", "3", "--allow_worse"))
    assert [path.name for path in (output / "nfe-3").glob("checkpoint-*")] == ["checkpoint-2"]


def test_one_curve_serves_every_count_and_is_refined(room, tmp_path, capsys):
    output = tmp_path / "schedules"
    curve = arguments(room, output, "--curve", "--nfe", "2", "4", "--allow_worse", recipe="default")
    train_ld3.main(curve)
    assert files(output) == {
        "scheduler_config.json",
        "curve/schedule.png",
        "curve/training_log.jsonl",
        "curve/checkpoint-3/learner.pt",
    }
    learned = LD3Scheduler.from_pretrained(output)
    assert learned.served_counts == [2, 3, 4] and learned.learned_counts == []
    facts = learned.learned_curve.provenance
    assert facts["counts_learned_on"] == [2, 3, 4] and facts["loss"] < facts["initial_loss"]
    assert facts["learned_on"]["train"]["seeds"] == [0, 4]
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = learned
    noise, target, conditioning = TeacherSet.load(room / "pairs").batch([5, 6, 7])
    call = {"guidance_scale": 2.0, "output_type": "latent", "height": 32, "width": 32}
    for nfe in (2, 3, 4):
        end = pipe(**conditioning, latents=noise, num_inference_steps=nfe, **call).images
        assert float(((end - target) ** 2).mean()) == pytest.approx(facts["losses"][str(nfe)], rel=1e-4)
    before = (output / "scheduler_config.json").read_bytes()
    train_ld3.main([*curve, "--resume_from_checkpoint", "latest"])
    assert "has this curve already" in capsys.readouterr().out
    assert (output / "scheduler_config.json").read_bytes() == before

    # A schedule that starts from the curve, in the same folder, comes before it; the curve stays.
    train_ld3.main(arguments(room, output, "--init", str(output), "--allow_worse", nfe=4, recipe="default"))
    refined = LD3Scheduler.from_pretrained(output)
    assert refined.learned_counts == [4] and refined.config.curve == learned.config.curve
    assert refined.learned_schedules[4].provenance["loss"] <= refined.learned_schedules[4].provenance["initial_loss"]
    # A curve without coefficients is one, too.
    times = arguments(room, tmp_path / "times", "--curve", "--nfe", "2", "3", "--learn", "times", recipe="default")
    train_ld3.main([*times, "--max_train_steps", "1", "--allow_worse"])
    assert LD3Scheduler.from_pretrained(tmp_path / "times").learned_schedule(3).residuals is None
    for given, sentence in (
        (["--nfe", "3"], "--curve learns from the least to the largest --nfe"),
        (["--recipe", "adam"], "--curve learns from the least to the largest --nfe, by the recipe 'default'"),
        (["--solver", "heun"], "one evaluation a step"),
    ):
        given = arguments(room, tmp_path / "no", "--curve", "--nfe", "3", "5", *given, recipe="default")
        assert sentence in refused(capsys, given)


def test_what_a_start_was_learned_on_counts_as_seen(room, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train_ld3.main(arguments(room, first))
    (tmp_path / "others.txt").write_text("a green frog\n")
    make = [
        "--teacher",
        str(room / "sd"),
        "--output_dir",
        str(tmp_path / "others"),
        "--num_samples",
        "8",
        "--seed",
        "20",
    ]
    make += ["--resolution", "32", "--num_inference_steps", "20", "--guidance_scale", "2"]
    make_teacher_set.main([*make, "--prompts_file", str(tmp_path / "others.txt")])
    others = ["--teacher_set", str(tmp_path / "others"), "--discretization", str(first), "--allow_worse"]
    train_ld3.main(arguments(room, second, *others))
    facts = LD3Scheduler.from_pretrained(second).config.schedules["3"]["provenance"]
    assert facts["learned_on"]["train"]["seeds"] == [0, 24] and len(facts["learned_on"]["train"]["prompts"]) == 3
    assert facts["discretization"] == "first" and str(tmp_path) not in str(facts)


def test_the_solver_type_of_the_teacher_is_recorded_where_it_is_not_the_default(room, tmp_path, capsys):
    entries = {}
    for kind, seed in (("bh1", 0), ("bh2", 100)):
        made = ["--teacher", str(room / "sd"), "--output_dir", str(tmp_path / kind), "--num_samples", "8"]
        made += ["--resolution", "32", "--num_inference_steps", "4", "--prompts_file", str(room / "prompts.txt")]
        make_teacher_set.main([*made, "--guidance_scale", "2", "--solver_type", kind, "--seed", str(seed)])
        output = tmp_path / f"of-{kind}"
        given = arguments(
            room, output, "--teacher_set", str(tmp_path / kind), "--allow_worse", "--max_train_steps", "1"
        )
        train_ld3.main(given)
        entries[kind] = LD3Scheduler.from_pretrained(output).config.schedules["3"]
    assert "teacher_solver_type" not in entries["bh2"]["provenance"]
    for kind, entry in entries.items():
        # What is certified is the teacher that was learned from.
        asked = pair_arguments("user/sd", shared_facts({"3": entry}), (0, 9), 4)
        teacher = make_teacher_set.teacher_scheduler(
            asked, DiffusionPipeline.from_pretrained(room / "sd").scheduler.config
        )
        assert teacher.spec.make().variant == kind
    mixed = arguments(room, tmp_path / "mixed", "--teacher_set", str(tmp_path / "bh1"), "--num_train", "8")
    mixed += ["--validation_set", str(tmp_path / "bh2")]
    assert "was made with solver_type='bh2', the teacher set with 'bh1'" in refused(capsys, mixed)


def test_other_weights_other_models_and_broken_configs_are_refused(room, tmp_path, capsys):
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1.0)
    pipe.save_pretrained(tmp_path / "other")
    given = arguments(room, tmp_path / "schedules", "--teacher", str(tmp_path / "other"))
    assert "made by other weights" in refused(capsys, given)

    output = tmp_path / "flow"
    LD3Scheduler(noise_path="flow", prediction_type="flow_prediction").save_pretrained(output)
    before = (output / "scheduler_config.json").read_bytes()
    assert "holds schedules for a model with noise_path='flow'" in refused(capsys, arguments(room, output))
    (output / "scheduler_config.json").write_text("{")
    assert "not valid JSON" in refused(capsys, arguments(room, output))
    (output / "scheduler_config.json").write_bytes(before)

    shutil.copytree(room / "pairs", tmp_path / "same")
    given = arguments(room, tmp_path / "schedules", "--validation_set", str(tmp_path / "same"))
    assert "share the seeds 0 to 7" in refused(capsys, given)

    make_teacher_set.main(
        [
            "--teacher",
            str(room / "sd"),
            "--output_dir",
            str(tmp_path / "shorter"),
            "--num_samples",
            "2",
            "--seed",
            "50",
        ]
        + ["--num_inference_steps", "10", "--prompts_file", str(room / "prompts.txt"), "--guidance_scale", "2"]
        + ["--resolution", "32"]
    )
    given = arguments(room, tmp_path / "schedules", "--validation_set", str(tmp_path / "shorter"), "--num_valid", "2")
    assert "the validation set was made with num_inference_steps=10, the teacher set with 20" in refused(capsys, given)

    (tmp_path / "file").write_text("")
    assert "is not a writable folder" in refused(capsys, arguments(room, tmp_path / "file" / "schedules"))


def test_a_solver_that_extrapolates_no_data_is_refused_where_data_are_clipped(tmp_path, capsys):
    pipe, _ = PIPELINES["ddpm"]()
    pipe.save_pretrained(tmp_path / "ddpm")
    given = ["--teacher", str(tmp_path / "ddpm"), "--output_dir", str(tmp_path / "schedules"), "--nfe", "3"]
    given += ["--num_train", "2", "--num_valid", "1", "--teacher_steps", "4", "--report_to", "none", "--solver"]
    assert "bound the data prediction, which ipndm does not extrapolate" in refused(capsys, [*given, "ipndm"])
    train_ld3.main([*given, "unipc", "--max_train_steps", "1", "--learn", "times", "--allow_worse"])
    assert LD3Scheduler.from_pretrained(tmp_path / "schedules").config.clip_sample


def test_every_field_of_the_recipes_has_an_argument():
    fields = {field for recipe in RECIPES.values() for field in recipe.__dataclass_fields__}
    names = {action.dest for action in parser()._actions}
    assert fields == set(RECIPE_ARGUMENTS) | set(RECIPE_FLAGS) | {"betas"}
    assert {f"recipe_{field}" for field in (*RECIPE_ARGUMENTS, *RECIPE_FLAGS)} <= names
