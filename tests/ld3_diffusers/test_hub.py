# SPDX-License-Identifier: Apache-2.0
"""Schedules on the Hub, through the real client and a local server: published, found, loaded, and refused."""

import json
import os

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ld3_diffusers import LD3Scheduler, Variant, find_schedules, list_variants, save_pipeline
from tests.schedules import SD_BETAS, outputs, run, scheduler_with
from tests.tiny_pipelines import PIPELINES


FACTS = {"teacher": "a/b", "guidance_scale": 7.5, "height": 512, "width": 768, "dtype": "float16"}
CARD = """---
library_name: diffusers
license: apache-2.0
base_model: {base_model}
base_model_relation: adapter
tags: [{tags}]
---
Schedules.
"""


@pytest.fixture
def scheduler():
    return scheduler_with((4, 5), "unipc", 3, provenance=FACTS)


@pytest.fixture
def api(hub):
    return HfApi(token=hub.token)


@pytest.fixture
def no_waiting(monkeypatch):
    """The client tries again after 1, 2, 4 ... seconds where nothing answers."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def assert_same(back, scheduler):
    assert dict(back.config) | {"_use_default_values": 0} == dict(scheduler.config) | {"_use_default_values": 0}
    for nfe in scheduler.learned_counts:
        x, rest = outputs(nfe)
        for s in (back, scheduler):
            s.set_timesteps(nfe, mu=0.7)
        for name in ("state", "history", "timesteps"):
            assert torch.equal(getattr(back._table, name), getattr(scheduler._table, name))
        assert all(torch.equal(a, b) for a, b in zip(run(back, x, rest), run(scheduler, x, rest)))


def publish(api, repo_id, text, path="scheduler_config.json"):
    api.create_repo(repo_id, exist_ok=True)
    text = text if isinstance(text, bytes) else text.encode()
    return api.upload_file(repo_id=repo_id, path_or_fileobj=text, path_in_repo=path)


# Loading by name -------------------------------------------------------------------------------------------------------


def test_pushed_and_loaded_by_name(hub, scheduler):
    scheduler.push_to_hub("user/schedules", token=hub.token)
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert_same(LD3Scheduler.from_pretrained("user/schedules"), scheduler)
    assert "library_name: diffusers" in hub.files("user/schedules")["README.md"].decode()


def test_subfolders_and_revisions(hub, api, scheduler):
    other = scheduler_with((6,), "dpmpp", 2)
    scheduler.push_to_hub("user/s", token=hub.token)
    other.push_to_hub("user/s", token=hub.token, subfolder="dpmpp/6steps")
    first = api.list_repo_refs("user/s").branches[0].target_commit
    api.create_tag("user/s", tag="v1")
    other.push_to_hub("user/s", token=hub.token)
    assert_same(LD3Scheduler.from_pretrained("user/s"), other)
    assert_same(LD3Scheduler.from_pretrained("user/s", subfolder="dpmpp/6steps"), other)
    assert_same(LD3Scheduler.from_pretrained("user/s", revision=first), scheduler)
    assert_same(LD3Scheduler.from_pretrained("user/s", revision="v1"), scheduler)


def test_tokens(hub, scheduler):
    for token, status in ((None, 401), ("hf_unknown", 401), ("hf_token_of_other", 403)):
        with pytest.raises(HfHubHTTPError) as error:
            scheduler.push_to_hub("user/s", token=token)
        assert error.value.response.status_code == status and not hub.repos
    scheduler.push_to_hub("user/s", token=hub.token, private=True)
    for token in (None, "hf_token_of_other"):
        with pytest.raises(OSError, match="pass a token"):
            LD3Scheduler.from_pretrained("user/s", token=token)
    hub.repos["user/s"].private, hub.repos["user/s"].gated = False, True
    with pytest.raises(OSError, match="pass a token"):
        LD3Scheduler.from_pretrained("user/s", token="hf_token_of_other")
    assert_same(LD3Scheduler.from_pretrained("user/s", token=hub.token), scheduler)


def test_once_downloaded_no_connection_is_needed(hub, scheduler, monkeypatch, no_waiting):
    scheduler.push_to_hub("user/s", token=hub.token)
    scheduler.push_to_hub("user/s", token=hub.token, subfolder="more")
    with pytest.raises(OSError, match="not downloaded before"):
        LD3Scheduler.from_pretrained("user/s", local_files_only=True)
    variants = list_variants("user/s")
    asked = len(hub.requests)
    assert_same(LD3Scheduler.from_pretrained("user/s", local_files_only=True), scheduler)
    assert_same(LD3Scheduler.from_pretrained("user/s", subfolder="more", local_files_only=True), scheduler)
    assert len(hub.requests) == asked
    hub.stop()
    assert_same(LD3Scheduler.from_pretrained("user/s"), scheduler)
    assert list_variants("user/s") == variants
    with pytest.raises(OSError, match="not downloaded before.*load it once with a connection"):
        LD3Scheduler.from_pretrained("user/unseen")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(LD3Scheduler.from_pretrained("user/s"), scheduler)
    assert list_variants("user/s") == variants
    with pytest.raises(OSError, match="not downloaded before"):
        LD3Scheduler.from_pretrained("user/unseen")


def test_what_is_not_there(hub, scheduler, tmp_path):
    scheduler.push_to_hub("user/s", token=hub.token)
    scheduler.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="not a valid model identifier"):
        LD3Scheduler.from_pretrained("user/missing")
    with pytest.raises(OSError, match="not a valid git identifier"):
        LD3Scheduler.from_pretrained("user/s", revision="missing")
    # of a local folder, Diffusers itself would take the root's config
    for place in ("user/s", tmp_path):
        with pytest.raises(OSError, match="no scheduler_config.json in the subfolder 'missing'.*list_variants"):
            LD3Scheduler.from_pretrained(place, subfolder="missing")
    with pytest.raises(OSError, match="no file named scheduler_config.json"):
        LD3Scheduler.from_pretrained(tmp_path.parent)


# What was tampered with ------------------------------------------------------------------------------------------------


def times(values):
    return lambda config: config["schedules"]["5"].update(times=values)


def option(**options):
    return lambda config: config.update(options)


def entry(**options):
    return lambda config: config["schedules"]["5"].update(options)


def renamed(key):
    return lambda config: config["schedules"].update({key: config["schedules"].pop("5")})


TAMPERED = {
    "times must be a finite number, got nan": times([1.0, 0.8, float("nan"), 0.4, 0.2, 0.0]),
    "times must be a finite number, got inf": times([float("inf"), 0.8, 0.6, 0.4, 0.2, 0.0]),
    "beta_end must be a finite number": option(beta_end=float("inf")),
    r"times\[2\] = 0.9 is above": times([1.0, 0.8, 0.9, 0.4, 0.2, 0.0]),
    "builds another step table": times([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
    "'times' of a schedule holds 1000000 values and may hold 1001": times([0] * 10**6),
    "'network_times' of a schedule holds 1002 values": entry(network_times=[0.5] * 1002),
    "'times' of a schedule must be a list of finite numbers, got 'abc'": times("abc"),
    "'checksum' of a schedule must be a finite number": entry(checksum="1"),
    "'provenance' of a schedule must be a mapping": entry(provenance=[1]),
    r"schedules\['5'\]: unknown schedule entries \['code'\]": entry(code="import os"),
    r"unknown options \['amed_weights'\]; update ld3-diffusers": option(amed_weights=[1]),
    r"unknown options \['_use_default_values'\]": option(_use_default_values=["prediction_type"]),
    "'interpolate' must be true or false, got 'no'": option(interpolate="no"),
    "entry of the wrong type": option(solver=["unipc"]),
    "schedules must map": option(schedules=[1]),
    "schedules has the keys .'05'.*decimal string": renamed("05"),
    "schedules has the keys .'1001'": renamed("1001"),
    "rename the key to '5'": renamed("6"),
    "num_train_timesteps must be a positive integer of at most": option(num_train_timesteps=10**9),
    "saved by 'TurboScheduler', which is neither": option(_class_name="TurboScheduler"),
    "saved by .'m', 'LD3Scheduler'., which is neither": option(_class_name=["m", "LD3Scheduler"]),
    "saved by 'scheduling_utils', which is neither": option(_class_name="scheduling_utils"),
}


@pytest.mark.parametrize("sentence", TAMPERED)
def test_tampered_configs_are_refused_in_words(sentence, api, scheduler):
    config = json.loads(scheduler.to_json_string())
    TAMPERED[sentence](config)
    publish(api, "user/s", json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        LD3Scheduler.from_pretrained("user/s")


TAMPERED_TEXT = {
    "'solver' twice": lambda text: text.replace('"solver": ', '"solver": "ddim", "solver": ', 1),
    "beta_end must be a finite number, got inf": lambda text: text.replace('"beta_end": 0.012', '"beta_end": 1e999'),
    "larger than 4 MiB": lambda text: text + " " * 2**22,
    "not valid JSON": lambda text: text[:-10],
    r"not valid JSON \(.*utf-8": lambda text: text.encode() + b"\xff",
    r"not valid JSON \(maximum recursion": lambda text: "[" * 10**5,
    "must hold a mapping": lambda text: f"[{text}]",
    "4300 digits": lambda text: text.replace('"beta_end": 0.012', '"beta_end": ' + "1" * 5000),
}


@pytest.mark.parametrize("sentence", TAMPERED_TEXT)
def test_tampered_files_are_refused_in_words(sentence, api, scheduler):
    publish(api, "user/s", TAMPERED_TEXT[sentence](scheduler.to_json_string()))
    with pytest.raises(ValueError, match=f"cannot use the scheduler config in .*{sentence}"):
        LD3Scheduler.from_pretrained("user/s")


def test_options_of_stock_schedulers_ride_along(tmp_path):
    stock = DPMSolverMultistepScheduler(**SD_BETAS, lambda_min_clipped=-float("inf"), euler_at_final=True)
    stock.save_pretrained(tmp_path)
    scheduler = scheduler_with((5,), config=DPMSolverMultistepScheduler.from_pretrained(tmp_path).config)
    scheduler.save_pretrained(tmp_path)
    back = LD3Scheduler.from_pretrained(tmp_path)
    assert_same(back, scheduler)
    assert DPMSolverMultistepScheduler.from_config(back.config).config.lambda_min_clipped == -float("inf")
    assert DPMSolverMultistepScheduler.from_config(back.config).config.euler_at_final is True


def test_options_that_nobody_has_any_more_do_not(tmp_path):
    # as in google/ddpm-cifar10-32
    config = {**SD_BETAS, "_class_name": "DDPMScheduler", "timestep_values": None, "variance_type": "fixed_large"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = LD3Scheduler.from_pretrained(tmp_path)
    assert "timestep_values" not in scheduler.config and scheduler.config["variance_type"] == "fixed_large"
    scheduler.save_pretrained(tmp_path)
    assert_same(LD3Scheduler.from_pretrained(tmp_path), scheduler)


# Finding and listing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(hub, api):
    """Three repositories of schedules and another one."""
    for name, base_model, tags in (
        ("sd", "a/sd", "ld3-schedule, ld3-nfe-10, ld3-nfe-5, ld3-nfe-x"),
        ("sd-few", "a/sd", "ld3-schedule, ld3-nfe-4"),
        ("flux", "b/flux", "ld3-schedule, ld3-nfe-5"),
        ("lora", "a/sd", "lora, ld3-nfe-5"),
    ):
        publish(api, f"user/{name}", CARD.format(base_model=base_model, tags=tags), "README.md")
    hub.repos["user/sd-few"].downloads = 7
    return hub


def test_find_schedules(shelf):
    def names(**query):
        return [found.repo_id.removeprefix("user/") for found in find_schedules(**query)]

    assert sorted(names()) == ["flux", "sd", "sd-few"] and names()[0] == "sd-few"
    assert names(base_model="a/sd") == ["sd-few", "sd"]
    assert names(base_model="a/sd", nfe=5) == ["sd"]
    assert sorted(names(nfe=5)) == ["flux", "sd"]
    assert names(nfe=6) == names(author="other") == []
    assert names(limit=1) == ["sd-few"]
    few, sd = find_schedules("a/sd")
    assert (sd.base_model, sd.nfe, sd.downloads, few.downloads, sd.likes) == ("a/sd", (5, 10), 0, 7, 0)
    assert sd.last_modified.year == 2026
    shelf.repos["user/sd"].private = True
    assert names(nfe=10) == [] and names(nfe=10, token=shelf.token) == ["sd"]


@pytest.mark.parametrize(
    "query",
    [{"base_model": 3}, {"base_model": " "}, {"nfe": "5"}, {"nfe": 0}, {"nfe": True}, {"limit": 0}, {"author": ""}],
)
def test_find_schedules_refuses(query):
    with pytest.raises(ValueError, match=f"{next(iter(query))} must be .* leave it out"):
        find_schedules(**query)


def test_find_schedules_says_why_it_cannot(hub, monkeypatch, no_waiting):
    with pytest.raises(ValueError, match="cannot search the Hub.*refuses this token"):
        find_schedules(token="hf_unknown")
    hub.fail_next("/api/models", 418)
    with pytest.raises(ValueError, match="refused or failed; try again .*418"):
        find_schedules()
    hub.stop()
    with pytest.raises(ValueError, match="cannot be reached; check the connection"):
        find_schedules()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; unset it"):
        find_schedules()


def test_list_variants(hub, api, scheduler, tmp_path):
    mixed = LD3Scheduler.from_config(scheduler.config)
    mixed.config["schedules"]["5"]["provenance"]["guidance_scale"] = 1.0
    mixed.config["schedules"]["5"]["provenance"]["dtype"] = {"not": "a name"}
    folders = {"": scheduler, "mixed/guidance": mixed, "flow": scheduler_with((3,), "ipndm", config={"shift": 3.0})}
    for name, each in folders.items():
        each.save_pretrained(tmp_path / name)
    UniPCMultistepScheduler().save_pretrained(tmp_path / "stock")
    (tmp_path / "flow" / "certificate.json").write_text("{}")
    (tmp_path / "weights.bin").write_bytes(b"large")
    api.create_repo("user/s")
    api.upload_folder(repo_id="user/s", folder_path=tmp_path)
    expected = [
        Variant(None, "unipc", 3, (4, 5), 7.5, 512, 768, "float16", certified=False),
        Variant("flow", "ipndm", None, (3,), None, None, None, None, certified=True),
        Variant("mixed/guidance", "unipc", 3, (4, 5), None, 512, 768, None, certified=False),
    ]
    assert list_variants("user/s") == list_variants(tmp_path) == expected
    assert not any("weights.bin" in request for request in hub.requests if "/resolve/" in request)
    for variant in expected:
        assert_same(
            LD3Scheduler.from_pretrained("user/s", subfolder=variant.subfolder), folders[variant.subfolder or ""]
        )
    revision = api.model_info("user/s").sha
    publish(api, "user/s", "[1]", "flow/scheduler_config.json")
    with pytest.raises(ValueError, match="subfolder 'flow' cannot be used: .*must hold a mapping"):
        list_variants("user/s")
    assert list_variants("user/s", revision=revision) == expected


def test_list_variants_says_why_it_cannot(hub, api, no_waiting):
    with pytest.raises(ValueError, match="no such repository, or it is private or gated"):
        list_variants("user/missing")
    api.create_repo("user/empty")
    with pytest.raises(ValueError, match="no such revision"):
        list_variants("user/empty", revision="missing")
    with pytest.raises(ValueError, match="holds no learned schedule; find_schedules"):
        list_variants("user/empty")
    hub.stop()
    with pytest.raises(ValueError, match="not downloaded before; check the connection"):
        list_variants("user/unseen")


# Whole pipelines -------------------------------------------------------------------------------------------------------


def learned_pipeline(name):
    pipe, call = PIPELINES[name]()
    pipe.scheduler = scheduler_with((5,), "dpmpp", 3, config=pipe.scheduler.config)
    return pipe, call


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_save_pipeline(name, hub, tmp_path):
    pipe, call = learned_pipeline(name)
    folder = tmp_path / "pipeline"
    commit = save_pipeline(pipe, folder, push_to_hub=True, repo_id="user/p", token=hub.token)
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert commit.oid == hub.repos["user/p"].branches["main"] and os.listdir(tmp_path) == ["pipeline"]
    assert json.loads(hub.files("user/p")["model_index.json"])["scheduler"] == ["ld3_shim", "LD3Scheduler"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained("user/p")
    expected = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    for place in ("user/p", folder):
        back = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
        back.set_progress_bar_config(disable=True)
        assert type(back.scheduler) is LD3Scheduler
        assert_same(back.scheduler, pipe.scheduler)
        torch.testing.assert_close(
            back(**call, generator=torch.Generator().manual_seed(0))[0], expected, rtol=1e-5, atol=1e-5
        )
    # what was loaded can be published again, and a card that somebody wrote stays
    HfApi(token=hub.token).upload_file(repo_id="user/p", path_or_fileobj=b"mine", path_in_repo="README.md")
    save_pipeline(back, tmp_path / "again", push_to_hub=True, repo_id="user/p", token=hub.token)
    assert hub.files("user/p")["README.md"] == b"mine"
    assert [variant.subfolder for variant in list_variants("user/p")] == ["scheduler"]


def test_save_pipeline_refuses(hub, tmp_path):
    pipe, _ = PIPELINES["sd"]()
    with pytest.raises(ValueError, match="is a PNDMScheduler; set pipe.scheduler"):
        save_pipeline(pipe, tmp_path / "p")
    pipe, _ = learned_pipeline("sd")
    with pytest.raises(ValueError, match="add push_to_hub=True"):
        save_pipeline(pipe, tmp_path / "p", repo_id="user/p")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in ("full", "full/file"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            save_pipeline(pipe, tmp_path / taken)
    with pytest.raises(TypeError):
        save_pipeline(pipe, tmp_path / "p", max_shard_size=object())
    assert sorted(os.listdir(tmp_path)) == ["full"]


@pytest.mark.parametrize("broken", ["PUT /lfs", "/objects/batch", "/commit/"])
def test_an_interrupted_upload_leaves_nothing(broken, hub, tmp_path):
    pipe, _ = learned_pipeline("sd")
    hub.fail_next(broken)
    with pytest.raises(ValueError, match="saved; .hf upload user/p .*refused or failed"):
        save_pipeline(pipe, tmp_path / "p", push_to_hub=True, repo_id="user/p", token=hub.token)
    assert list(hub.files("user/p")) == [".gitattributes"] and len(hub.repos["user/p"].commits) == 1
    with pytest.raises(ValueError, match="refuses this token"):
        save_pipeline(pipe, tmp_path / "q", push_to_hub=True, repo_id="other/p", token=hub.token)
    HfApi(token=hub.token).upload_folder(repo_id="user/p", folder_path=tmp_path / "p")
    assert type(DiffusionPipeline.from_pretrained("user/p", trust_remote_code=True).scheduler) is LD3Scheduler


def test_a_stale_parent_is_refused(hub, api, scheduler):
    publish(api, "user/s", scheduler.to_json_string())
    seen = api.model_info("user/s").sha
    publish(api, "user/s", "another", "notes.txt")
    before = hub.files("user/s")
    with pytest.raises(HfHubHTTPError, match="412"):
        operation = CommitOperationAdd("scheduler_config.json", b"{}")
        api.create_commit("user/s", operations=[operation], commit_message="late", parent_commit=seen)
    assert hub.files("user/s") == before
