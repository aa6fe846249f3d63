# SPDX-License-Identifier: Apache-2.0
"""The program that evaluates schedulers, on a tiny Stable Diffusion: its numbers, made anew by other ways, and that it goes on."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from ld3_diffusers import LD3Scheduler
from tests.schedules import scheduler_with
from tests.tiny_pipelines import PIPELINES
from tests.training.test_processes import ROOT, launch
from training import evaluate, evaluation_of_pipeline, evaluation_store, make_teacher_set
from training.comparison import Comparison, Contender, paired_interval
from training.contenders import NamedScheduler, stock_contenders
from training.evaluation import Entrant
from training.evaluation_store import PartFeatures, Store
from training.features import StoredFeatures, load_feature_network
from training.frechet import Moments, frechet_distance, frechet_influence
from training.references import Reference
from training.scheduler_specs import parse_scheduler
from training.teacher_set import TeacherSet


SEEDS = 10
FEATURES = '''
import torch
def moments_of_channels(images):
    """Means and spreads of the red and green channel."""
    x = images.double().flatten(2)
    return torch.cat([x.mean(2)[:, :2], x.std(2)[:, :1]], 1).float()
'''


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A pipeline, prompts, learned schedules for 3 evaluations, a feature network and a reference by it."""
    folder = tmp_path_factory.mktemp("room")
    pipe, _ = PIPELINES["sd"]()
    pipe.save_pretrained(folder / "sd")
    scheduler_with((3,), config=dict(pipe.scheduler.config)).save_pretrained(folder / "learned")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\na green frog\n")
    (folder / "network.py").write_text(FEATURES)
    network = load_feature_network(f"{folder}/network.py:moments_of_channels")
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(64, 3, generator=generator) * 255
    Reference(Moments.of([rows]), network.record, 64, features=rows).save(folder / "real.npz")
    return folder


def arguments(room, output, *more, metrics=("mse",), schedulers=None, nfe=(3, 4)) -> list[str]:
    given = {
        "teacher": room / "sd",
        "prompts_file": room / "prompts.txt",
        "output_dir": output,
        "seeds": f"0-{SEEDS - 1}",
    }
    given |= {"guidance_scale": 2, "resolution": 32, "batch_size": 4, "teacher_steps": 6, "save_images": SEEDS}
    given |= {"feature_network": f"{room}/network.py:moments_of_channels", "blocks": 2}
    named = schedulers or [
        str(room / "learned"),
        "UniPCMultistepScheduler:name=UniPC",
        "HeunDiscreteScheduler:name=Heun",
    ]
    arguments = [f"--{name}={value}" for name, value in given.items()]
    return [*arguments, "--schedulers", *named, "--nfe", *map(str, nfe), "--metrics", *metrics, *more]


def results_of(output) -> dict:
    return json.loads((output / "results.json").read_text())


def row(results, name, nfe) -> dict:
    [found] = [each for each in results["rows"] if (each["name"], each["nfe"]) == (name, nfe)]
    return found


@pytest.fixture(scope="module")
def whole(room, tmp_path_factory):
    """An evaluation by three metrics in one go."""
    output = tmp_path_factory.mktemp("whole")
    evaluate.main(arguments(room, output, "--reference", str(room / "real.npz"), metrics=("mse", "psnr", "fid")))
    return output


# ---------------------------------------------------------------------- the numbers


def test_mse_is_what_a_comparison_on_a_teacher_set_measures(room, whole, tmp_path):
    given = {"teacher": room / "sd", "prompts_file": room / "prompts.txt", "output_dir": tmp_path / "set", "seed": 0}
    given |= {"num_samples": SEEDS, "guidance_scale": 2, "resolution": 32, "num_inference_steps": 6, "batch_size": 4}
    make_teacher_set.main([f"--{name}={value}" for name, value in given.items()])
    pairs = TeacherSet.load(tmp_path / "set")
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    stock = {each.label: each for each in stock_contenders(pipe.scheduler.config, 4)}
    others = {
        ("learned", 3): Contender("learned", LD3Scheduler.from_pretrained(room / "learned"), 3),
        ("Heun", 4): stock["Heun (leading)"],
    }
    results, store = results_of(whole), Store(whole / "work", SEEDS, 4)
    fresh = {
        (name, nfe): NamedScheduler(parse_scheduler(spec), pipe.scheduler.config).contenders(nfe)[0]
        for name, nfe, spec in (("learned", 3, str(room / "learned")), ("Heun", 4, "HeunDiscreteScheduler"))
    }
    with Comparison(pipe, **pairs.call_settings) as comparison:
        for (name, nfe), contender in others.items():
            comparison.measure(contender, pairs, batch_size=4)
            found = row(results, name, nfe)
            assert found["values"]["mse"]["value"] == pytest.approx(contender.mean, rel=1e-6)
            assert found["evaluations"] == contender.evaluations == (5 if name == "Heun" else 3)
            values = store.column(Entrant.of(fresh[name, nfe], nfe).key, "mse")
            torch.testing.assert_close(values, contender.distances, rtol=1e-5, atol=0)
            _, low, high = paired_interval(values, torch.zeros(SEEDS, dtype=torch.float64))
            assert found["values"]["mse"]["interval"] == [low, high]


def test_rows_are_compared_with_the_subject_and_absences_are_told(room, whole):
    results = results_of(whole)
    assert results["subject"] == "learned" and results["facts"]["seeds"] == f"0-{SEEDS - 1}"
    [absent] = results["absent"]
    assert (absent["name"], absent["nfe"]) == ("learned", 4) and "no schedule was learned for 4" in absent["reason"]
    own, other = row(results, "learned", 3), row(results, "UniPC", 3)
    for metric in ("mse", "fid"):
        assert own["values"][metric]["difference"] is None
        mean, low, high = other["values"][metric]["difference"]
        assert mean == pytest.approx(other["values"][metric]["value"] - own["values"][metric]["value"])
        assert low < mean < high
    assert row(results, "UniPC", 4)["values"]["mse"]["difference"] is None  # nobody to compare with
    scheduler = LD3Scheduler.from_pretrained(room / "learned")
    scheduler.set_timesteps(3)
    assert own["schedule"]["levels"] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    schedule = scheduler._schedules[3]
    told = scheduler.path.levels(schedule.network_times).z
    assert own["schedule"]["told"] == pytest.approx(told.tolist(), rel=1e-5)
    assert other["schedule"] is None and other["solver"] is None and own["solver"] == "unipc"
    assert (whole / "table.md").is_file()


def pictures(folder) -> torch.Tensor:
    files = [folder / f"{seed}.png" for seed in range(SEEDS)]
    return torch.stack([torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1) for file in files])


def test_image_metrics_are_those_of_the_pictures_kept(room, whole):
    results = results_of(whole)
    found = row(results, "learned", 3)
    own, teacher = (pictures(whole / place) for place in (found["images"], "images/teacher"))
    errors = (own.double() - teacher.double()).square().flatten(1).mean(1)
    psnr = 10 * torch.log10(255**2 / errors)
    assert found["values"]["psnr"]["value"] == pytest.approx(float(psnr.mean()), rel=1e-6)
    assert found["values"]["psnr"]["blocks"] == pytest.approx(
        [float(psnr[:5].mean()), float(psnr[5:].mean())], rel=1e-6
    )
    network = load_feature_network(f"{room}/network.py:moments_of_channels")
    with numpy.load(room / "real.npz") as file:
        real = Moments(64, torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"]))
    for images, value in (
        (own, found["values"]["fid"]["value"]),
        (teacher, results["facts"]["teacher_values"]["fid"]),
        (own[5:], found["values"]["fid"]["blocks"][1]),
    ):
        assert value == pytest.approx(frechet_distance(Moments.of([network(images)]), real), rel=1e-6)
    # Each sample's influence beside the value is what is bootstrapped.
    unipc = pictures(whole / row(results, "UniPC", 3)["images"])
    values = []
    for images in (own, unipc):
        features = network(images)
        influence = frechet_influence(StoredFeatures(features), real)
        values.append(frechet_distance(Moments.of([features]), real) + influence)
    interval = paired_interval(values[0], torch.zeros(SEEDS))[1:]
    assert found["values"]["fid"]["interval"] == pytest.approx(interval, rel=1e-6)
    difference = row(results, "UniPC", 3)["values"]["fid"]["difference"]
    assert difference == pytest.approx(paired_interval(values[1], values[0]), rel=1e-6, abs=1e-6)


def test_the_teacher_s_own_schedule_is_no_distance_away(room, tmp_path):
    spec = "LD3Scheduler:solver=unipc,discretization=logsnr"
    evaluate.main(arguments(room, tmp_path / "out", schedulers=[spec], nfe=[6]))
    [same] = results_of(tmp_path / "out")["rows"]
    assert same["values"]["mse"]["value"] == 0


def test_samples_that_are_not_finite_are_infinitely_far_and_black(room, tmp_path, monkeypatch):
    follow = Comparison.follow

    def failing(self, contender, noise, *rest):
        ends = follow(self, contender, noise, *rest)
        if contender.name == "UniPC" and len(noise) > 1:
            ends[1] = math.nan
        return ends

    monkeypatch.setattr(Comparison, "follow", failing)
    schedulers = [str(room / "learned"), "UniPCMultistepScheduler:name=UniPC"]
    evaluate.main(arguments(room, tmp_path / "out", schedulers=schedulers, nfe=[3]))
    results = results_of(tmp_path / "out")
    found = row(results, "UniPC", 3)
    assert found["values"]["mse"] == {"value": None, "interval": None, "difference": None, "blocks": None}
    assert any("3 of 10 samples of UniPC at 3 evaluations are not finite" in note for note in results["warnings"])
    images = pictures(tmp_path / "out" / found["images"])
    assert images[1].max() == 0 and images[0].max() > 0


# ---------------------------------------------------------------------- going on


def numbers(output) -> list:
    results = results_of(output)
    return [results["rows"], results["absent"], results["warnings"]]


def counted(monkeypatch) -> list[str]:
    """Names of the contenders that are sampled in batches."""
    follow, names = Comparison.follow, []

    def counting(self, contender, noise, *rest):
        if len(noise) > 1:
            names.append(contender.name)
        return follow(self, contender, noise, *rest)

    monkeypatch.setattr(Comparison, "follow", counting)
    return names


def test_a_stopped_evaluation_continues_to_the_same_numbers(room, whole, tmp_path, monkeypatch):
    command = arguments(room, tmp_path, "--reference", str(room / "real.npz"), metrics=("mse", "psnr", "fid"))
    write, written = Store.write, []

    def interrupted(self, key, part, columns):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append((key, part))
        write(self, key, part, columns)

    monkeypatch.setattr(Store, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(Store, "write", write)
    damaged = tmp_path / "work" / written[-1][0] / f"part-{written[-1][1]:06d}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    names = counted(monkeypatch)
    evaluate.main(command)
    # The teacher, one learned and two stock schedulers at 3 evaluations, the latter at 4, in 3 parts each; 6 were whole.
    assert len(names) == 3 * 6 - 6
    assert numbers(tmp_path) == numbers(whole)


def test_metrics_counts_and_schedulers_are_added_to_what_is_there(room, whole, tmp_path, monkeypatch):
    first = [str(room / "learned"), "UniPCMultistepScheduler:name=UniPC"]
    evaluate.main(arguments(room, tmp_path, schedulers=first, nfe=[3]))
    names = counted(monkeypatch)
    evaluate.main(arguments(room, tmp_path, schedulers=[*first, "HeunDiscreteScheduler:name=Heun"]))
    assert sorted(names) == ["Heun"] * 6 + ["UniPC"] * 3
    names.clear()
    more = ("--reference", str(room / "real.npz"))
    evaluate.main(arguments(room, tmp_path, *more, metrics=("mse", "psnr", "fid")))
    assert "teacher" not in names and len(names) == 3 * 5  # its ends are kept
    assert numbers(tmp_path) == numbers(whole)


def test_what_samples_the_same_is_measured_once(room, tmp_path, monkeypatch):
    names = counted(monkeypatch)
    evaluate.main(arguments(room, tmp_path, schedulers=["HeunDiscreteScheduler:name=Heun"], nfe=[4, 5]))
    assert names.count("Heun") == 3
    four, five = (row(results_of(tmp_path), "Heun", nfe) for nfe in (4, 5))
    assert four["evaluations"] == five["evaluations"] == 5 and four["values"] == five["values"]


def test_another_teacher_schedule_is_refused(room, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(SystemExit):
        evaluate.main(arguments(room, tmp_path / "copy", "--teacher_steps=7"))
    assert "was made with another teacher_schedule" in " ".join(capsys.readouterr().err.split())


def _other_betas(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.02)


def _other_decoder(pipe):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.add_(0.1)


@pytest.mark.parametrize(
    "edit, key",
    [(_other_betas, "scheduler_digest"), (_other_decoder, "encoders_digest")],
    ids=["scheduler", "decoder"],
)
def test_a_teacher_that_was_edited_in_place_is_another_one(room, whole, tmp_path, capsys, edit, key):
    shutil.copytree(whole, tmp_path / "copy")
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    edit(pipe)
    pipe.save_pretrained(tmp_path / "sd")
    given = arguments(room, tmp_path / "copy", f"--teacher={tmp_path / 'sd'}", schedulers=["UniPCMultistepScheduler"])
    with pytest.raises(SystemExit):
        evaluate.main(given)
    assert f"was made with another {key}" in " ".join(capsys.readouterr().err.split())


def test_solvers_are_for_those_that_can_take_them(room, tmp_path, capsys):
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    learned = scheduler_with((3,), "unipc", 2, config=dict(pipe.scheduler.config))
    schedule = learned.learned_schedules[3]
    entry = replace(schedule, residuals=torch.zeros(3, 1), checksum=None).to_dict(learned.path)
    LD3Scheduler.from_config(learned.config, schedules={"3": entry}).save_pretrained(tmp_path / "coefficients")
    both = [str(room / "learned"), str(tmp_path / "coefficients")]
    evaluate.main(arguments(room, tmp_path / "out", "--solver", "ipndm", schedulers=both, nfe=[3]))
    found = results_of(tmp_path / "out")
    assert {each["name"] for each in found["rows"]} == {"learned ipndm"}
    [absent] = found["absent"]
    assert absent["name"] == "coefficients ipndm" and "serve no other solver" in absent["reason"]
    with pytest.raises(SystemExit):
        evaluate.main(arguments(room, tmp_path / "no", "--solver", "ipndm", schedulers=both[1:], nfe=[3]))
    assert "nobody can take any solver of --solver" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_an_evaluation_killed_at_a_random_moment_continues_to_the_same_numbers(room, whole, tmp_path):
    command = arguments(room, tmp_path, "--reference", str(room / "real.npz"), metrics=("mse", "psnr", "fid"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "training.evaluate", *command]
    program = subprocess.Popen(run, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    parts = random.randint(1, 3 * 6 - 1)  # of 3 of each of the 6 who are measured
    while program.poll() is None and len(list(tmp_path.glob("work/*/part-*"))) < parts:
        time.sleep(0.002)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    evaluate.main(command)
    assert numbers(tmp_path) == numbers(whole)
    for name in (row(results_of(tmp_path), "learned", 3)["images"], "images/teacher"):
        assert torch.equal(pictures(tmp_path / name), pictures(whole / name))


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(room, whole, tmp_path):
    command = arguments(room, tmp_path, "--reference", str(room / "real.npz"), metrics=("mse", "psnr", "fid"))
    program = launch("-m", "training.evaluate", *command)
    _, errors = program.communicate(timeout=280)
    assert program.returncode == 0, errors
    assert numbers(tmp_path) == numbers(whole)


def test_stored_features_are_read_as_they_are_asked_for(tmp_path, monkeypatch):
    store = Store(tmp_path, 7, 3)
    rows = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    for part in range(store.num_parts):
        positions = store.positions(part)
        store.write("key", part, {"features": rows[positions.start : positions.stop]})
    features = PartFeatures(store, "key", "features", range(2, 7))
    assert len(features) == 5 and torch.equal(torch.cat(list(features.chunks())), rows[2:])
    assert torch.equal(features.select([4, 0, 0, 3]), rows[[6, 2, 2, 5]])
    store.write("key", 1, {"more": torch.zeros(3)})
    assert store.columns("key", 1) == {"features", "more"} and store.columns("key", 9) == set()
    monkeypatch.setattr(evaluation_store, "CHUNK_SIZE", 6)
    assert [len(chunk) for chunk in features.chunks()] == [4, 1] and torch.equal(
        torch.cat(list(features.chunks())), rows[2:]
    )
    last = PartFeatures(store, "key", "features", range(3, 6))
    assert torch.equal(torch.cat(list(last.chunks())), rows[3:6])


# ---------------------------------------------------------------------- pictures from files


def test_pictures_in_a_zip_have_the_values_of_those_that_were_sampled(room, whole, tmp_path):
    place = whole / row(results_of(whole), "learned", 3)["images"]
    with zipfile.ZipFile(tmp_path / "learned.zip", "w") as archive:
        for file in sorted(place.iterdir()):
            archive.write(file, file.name)
    network = f"{room}/network.py:moments_of_channels"
    given = ["--metrics", "fid", "--feature_network", network, "--reference", str(room / "real.npz"), "--batch_size=3"]
    images = ["--images", str(tmp_path / "learned.zip"), str(whole / "images" / "teacher")]
    evaluate.main([*given, *images, "--output_dir", str(tmp_path / "out"), "--blocks=0"])
    results = results_of(tmp_path / "out")
    zipped, teacher = (row(results, name, None)["values"]["fid"] for name in ("learned.zip", "teacher"))
    expected = row(results_of(whole), "learned", 3)["values"]["fid"]
    assert zipped["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert zipped["interval"] == pytest.approx(expected["interval"], rel=1e-9)
    assert teacher["difference"][0] == pytest.approx(teacher["value"] - zipped["value"])  # files of the same names
    # Other batches are measured anew, and not mixed with those that are there.
    evaluate.main([*given[:-1], "--batch_size=7", *images, "--output_dir", str(tmp_path / "out"), "--blocks=0"])
    again = row(results_of(tmp_path / "out"), "learned.zip", None)["values"]["fid"]
    assert again["value"] == pytest.approx(expected["value"], rel=1e-9)


def test_pictures_need_a_batch_size(room, tmp_path, capsys):
    given = [
        "--images",
        str(room),
        "--output_dir",
        str(tmp_path / "out"),
        "--metrics",
        "is",
        "--nfe",
        "3",
        "--batch_size",
        "0",
    ]
    with pytest.raises(SystemExit):
        evaluate.main(given)
    assert "--batch_size must be at least 1" in capsys.readouterr().err


def test_unreadable_pictures_are_named_and_counted(room, whole, tmp_path, capsys):
    shutil.copytree(whole / "images" / "teacher", tmp_path / "images")
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    network = f"{room}/network.py:moments_of_channels"
    given = ["--metrics", "fid", "--feature_network", network, "--reference", str(room / "real.npz"), "--blocks=0"]
    given += ["--images", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        evaluate.main(given)
    assert "1 of the images" in capsys.readouterr().err
    evaluate.main([*given, "--skip_unreadable"])
    results = results_of(tmp_path / "out")
    assert results["rows"][0]["samples"] == SEEDS - 1
    assert any("1 pictures of images cannot be read and are left out: 3.png" in note for note in results["warnings"])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--metrics", "msee"], "unknown metrics msee"),
        (["--metrics", "mse", "psnr", "mse"], "names one twice"),
        (["--metrics", "fid"], "give --reference"),
        (["--schedulers", "unipc"], "did you mean UniPCMultistepScheduler"),
        (["--nfe", "3", "0"], "--nfe must name different counts"),
        (["--nfe", "3", "7"], "--nfe 7 is more than the teacher's --teacher_steps 6"),
        (["--seeds=0-3,2"], "gives 2 more than once"),
        (["--solver", "unipc", "--schedulers", "stock"], "none is among --schedulers"),
        (["--blocks=1"], "give 0 or at least 2"),
        (["--images", "somewhere"], "in place of --teacher"),
        (["--prompts_file=", "--class_labels", "0-9", "--metrics", "clip_score"], "there are none, or class labels"),
        (["--feature_network=nothing", "--metrics", "is"], "nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_the_pipeline_is_loaded(room, tmp_path, capsys, monkeypatch, more, sentence):
    monkeypatch.setattr(evaluation_of_pipeline, "load_pipeline", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as error:
        evaluate.main(arguments(room, tmp_path / "out", *more))
    assert error.value.code == 2 and sentence in " ".join(capsys.readouterr().err.split())


def test_prompts_that_are_forgotten_may_be_given_later(room, tmp_path, capsys):
    command = arguments(room, tmp_path, schedulers=["UniPCMultistepScheduler"], nfe=[3])
    with pytest.raises(SystemExit):
        evaluate.main([argument for argument in command if not argument.startswith("--prompts_file")])
    assert "needs prompts" in capsys.readouterr().err and not (tmp_path / "request.json").exists()


def test_too_few_samples_for_a_distance_are_refused_before_the_pipeline_is_loaded(room, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation_of_pipeline, "load_pipeline", lambda *_: pytest.fail("loaded"))
    more = ["--reference", str(room / "real.npz"), "--seeds=0-2"]
    with pytest.raises(SystemExit):
        evaluate.main(arguments(room, tmp_path / "out", *more, metrics=["fid"]))
    assert "it needs at least 4" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "schedulers, more, sentence",
    [
        (["UniPCMultistepScheduler"], ["--subject=ours"], "the subject 'ours' does not take part"),
        (["UniPCMultistepScheduler", "UniPCMultistepScheduler"], [], "tell them apart by name="),
        (["FlowMatchEulerDiscreteScheduler"], [], "for flow models"),
        (["LEARNED"], ["--nfe", "5"], "has no schedule for any --nfe: no schedule was learned for 5"),
    ],
)
def test_schedulers_that_cannot_take_part_are_refused_before_sampling(
    room, tmp_path, capsys, monkeypatch, schedulers, more, sentence
):
    monkeypatch.setattr(Comparison, "follow", lambda *_: pytest.fail("sampled"))
    schedulers = [str(room / "learned") if name == "LEARNED" else name for name in schedulers]
    with pytest.raises(SystemExit):
        evaluate.main(arguments(room, tmp_path / "out", *more, schedulers=schedulers))
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_videos_are_compared_by_their_end_states_only(tmp_path, capsys):
    PIPELINES["ltx"]()[0].save_pretrained(tmp_path / "ltx")
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    given = ["--teacher", str(tmp_path / "ltx"), "--prompts_file", str(tmp_path / "prompts.txt"), "--resolution=32"]
    given += ["--schedulers", "LD3Scheduler", "--nfe", "2", "--seeds=0-1", "--teacher_steps=3", "--blocks=0"]
    with pytest.raises(SystemExit):
        evaluate.main([*given, "--metrics", "psnr", "--output_dir", str(tmp_path / "psnr")])
    assert "cannot be unpacked" in " ".join(capsys.readouterr().err.split())
    evaluate.main([*given, "--metrics", "mse", "--output_dir", str(tmp_path / "mse")])
    results = results_of(tmp_path / "mse")
    assert results["rows"][0]["values"]["mse"]["value"] > 0
    assert any(note.startswith("no pictures are kept") for note in results["warnings"])
