# SPDX-License-Identifier: Apache-2.0
"""Schedulers by name: what is read, what is refused, and that what takes part makes the evaluations it stands for."""

import json
import math

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

from ld3_diffusers import LD3Scheduler
from tests.schedules import scheduler_with
from tests.tiny_pipelines import PIPELINES
from training.comparison import Comparison
from training.contenders import NamedScheduler, NoSchedule, is_stochastic, solver_of, stock_contenders
from training.scheduler_specs import parse_scheduler
from training.seeds import parse_seeds, written


@pytest.fixture(scope="module")
def sd():
    pipe, _ = PIPELINES["sd"]()
    return pipe


@pytest.fixture(scope="module")
def flux():
    pipe, _ = PIPELINES["flux"]()
    return pipe


@pytest.fixture
def folder(sd, tmp_path):
    """Saved schedules for 3 and 5 evaluations."""
    scheduler_with((3, 5), config=dict(sd.scheduler.config)).save_pretrained(tmp_path / "learned")
    return tmp_path / "learned"


def named(text, pipe) -> NamedScheduler:
    return NamedScheduler(parse_scheduler(text), pipe.scheduler.config)


# ---------------------------------------------------------------------- reading


def test_options_are_yaml_scalars():
    spec = parse_scheduler("UniPCMultistepScheduler:solver_order=3,use_karras_sigmas=true,solver_type=bh1,name=three")
    assert spec.options == {"solver_order": 3, "use_karras_sigmas": True, "solver_type": "bh1"}
    assert spec.name == "three" and spec.kind is UniPCMultistepScheduler and not spec.is_saved


def test_places_and_names_stay_text():
    spec = parse_scheduler("owner/schedules:revision=1234567,subfolder=0012,name=5")
    assert spec.options == {"revision": "1234567", "subfolder": "0012"} and spec.name == "5" and spec.is_saved


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("unipc", "did you mean UniPCMultistepScheduler"),
        ("UniPCMultistepSchedular", "did you mean UniPCMultistepScheduler"),
        ("no/such/folder", "neither stock, a scheduler class"),
        ("UniPCMultistepScheduler:solver_order", "no option=value; separate options by commas"),
        ("UniPCMultistepScheduler:solver_order=2,solver_order=3", "gives solver_order twice"),
        ("UniPCMultistepScheduler:order=2", "no option 'order'"),
        ("UniPCMultistepScheduler:trained_betas=[1]", "no single value"),
        ("UniPCMultistepScheduler:subfolder=x", "are for saved schedulers"),
        ("LD3Scheduler:solver=unipcc", "unknown solver 'unipcc'"),
        ("LD3Scheduler:name=", "empty name="),
        ("stock:name=x", "stock takes no options"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_scheduler(text)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no scheduler_config.json; see subfolder="):
        parse_scheduler(str(tmp_path))


def test_solvers_multiply_those_that_have_none_of_their_own(folder):
    solvers = ["unipc", "ipndm"]
    several = parse_scheduler(str(folder)).with_solvers(solvers)
    assert [(s.name, s.options["solver"]) for s in several] == [("learned unipc", "unipc"), ("learned ipndm", "ipndm")]
    for text in ("LD3Scheduler:solver=ddim", "UniPCMultistepScheduler", "stock"):
        spec = parse_scheduler(text)
        assert spec.with_solvers(solvers) == [spec]


# ---------------------------------------------------------------------- taking part


@pytest.mark.parametrize(
    "text, nfe, steps, evaluations",
    [
        ("UniPCMultistepScheduler", 4, 4, 4),
        ("HeunDiscreteScheduler", 4, 3, 5),
        ("HeunDiscreteScheduler", 5, 3, 5),
        ("KDPM2DiscreteScheduler", 4, 3, 5),
        ("PNDMScheduler", 5, 4, 5),
        ("EulerAncestralDiscreteScheduler", 3, 3, 3),
        ("LD3Scheduler:solver=ipndm,discretization=logsnr", 4, 4, 4),
    ],
)
def test_the_fewest_steps_that_make_the_evaluations(sd, text, nfe, steps, evaluations):
    [contender] = named(text, sd).contenders(nfe)
    assert contender.num_inference_steps == steps and contender.spec == text
    with Comparison(sd, height=32, width=32) as comparison:
        conditioning = comparison.encode(["a red fox"])
        noise = torch.randn(1, *comparison.state_shape(conditioning), generator=torch.Generator().manual_seed(0))
        comparison.follow(contender, noise, conditioning)
    assert contender.evaluations == evaluations


def test_a_class_by_name_is_the_stock_contender_of_a_flow_pipeline(flux):
    by_name = {each.name: each.scheduler for each in stock_contenders(flux.scheduler.config, 5)}
    for name, text in (
        ("FlowMatchHeun", "FlowMatchHeunDiscreteScheduler"),
        ("DPM++ 2M", "DPMSolverMultistepScheduler"),
    ):
        [contender] = named(text, flux).contenders(5)
        own, stock = contender.scheduler, by_name[name]
        for scheduler in (own, stock):
            scheduler.set_timesteps(contender.num_inference_steps, mu=0.7)
        assert torch.equal(own.sigmas, stock.sigmas)
        key = "shift" if isinstance(own, FlowMatchHeunDiscreteScheduler) else "flow_shift"
        assert own.config[key] == pytest.approx(math.exp(0.7))


def test_families_are_not_mixed(sd, flux, folder):
    with pytest.raises(ValueError, match="for flow models, and this pipeline has none"):
        named("FlowMatchEulerDiscreteScheduler", sd)
    with pytest.raises(ValueError, match="knows no flow models"):
        named("DDIMScheduler", flux)
    with pytest.raises(ValueError, match="cannot be made: .*use schedules made for this model"):
        named(str(folder), flux)


def test_learned_schedules_answer_for_their_counts(sd, folder):
    entry = named(f"{folder}:name=ours", sd)
    saved = LD3Scheduler.from_pretrained(folder)
    [contender] = entry.contenders(3)
    assert contender.name == "ours" and solver_of(contender) == saved._schedules[3].spec.solver
    contender.scheduler.set_timesteps(3)
    saved.set_timesteps(3)
    assert torch.equal(contender.scheduler.timesteps, saved.timesteps)
    assert torch.equal(contender.scheduler.sigmas, saved.sigmas)
    with pytest.raises(NoSchedule, match="no schedule was learned for 4 evaluations"):
        entry.contenders(4)
    [between] = named(f"{folder}:interpolate=true", sd).contenders(4)
    assert "interpolated" in between.setting
    [on_grid] = named(f"{folder}:discretization=dmn", sd).contenders(4)
    assert on_grid.setting.endswith(", dmn")
    [between] = named(f"{folder}:interpolate=true,discretization=dmn", sd).contenders(4)
    assert "interpolated" in between.setting
    between.scheduler.set_timesteps(4)
    interpolating = LD3Scheduler.from_pretrained(folder, interpolate=True)
    interpolating.set_timesteps(4)
    assert torch.equal(between.scheduler.timesteps, interpolating.timesteps)


def test_another_solver_runs_on_the_learned_times(sd, folder):
    saved = LD3Scheduler.from_pretrained(folder)
    [contender] = named(f"{folder}:solver=ipndm,solver_order=3", sd).contenders(5)
    schedule = contender.scheduler._schedules[5]
    assert schedule.spec.solver == "ipndm" and schedule.spec.make().order == 3 and solver_of(contender) == "ipndm"
    assert torch.equal(schedule.times, saved._schedules[5].times)
    assert torch.equal(schedule.network_times, saved._schedules[5].network_times)
    with pytest.raises(ValueError, match="levels that were learned for"):
        named(f"{folder}:solver=heun", sd)


def test_a_config_of_another_model_is_refused(sd, folder):
    file = folder / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "schedules": {}, "beta_end": 0.02}))
    with pytest.raises(ValueError, match="beta_end"):
        named(str(folder), sd)


def test_schedulers_that_add_noise_are_known(sd):
    for text, expected in (
        ("EulerAncestralDiscreteScheduler", True),
        ("DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++", True),
        ("LCMScheduler", True),
        ("DPMSolverMultistepScheduler", False),
        ("HeunDiscreteScheduler", False),
        ("LD3Scheduler", False),
    ):
        [contender] = named(text, sd).contenders(4)
        assert is_stochastic(contender.scheduler) == expected, text


# ---------------------------------------------------------------------- seeds


def test_seeds():
    assert parse_seeds("0-3,20, 30-31") == [0, 1, 2, 3, 20, 30, 31]
    assert written([0, 1, 2, 3, 20, 30, 31]) == "0-3,20,30-31" and written([5]) == "5"
    assert parse_seeds(written([9, 3, 4])) == [9, 3, 4]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "write numbers and ranges"),
        ("1-", "at '1-'"),
        ("-3", "at '-3'"),
        ("5-2", "runs backwards; write 2-5"),
        ("0-5,3", "gives 3 more than once"),
        (str(2**63), "too large"),
        ("0-999999999", "more than 100 million"),
    ],
)
def test_malformed_seeds_are_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_seeds(text)
