# SPDX-License-Identifier: Apache-2.0
"""The whole way with a tiny Flux and a Hub of its own: learn, certify, publish, find, load, sample, verify; and what is refused."""

import contextlib
import io
import json
import os
import re
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.hub import find_schedules, list_variants
from tests.tiny_pipelines import PIPELINES
from tests.training.test_processes import on_two_processes
from training import certification, make_teacher_set, publish, published, train_ld3
from training.certificate import contenders, count_record, to_json
from training.certificate_form import read
from training.comparison import Comparison
from training.teacher_set import TeacherSet, prompt_hash


SAMPLES = 24
LEARNED_WITH = ["a red fox", "a blue bird", "a green tree"]
HELD_OUT = ["a red fox", "a quick cat", "an old house"]  # of which learning saw the first


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A teacher, a schedule of 5 evaluations that wins, and one of 3 that was hardly learned and loses."""
    folder = tmp_path_factory.mktemp("room")
    pipe, _ = PIPELINES["flux"]()
    pipe.save_pretrained(folder / "teacher")
    for name, prompts in (("learn", LEARNED_WITH), ("held_out", HELD_OUT)):
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    teacher = ["--teacher", str(folder / "teacher")]
    call = ["--resolution", "32", "--guidance_scale", "2", "--max_sequence_length", "16"]
    prompts = ["--prompts_file", str(folder / "learn.txt")]
    pairs = ["--output_dir", str(folder / "pairs"), "--num_samples", "32", "--num_inference_steps", "20"]
    make_teacher_set.main(teacher + pairs + call + prompts)
    for nfe, recipe in ((5, []), (3, ["--recipe", "adam", "--max_train_steps", "1"])):
        learn = ["--teacher_set", str(folder / "pairs"), "--nfe", str(nfe), "--output_dir", str(folder / "schedules")]
        train_ld3.main([*teacher, *learn, *recipe, "--solver", "unipc", "--report_to", "none", "--allow_worse"])
    return folder


def arguments(room, output, *more, nfe=(5,)):
    given = ["--schedules", str(room / "schedules"), "--teacher", str(room / "teacher"), "--output_dir", str(output)]
    given += ["--prompts_file", str(room / "held_out.txt"), "--num_samples", str(SAMPLES)]
    return given + (["--nfe", *map(str, nfe)] if nfe else []) + list(more)


@pytest.fixture(scope="module")
def certified(room):
    """A published folder; what is certified there once is used again by the tests."""
    publish.main(arguments(room, room / "certified"))
    return room / "certified"


@pytest.fixture
def output(certified, tmp_path):
    """A copy of it to work with."""
    return shutil.copytree(certified, tmp_path / "output")


def refusal(argv) -> str:
    """The sentence with which the program ends, exit code 2."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(said):
        publish.main(argv)
    assert stopped.value.code == 2
    return said.getvalue().strip().splitlines()[-1]


def not_verified(argv, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        publish.main(argv)
    assert stopped.value.code == 1
    return capsys.readouterr().out.strip().splitlines()[-1]


def never(*_args, **_kwargs):
    raise AssertionError("this should not have been asked for")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------- the whole way


def test_learn_certify_push_find_load_sample_verify(room, output, hub, capsys, monkeypatch):
    pipe, _ = PIPELINES["flux"]()
    pipe.push_to_hub("user/tiny-flux", token=hub.token)
    monkeypatch.setattr(Comparison, "measure", never)  # the folder holds what was measured already
    push = ["--push_to_hub", "--hub_model_id", "user/flux-schedules", "--hub_token", hub.token]
    publish.main(arguments(room, output, *push, "--teacher", "user/tiny-flux"))
    monkeypatch.undo()
    assert "using it" in capsys.readouterr().out
    on_hub = hub.files("user/flux-schedules")
    assert {name: content for name, content in on_hub.items() if name != ".gitattributes"} == files(output)
    assert len(hub.repos["user/flux-schedules"].commits) == 2  # that of the new repository, and ours

    (found,) = find_schedules(base_model="user/tiny-flux", nfe=5)
    assert found.repo_id == "user/flux-schedules"
    (variant,) = list_variants(found.repo_id)
    assert variant.certified and variant.nfe == (5,) and variant.guidance_scale == 2.0 and variant.subfolder is None

    card = ModelCard.load(found.repo_id)
    assert card.data.base_model == "user/tiny-flux" and "ld3-nfe-5" in card.data.tags
    (code,) = re.findall(r"^```python\n(.*?)^```", card.text, flags=re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    assert names["image"].size == (32, 32) and names["pipe"].scheduler.learned_counts == [5]
    assert names["pipe"].scheduler.num_inference_steps == 5

    (command,) = re.findall(r"^```bash\npython -m training.publish (.*)\n```", card.text, flags=re.MULTILINE)
    publish.main([*command.split(), "--num_samples", "4"])
    said = capsys.readouterr().out
    assert said.strip().endswith("verified") and "4 samples, largest deviation" in said
    assert "the certificate names the teacher user/tiny-flux: it is downloaded from the Hub" in said


def test_what_is_certified_is_what_was_measured(room, certified):
    certificate = read(certified / "certificate.json")
    (run,) = certificate["runs"].values()
    assert run["prompts"] == HELD_OUT[1:] and run["left_out"] == 1 and run["disjoint"] == ["seeds", "prompts"]
    assert run["seeds"] == [1_000_000_000, 1_000_000_000 + SAMPLES - 1]
    record = certificate["counts"]["5"]
    assert record["won"]
    rows = {row["name"]: row for row in record["stock"]}
    assert set(rows) == {"FlowMatchEuler", "FlowMatchHeun", "UniPC", "DPM++ 2M"}
    assert {row["evaluations"] for row in (record["learned"], *record["stock"])} == {5}
    assert rows["FlowMatchHeun"]["num_inference_steps"] == 3

    # Once more without the program: two samples through the user's own pipeline.
    pipe, _ = PIPELINES["flux"]()
    pipe.scheduler = LD3Scheduler.from_pretrained(certified)
    (pairs,) = (room / "schedules" / "certification").glob("pairs-*")
    noise, end, conditioning = TeacherSet.load(pairs).batch([0, 5])
    call = {"guidance_scale": 2.0, "height": 32, "width": 32, "output_type": "latent", "num_inference_steps": 5}
    with torch.no_grad():
        sampled = pipe(**conditioning, latents=noise, **call).images
    distances = (sampled - end).square().flatten(1).mean(1)
    stated = [record["learned"]["distances"][i] for i in (0, 5)]
    assert distances.tolist() == pytest.approx(stated, rel=1e-4)


def test_a_curve_is_certified_like_single_counts(room, tmp_path):
    teacher = ["--teacher", str(room / "teacher"), "--teacher_set", str(room / "pairs"), "--report_to", "none"]
    learn = ["--curve", "--nfe", "4", "6", "--solver", "unipc", "--max_train_steps", "3"]
    train_ld3.main([*teacher, *learn, "--output_dir", str(tmp_path / "curve")])
    publish.main(arguments(room, tmp_path / "published", "--schedules", str(tmp_path / "curve")))
    assert list(read(tmp_path / "published" / "certificate.json")["counts"]) == ["5"]
    of_curve, scheduler = (LD3Scheduler.from_pretrained(tmp_path / name) for name in ("curve", "published"))
    assert of_curve.served_counts == [4, 5, 6] and scheduler.served_counts == scheduler.learned_counts == [5]
    schedule = scheduler.learned_schedule(5)
    assert torch.equal(schedule.times, of_curve.learned_schedule(5).times) and schedule.residuals.any()


def test_nothing_private_is_published(room, hub, tmp_path, monkeypatch):
    here = tmp_path / "my-secret-project"
    here.mkdir()
    monkeypatch.chdir(here)
    near = os.path.relpath(room)  # "../..": what is relative tells as much
    push = ["--push_to_hub", "--hub_model_id", "user/private", "--hub_token", hub.token, "--private"]
    push += [
        "--schedules",
        f"{near}/schedules",
        "--prompts_file",
        f"{near}/held_out.txt",
        "--teacher",
        f"{near}/teacher",
    ]
    publish.main(arguments(room, tmp_path / "out", *push, "--dataset_name=", "--variant="))
    assert hub.repos["user/private"].private
    for content in hub.files("user/private").values():
        for secret in (hub.token, str(room), room.name, str(tmp_path), here.name):
            assert secret.encode() not in content
    (run,) = read(tmp_path / "out" / "certificate.json")["runs"].values()
    shown = {"schedules": "schedules", "prompts_file": "held_out.txt", "pretrained_model_name_or_path": "teacher"}
    assert shown.items() <= run["arguments"].items() and not {"dataset_name", "variant"} & set(run["arguments"])

    # only what is a path is taken for one
    for name in ("fp16", "captions"):
        (here / name).mkdir()
    (here / "main").symlink_to(here)
    given = [
        "--revision",
        "main",
        "--variant",
        "fp16",
        "--dataset_name",
        str(here / "captions"),
        "--teacher",
        "owner/name",
    ]
    shown = publish.recorded(publish.parser().parse_args(given))
    named = {name: shown[name] for name in ("revision", "variant", "dataset_name", "pretrained_model_name_or_path")}
    assert list(named.values()) == ["main", "fp16", "captions", "owner/name"]


def test_a_count_that_does_not_win_is_refused_with_the_numbers(room, tmp_path):
    said = refusal(arguments(room, tmp_path / "published", nfe=None))
    found = re.search(
        r"at 3 evaluations (.+?) has ([\d.]+), learned ([\d.]+), difference (\S+) \[(\S+), (\S+)\] \(x 1e-3\); "
        r"publish only those that win, with --nfe 5$",
        said,
    )
    assert found, said
    other, own, difference, low = (float(found[i]) for i in (2, 3, 4, 5))
    assert difference == pytest.approx(other - own, abs=2e-3) and low <= 0
    assert not (tmp_path / "published").exists()
    assert "make others, with more pairs" in refusal(arguments(room, tmp_path / "published", nfe=[3]))


def test_a_tampered_certificate_is_not_verified(room, certified, output, capsys):
    verify = ["--verify", str(output), "--teacher", str(room / "teacher"), "--num_samples", "6"]
    certificate = read(certified / "certificate.json")
    record = certificate["counts"]["5"]
    stock = next(row for row in record["stock"] if row["name"] == "UniPC")
    stock["distances"][2] *= 1.01
    (output / "certificate.json").write_text(to_json(certificate))
    assert "the mean of UniPC (shift by resolution) does not follow" in not_verified(verify, capsys)

    # forged with care: the numbers agree with each other, but not with the teacher
    class Named:
        pass

    learned, others = contenders(record)
    for contender, row in zip([learned, *others], [record["learned"], *record["stock"]]):
        contender.scheduler = type(row["class"], (Named,), {})()
    entry = json.loads((output / "scheduler_config.json").read_text())["schedules"]["5"]
    certificate["counts"]["5"] = {**count_record(entry, learned, others), "run": record["run"]}
    (output / "certificate.json").write_text(to_json(certificate))
    said = not_verified(verify, capsys)
    assert re.search(r"NOT verified: at 5 evaluations UniPC .* at seed 1000000002, the certificate says", said)

    shutil.copyfile(certified / "certificate.json", output / "certificate.json")
    config = json.loads((output / "scheduler_config.json").read_text())
    (output / "scheduler_config.json").write_text(json.dumps({**config, "interpolate": True}))
    assert "of which the certificate says nothing" in not_verified(verify, capsys)
    assert [variant.certified for variant in list_variants(output)] == [False]
    config["schedules"]["5"]["provenance"]["loss"] = 0.0
    (output / "scheduler_config.json").write_text(json.dumps(config))
    assert "its hash differs" in not_verified(verify, capsys)


# ---------------------------------------------------------------------- seeds, prompts, teacher


def test_what_learning_saw_is_not_used(room, tmp_path):
    said = refusal(arguments(room, tmp_path / "out", "--prompts_file", str(room / "learn.txt")))
    assert "learning saw all 3 prompts" in said
    assert "learning used the seeds 0 to" in refusal(arguments(room, tmp_path / "out", "--seed", "10"))
    used = {"train": {"seeds": [10**9 + 5, 10**9 + 9], "prompts": []}, "valid": {"seeds": [7, 8], "prompts": []}}
    entries = {"5": {"provenance": {"learned_on": used}}}
    assert publish.unseen_seeds(None, 4, entries) == (10**9, 10**9 + 3)
    assert publish.unseen_seeds(None, 24, entries) == (10**9 + 10, 10**9 + 33)
    used["valid"]["prompts"] = [prompt_hash(" a cat")]
    assert publish.unseen_prompts(["a dog", "a cat "], entries, labels=False) == ["a dog"]
    assert publish.unseen_prompts(["a dog", "a cat "], entries, labels=True) == ["a dog", "a cat "]


def test_another_teacher_is_refused(room, tmp_path):
    pipe, _ = PIPELINES["flux"]()
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(0.1)
    pipe.save_pretrained(tmp_path / "other")
    said = refusal(arguments(room, tmp_path / "out", "--teacher", str(tmp_path / "other")))
    assert "is another teacher" in said and "--variant" in said


def test_another_prediction_type_is_refused(room, tmp_path):
    """The digest of a teacher is of its weights; its scheduler's config says what they mean."""
    pipe, _ = PIPELINES["flux"]()
    scheduler = publish.chosen_schedules(publish.parser().parse_args(arguments(room, tmp_path)))
    with Comparison(pipe) as comparison, pytest.raises(ValueError, match="are for prediction_type='flow_prediction'"):
        comparison.scheduler.register_to_config(prediction_type="epsilon")
        certification.measure(comparison, None, scheduler, ["5"], pipe.scheduler.config, tmp_path, None)


def test_bad_input_is_refused_in_a_sentence(room, certified, tmp_path):
    out = tmp_path / "out"
    assert "holds no schedules" in refusal(arguments(room, out, "--schedules", str(tmp_path)))
    assert "there is no schedule for it; the folder has 3, 5" in refusal(arguments(room, out, nfe=[4]))
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompt" in refusal(arguments(room, out, "--prompts_file", str(tmp_path / "empty.txt")))
    assert "cannot read the prompts file" in refusal(arguments(room, out, "--prompts_file", str(tmp_path / "no.txt")))
    assert "give others with --prompts_file" in refusal(arguments(room, out, "--prompts_file", ""))
    assert "give either --schedules" in refusal([]) and "give either" in refusal(
        ["--verify", "a/b", "--schedules", "c"]
    )
    assert "at least 16" in refusal(arguments(room, out, "--num_samples", "8"))
    assert "learned in float32" in refusal(arguments(room, out, "--mixed_precision", "bf16"))
    assert "give it with --teacher" in refusal(["--schedules", str(room / "schedules")])
    assert "give it with --teacher" in refusal(["--verify", str(certified)])
    assert "has no certificate.json" in refusal(["--verify", str(room / "schedules")])
    assert "has no scheduler_config.json in dpmpp" in refusal(["--verify", str(certified), "--subfolder", "dpmpp"])
    old = shutil.copytree(room / "schedules", tmp_path / "old")
    config = json.loads((old / "scheduler_config.json").read_text())
    del config["schedules"]["5"]["provenance"]["learned_on"]
    (old / "scheduler_config.json").write_text(json.dumps(config))
    assert "make it again" in refusal(arguments(room, out, "--schedules", str(old)))
    assert not out.exists()


# ---------------------------------------------------------------------- interruption


def test_an_interrupted_certification_continues_to_the_same_certificate(room, certified, tmp_path, monkeypatch):
    measured = []
    real = Comparison.measure

    def counted(self, contender, *args, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(contender.name)
        real(self, contender, *args, **options)

    # the pairs are there already
    shutil.copytree(room / "schedules", tmp_path / "schedules", ignore=shutil.ignore_patterns("distances"))
    again = arguments(room, tmp_path / "out", "--schedules", str(tmp_path / "schedules"))
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "measure", counted)
        with pytest.raises(KeyboardInterrupt):
            publish.main(again)
    assert not (tmp_path / "out").exists() and measured == ["learned", "FlowMatchEuler"]
    with monkeypatch.context() as patch:
        patch.setattr(certification, "encode_and_sample", never)
        patch.setattr(
            Comparison, "measure", lambda self, c, *a, **o: (measured.append(c.name), real(self, c, *a, **o))
        )
        publish.main(again)
    assert measured == ["learned", "FlowMatchEuler", "UniPC", "DPM++ 2M", "FlowMatchHeun"]
    assert (
        read(tmp_path / "out" / "certificate.json")["counts"]["5"]["learned"]
        == (read(certified / "certificate.json")["counts"]["5"]["learned"])
    )


def test_what_cannot_be_drawn_is_left_out(room, tmp_path, monkeypatch, capsys):
    batches = []

    def decode(self, latents):
        batches.append(len(latents))
        if len(batches) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return latents.new_zeros(len(latents), 3, 8, 8)

    monkeypatch.setattr(Comparison, "decode", decode)
    publish.main(arguments(room, tmp_path / "out"))
    assert batches == [1, 1, 1, 1]
    assert "samples.png is left out, it cannot be drawn: CUDA out of memory.\n" in capsys.readouterr().out
    (variant,) = published.read(tmp_path / "out").values()
    assert list(variant.pictures) == ["schedules.png"]
    assert "samples.png" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_certify_the_same(room, certified, tmp_path):
    copy = shutil.copytree(room / "schedules", tmp_path / "schedules", ignore=shutil.ignore_patterns("certification"))
    on_two_processes(publish.main, arguments(room, tmp_path / "out", "--schedules", str(copy)))
    of_two, of_one = (read(folder / "certificate.json") for folder in (tmp_path / "out", certified))
    for row, other in zip(of_two["counts"]["5"]["stock"], of_one["counts"]["5"]["stock"]):
        assert row == other
    assert of_two["counts"]["5"]["learned"] == of_one["counts"]["5"]["learned"]
    assert files(tmp_path / "out").keys() == files(certified).keys()


# ---------------------------------------------------------------------- the Hub


def test_access_is_checked_before_anything_is_certified(room, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "certify", never)
    out = tmp_path / "out"

    def push(repo_id, token):
        return refusal(arguments(room, out, "--push_to_hub", "--hub_model_id", repo_id, "--hub_token", token))

    assert "needs a token" in refusal(arguments(room, out, "--push_to_hub", "--hub_model_id", "user/new"))
    assert "give --hub_model_id" in refusal(arguments(room, out, "--push_to_hub", "--hub_token", hub.token))
    assert "does not accept this token" in push("user/new", "hf_wrong")
    said = push("other/new", hub.token)
    assert "user may not write to the repositories of other; give --hub_model_id user/new" in said
    assert "is no repository name" in push("user/new--", hub.token)
    assert not hub.repos and not out.exists()
    hub.stop()
    assert "cannot reach the Hub" in push("user/new", hub.token)


@pytest.mark.parametrize("broken", ["PUT /lfs", "/commit/"])
def test_an_interrupted_upload_leaves_nothing_and_is_repeated_cheaply(broken, room, output, hub, monkeypatch):
    push = arguments(room, output, "--push_to_hub", "--hub_model_id", "user/new", "--hub_token", hub.token)
    monkeypatch.setattr(publish, "certify", never)
    hub.fail_next(broken)
    said = refusal(push)
    assert "nothing was uploaded to 'user/new': this failure was asked for; run the same command again" in said
    assert list(hub.files("user/new")) == [".gitattributes"]
    publish.main(push)
    assert hub.files("user/new")["certificate.json"] == (output / "certificate.json").read_bytes()


def test_a_change_by_somebody_else_is_not_overwritten(room, output, hub, monkeypatch):
    push = arguments(room, output, "--push_to_hub", "--hub_model_id", "user/shared", "--hub_token", hub.token)
    publish.main(push)
    api, real = HfApi(token=hub.token), published.read_hub
    monkeypatch.setattr(publish, "certify", never)

    notes = []

    def read_and_change(*args):
        state = real(*args)
        notes.append(b"theirs %d" % len(notes))
        api.upload_file(path_or_fileobj=notes[-1], path_in_repo="notes.txt", repo_id="user/shared")
        return state

    hub_before = hub.files("user/shared")
    with monkeypatch.context() as patch:
        patch.setattr(published, "read_hub", read_and_change)
        said = refusal([*push, "--license", "mit"])
    assert "it was changed by somebody else meanwhile; run the same command again" in said
    assert hub.files("user/shared") == {**hub_before, "notes.txt": notes[-1]}
    publish.main([*push, "--license", "mit"])
    after = hub.files("user/shared")
    assert after["notes.txt"] == notes[-1] and b"license: mit" in after["README.md"]


def test_a_license_stays_until_another_is_given(room, output, hub, monkeypatch):
    monkeypatch.setattr(publish, "certify", never)
    push = ["--push_to_hub", "--hub_model_id", "user/licensed", "--hub_token", hub.token]
    for given, stated in (
        ([], "apache-2.0"),
        (["--license", "mit"], "mit"),
        ([], "mit"),  # of the folder
        (push, "mit"),
        (["--license", "openrail"], "openrail"),
        (push, "mit"),  # of the Hub, where others may have changed it
    ):
        publish.main(arguments(room, output, *given))
        assert f"\nlicense: {stated}\n" in (output / "README.md").read_text()
    assert b"\nlicense: mit\n" in hub.files("user/licensed")["README.md"]


def test_a_picture_that_is_not_of_the_schedules_any_more_goes_from_the_hub(room, output, hub, monkeypatch):
    push = arguments(room, output, "--push_to_hub", "--hub_model_id", "user/pictures", "--hub_token", hub.token)
    publish.main(push)
    api = HfApi(token=hub.token)
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.png", repo_id="user/pictures")
    before = hub.files("user/pictures")
    (variant,) = published.read(output).values()
    anew = published.Variant(variant.config, variant.certificate, {"schedules.png": b"new"})
    monkeypatch.setattr(publish, "certified_already", lambda *_: anew)
    publish.main(push)
    after = hub.files("user/pictures")
    assert set(before) - set(after) == {"samples.png"} and after["notes.png"] == b"theirs"
    assert not (output / "samples.png").exists() and b"samples.png" not in after["README.md"]
    assert len(hub.repos["user/pictures"].commits) == 4  # the new repository, ours, theirs, ours: one commit each


def test_counts_of_another_target_are_refused_before_they_are_certified_unless_they_replace_all(
    room, output, tmp_path, monkeypatch
):
    monkeypatch.setattr(publish, "certify", never)
    config = json.loads((room / "schedules" / "scheduler_config.json").read_text())
    for entry in config["schedules"].values():
        entry["provenance"]["teacher_steps"] = 40
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    other = ["--schedules", str(tmp_path)]
    assert "already has another teacher_schedule" in refusal(arguments(room, output, *other, nfe=(3,)))
    with pytest.raises(AssertionError, match="should not have been asked for"):
        publish.main(arguments(room, output, *other, nfe=(3, 5)))


def test_more_counts_and_variants_join_one_repository(room, output, hub, tmp_path, monkeypatch):
    """Only the settings are made up: what is published under them was measured with others, which this test does not look at."""
    hub_arguments = ["--push_to_hub", "--hub_model_id", "user/many", "--hub_token", hub.token]
    publish.main(arguments(room, output, *hub_arguments))
    first = hub.files("user/many")
    variant = published.read(output)[""]
    entry = variant.config["schedules"]["5"]
    facts = {**entry["provenance"], "guidance_scale": 3.0}
    (tmp_path / "g3").mkdir()
    scheduler = LD3Scheduler.from_config({**variant.config, "schedules": {"5": {**entry, "provenance": facts}}})
    scheduler.save_pretrained(tmp_path / "g3")

    def certify(args, scheduler, facts, settings, seeds, *_):
        (run,) = variant.certificate["runs"].values()
        record = {
            **variant.certificate["counts"]["5"],
            "entry_sha256": publish.certificates.entry_hash(scheduler.config.schedules["5"]),
        }
        return published.Variant(dict(scheduler.config), publish.certificates.build(settings, run, {"5": record}))

    monkeypatch.setattr(publish, "certify", certify)
    given = arguments(room, tmp_path / "other", *hub_arguments, "--schedules", str(tmp_path / "g3"))
    publish.main(given)
    after = hub.files("user/many")
    assert {name: after[name] for name in first if name != "README.md"} == {
        name: first[name] for name in first if name != "README.md"
    }
    assert {name for name in after if name not in first} == {
        "unipc-g3/scheduler_config.json",
        "unipc-g3/certificate.json",
    }
    assert [(v.subfolder, v.guidance_scale) for v in list_variants("user/many")] == [(None, 2.0), ("unipc-g3", 3.0)]
    assert b"| unipc-g3 | unipc of order 2 | 5 |" in after["README.md"]
    assert LD3Scheduler.from_pretrained("user/many", subfolder="unipc-g3").learned_counts == [5]

    # another teacher's schedules are refused before they are certified
    facts["teacher_digest"] = "cd" * 16
    scheduler = LD3Scheduler.from_config({**variant.config, "schedules": {"5": {**entry, "provenance": facts}}})
    scheduler.save_pretrained(tmp_path / "g3")
    monkeypatch.setattr(publish, "certify", never)
    assert "the repository is for another teacher" in refusal([*given, "--output_dir", str(tmp_path / "third")])
    assert hub.files("user/many") == after
