# SPDX-License-Identifier: Apache-2.0
"""The program, on a tiny Stable Diffusion with random weights: what it writes, what it refuses, and that it resumes."""

import json
import re

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ld3_diffusers import AMEDScheduler, LD3Scheduler, load_scheduler
from tests.tiny_pipelines import PIPELINES
from training import make_teacher_set, train_amed, train_ld3
from training.teacher_set import TeacherSet

from .test_processes import launch


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a pipeline and a teacher set of 8 pairs."""
    folder = tmp_path_factory.mktemp("room")
    PIPELINES["sd"]()[0].save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    make_pairs(folder, "sd", "pairs", "--prompts_file", str(folder / "prompts.txt"), "--guidance_scale", "2")
    return folder


def make_pairs(room, teacher, output, *more):
    given = ["--teacher", str(room / teacher), "--output_dir", str(room / output), "--num_samples", "8"]
    make_teacher_set.main([*given, "--resolution", "32", "--num_inference_steps", "10", *more])


def arguments(room, output, *more, nfe=4, teacher="sd", pairs="pairs"):
    given = ["--teacher", str(room / teacher), "--output_dir", str(output), "--nfe", str(nfe)]
    given += ["--teacher_set", str(room / pairs), "--num_train", "5", "--num_valid", "3", "--report_to", "none"]
    given += ["--train_batch_size", "3", "--num_train_epochs", "2", "--validation_steps", "1", "--checkpointing_steps"]
    given += ["1", "--checkpoints_total_limit", "1", "--num_intermediate_points", "1", "--discretization", "logsnr"]
    return [*given, "--allow_worse", *more]


def files(folder):
    """By name, the trajectories' folders under one."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"trajectories/\w{16}/", "trajectories/*/", name) for name in names}


def entries(folder):
    return json.loads((folder / "scheduler_config.json").read_text())["schedules"]


def outcome(folder):
    """Contents of all that does not come and go with the way to it."""
    left = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in left if "checkpoint-" not in str(path)}


@pytest.fixture(scope="module")
def learned(room, tmp_path_factory):
    """A folder with a per-sample schedule for 4 evaluations."""
    folder = tmp_path_factory.mktemp("learned") / "schedules"
    train_amed.main(arguments(room, folder, "--scale_time", "0.1"))
    return folder


# ---------------------------------------------------------------------- what is written


def judged(room, folder, nfe):
    """Mean squared distance to the held-out pairs' ends, by the pipeline as a user runs it; and the loss that was saved."""
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = load_scheduler(folder)
    pipe.scheduler.check(pipe)
    pipe.scheduler.attach(pipe)
    noise, target, conditioning = TeacherSet.load(room / "pairs").batch([5, 6, 7])
    call = {"guidance_scale": 2.0, "output_type": "latent", "height": 32, "width": 32}
    end = pipe(**conditioning, latents=noise, num_inference_steps=nfe, **call).images
    return float(((end - target) ** 2).mean()), entries(folder)[str(nfe)]["provenance"]["loss"]


def test_writes_a_folder_that_samples_as_it_was_judged(room, learned):
    assert files(learned) == {
        "scheduler_config.json",
        "predictor-4/config.json",
        "predictor-4/diffusion_pytorch_model.safetensors",
        "nfe-4/schedule.png",
        "nfe-4/training_log.jsonl",
        "nfe-4/checkpoint-4/learner.pt",
        "trajectories/*/trajectories.safetensors",
    }
    found, loss = judged(room, learned, 4)
    assert found == pytest.approx(loss, rel=1e-5)
    log = [json.loads(line) for line in (learned / "nfe-4" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    facts = entries(learned)["4"]["provenance"]
    assert loss == min(facts["initial_loss"], *(entry["validation_loss"] for entry in log))
    assert all(entry["loss"] == pytest.approx(entry["step-0/loss"] + entry["step-1/loss"]) for entry in log)


def test_what_is_said_of_its_making(learned):
    facts = entries(learned)["4"]["provenance"]
    expected = {
        "form": "per_sample",
        "random_start": False,
        "scale_dir": 0.01,
        "scale_time": 0.1,
        "teacher_solver": "dpmpp",
    }
    expected |= {"num_intermediate_points": 1, "batch_size": 3, "num_epochs": 2, "validation_steps": 1}
    assert facts["amed"] == expected
    assert facts["recipe"] == "amed" and facts["start"] == facts["discretization"] == "logsnr"
    assert (facts["loss_name"], facts["loss_space"], facts["guidance_scale"]) == ("l2", "latent", 2)
    assert facts["learned_on"]["train"]["seeds"] == [0, 4] and facts["learned_on"]["valid"]["seeds"] == [5, 7]
    # 5 trajectories of 4 rows; 2 epochs of 2 steps, whose first evaluations are known
    assert facts["evaluations"] == {"teacher": 5 * 4, "forward": 2 * 5 * 2, "backward": 2 * 5 * 2}
    assert str(learned.parent) not in (learned / "scheduler_config.json").read_text()

    predictor = json.loads((learned / "predictor-4" / "config.json").read_text())
    path = load_scheduler(learned).path
    z = path.levels(torch.tensor(entries(learned)["4"]["times"], dtype=torch.float64)).z
    asked = {"form": "per_sample", "num_steps": 2, "solver": "amed", "afs": False, "bottleneck": "mid_block"}
    asked |= {"scale_dir": 0.01, "scale_time": 0.1, "z_max": float(z[0]), "z_min": 0.0}
    assert {key: predictor[key] for key in asked} == asked


def test_several_counts_forms_and_kinds_in_one_folder(room, tmp_path, capsys):
    output = tmp_path / "schedules"
    ld3 = ["--teacher", str(room / "sd"), "--output_dir", str(output), "--nfe", "5", "--solver", "dpmpp"]
    ld3 += ["--teacher_set", str(room / "pairs"), "--num_train", "5", "--num_valid", "3", "--max_train_steps", "1"]
    train_ld3.main([*ld3, "--report_to", "none", "--allow_worse"])
    before = entries(output)["5"]
    train_amed.main(arguments(room, output, "--nfe", "2", "4", "--solver", "dpmpp", "--solver_order", "2"))
    train_amed.main(arguments(room, output, "--form", "static", "--afs", nfe=3))
    scheduler = load_scheduler(output)
    assert isinstance(scheduler, AMEDScheduler)
    assert scheduler.learned_counts == [2, 3, 4, 5] and sorted(scheduler.predictors) == [2, 4]
    assert entries(output)["5"] == before
    assert [entries(output)[nfe].get("predictor", {}).get("folder") for nfe in ("3", "4")] == [None, "predictor-4"]
    for nfe in (2, 3, 4):
        found, loss = judged(room, output, nfe)
        assert found == pytest.approx(loss, rel=1e-5)

    # LD3 serves the static one as well, and a folder of stages takes a learned schedule without them.
    only = {"5": before, "3": entries(output)["3"]}
    assert LD3Scheduler.from_config({**scheduler.config, "schedules": only}).learned_counts == [3, 5]
    train_ld3.main([*ld3, "--report_to", "none", "--allow_worse", "--nfe", "6"])
    assert load_scheduler(output).learned_counts == [2, 3, 4, 5, 6]

    kept = {name: content for name, content in outcome(output).items() if "predictor-4" not in name}
    train_amed.main(arguments(room, output, "--form", "static"))
    assert load_scheduler(output).predictors.keys() == {2}
    assert not (output / "predictor-4").exists() and (output / "predictor-2").is_dir()
    assert all((output / name).read_bytes() == kept[name] for name in kept if name.startswith("predictor-2"))

    config = (output / "scheduler_config.json").read_bytes()
    capsys.readouterr()
    train_amed.main(arguments(room, output, "--form", "static", "--resume_from_checkpoint", "latest"))
    assert f"{output} has this schedule for 4 evaluations already" in capsys.readouterr().out
    assert (output / "scheduler_config.json").read_bytes() == config


def test_a_static_schedule_is_what_its_logits_say(room, tmp_path):
    output = tmp_path / "schedules"
    train_amed.main(arguments(room, output, "--form", "static", "--scale_time", "0.1"))
    entry = entries(output)["4"]
    assert "predictor" not in entry and len(entry["direction_scales"]) == 4
    assert entry["direction_scales"][0::2] == [1.0, 1.0]
    state = torch.load(output / "nfe-4" / "checkpoint-4" / "learner.pt", weights_only=True)["learner"]
    scheduler = load_scheduler(output)
    ends = scheduler.path.lam(torch.tensor([entry["times"][i] for i in (0, 1, 2)], dtype=torch.float64))
    r = (ends[1] - ends[0]) / (ends[2] - ends[0])
    head = torch.sigmoid(state["best"]["logits.0"])
    assert float(r) == pytest.approx(float(head[0]), rel=1e-9)
    assert entry["direction_scales"][1] == pytest.approx(1 + 0.01 * (2 * float(head[1]) - 1), rel=1e-12)
    z = scheduler.path.sigma_edm(torch.tensor([entry["times"][1], entry["network_times"][1]], dtype=torch.float64))
    assert float(z[1] / z[0]) == pytest.approx(1 + 0.1 * (2 * float(head[2]) - 1), rel=1e-9)


def test_a_recipe_file_has_a_section_for_it(room, learned, tmp_path):
    output, recipe = tmp_path / "schedules", tmp_path / "recipe.yaml"
    recipe.write_text("common: {seed: 0}\ntrain_amed: {scale_time: 0.1}\ntrain_ld3: {loss: l1}\n")
    train_amed.main(arguments(room, output, "--config", str(recipe)))
    assert outcome(output) == outcome(learned)


def test_the_grid_best_for_the_bare_solver_is_taken(room, tmp_path, monkeypatch):
    found, search = [], train_amed.grid_search

    def grid_search(*given, **options):
        found.append(search(*given, **options))
        return found[-1]

    monkeypatch.setattr(train_amed, "grid_search", grid_search)
    output = tmp_path / "schedules"
    given = ["--discretization", "best", "--num_train_epochs", "1", "--form", "static", "--random_start"]
    train_amed.main(arguments(room, output, *given))
    facts, [losses] = entries(output)["4"]["provenance"], found
    assert set(losses) == {"logsnr", "time_uniform", "time_quadratic", "polynomial", "edm", "ays"}
    assert losses[facts["start"]] == min(losses.values())
    assert facts["discretization"] == "best" and facts["amed"]["random_start"]
    # The static form begins with the bare solver.
    assert facts["initial_loss"] == pytest.approx(facts["bare_loss"], rel=1e-5)


# ---------------------------------------------------------------------- going on, side by side


def test_an_interrupted_run_continues_to_the_same_files(room, learned, tmp_path, monkeypatch):
    output, real = tmp_path / "broken", train_amed.iterate

    def interrupted(*given):
        *rest, report = given

        def kill(done, entry):
            report(done, entry)
            if done == 2:
                raise KeyboardInterrupt

        return real(*rest, kill)

    monkeypatch.setattr(train_amed, "iterate", interrupted)
    given = arguments(room, output, "--scale_time", "0.1")
    with pytest.raises(KeyboardInterrupt):
        train_amed.main(given)
    assert files(output) == {"nfe-4/checkpoint-2/learner.pt", "trajectories/*/trajectories.safetensors"}
    monkeypatch.setattr(train_amed, "iterate", real)
    train_amed.main([*given, "--resume_from_checkpoint", "latest"])
    expected = outcome(learned)
    found = outcome(output)
    assert {name: found[name] for name in found if name != "scheduler_config.json"} == {
        name: expected[name] for name in expected if name != "scheduler_config.json"
    }
    # but for the evaluations, which this process made fewer of
    first, second = entries(output)["4"], entries(learned)["4"]
    assert first.pop("provenance").pop("loss") == second.pop("provenance").pop("loss")
    assert first == second


@pytest.mark.slow
def test_two_processes_write_what_one_does(room, tmp_path):
    given = ["--micro_batch_size", "2", "--solver", "dpmpp", "--num_train_epochs", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    train_amed.main(arguments(room, one, *given))
    program = launch("-m", "training.train_amed", *arguments(room, two, *given))
    _, errors = program.communicate(timeout=300)
    assert program.returncode == 0, errors
    found, expected = outcome(two), outcome(one)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name != "scheduler_config.json")
    first, second = entries(two)["4"], entries(one)["4"]
    for entry in (first, second):
        del entry["provenance"]["evaluations"]  # of one process
    assert first == second


# ---------------------------------------------------------------------- refused


def refused(capsys, given):
    with pytest.raises(SystemExit) as error:
        train_amed.main(given)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_stages_that_lose_to_a_grid_are_not_saved(room, tmp_path, capsys):
    output = tmp_path / "schedules"
    given = [name for name in arguments(room, output, "--learning_rate", "1e-12") if name != "--allow_worse"]
    given += ["--form", "static", "--discretization", "edm", "--num_train_epochs", "1"]
    sentence = refused(capsys, given)
    assert "the schedule learned for 4 evaluations does not beat the grid" in sentence
    assert "so it was not saved; use more pairs, or learn longer, or that grid, or --allow_worse" in sentence
    assert not (output / "scheduler_config.json").exists() and not list(output.glob("predictor-*"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--nfe", "3"], "use 4 evaluations, or set afs"),
        (["--nfe", "4", "--afs"], "use 5 evaluations, or drop afs"),
        (["--nfe", "4", "4"], "--nfe must name different counts"),
        (["--solver", "unipc"], "invalid choice: 'unipc'"),
        (["--form", "mean"], "invalid choice: 'mean'"),
        (["--scale_dir", "1"], "--scale_dir must be at least 0 and below 1, got 1.0"),
        (["--scale_time", "-0.1"], "--scale_time must be at least 0 and below 1, got -0.1"),
        (["--discretization", "best", "--rho", "3"], "--rho is of one grid; name it with --discretization"),
        (["--rho", "-1"], "--rho must be a positive number, got -1.0"),
        (["--rho", "3"], "discretization 'logsnr' has no option 'rho'"),
        (["--learning_rate", "nan"], "--learning_rate must be a positive number, got nan"),
        (["--num_intermediate_points", "-1"], "--num_intermediate_points must not be negative, got -1"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be at least 1, got 0"),
        (["--micro_batch_size", "0"], "--micro_batch_size must be at least 1, got 0"),
        (["--solver_order", "7", "--solver", "dpmpp"], "dpmpp has no order 7"),
        (["--teacher_solver_order", "7"], "dpmpp has no order 7"),
        (["--teacher_solver", "amed"], "invalid choice: 'amed'"),
        (["--resume_from_checkpoint", "checkpoint-9"], "is no checkpoint"),
        (["--resume_from_checkpoint", "checkpoint-9", "--nfe", "4", "6"], "a checkpoint is of one count"),
        (["--guidance_scale", "7.5"], "was made with guidance_scale=2.0, not 7.5"),
        (["--teacher", "nowhere"], "neither an existing folder nor a Hub id"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(room, tmp_path, capsys, given, sentence):
    output = tmp_path / "schedules"
    assert sentence in refused(capsys, arguments(room, output, *given))
    assert not (output / "scheduler_config.json").exists()


def test_pipelines_that_cannot_be_learned_through(room, tmp_path, capsys):
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=True)
    pipe.save_pretrained(tmp_path / "bounded")
    given = arguments(room, tmp_path / "schedules", "--teacher", str(tmp_path / "bounded"))
    assert "bounds the data prediction" in refused(capsys, given)

    PIPELINES["flux"]()[0].save_pretrained(tmp_path / "flux")
    more = ("--prompts_file", str(room / "prompts.txt"), "--max_sequence_length", "16")
    make_pairs(tmp_path, "flux", "flux-pairs", *more)
    flux = {"teacher": "flux", "pairs": "flux-pairs"}
    given = arguments(tmp_path, tmp_path / "schedules", "--discretization", "time_uniform", **flux)
    assert "without a bottleneck (mid_block) to predict stages from" in refused(capsys, given)
    assert "drop --afs for flow models" in refused(capsys, [*given, "--form", "static", "--afs", "--nfe", "3"])
    train_amed.main([*given, "--form", "static", "--nfe", "2"])
    assert load_scheduler(tmp_path / "schedules").learned_counts == [2]

    PIPELINES["ddpm"]()[0].save_pretrained(tmp_path / "ddpm")
    given = ["--teacher", str(tmp_path / "ddpm"), "--output_dir", str(tmp_path / "ddpm-pairs"), "--num_samples", "8"]
    make_teacher_set.main([*given, "--num_inference_steps", "10"])
    given = arguments(tmp_path, tmp_path / "other", "--form", "static", teacher="ddpm", pairs="ddpm-pairs")
    assert "bounds the data prediction" in refused(capsys, given)  # by clip_sample
    scheduler = tmp_path / "ddpm" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "clip_sample": False}))
    assert "DDPMPipeline takes no latents" in refused(capsys, given)
