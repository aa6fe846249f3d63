# SPDX-License-Identifier: Apache-2.0
"""Certificates, the names of variants and model cards, from made-up measurements: what is accepted, and what is not believed."""

import json
from copy import deepcopy

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from ld3_diffusers import LD3Scheduler, Schedule, SolverSpec
from training import certificate as certificates
from training import certificate_form, published
from training.certificate import build, check, count_record, merged, settings, shared_facts, to_json
from training.certificate_form import read, validate
from training.comparison import Contender, paired_interval
from training.model_card import model_card
from training.published import Variant, contents, extended, outdated, place, restricted, union, write
from training.published import read as read_repository
from training.teacher_set import prompt_hash
from training.verification import named_teacher


TEACHER = {"name": "owner/teacher", "hub_id": "owner/teacher", "revision": None, "digest": "ab" * 16}
LEARNED_ON = {
    "train": {"seeds": [0, 63], "prompts": [prompt_hash("a red fox")]},
    "valid": {"seeds": [64, 95], "prompts": [prompt_hash("a bird")]},
}
FACTS = {
    "teacher_digest": TEACHER["digest"],
    "pipeline": "StableDiffusionPipeline",
    "dtype": "float32",
    "guidance_scale": 3.0,
    "teacher_solver": "unipc",
    "teacher_solver_order": 2,
    "teacher_discretization": "logsnr",
    "teacher_steps": 50,
    "learned_on": LEARNED_ON,
    "train_pairs": 64,
    "valid_pairs": 32,
    "recipe": "default",
}
RUN = {
    "seeds": [1000, 1019],
    "prompts": ["a cat", "a house [ 1, 2 ]"],
    "disjoint": ["seeds", "prompts"],
    "left_out": 1,
    "batch_size": 16,
    "arguments": {},
    "versions": {"diffusers": "0"},
    "device": "cpu",
    "date": "2026-01-01T00:00:00+00:00",
}


def config_of(*nfes, spec=SolverSpec("unipc", 2, "bh2"), **changes):
    """A scheduler config with a schedule for each count."""
    scheduler = LD3Scheduler()
    entries = {}
    for nfe in nfes:
        times = torch.linspace(1, 0, nfe + 1, dtype=torch.float64) ** 1.5 * 0.99
        facts = {key: value for key, value in {**FACTS, **changes}.items() if value is not None}
        entries[str(nfe)] = Schedule(times, spec=spec, provenance=facts).to_dict(scheduler.path)
    return dict(LD3Scheduler(schedules=entries).config)


def distances(mean: float, seed: int, samples: int = 20) -> torch.Tensor:
    noise = torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean * (0.8 + 0.4 * noise)


def measured(nfe: int, learned: float = 1.0, stock: float = 2.0):
    return Contender("learned", None, nfe, "unipc 2", nfe, distances(learned, 0)), [
        Contender("UniPC", None, nfe, "leading", nfe, distances(1.5 * stock, 1)),
        Contender("UniPC", None, nfe, "trailing", nfe, distances(stock, 2)),
        Contender("Heun", None, nfe // 2 + 1, "", nfe, torch.full((20,), torch.nan, dtype=torch.float64)),
    ]


def variant_of(config, run=RUN, teacher=TEACHER, **values) -> Variant:
    entries = config["schedules"]
    counts = {nfe: count_record(entry, *measured(int(nfe), **values)) for nfe, entry in entries.items()}
    facts = shared_facts(entries)
    return Variant(config, build(settings(teacher, "owner/teacher", facts), run, counts), {"samples.png": b"picture"})


def certificate_of(*nfes, **changes) -> tuple[dict, dict]:
    config = config_of(*nfes, **changes)
    return variant_of(config).certificate, config["schedules"]


# ---------------------------------------------------------------------- the certificate


def test_what_is_written_is_read_and_believed(tmp_path):
    certificate, schedules = certificate_of(4, 5)
    (tmp_path / "certificate.json").write_text(to_json(certificate))
    again = read(tmp_path / "certificate.json")
    assert again == certificate
    check(again, schedules)
    learned, stock = certificates.contenders(again["counts"]["5"])
    interval = paired_interval(stock[1].distances, learned.distances)
    assert again["counts"]["5"]["stock"][1]["difference"] == list(interval) and again["counts"]["5"]["won"]
    assert again["counts"]["5"]["stock"][2]["distances"] is None  # not finite: not nearer
    # each list of numbers has a line of its own, and prompts are left alone
    assert max(map(len, to_json(certificate).splitlines())) < 800 and '"a house [ 1, 2 ]"' in to_json(certificate)


def test_the_hash_is_of_the_content():
    entry = config_of(4)["schedules"]["4"]
    assert certificates.entry_hash(dict(reversed(entry.items()))) == certificates.entry_hash(entry)
    moved = {**entry, "times": [*entry["times"][:-1], 1e-9]}
    assert certificates.entry_hash(moved) != certificates.entry_hash(entry)


def changed(certificate, *keys_and_value):
    """A copy with one entry replaced; a callable is given the old value."""
    *keys, last, value = keys_and_value
    copy = deepcopy(certificate)
    place = copy
    for key in keys:
        place = place[key]
    place[last] = value(place[last]) if callable(value) else value
    return copy


@pytest.mark.parametrize(
    "keys, value, where",
    [
        (("format_version",), 2, "format version 2"),
        (("format_version",), True, "certificate.format_version"),
        (("teacher",), None, "certificate.teacher"),
        (("teacher", "digest"), 5, "teacher.digest"),
        (("call_settings",), {"prompt": "x"}, "call_settings.prompt"),
        (("call_settings", "guidance_scale"), True, "call_settings.guidance_scale"),
        (("solver", "afs"), 0, "solver.afs"),
        (("teacher_schedule", "steps"), "50", "teacher_schedule.steps"),
        (("runs", "*", "seeds"), [5], "seeds"),
        (("runs", "*", "seeds"), [5, 2**70], "seeds"),
        (("runs", "*", "prompts"), [1], "prompts"),
        (("runs", "*", "disjoint"), [], "disjoint"),
        (("counts", "4", "won"), "yes", "counts.4.won"),
        (("counts", "4", "run"), "other", "counts.4.run"),
        (("counts", "4", "learned", "distances"), lambda d: d[:-1], "counts.4.learned.distances"),
        (("counts", "4", "learned", "distances", 3), float("nan"), "counts.4.learned.distances"),
        (("counts", "4", "learned", "distances", 3), -1.0, "counts.4.learned.distances"),
        (("counts", "4", "learned", "distances", 3), 10**400, "counts.4.learned.distances"),
        (("counts", "4", "learned", "distances"), None, "counts.4.learned.mean"),
        (("counts", "4", "stock", 0), "UniPC", "counts.4.stock[0]"),
        (("counts", "4", "stock", 0, "difference"), None, "counts.4.stock[0].difference"),
        (("counts", "4", "stock", 0, "difference"), [1.0, float("inf"), 2.0], "counts.4.stock[0].difference"),
        (("counts", "4", "stock", 0, "extra"), 1, "counts.4.stock[0]"),
        (("counts",), lambda counts: {"four": counts["4"]}, "counts.four"),
    ],
)
def test_a_malformed_certificate_is_refused_with_the_place(keys, value, where):
    certificate, _ = certificate_of(4)
    (label,) = certificate["runs"]
    keys = [label if key == "*" else key for key in keys]
    if keys[-1] == "extra":
        certificate["counts"]["4"]["stock"][0]["extra"] = 0
    with pytest.raises(ValueError) as refused:
        validate(changed(certificate, *keys, value))
    assert where in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "certificate.json"
    for content in ("", "[1]", "nothing", "[" * 100_000, '{"format_version": NaN}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="certificate"):
            read(file)
    file.write_text(to_json(certificate_of(4)[0]))
    monkeypatch.setattr(certificate_form, "LARGEST_FILE", 100)
    with pytest.raises(ValueError, match="more than"):
        read(file)


@pytest.mark.parametrize(
    "keys, value, said",
    [
        (("counts", "4", "entry_sha256"), "0" * 64, "not the one that was certified"),
        (("counts", "4", "learned", "mean"), 0.5, "the mean of learned"),
        (("counts", "4", "learned", "distances", 0), lambda d: d * 0.9, "the mean of learned"),
        (("counts", "4", "stock", 1, "difference", 1), lambda low: low + 0.1, "the interval of UniPC"),
        (("counts", "4", "won"), False, "claims a result"),
        (("counts", "4", "stock"), [], "claims a result"),
        (("teacher", "digest"), "cd" * 16, "teacher_digest"),
        (("call_settings", "guidance_scale"), 7.5, "guidance_scale"),
        (("call_settings", "height"), 512, "height"),
        (("teacher_schedule", "steps"), 100, "teacher_steps"),
        (("runs", "*", "seeds"), [90, 109], "was learned on seeds 64 to 95 and judged on 90 to 109"),
        (("runs", "*", "prompts"), ["a cat", " a bird"], "learned on the prompt ' a bird'"),
    ],
)
def test_what_does_not_agree_is_not_believed(keys, value, said):
    certificate, schedules = certificate_of(4)
    (label,) = certificate["runs"]
    altered = changed(certificate, *[label if key == "*" else key for key in keys], value)
    validate(altered)
    with pytest.raises(ValueError) as refused:
        check(altered, schedules)
    assert said in str(refused.value)


def test_a_certificate_is_about_the_config_beside_it():
    certificate, _ = certificate_of(4)
    with pytest.raises(ValueError, match="about the counts 4, the config beside it has 4, 5"):
        check(certificate, config_of(4, 5)["schedules"])


def test_a_loss_is_recorded_as_one():
    record = count_record(config_of(4)["schedules"]["4"], *measured(4, learned=1.99, stock=2.0))
    assert record["won"] is False
    low = record["stock"][1]["difference"][1]
    assert low < 0


def test_schedules_of_one_folder_must_be_alike():
    mixed = {**config_of(4)["schedules"], **config_of(5, guidance_scale=5.0)["schedules"]}
    with pytest.raises(ValueError, match="4 and 5 evaluations differ in guidance_scale: 3.0 and 5.0.*--nfe"):
        shared_facts(mixed)
    mixed = {**config_of(4)["schedules"], **config_of(5, spec=SolverSpec("unipc", 3, "bh2"))["schedules"]}
    with pytest.raises(ValueError, match="differ in solver_order"):
        shared_facts(mixed)
    # the default, spelled out or not, is one solver
    shared_facts({**config_of(4)["schedules"], **config_of(5, spec=SolverSpec("unipc"))["schedules"]})


@pytest.mark.parametrize("used", [None, {}, {"train": {"seeds": [3, 1], "prompts": []}}, {"train": 1, "valid": 2}])
def test_what_does_not_say_what_it_learned_on_is_refused(used):
    with pytest.raises(ValueError, match="5 evaluations does not say which seeds.*make it again"):
        shared_facts(config_of(5, learned_on=used)["schedules"])


# ---------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    "spec, changes, name",
    [
        (SolverSpec("unipc"), {}, ""),
        (SolverSpec("unipc", 3), {}, "unipc-o3"),
        (SolverSpec("unipc", 2, "bh1"), {}, "unipc-bh1"),
        (SolverSpec("unipc", lower_order_final=False), {}, "unipc-lower_order_final-false"),
        (SolverSpec("dpmpp"), {}, "dpmpp"),
        (SolverSpec("dpmpp", 3), {}, "dpmpp-o3"),
        (SolverSpec("ipndm"), {"guidance_scale": 7.5}, "ipndm-g7.5"),
        (SolverSpec("unipc"), {"guidance_scale": 7.0, "height": 768, "width": 768}, "unipc-g7-768"),
        (SolverSpec("dpmpp"), {"height": 512, "width": 768}, "dpmpp-512x768"),
        (SolverSpec("unipc"), {"true_cfg_scale": 4.0, "negative_prompt": ""}, "unipc-t4-ne3b0c4"),
        (SolverSpec("unipc"), {"max_sequence_length": 256}, "unipc-l256"),
        (SolverSpec("unipc"), {"guidance_scale": None}, "unipc-gdefault"),
    ],
)
def test_names_of_variants(spec, changes, name):
    root = variant_of(config_of(4))
    assert place({"": root}, variant_of(config_of(5, spec=spec, **changes)).certificate) == name
    assert place({}, variant_of(config_of(5, spec=spec, **changes)).certificate) == ""


def test_another_teacher_has_another_repository():
    other = {**TEACHER, "digest": "cd" * 16, "name": "owner/other"}
    variant = variant_of(config_of(4, teacher_digest=other["digest"]), teacher=other)
    with pytest.raises(ValueError, match=r"another teacher \(owner/teacher, float32\) than owner/other"):
        place({"": variant_of(config_of(4))}, variant.certificate)


def test_counts_of_one_variant_come_together_and_new_ones_replace_old_ones():
    later = {**RUN, "seeds": [2000, 2019]}
    old, new = variant_of(config_of(4, 5)), variant_of(config_of(5, 6), later, learned=0.5)
    new.pictures["samples.png"] = b"of 5"
    together = extended({"": old}, "", new)[""]
    assert list(together.config["schedules"]) == list(together.certificate["counts"]) == ["4", "5", "6"]
    assert together.certificate["counts"]["5"] == new.certificate["counts"]["5"]
    assert together.certificate["counts"]["4"] == old.certificate["counts"]["4"]
    assert sorted(run["seeds"] for run in together.certificate["runs"].values()) == [[1000, 1019], [2000, 2019]]
    assert together.pictures["samples.png"] == b"picture"  # of the smallest count, which is old
    assert "scheduler_config.json" in together.files()

    back = restricted(together, ["5", "6"])
    assert back.certificate["counts"] == new.certificate["counts"] and not back.pictures
    assert list(back.certificate["runs"]) == list(new.certificate["runs"])
    new.pictures.clear()  # they could not be drawn: those of a larger count, or of another schedule, take no smaller one's place
    assert not extended({"": variant_of(config_of(6))}, "", new)[""].pictures
    assert not extended({"": variant_of(config_of(5))}, "", new)[""].pictures
    every = extended({"": old}, "", variant_of(config_of(4, 5), later))[""]
    assert len(every.certificate["runs"]) == 1  # the old run is not mentioned any more


def test_only_what_was_made_alike_comes_together():
    old = variant_of(config_of(4))
    with pytest.raises(ValueError, match="another teacher_schedule"):
        merged(old.certificate, variant_of(config_of(5, teacher_steps=100)).certificate)
    whole = variant_of(config_of(4, 5, teacher_steps=100))
    assert extended({"": old}, "", whole)[""] is whole  # of the old one nothing stays
    other = variant_of(config_of(5))
    other.config["beta_end"] = 0.5
    with pytest.raises(ValueError, match="another beta_end"):
        extended({"": old}, "", other)


def test_a_folder_joins_what_the_hub_has_where_it_belongs_there():
    remote = {"": variant_of(config_of(4)), "dpmpp": variant_of(config_of(4, spec=SolverSpec("dpmpp")))}
    local = {"": variant_of(config_of(4, 6, spec=SolverSpec("dpmpp")), learned=0.1)}
    together = union(local, remote)
    assert list(together) == ["", "dpmpp"] and list(together["dpmpp"].config["schedules"]) == ["4", "6"]
    assert together["dpmpp"].certificate["counts"]["4"] == remote["dpmpp"].certificate["counts"]["4"]
    assert union(local, {}) == local


def test_a_repository_is_written_whole_and_read_back(tmp_path, monkeypatch):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    repository = {"": variant_of(config_of(4)), "dpmpp": variant_of(config_of(5, spec=SolverSpec("dpmpp")))}
    write(published.contents(repository, "card"), folder)
    again = read_repository(folder)
    assert {name: v.certificate for name, v in again.items()} == {n: v.certificate for n, v in repository.items()}
    assert {name: v.pictures for name, v in again.items()} == {name: v.pictures for name, v in repository.items()}
    assert (folder / "notes.txt").read_text() == "mine"
    assert LD3Scheduler.from_pretrained(folder, subfolder="dpmpp").learned_counts == [5]

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "write_bytes", full)
        with pytest.raises(OSError):
            write({"README.md": b"new"}, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    folder.rename(tmp_path / ".published.old")  # as far as an interrupted run may have come
    assert list(read_repository(folder)) == ["", "dpmpp"] and (folder / "notes.txt").exists()

    (folder / "certificate.json").unlink()
    with pytest.raises(ValueError, match="the root has no certificate.json.*another repository"):
        read_repository(folder)


def test_what_is_not_written_any_more_goes_and_what_is_foreign_stays(tmp_path):
    folder = tmp_path / "published"
    before = {"": variant_of(config_of(4)), "dpmpp": variant_of(config_of(5, spec=SolverSpec("dpmpp")))}
    before["o3"] = variant_of(config_of(5, spec=SolverSpec("unipc", 3, "bh2")))
    write(contents(before, "card"), folder)
    for name in ("notes.txt", "o3/notes.txt"):
        (folder / name).write_text("mine")
    after = {"": Variant(before["dpmpp"].config, before["dpmpp"].certificate), "unipc": before[""]}
    files = contents(after, "card")
    own = ["scheduler_config.json", "certificate.json", "samples.png"]
    gone = outdated(before, files)
    assert gone == ["samples.png", *(f"{name}/{file}" for name in ("dpmpp", "o3") for file in own)]
    write(files, folder, gone)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {*files, "notes.txt", "o3/notes.txt"} and not (folder / "dpmpp").exists()
    again = read_repository(folder)
    assert list(again) == ["", "unipc"] and not again[""].pictures and again["unipc"].pictures


def test_a_certificate_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    certificate, _ = certificate_of(4)
    monkeypatch.chdir(tmp_path)
    assert named_teacher(certificate) == "owner/teacher"
    for name in (str(tmp_path), "..", "../teacher", "./teacher", "teacher", "owner/teacher/unet", "", "~/teacher"):
        with pytest.raises(ValueError, match="no Hub id of the form owner/name; give it with --teacher"):
            named_teacher(changed(changed(certificate, "teacher", "hub_id", None), "base_model", name))
    with pytest.raises(ValueError, match="is on no Hub that the certificate knows"):
        named_teacher(changed(changed(certificate, "teacher", "hub_id", None), "base_model", None))
    (tmp_path / "owner" / "teacher").mkdir(parents=True)
    with pytest.raises(ValueError, match="a folder here has that name"):
        named_teacher(certificate)


# ---------------------------------------------------------------------- the card


def test_the_card_says_what_the_certificates_say():
    dpmpp = variant_of(config_of(5, spec=SolverSpec("dpmpp"), guidance_scale=7.5), stock=4.0)
    text = model_card({"": variant_of(config_of(4, 8)), "dpmpp-g7.5": dpmpp}, "user/schedules", "mit")
    card = ModelCard(text).data.to_dict()
    tags = ["diffusers", "ld3-schedule", "ld3-nfe-4", "ld3-nfe-5", "ld3-nfe-8", "text-to-image"]
    assert card == {"base_model": "owner/teacher", "library_name": "diffusers", "license": "mit", "tags": tags}
    assert yaml.safe_load(text.split("---")[1]) == card
    learned, stock = measured(5, stock=4.0)
    mean, low, high = (1e3 * x for x in paired_interval(stock[1].distances, learned.distances))
    assert f"| 5 | **{1e3 * learned.mean:.3f}** | {1e3 * stock[1].mean:.3f} | UniPC (trailing) " in text
    assert f"| {mean:+.3f} [{low:+.3f}, {high:+.3f}] | 20 |" in text
    assert "pipe('a cat', num_inference_steps=4, guidance_scale=3.0)" in text
    assert "| dpmpp-g7.5 | dpmpp of order 2 | 5 | guidance scale 7.5, float32 |" in text
    assert "![Samples at 5 evaluations: teacher, best stock, learned](dpmpp-g7.5/samples.png)" in text
    assert "--verify user/schedules\n" in text and "4, 5 or 8 network evaluations instead of 50" in text
    assert json.dumps(card) and "None" not in text


def test_the_card_calls_a_searched_schedule_searched():
    searched = {"recipe": "gits", "search": {"metric": "dev"}, "won": "coeff 1.15"}
    alone, learned = config_of(4, **searched), config_of(8)
    text = model_card({"": variant_of(alone)}, "user/schedules", "mit")
    assert "# Searched schedules for owner/teacher" in text and "learn" not in text
    assert "when the solver steps, searched ([GITS](https://arxiv.org/abs/2405.11326)) through" in text
    assert "| evaluations | searched | best stock | scheduler | stock - searched | samples |" in text
    assert "![Samples at 4 evaluations: teacher, best stock, searched](samples.png)" in text
    assert "- 4 evaluations: searched on 64 + 32 pairs, recipe gits, taken: coeff 1.15; judged" in text

    both = {**alone, "schedules": {**alone["schedules"], **learned["schedules"]}}
    text = model_card({"": variant_of(both)}, "user/schedules", "mit")
    assert "# Learned or searched schedules for" in text and "that learning or search never saw" in text
    assert "and what time the network is told, learned or searched ([GITS](" in text
    assert "- 4 evaluations: searched on" in text and "- 8 evaluations: learned on" in text
