# SPDX-License-Identifier: Apache-2.0
"""AMED's schedules from a folder to the Hub and back: certified, published, found, loaded, attached, verified; and what is refused.

The teacher is a stand-in of as many evaluations as the schedules, on nearly the same times, so that an untrained predictor wins.
"""

import contextlib
import io
import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard

from ld3_diffusers import (
    AMEDScheduler,
    LD3Scheduler,
    Schedule,
    SolverSpec,
    find_schedules,
    list_variants,
    load_scheduler,
    save_pipeline,
)
from ld3_diffusers.amed import amed_schedule
from tests.amed_runs import predictor_for
from tests.schedules import scheduler_with
from tests.tiny_pipelines import PIPELINES
from tests.training.test_certificate import FACTS, variant_of
from training import publish
from training.certificate import sampler_name, shared_facts
from training.certificate_form import read, validate
from training.make_teacher_set import teacher_scheduler
from training.model_card import model_card
from training.published import Variant, contents, extended, outdated, place, restricted, union, write
from training.published import read as read_repository
from training.teacher import teacher_digest


NFE, SAMPLES, PREDICTOR = 4, 16, ("predictor-4/config.json", "predictor-4/diffusion_pytorch_model.safetensors")


def amed_scheduler(config, *nfes, form="per sample", solver="ipndm", provenance=FACTS) -> AMEDScheduler:
    """With steps between every other one of the stand-in's times."""
    entries, teacher = (
        {},
        teacher_scheduler(Namespace(solver=solver, solver_order=None, discretization="logsnr"), config),
    )
    for nfe in nfes:
        teacher.set_timesteps(nfe)
        bare = amed_schedule(teacher.schedule.times[::2], SolverSpec(solver), teacher.path, "epsilon")
        entries[str(nfe)] = replace(bare, provenance=provenance).to_dict(teacher.path)
    scheduler = AMEDScheduler.from_config(config, schedules=entries)
    for nfe in nfes if form == "per sample" else ():
        predictor = predictor_for(solver, scale_dir=0.01, scale_time=0.02)
        with torch.no_grad():  # near the bare solver, but not the same for all samples
            for head in (predictor.fc_r, predictor.fc_scale_dir, predictor.fc_scale_time):
                head.weight *= 0.03 + nfe / 1000
        scheduler.set_predictor(nfe, predictor)
    return scheduler


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A teacher with a schedule of predicted and one of static stages, the first one certified and published in a folder."""
    folder = tmp_path_factory.mktemp("room")
    pipe, _ = PIPELINES["sd"]()
    pipe.save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a quick cat\nan old house")
    facts = {
        **FACTS,
        **{"teacher_digest": teacher_digest(pipe), "guidance_scale": 2.0, "height": 32, "width": 32, "recipe": "amed"},
        **{"teacher_solver": "ipndm", "teacher_solver_order": None, "teacher_steps": NFE},
    }
    for form in ("per sample", "static"):
        provenance = {**facts, "amed": {"form": form, "scale_dir": 0.01, "trajectories": 64}}
        amed_scheduler(pipe.scheduler.config, NFE, form=form, provenance=provenance).save_pretrained(folder / form)
    publish.main(arguments(room=folder, form="per sample", output=folder / "published"))
    return folder


def arguments(room, form, output, *more):
    given = ["--schedules", str(room / form), "--teacher", str(room / "teacher"), "--output_dir", str(output)]
    return [*given, "--prompts_file", str(room / "prompts.txt"), "--num_samples", str(SAMPLES), *more]


@pytest.fixture
def output(room, tmp_path):
    """A copy of the published folder to work with."""
    return shutil.copytree(room / "published", tmp_path / "output")


def sampled(scheduler, batch=2):
    """Latents of the tiny teacher, and the pipeline that made them."""
    pipe, call = PIPELINES["sd"]()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    if isinstance(scheduler, AMEDScheduler) and scheduler.predictors:
        scheduler.attach(pipe)
    changes = {"prompt": ["a quick cat"] * batch, "negative_prompt": ["blurry"] * batch, "guidance_scale": 2.0}
    noise = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe(**{**call, **changes, "latents": noise, "num_inference_steps": NFE}).images, pipe


def refusal(argv) -> str:
    said = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(said):
        publish.main(argv)
    return said.getvalue().strip().splitlines()[-1]


def not_verified(folder, room, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        publish.main(["--verify", str(folder), "--teacher", str(room / "teacher"), "--num_samples", "1"])
    assert stopped.value.code == 1
    return capsys.readouterr().out.strip().splitlines()[-1]


# ---------------------------------------------------------------------- the whole way


def test_certify_push_find_list_load_attach_sample_verify(room, output, hub, capsys, monkeypatch):
    PIPELINES["sd"]()[0].push_to_hub("user/tiny-sd", token=hub.token)
    push = ["--push_to_hub", "--hub_model_id", "user/amed", "--hub_token", hub.token, "--teacher", "user/tiny-sd"]
    publish.main(arguments(room, "per sample", output, *push))
    on_hub = hub.files("user/amed")
    assert set(PREDICTOR) < set(on_hub) and len(hub.repos["user/amed"].commits) == 2  # a new repository, and ours
    assert not any(str(room).encode() in content or str(output).encode() in content for content in on_hub.values())
    record = read(output / "certificate.json")["counts"][str(NFE)]
    assert record["won"] and record["learned"]["class"] == "AMEDScheduler"
    assert record["learned"]["setting"] == "ipndm 4, stages per sample"

    (found,) = find_schedules(base_model="user/tiny-sd", nfe=NFE)
    asked = len(hub.requests)
    (variant,) = list_variants(found.repo_id)
    assert variant.stages == "per sample" and variant.solver == "ipndm" and variant.certified and variant.nfe == (NFE,)
    assert not any("predictor" in request for request in hub.requests[asked:] if "/resolve/" in request)

    loaded, own = load_scheduler(found.repo_id), AMEDScheduler.from_pretrained(room / "per sample")
    assert type(loaded) is AMEDScheduler and loaded.config.schedules == own.config.schedules
    mine, pipe = sampled(loaded)
    assert torch.equal(mine, sampled(own)[0])
    loaded.detach()
    with pytest.raises(ValueError, match="call scheduler.attach"):
        pipe("a quick cat", num_inference_steps=NFE, height=32, width=32)

    card = ModelCard.load(found.repo_id)
    assert "**AMED-Plugin on ipndm of order 4, stages predicted for each sample**" in card.text
    assert "[AMED](https://arxiv.org/abs/2312.00094)" in card.text and "trajectories 64" in card.text
    (code,) = re.findall(r"^```python\n(.*?)^```", card.text, flags=re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    assert names["image"].size == (32, 32) and type(names["pipe"].scheduler) is AMEDScheduler

    (command,) = re.findall(r"^```bash\npython -m training.publish (.*)\n```", card.text, flags=re.MULTILINE)
    capsys.readouterr()
    publish.main([*command.split(), "--num_samples", "2"])
    assert capsys.readouterr().out.strip().endswith("verified")


def test_static_stages_join_as_a_variant_that_every_scheduler_serves(room, output, hub, tmp_path):
    # What stock schedulers do is known from certifying the other form.
    copy = shutil.copytree(room / "static", tmp_path / "static")
    shutil.copytree(room / "per sample" / "certification", copy / "certification")
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    publish.main(arguments(room, "static", output, "--schedules", str(copy), "--hub_model_id", "user/amed"))
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.name in before} | {"README.md": b""} == (
        before | {"README.md": b""}
    )
    root, static = list_variants(output)
    assert (root.subfolder, root.stages, static.subfolder, static.stages) == (
        None,
        "per sample",
        "ipndm-static",
        "static",
    )
    assert not list((output / "ipndm-static").glob("predictor*"))
    card = (output / "README.md").read_text()
    assert "| ipndm-static | AMED-Plugin on ipndm of order 4, static stages | 4 |" in card
    back, own = (load_scheduler(place) for place in (output / "ipndm-static", room / "static"))
    assert type(back) is LD3Scheduler and type(own) is AMEDScheduler
    assert torch.equal(sampled(back)[0], sampled(own)[0])


def test_a_predictor_that_is_not_the_certified_one_is_not_verified(room, output, capsys):
    other = AMEDScheduler.from_config(load_scheduler(output).config)
    other.set_predictor(NFE, predictor_for("ipndm"))
    other.save_pretrained(output)
    assert "its hash differs" in not_verified(output, room, capsys)
    shutil.copyfile(room / "published" / "scheduler_config.json", output / "scheduler_config.json")
    assert "is not the predictor that the schedule for 4 evaluations was saved with" in not_verified(
        output, room, capsys
    )
    (output / PREDICTOR[1]).unlink()
    assert "the predictor for 4 evaluations cannot be read" in not_verified(output, room, capsys)
    said = refusal(arguments(room, "static", output))
    assert "the predictor for 4 evaluations cannot be read from 'predictor-4'" in said


# ---------------------------------------------------------------------- repositories, without measuring


@pytest.fixture(scope="module")
def variants():
    """Made-up certificates of iPNDM's schedules: predicted stages for 4 and for 6 evaluations, static ones, and none."""
    config = PIPELINES["sd"]()[0].scheduler.config
    made = {
        f"{form} {nfe}": amed_scheduler(config, nfe, form=form) for form in ("per sample", "static") for nfe in (4, 6)
    }
    made["plain 4"] = scheduler_with((4,), "ipndm", config=config, provenance=FACTS)
    made["amed plain 4"] = scheduler_with((4,), "amed", config=config, provenance=FACTS)
    made["amed static 4"] = amed_scheduler(config, 4, form="static", solver="amed")
    made["amed per sample 4"] = amed_scheduler(config, 4, solver="amed")
    found = {}
    for name, scheduler in made.items():
        made_up = variant_of(dict(scheduler.config))
        found[name] = replace(made_up, predictors=dict(getattr(scheduler, "predictors", {})))
    return found


def names_beside(root: Variant, variants) -> dict[str, str]:
    return {name: place({"": root}, variant.certificate) for name, variant in variants.items() if name.endswith("4")}


def test_forms_of_one_solver_are_variants_of_their_own(variants):
    expected = {
        **{"per sample 4": "ipndm-per-sample", "static 4": "ipndm-static", "plain 4": "ipndm"},
        **{"amed per sample 4": "amed-per-sample", "amed static 4": "amed-static", "amed plain 4": "amed"},
    }
    for root in expected:
        assert names_beside(variants[root], variants) == {**expected, root: ""}
    mixed = {**variants["static 4"].config["schedules"], **variants["per sample 6"].config["schedules"]}
    with pytest.raises(
        ValueError, match="differ in stages: 'static' and 'per sample'; publish them from folders of their own"
    ):
        shared_facts(mixed)


def test_certificates_name_the_form(variants):
    names = {name: sampler_name(variant.certificate["solver"]) for name, variant in variants.items()}
    assert names["plain 4"] == "ipndm of order 4" and names["amed plain 4"] == "amed of order 2"
    assert names["static 6"] == "AMED-Plugin on ipndm of order 4, static stages"
    assert names["amed per sample 4"] == "AMED-Solver, stages predicted for each sample"
    # of schedules without AMED's stages a certificate is what it always was
    assert "stages" not in variants["plain 4"].certificate["solver"]
    certificate = json.loads(json.dumps(variants["static 4"].certificate))
    validate(certificate)
    certificate["solver"]["stages"] = "moving"
    with pytest.raises(ValueError, match="malformed at solver.stages"):
        validate(certificate)


def test_predictors_travel_with_their_counts(variants, tmp_path):
    four, six = variants["per sample 4"], variants["per sample 6"]
    both = extended({"": four}, "", six)
    files = contents(both, "card")
    write(files, tmp_path / "r")
    again = read_repository(tmp_path / "r")
    assert contents(again, "card") == files
    assert {nfe: p.digest() for nfe, p in again[""].predictors.items()} == {
        nfe: p.digest() for each in (four, six) for nfe, p in each.predictors.items()
    }
    alone = restricted(again[""], ["4"])
    assert contents({"": alone}, "card") == contents({"": four}, "card")
    assert contents(union({"": six}, {"": four}), "card") == files

    gone = outdated(again, contents({"": alone}, "card"))
    assert gone == ["predictor-6/config.json", "predictor-6/diffusion_pytorch_model.safetensors"]
    write(contents({"": alone}, "card"), tmp_path / "r", gone)
    assert not (tmp_path / "r" / "predictor-6").exists() and (tmp_path / "r" / "predictor-4").is_dir()


def test_a_variant_that_goes_leaves_no_folder(variants, tmp_path):
    before = extended({"": variants["plain 4"]}, "ipndm-per-sample", variants["per sample 4"])
    write(contents(before, "card"), tmp_path / "r")
    assert (tmp_path / "r" / "ipndm-per-sample" / PREDICTOR[1]).is_file()
    after = contents({"": variants["plain 4"]}, "card")
    write(after, tmp_path / "r", outdated(before, after))
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(after)


def test_a_predictor_of_another_schedule_is_not_written(variants):
    wrong = replace(variants["per sample 4"], predictors={4: variants["per sample 6"].predictors[6]})
    with pytest.raises(ValueError, match="is not the predictor that the schedule for 4 evaluations was saved with"):
        wrong.files()


def test_the_card_tells_how_each_variant_is_loaded(variants):
    beside = extended({"": variants["static 4"]}, "ipndm-per-sample", variants["per sample 4"])
    card = model_card(beside, "user/amed", "mit")
    assert "pipe.scheduler = LD3Scheduler.from_pretrained('user/amed')" in card
    assert "Load `ipndm-per-sample` with `AMEDScheduler` and call `pipe.scheduler.attach(pipe)`." in card
    assert "where the solver evaluates within each step and how far that leads, learned ([AMED]" in card
    mixed = model_card(extended({"": variants["plain 4"]}, "ipndm-static", variants["static 4"]), "user/amed", "mit")
    assert "and what time the network is told, or where the solver evaluates within each step" in mixed
    assert "attach" not in mixed


# ---------------------------------------------------------------------- the library


def test_a_scheduler_is_loaded_as_the_class_that_saved_it(room, hub, tmp_path):
    stock = PIPELINES["sd"]()[0].scheduler
    stock.save_pretrained(tmp_path / "stock")
    scheduler_with((4,)).save_pretrained(tmp_path / "learned")
    for name, kind in (("stock", LD3Scheduler), ("learned", LD3Scheduler)):
        assert type(load_scheduler(tmp_path / name)) is kind
    assert type(load_scheduler(room / "static")) is AMEDScheduler
    api = HfApi(token=hub.token)
    api.create_repo("user/s", private=True)
    api.upload_folder(
        repo_id="user/s", folder_path=room / "per sample", path_in_repo="here", allow_patterns=["s*", "p*"]
    )
    with pytest.raises(OSError, match="pass a token"):
        load_scheduler("user/s", subfolder="here")
    loaded = load_scheduler("user/s", subfolder="here", token=hub.token, revision="main")
    assert list(loaded.predictors) == [NFE]
    for origin, options in (("user/s", {"token": hub.token}), (tmp_path, {})):
        with pytest.raises(OSError, match="no scheduler_config.json in the subfolder 'missing'.*list_variants"):
            load_scheduler(origin, subfolder="missing", **options)
    (tmp_path / "learned" / "scheduler_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_scheduler(tmp_path / "learned")


def test_variants_are_listed_without_their_predictors(room, tmp_path):
    shutil.copy(room / "per sample" / "scheduler_config.json", tmp_path)
    (variant,) = list_variants(tmp_path)
    assert variant.stages == "per sample" and not variant.certified
    (tmp_path / "plain").mkdir()
    shutil.copy(room / "static" / "scheduler_config.json", tmp_path / "plain")
    assert [each.stages for each in list_variants(tmp_path)] == ["per sample", "static"]


def test_predictors_are_copied_with_a_config(room):
    scheduler = load_scheduler(room / "per sample")
    copy = AMEDScheduler.from_config(scheduler.config, predictors=scheduler.predictors)
    assert copy.config.schedules == scheduler.config.schedules
    assert torch.equal(sampled(copy)[0], sampled(scheduler)[0])
    assert not AMEDScheduler.from_config(scheduler.config).predictors
    with pytest.raises(ValueError, match="is not the predictor that the schedule for 4 evaluations"):
        AMEDScheduler.from_config(scheduler.config, predictors={NFE: predictor_for("ipndm")})
    assert Schedule.from_dict(scheduler.config.schedules[str(NFE)]).stages == "per sample"


def test_a_whole_pipeline_travels_with_its_predictors(room, hub, tmp_path):
    expected, pipe = sampled(load_scheduler(room / "per sample"))
    save_pipeline(pipe, tmp_path / "p", push_to_hub=True, repo_id="user/p", token=hub.token)
    assert json.loads(hub.files("user/p")["model_index.json"])["scheduler"] == ["ld3_shim", "AMEDScheduler"]
    for origin in ("user/p", tmp_path / "p"):
        back = DiffusionPipeline.from_pretrained(origin, trust_remote_code=True)
        assert type(back.scheduler) is AMEDScheduler
        assert torch.equal(sampled(back.scheduler)[0], expected)
    assert [(variant.subfolder, variant.stages) for variant in list_variants("user/p")] == [
        ("scheduler", "per sample")
    ]
