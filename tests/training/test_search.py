# SPDX-License-Identifier: Apache-2.0
"""The search programs on tiny pipelines with random weights: what they write, that they continue, and what they refuse."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ld3_diffusers import LD3Scheduler, SolverSpec
from ld3_diffusers.noise_path import RectifiedFlow, VPLinear
from tests.tiny_pipelines import PIPELINES
from tests.training.test_processes import digests, on_two_processes
from tests.training.toy import Mixture, ToyRollout
from training import make_teacher_set, search, search_gits, search_oss, train_ld3
from training.certificate import how_made, shared_facts
from training.gits import dynamic_programme
from training.search import TeacherGrid, most_steps, students
from training.teacher_set import TeacherSet


PROGRAMS = {"gits": search_gits, "oss": search_oss}
CALLS = {
    "sd": ["--resolution", "32", "--guidance_scale", "2"],
    "flux": ["--resolution", "32", "--max_sequence_length", "16"],
}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with two pipelines and a teacher set of 7 pairs for each."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    for name, call in CALLS.items():
        PIPELINES[name]()[0].save_pretrained(folder / name)
        given = ["--teacher", str(folder / name), "--output_dir", str(folder / f"{name}-pairs"), "--num_samples", "7"]
        given += ["--num_inference_steps", "10", "--prompts_file", str(folder / "prompts.txt"), *call]
        make_teacher_set.main(given)
    return folder


def arguments(room, output, *more, teacher="sd"):
    given = [
        "--teacher",
        str(room / teacher),
        "--teacher_set",
        str(room / f"{teacher}-pairs"),
        "--output_dir",
        str(output),
    ]
    given += ["--num_train", "5", "--num_valid", "2", "--batch_size", "2", "--num_grid_points", "9"]
    return [*given, "--nfe", "2", "3", *more]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def provenance(folder, nfe=3):
    return LD3Scheduler.from_pretrained(folder).config.schedules[str(nfe)]["provenance"]


@pytest.mark.parametrize("teacher", ["sd", "flux"])
def test_gits_saves_what_the_student_chose(room, tmp_path, teacher):
    output = tmp_path / "gits"
    search_gits.main(arguments(room, output, "--solver", "dpmpp", teacher=teacher))
    assert files(output) == {
        "scheduler_config.json",
        *("gits/cost.safetensors", "gits/cost.png", "gits/schedules.json"),
        *("nfe-2/schedule.png", "nfe-3/schedule.png"),
    }
    scheduler = LD3Scheduler.from_pretrained(output)
    assert scheduler.learned_counts == [2, 3]
    facts = provenance(output)
    assert facts["recipe"] == "gits" and facts["search"]["metric"] == "dev" and facts["train_pairs"] == 5
    assert facts["learned_on"]["train"]["seeds"] == [0, 4] and facts["learned_on"]["valid"]["seeds"] == [5, 6]
    # the winner is the best of searched schedules and hand-made grids
    assert facts["loss"] == facts["losses"][facts["won"]] == min(facts["losses"].values())
    assert any(name.startswith("coeff") for name in facts["losses"]) and "edm" in facts["losses"]
    assert facts["best_grid_loss"] == facts["losses"][facts["best_grid"]]

    found = json.loads((output / "gits" / "schedules.json").read_text())
    cost = load_file(output / "gits" / "cost.safetensors")["cost"]
    assert len(found["schedules"]) == 9
    entry = found["schedules"]["coeff 1.15"]["3"]
    assert entry["indices"] == dynamic_programme(cost, 3, 1.15)[-1]
    assert entry["times"][0] == 1.0 and entry["times"][-1] == 0.0

    # It can be certified like a learned one, and is called what it is.
    entries = scheduler.config.schedules
    assert shared_facts(entries)["teacher_steps"] == 10 and how_made(entries) == "searched"

    # The pipeline samples with it as it was judged.
    pipe = DiffusionPipeline.from_pretrained(room / teacher)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    scheduler.check(pipe)
    pairs = TeacherSet.load(room / f"{teacher}-pairs")
    noise, target, conditioning = pairs.batch([5, 6])
    settings = {"num_inference_steps": 3, "output_type": "latent", **pairs.call_settings}
    end = pipe(**conditioning, latents=noise, **settings).images
    assert float(((end - target) ** 2).mean()) == pytest.approx(facts["loss"], rel=1e-4)


def test_plain_gits_takes_the_first_coeff(room, tmp_path):
    output = tmp_path / "gits"
    options = [
        "--no-rescore",
        "--coeff",
        "0.9",
        "1.3",
        "--solver",
        "ipndm",
        "--metric",
        "l2",
        "--teacher_solver",
        "heun",
    ]
    search_gits.main(arguments(room, output, *options, "--final_sigmas_type", "sigma_min"))
    found = json.loads((output / "gits" / "schedules.json").read_text())["schedules"]
    assert len(found) == 10  # the authors' and 1.3
    entry = LD3Scheduler.from_pretrained(output).config.schedules["3"]
    assert entry["times"] == found["coeff 0.9"]["3"]["times"] and entry["network_times"] == entry["times"][:-1]
    assert entry["times"][-1] == 0.001  # the path's t_min
    assert provenance(output)["won"] == "coeff 0.9" and list(provenance(output)["losses"]) == ["coeff 0.9"]


@pytest.mark.parametrize("teacher", ["sd", "flux"])
def test_oss_saves_its_combined_list(room, tmp_path, teacher):
    output = tmp_path / "oss"
    search_oss.main(arguments(room, output, "--solver", "euler", teacher=teacher))
    assert files(output) == {
        "scheduler_config.json",
        *("oss/paths.safetensors", "oss/schedules.json", "nfe-2/schedule.png", "nfe-3/schedule.png"),
    }
    found = json.loads((output / "oss" / "schedules.json").read_text())["schedules"]["oss"]
    entry = LD3Scheduler.from_pretrained(output).config.schedules["3"]
    assert entry["times"] == found["3"]["times"] and entry["provenance"]["recipe"] == "oss"
    assert list(entry["provenance"]["losses"]) == ["oss"] and entry["provenance"]["loss"] > 0
    assert load_file(output / "oss" / "paths.safetensors")["paths"].shape == (5, 3, 4)
    # Rescored it need not win, but is judged.
    search_oss.main(arguments(room, output, "--solver", "euler", "--rescore", teacher=teacher))
    assert "oss" in provenance(output)["losses"] and "edm" in provenance(output)["losses"]


def test_an_analytical_first_step_is_found_on_the_teacher_without(room, tmp_path):
    plain, afs = tmp_path / "plain", tmp_path / "afs"
    search_gits.main(arguments(room, plain, "--solver", "dpmpp"))
    search_gits.main(arguments(room, afs, "--solver", "dpmpp", "--afs", "--no-rescore"))
    costs = [load_file(folder / "gits" / "cost.safetensors")["cost"] for folder in (plain, afs)]
    assert torch.equal(*costs)
    entry = LD3Scheduler.from_pretrained(afs).config.schedules["3"]
    assert entry["afs"] and len(entry["times"]) == 5
    # all but the first step are those of the search for 3 steps, or it is the search for 4
    found = json.loads((afs / "gits" / "schedules.json").read_text())["schedules"]["coeff 1.15"]
    inserted = entry["times"][2:] == found["3"]["times"][1:]
    assert inserted or entry["times"] == found["4"]["times"]


def test_students_are_the_grids_levels_at_the_solvers_steps():
    path = VPLinear()
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    grid = TeacherGrid("time_uniform", times, path, "epsilon")
    ways = {"a": [[0, 10], [0, 6, 10], [0, 5, 8, 10]], "b": [[0, 10], [0, 6, 10], [0, 4, 8, 10]]}
    found = students(ways, grid, 3, SolverSpec("dpmpp"))
    assert {name: schedule.times.tolist() for name, schedule in found.items()} == {
        "a": times[[0, 5, 8, 10]].tolist(),
        "b": times[[0, 4, 8, 10]].tolist(),
    }
    # Two steps of Heun that end in clean data are three evaluations; equal schedules are one.
    heun = students(ways, grid, 3, SolverSpec("heun"))
    assert heun["a"] is heun["b"] and heun["a"].times.tolist() == times[[0, 6, 6, 10]].tolist() and heun["a"].nfe == 3
    # An analytical first step ends at each of the levels before the second, or is that of the longer list.
    afs = students({"a": ways["a"]}, grid, 2, SolverSpec("dpmpp", afs=True))
    assert {name: schedule.times.tolist() for name, schedule in afs.items()} == {
        "a": times[[0, 5, 8, 10]].tolist(),
        **{f"a, {k} inserted": times[[0, k, 6, 10]].tolist() for k in range(1, 6)},
    }
    assert all(schedule.nfe == 2 for schedule in afs.values())


def test_flow_schedules_are_shifted_when_they_sample():
    path = RectifiedFlow()
    rollout = ToyRollout(Mixture.random(dim=6), path)
    grid = TeacherGrid("time_uniform", torch.linspace(1, 0, 11, dtype=torch.float64), path, "flow_prediction")
    [schedule] = students({"a": [[0, 10], [0, 5, 10]]}, grid, 2, SolverSpec("euler")).values()
    shift = 3.0
    table = schedule.table(rollout.path, mu=float(torch.tensor(shift).double().log()))
    torch.testing.assert_close(table.times, torch.tensor([1.0, shift / (1 + shift), 0.0], dtype=torch.float64))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_killed_run_continues_to_the_same_result(room, tmp_path, monkeypatch, name):
    program, whole, broken = PROGRAMS[name], tmp_path / "whole", tmp_path / "broken"
    plain = ["--solver", "euler", "--no-rescore"]
    program.main(arguments(room, whole, *plain))
    function = {"gits": "record", "oss": "optimal_paths"}[name]
    real, calls = getattr(search, function), []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(*args, **options)

    monkeypatch.setattr(search, function, counted)
    with pytest.raises(Killed):
        program.main(arguments(room, broken, *plain))
    [work] = (broken / name).glob(".parts-*")
    assert len(list(work.iterdir())) == 2  # of three parts
    program.main(arguments(room, broken, *plain))
    assert len(calls) == 4 and not work.exists()
    assert digests(broken) == digests(whole)

    # What is there is not computed again, neither for the same counts nor for others that it serves.
    program.main(arguments(room, broken, *plain))
    if name == "gits":
        program.main(arguments(room, broken, "--solver", "ipndm", "--no-rescore", "--nfe", "4"))
        assert LD3Scheduler.from_pretrained(broken).learned_counts == [2, 3, 4]
    assert len(calls) == 4
    # Another request is, and a damaged file.
    program.main(arguments(room, broken, *plain, "--num_grid_points", "8"))
    assert len(calls) == 7
    next((broken / name).glob("*.safetensors")).write_bytes(b"not tensors")
    program.main(arguments(room, broken, *plain, "--num_grid_points", "8"))
    assert len(calls) == 10


def _search_both(room, folder):
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    for name, program in PROGRAMS.items():
        program.main(arguments(room, folder / name, "--solver", "euler"))


@pytest.mark.slow
def test_two_processes_find_bit_for_bit_what_one_does(room, tmp_path):
    for name, program in PROGRAMS.items():
        program.main(arguments(room, tmp_path / "one" / name, "--solver", "euler"))
    on_two_processes(_search_both, room, tmp_path / "two")
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


@pytest.mark.parametrize("name", PROGRAMS)
def test_learning_starts_from_a_search(room, tmp_path, monkeypatch, capsys, name):
    output = tmp_path / "learned"
    given = ["--teacher", str(room / "sd"), "--teacher_set", str(room / "sd-pairs"), "--output_dir", str(output)]
    given += [
        "--num_train",
        "5",
        "--num_valid",
        "2",
        "--nfe",
        "3",
        "--solver",
        "dpmpp",
        "--init",
        name,
        "--allow_worse",
    ]
    given += ["--max_train_steps", "2", "--report_to", "none", "--checkpointing_steps", "1"]
    monkeypatch.setattr(search, "GITS_POINTS", 9)
    monkeypatch.setattr(search, "OSS_POINTS", 9)
    train_ld3.main(given)
    facts = provenance(output)
    assert facts["start"].startswith("gits, coeff" if name == "gits" else "oss") and facts["discretization"] == name
    assert f"starting from {facts['start']}" in capsys.readouterr().out
    before = (output / "scheduler_config.json").read_bytes()

    # Continued, the run starts from the very same schedule, without a search.
    (output / "scheduler_config.json").unlink()
    monkeypatch.setattr(search, {"gits": "record", "oss": "optimal_paths"}[name], None)
    train_ld3.main([*given, "--resume_from_checkpoint", "latest"])
    assert (output / "scheduler_config.json").read_bytes() == before


def refused(capsys, program, given):
    with pytest.raises(SystemExit) as error:
        program.main(given)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("gits", ["--metric", "bdev"], "invalid choice: 'bdev'"),
        ("gits", ["--coeff", "1.1", "0"], "--coeff must be positive, got 0.0; 1.15 is usual"),
        ("gits", ["--nfe", "9"], "9 evaluations are 9 steps of unipc, but a teacher's grid of 9 points has only 8"),
        ("oss", ["--nfe", "8", "--afs"], "8 evaluations are 9 steps of euler"),
        ("gits", ["--num_warmup", "6"], "make a larger teacher set"),
        ("oss", ["--num_samples", "0"], "--num_train must be at least 1, got 0"),
        ("oss", ["--cost_power", "0"], "--cost_power must be a positive number"),
        ("gits", ["--num_grid_points", "2"], "--num_grid_points must be at least 3"),
        ("gits", ["--teacher_rho", "-1"], "--teacher_rho must be a positive number"),
        ("gits", ["--teacher_discretization", "logsnr", "--teacher_rho", "3"], "'logsnr' has no option 'rho'"),
        ("gits", ["--teacher_solver_order", "9"], "ipndm has no order 9"),
        ("gits", ["--resolution", "64"], "is for a teacher set made here"),
        ("gits", ["--batch_size", "0"], "--train_batch_size must be at least 1"),
        ("gits", ["--guidance_scale", "7.5"], "was made with guidance_scale=2.0, not 7.5"),
        ("oss", ["--teacher", "nowhere"], "neither an existing folder nor a Hub id"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(room, tmp_path, capsys, name, given, sentence):
    output = tmp_path / "schedules"
    assert sentence in refused(capsys, PROGRAMS[name], arguments(room, output, *given))
    assert not output.exists() or not files(output)


def test_a_first_step_without_evaluation_is_refused_for_flow(room, tmp_path, capsys):
    given = arguments(room, tmp_path / "schedules", "--afs", teacher="flux")
    assert "drop --afs for flow models" in refused(capsys, search_gits, given)


def test_a_bounded_data_prediction_is_refused(room, tmp_path, capsys):
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    pipe.scheduler.register_to_config(thresholding=True)
    pipe.save_pretrained(tmp_path / "bounded")
    given = arguments(room, tmp_path / "schedules", "--teacher", str(tmp_path / "bounded"))
    assert "set clip_sample and thresholding to false" in refused(capsys, search_gits, given)


def test_most_steps_counts_what_the_solver_makes_of_evaluations():
    assert most_steps(61, [3, 10], SolverSpec("unipc"), "zero") == 10
    assert most_steps(61, [3, 9], SolverSpec("heun"), "zero") == 5
    assert most_steps(61, [3, 9], SolverSpec("unipc", afs=True), "sigma_min") == 10
