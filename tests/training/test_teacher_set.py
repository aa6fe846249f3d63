# SPDX-License-Identifier: Apache-2.0
"""Teacher sets: true pairs, resumable to the bit, tied to their teacher; the program's manners."""

import hashlib
import json
import math
import shutil

import pytest
import torch

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.noise_path import shift_flow_time
from tests.tiny_pipelines import PIPELINES
from training import arguments, make_teacher_set, teacher_set
from training.conditioning import ConditioningStore
from training.prompts import read_prompts
from training.rollout import PipelineRollout
from training.teacher_set import TeacherSet, TeacherSetWriter, check_disjoint, starting_noise, teacher_digest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers") / "sd"
    PIPELINES["sd"]()[0].save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red fox\n\nblue\n")
    return path


def command(teacher, output, prompts, /, **changes) -> list[str]:
    values = {
        "teacher": teacher,
        "output_dir": output,
        "prompts_file": prompts,
        "num_samples": 5,
        "batch_size": 2,
        "num_inference_steps": 3,
        "resolution": 32,
        "guidance_scale": 3,
        "seed": 7,
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def files(path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def refuse(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        make_teacher_set.main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------- the pairs


def test_pairs_are_what_the_pipeline_makes(teacher, prompts, tmp_path):
    make_teacher_set.main(command(teacher, tmp_path / "set", prompts))
    made = TeacherSet.load(tmp_path / "set")
    assert len(made) == 5 and made.seeds == range(7, 12) and made.prompts == ["a red fox", "blue"]
    assert made.provenance["discretization"] == "logsnr" and made.provenance["teacher"] == "sd"
    noise, end, conditioning = made.batch([4, 1])
    expected = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (11, 8)])
    assert torch.equal(noise, expected)

    pipe, _ = PIPELINES["sd"]()
    pipe.scheduler = LD3Scheduler.from_config(pipe.scheduler.config, solver="unipc", discretization="logsnr")
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"}
    direct = pipe(prompt=["a red fox", "blue"], latents=noise, **settings).images
    assert (end - direct).abs().max() <= 1e-5 * direct.abs().max()
    with PipelineRollout(pipe, guidance_scale=3.0, height=32, width=32) as rollout, torch.no_grad():
        again = rollout(3, noise, conditioning)
    assert (end - again).abs().max() <= 1e-5 * end.abs().max()


@pytest.mark.parametrize("name", ["dit", "ddpm"])
def test_pipelines_that_draw_their_own_noise_store_seeds(name, tmp_path):
    pipe, _ = PIPELINES[name]()
    pipe.save_pretrained(tmp_path / name)
    labels = tmp_path / "labels.txt"
    labels.write_text("3\n7\n")
    prompts = labels if name == "dit" else None
    changes = {"resolution": None, "guidance_scale": 4.0 if name == "dit" else None}
    make_teacher_set.main(command(tmp_path / name, tmp_path / "set", prompts, **changes))
    made = TeacherSet.load(tmp_path / "set")
    seeds, end, conditioning = made.batch([3, 0])
    assert seeds.tolist() == [10, 7]
    if name == "dit":
        assert conditioning["class_labels"].tolist() == [7, 3]
    pipe.scheduler = LD3Scheduler.from_config(pipe.scheduler.config, discretization="logsnr")
    call = {} if name == "ddpm" else {"guidance_scale": 4.0}
    with PipelineRollout(pipe, **call) as rollout, torch.no_grad():
        assert (rollout(3, seeds, conditioning) - end).abs().max() <= 1e-5 * end.abs().max()
    made.check(pipe, guidance_scale=call.get("guidance_scale"))


def test_variant_and_end_are_those_asked_for(teacher, prompts, tmp_path, capsys):
    asked = {"solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min", "num_samples": 1}
    make_teacher_set.main(command(teacher, tmp_path / "set", prompts, **asked))
    made = TeacherSet.load(tmp_path / "set")
    assert made.provenance["solver_type"] == "bh1" and made.provenance["final_sigmas_type"] == "sigma_min"
    noise, end, _ = made.batch([0])
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"}
    pipe, _ = PIPELINES["sd"]()
    stock, ends = pipe.scheduler.config, {}
    for kind, last in (("bh1", "sigma_min"), ("bh2", "sigma_min"), ("bh1", "zero")):
        options = {"solver_type": kind, "final_sigmas_type": last, "solver_order": 2, "discretization": "logsnr"}
        pipe.scheduler = LD3Scheduler.from_config(stock, solver="unipc", **options)
        ends[kind, last] = pipe(prompt=["a red fox"], latents=noise, **settings).images
    scale = end.abs().max()
    distances = {which: float((end - image).abs().max() / scale) for which, image in ends.items()}
    assert distances.pop(("bh1", "sigma_min")) < 1e-5 and min(distances.values()) > 1e-4
    assert "dpmpp has no solver_type 'bh1'" in refuse(
        command(teacher, tmp_path / "other", prompts, solver="dpmpp", solver_type="bh1"), capsys
    )


def test_flow_teachers_that_keep_some_noise_end_where_schedules_do():
    config = LD3Scheduler(noise_path="flow", prediction_type="flow_prediction", shift=3.0).config
    asked = make_teacher_set.parser().parse_args(["--teacher=x", "--output_dir=y", "--final_sigmas_type=sigma_min"])
    scheduler = make_teacher_set.teacher_scheduler(asked, config)
    scheduler.set_timesteps(10)
    expected = shift_flow_time(torch.tensor(scheduler.path.t_min, dtype=torch.float64), math.log(3.0))
    torch.testing.assert_close(scheduler.schedule.times[-1], expected)


def test_sets_that_do_not_record_the_end_stay_valid_and_others_are_told_apart(teacher, prompts, tmp_path, capsys):
    def argv(name, **end):
        return command(teacher, tmp_path / name, prompts, num_samples=1, **end)

    make_teacher_set.main(argv("set"))
    provenance = tmp_path / "set" / "provenance.json"
    facts = json.loads(provenance.read_text())
    del facts["final_sigmas_type"]  # as before it could be chosen
    del facts["scheduler_digest"]
    provenance.write_text(json.dumps(facts))
    make_teacher_set.main(argv("set"))
    assert "finished already" in capsys.readouterr().out
    assert "final_sigmas_type: None, now 'sigma_min'" in refuse(argv("set", final_sigmas_type="sigma_min"), capsys)
    make_teacher_set.main(argv("to_t_min", final_sigmas_type="sigma_min"))
    assert "final_sigmas_type: 'sigma_min', now None" in refuse(argv("to_t_min"), capsys)


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop_at", ["conditioning", 0, 1, 2, "assembly"])
def test_a_killed_run_continues_to_the_same_bits(teacher, prompts, tmp_path, monkeypatch, stop_at):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make_teacher_set.main(command(teacher, whole, prompts))

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop_at == "conditioning":
            patch.setattr(teacher_set, "save_file", killed)
        elif stop_at == "assembly":
            patch.setattr(teacher_set.os, "rename", killed)
        else:
            replace = teacher_set.os.replace

            def replace_until(source, target):
                # the temporary file is complete but has not got its name
                if str(target).endswith(f"{stop_at:06d}.arrow"):
                    raise KeyboardInterrupt
                replace(source, target)

            patch.setattr(teacher_set.os, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            make_teacher_set.main(command(teacher, broken, prompts))
    assert not broken.exists()
    with pytest.raises(ValueError, match="not finished"):
        TeacherSet.load(broken)

    written = []
    write = TeacherSetWriter.write
    monkeypatch.setattr(
        TeacherSetWriter, "write", lambda self, shard, *a: (written.append(shard), write(self, shard, *a))
    )
    make_teacher_set.main(command(teacher, broken, prompts))
    assert written == {"conditioning": [0, 1, 2], 0: [0, 1, 2], 1: [1, 2], 2: [2], "assembly": []}[stop_at]
    assert files(broken) == files(whole)
    assert not broken.with_name("broken.partial").exists()


def test_a_set_is_of_one_noise_path(teacher, prompts, tmp_path, capsys):
    make_teacher_set.main(command(teacher, tmp_path / "set", prompts, num_samples=1))
    edited = shutil.copytree(teacher, tmp_path / "edited")
    config = edited / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.02}))
    assert "scheduler_digest" in refuse(command(edited, tmp_path / "set", prompts, num_samples=1), capsys)


def test_other_arguments_do_not_continue_a_set(teacher, prompts, tmp_path, capsys):
    make_teacher_set.main(command(teacher, tmp_path / "set", prompts))
    before = files(tmp_path / "set")
    make_teacher_set.main(command(teacher, tmp_path / "set", prompts))
    assert "finished already" in capsys.readouterr().out
    message = refuse(command(teacher, tmp_path / "set", prompts, guidance_scale=4), capsys)
    assert "guidance_scale: 3.0, now 4.0" in message and "--output_dir" in message
    assert files(tmp_path / "set") == before


# ---------------------------------------------------------------------- whose set it is


def test_refuses_another_teacher_and_other_settings(teacher, prompts, tmp_path):
    make_teacher_set.main(command(teacher, tmp_path / "set", prompts))
    made = TeacherSet.load(tmp_path / "set")
    pipe, _ = PIPELINES["sd"]()
    made.check(pipe, guidance_scale=3.0, height=32, width=32)
    made.check(pipe)
    with pytest.raises(ValueError, match="guidance_scale=3.0, not 7.5"):
        made.check(pipe, guidance_scale=7.5)
    with pytest.raises(ValueError, match="height=32, not 64"):
        made.check(pipe, height=64)
    with torch.no_grad():
        # one fine-tuning step of one layer
        pipe.unet.conv_out.bias += 1e-4
    with pytest.raises(ValueError, match="other weights"):
        made.check(pipe)
    same, _ = PIPELINES["sd"]()
    stock = same.scheduler
    same.scheduler = type(stock).from_config(stock.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="another noise path, prediction type or shift"):
        made.check(same)
    assert teacher_digest(same) == made.provenance["teacher_digest"]
    assert teacher_digest(same.to(torch.bfloat16)) != made.provenance["teacher_digest"]


def test_learning_and_evaluation_share_no_seed():
    def of(first, count):
        made = object.__new__(TeacherSet)
        made.provenance, made.pairs = {"base_seed": first}, range(count)
        return made

    check_disjoint(of(0, 10), of(10, 5))
    check_disjoint(of(10, 5), of(0, 10))
    with pytest.raises(ValueError, match="seeds 9 to 9; .* --seed of 14 or more"):
        check_disjoint(of(0, 10), of(9, 5))


def test_noise_of_a_sample_depends_on_its_seed_alone():
    together = starting_noise([3, 4, 5], (4, 8))
    assert torch.equal(together[1:2], starting_noise([4], (4, 8)))
    assert abs(float(starting_noise(range(50), (4, 64)).std()) - 1) < 0.02


# ---------------------------------------------------------------------- conditioning


def test_conditioning_survives_the_file_in_every_form(tmp_path):
    padded = {"prompt_embeds": torch.arange(12.0).reshape(2, 3, 2), "prompt_embeds_mask": torch.ones(2, 3)}
    longer = {"prompt_embeds": torch.ones(1, 5, 2), "prompt_embeds_mask": torch.ones(1, 5)}
    lists = [{"tokens": [torch.ones(2, 3), torch.zeros(4, 3)]}, {"tokens": [torch.full((1, 3), 2.0)]}]
    labels = [{"class_labels": torch.tensor([4, 5])}, {"class_labels": torch.tensor([6])}]
    same = [{"negative": torch.full((2, 3), 7.0)}, {"negative": torch.full((1, 3), 7.0)}]
    text = [{"prompt": ["a", "b"]}, {"prompt": ["c"]}]
    store = ConditioningStore.of(
        [
            {**padded, **lists[0], **labels[0], **same[0], **text[0]},
            {**longer, **lists[1], **labels[1], **same[1], **text[1]},
        ]
    )
    tensors = store.to_tensors()
    assert tensors["negative"].shape == (1, 3)
    back = ConditioningStore.from_tensors(tensors, {"prompt": store.rows["prompt"]}).select([2, 0])
    assert back["prompt_embeds"].shape == (2, 5, 2) and torch.equal(
        back["prompt_embeds"][1, :3], padded["prompt_embeds"][0]
    )
    assert back["prompt_embeds_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert [t.tolist() for t in back["tokens"]] == [[[2.0] * 3], [[1.0] * 3] * 2]
    assert back["class_labels"].tolist() == [6, 4] and back["prompt"] == ["c", "a"]
    assert back["negative"].tolist() == [[7.0] * 3] * 2


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "one\n\n two \n", ["one", "two"]),
        ("a.json", '["one", "two"]', ["one", "two"]),
        ("a.json", '{"x.png": ["one", "two"], "y.png": "three"}', ["one", "two", "three"]),
        (
            "a.json",
            '{"images": [], "annotations": [{"id": 1, "caption": "one"}, {"id": 2, "caption": "two"}]}',
            ["one", "two"],
        ),
        ("a.csv", 'id,caption\n1,"one, and"\n2,two\n', ["one, and", "two"]),
        ("a.tsv", "id\ttext\n1\tone\n", ["one"]),
    ],
)
def test_reads_prompts_of_every_form(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == expected
    assert read_prompts(tmp_path / name, max_prompts=1) == expected[:1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.json", "[1, 2]", "none of: a list"),
        ("a.json", "{", "not valid JSON"),
        ("a.csv", "id,words\n1,one\n", "--caption_column"),
        ("missing.txt", None, "cannot read"),
    ],
)
def test_refuses_files_without_prompts(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


# ---------------------------------------------------------------------- the program


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher": "no/such/folder"}, "neither an existing folder nor a Hub id"),
        ({"prompts_file": "EMPTY"}, "holds no prompt"),
        ({"prompts_file": None}, "needs prompts"),
        ({"num_samples": 0}, "--num_samples must be at least 1"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"solver": "magic"}, "invalid choice"),
        ({"solver_order": 7}, "no order 7"),
        ({"height": 32}, "--resolution gives both"),
        ({"output_dir": "FILE/set"}, "not a writable folder"),
        ({"output_dir": "FILE"}, "is no teacher set"),
    ],
)
def test_user_errors_are_one_sentence_and_leave_nothing(teacher, prompts, tmp_path, capsys, changes, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("mine")
    places = {"EMPTY": tmp_path / "empty.txt", "FILE/set": tmp_path / "file" / "set", "FILE": tmp_path / "file"}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    error = refuse(command(teacher, tmp_path / "set", prompts, **changes), capsys)
    assert message in error.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "file", "prompts.txt"]
    assert (tmp_path / "file").read_text() == "mine"


def test_recipe_fills_in_what_the_command_line_leaves_out(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "teacher: some/teacher\noutput_dir: out\nnum_samples: 12\nguidance_scale: 1e0\nseed: 3\nrevision: null\n"
    )
    args = arguments.parse(make_teacher_set.parser(), ["--config", str(recipe), "--seed", "5"])
    assert (args.pretrained_model_name_or_path, args.num_samples, args.guidance_scale, args.seed) == (
        "some/teacher",
        12,
        1.0,
        5,
    )
    assert args.revision is None
    for content, message in (
        ("num_sample: 12\n", "unknown entries num_sample"),
        ("- 1\n", "no mapping"),
        ("num_samples: many\n", "invalid int value"),
        ("a: [\n", "cannot read the recipe"),
    ):
        recipe.write_text(content)
        assert message in refuse(["--config", str(recipe)], capsys)


def test_provenance_is_plain_json_without_machine_paths(teacher, prompts, tmp_path):
    make_teacher_set.main(command(teacher, tmp_path / "set", prompts))
    text = (tmp_path / "set" / "provenance.json").read_text()
    assert str(tmp_path) not in text and str(teacher.parent) not in text
    facts = json.loads(text)
    assert facts["base_seed"] == 7 and facts["num_samples"] == 5 and facts["shape"] == [4, 16, 16]
    assert facts["versions"]["torch"] == torch.__version__
