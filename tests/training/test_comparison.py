# SPDX-License-Identifier: Apache-2.0
"""Schedulers side by side: that stock ones run as their makers meant them to, how they are compared, and the report."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

from ld3_diffusers import LD3Scheduler
from tests.schedules import scheduler_with
from tests.tiny_pipelines import PIPELINES
from training import comparison as comparisons
from training import make_teacher_set
from training.comparison import Comparison, Contender, best_by_name, paired_interval, unbeaten
from training.contenders import stock_contenders
from training.report import pick_columns, save_results, save_schedules, table
from training.teacher_set import TeacherSet
from training.whole_files import write_whole


def contender(name, distances, setting=""):
    return Contender(name, None, 5, setting, 5, torch.tensor(distances, dtype=torch.float64))


def test_paired_interval_is_the_bootstraps():
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(64, generator=generator, dtype=torch.float64)
    other = own + 0.3 + 0.5 * torch.randn(64, generator=generator, dtype=torch.float64)
    difference = other - own
    mean, low, high = paired_interval(other, own)
    assert mean == pytest.approx(float(difference.mean()), rel=1e-12)
    # of many symmetric differences nearly Student's interval (t of 63 degrees of freedom at 97.5 %)
    half = 1.99834 * float(difference.std()) / math.sqrt(64)
    assert low == pytest.approx(mean - half, abs=0.15 * half) and high == pytest.approx(mean + half, abs=0.15 * half)
    assert paired_interval(other, own) == (mean, low, high)  # the resamples are always the same
    assert paired_interval(own, own) == (0.0, 0.0, 0.0) and paired_interval(own + 1, own) == pytest.approx(
        (1.0, 1.0, 1.0)
    )
    with pytest.raises(ValueError, match="the same two or more samples"):
        paired_interval(own, own[:1])
    with pytest.raises(ValueError, match="not finite"):
        paired_interval(torch.tensor([1.0, math.nan]), own[:2])


def test_paired_interval_follows_skewed_differences():
    """Where few samples decide, Student's symmetric interval would reach as far down as up."""
    difference = torch.tensor([0.01] * 30 + [4.0, 5.0], dtype=torch.float64)
    mean, low, high = paired_interval(difference, torch.zeros(32, dtype=torch.float64))
    assert 0 < low < mean < high and high - mean > 1.5 * (mean - low)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    intervals = [paired_interval(draw, torch.zeros(24, dtype=torch.float64)) for draw in draws]
    covered = sum(low <= 0 <= high for _, low, high in intervals)
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_many_samples_have_the_interval_to_which_the_bootstrap_tends(monkeypatch):
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    # Ten times the usual resamples leave 0.6 % of a limit's distance from the mean to chance.
    monkeypatch.setattr(comparisons, "RESAMPLES", 100_000)
    mean, low, high = paired_interval(values, torch.zeros(2000))
    monkeypatch.setattr(comparisons, "MOST_RESAMPLED", 1999)
    found, lower, upper = paired_interval(values, torch.zeros(2000))
    assert found == mean and high - mean > 1.07 * (mean - low)
    assert (mean - lower, upper - mean) == pytest.approx((mean - low, high - mean), rel=0.015)


def test_a_win_needs_the_whole_interval():
    learned = contender("LD3", [1.0, 2.0, 3.0, 4.0])
    ahead, unclear = contender("A", [2.0, 3.1, 4.0, 5.0]), contender("B", [1.1, 1.9, 3.2, 4.0])
    failed = contender("C", [math.nan, 1.0, 1.0, 1.0])
    assert not unbeaten(learned, [ahead, failed])
    ((lost, (mean, low, high)),) = unbeaten(learned, [ahead, unclear, failed])
    assert lost is unclear and low < 0 < mean < high
    text = table(learned, [ahead, failed])
    assert "| A |  | 5 | 3525.000 | +1025.000 [+1000.000, +1100.000] | 1.41 |" in text
    assert "| C |  | 5 | not finite | | |" in text


def test_each_stock_scheduler_enters_with_its_best_setting():
    contenders = [contender("A", [3.0], "leading"), contender("B", [2.0]), contender("A", [1.0], "trailing")]
    assert [(c.name, c.setting) for c in best_by_name(contenders)] == [("A", "trailing"), ("B", "")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    PIPELINES["sd"]()[0].save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red fox\n")
    given = {"teacher": folder / "teacher", "prompts_file": folder / "prompts.txt", "output_dir": folder / "set"}
    given |= {"num_samples": 3, "train_batch_size": 2, "guidance_scale": 2, "resolution": 16, "num_inference_steps": 6}
    make_teacher_set.main([f"--{name}={value}" for name, value in given.items()])
    return TeacherSet.load(folder / "set")


@pytest.mark.parametrize("nfe, heun", [(4, 5), (5, 5)])
def test_stock_schedulers_make_the_evaluations_they_are_listed_with(pairs, nfe, heun):
    pipe, _ = PIPELINES["sd"]()
    contenders = list(stock_contenders(pipe.scheduler.config, nfe))
    before = pipe.scheduler
    with Comparison(pipe, **pairs.call_settings) as comparison:
        for each in contenders:
            comparison.measure(each, pairs, batch_size=2)
        ends = {each.label: comparison.ends(each, pairs, [2]) for each in contenders}
    assert pipe.scheduler is before
    assert {c.name: c.evaluations for c in contenders} == {
        **dict.fromkeys(["UniPC", "DPM++ 2M", "DPM++ 2M Karras", "DEIS", "Euler", "DDIM"], nfe),
        "Heun": heun,
    }
    end = pairs.batch([2])[1]
    for each in contenders:
        assert each.distances.shape == (3,)
        assert float(each.distances[2]) == pytest.approx(float((ends[each.label] - end).square().mean()), rel=1e-5)


@pytest.fixture(scope="module")
def flux():
    """A tiny Flux, which shifts with the resolution, one starting noise, and embeddings."""
    pipe, _ = PIPELINES["flux"]()
    call = {"height": 32, "width": 32, "max_sequence_length": 16}
    with Comparison(pipe, **call) as comparison:
        conditioning = comparison.encode(["a red fox"])
        shape = comparison.state_shape(conditioning)
    return pipe, call, torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), conditioning


def native(kind, config, **options):
    """The stock scheduler as its documentation says to make it for a flow model."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config.get("shift", 1.0)}
    return kind.from_config(config, **(flow if kind is not FlowMatchHeunDiscreteScheduler else {}), **options)


@pytest.mark.parametrize("shift", ["dynamic", "linear", "constant"])
def test_stock_schedulers_shift_with_the_resolution_of_a_flow_pipeline(flux, shift):
    pipe, call, noise, conditioning = flux
    scheduler = pipe.scheduler
    changes = {"dynamic": {}, "linear": {"time_shift_type": "linear"}, "constant": {"use_dynamic_shifting": False}}
    pipe.scheduler = type(scheduler).from_config(scheduler.config, **changes[shift])
    config, nfe = pipe.scheduler.config, 5
    try:
        with Comparison(pipe, **call) as comparison:
            ran = {each.name: each for each in stock_contenders(config, nfe)}
            ends = {name: comparison.follow(each, noise, conditioning) for name, each in ran.items()}
            # Stock UniPC, and DPM++ with an exponential shift, take the shift themselves.
            for name, kind in (("UniPC", UniPCMultistepScheduler), ("DPM++ 2M", DPMSolverMultistepScheduler)):
                if name == "UniPC" or shift == "dynamic":
                    own = comparison.follow(Contender(name, native(kind, config), nfe), noise, conditioning)
                    assert torch.equal(own, ends[name])
    finally:
        pipe.scheduler = scheduler
    euler = ran["FlowMatchEuler"].scheduler.sigmas.double()
    assert not torch.allclose(euler[:-1], torch.linspace(1, 0.2, 5).double(), atol=0.05)  # there is a shift
    # Euler's times are 1 - i/N before the shift, those of UniPC and DPM++ 1 - i .999/N and .999 (1 - i/N).
    for name in ("UniPC", "DPM++ 2M"):
        assert torch.allclose(ran[name].scheduler.sigmas.double(), euler, atol=2.5e-3), name
    # Heun's 3 points reach from 1 to nearly 0; the same formula shifts the one between.
    shift_factor = float(euler[1] / (1 - euler[1]) / 4)  # 4 = .8 / (1 - .8)
    heun = ran["FlowMatchHeun"].scheduler.sigmas
    assert heun[0] == 1 and float(heun[1]) == pytest.approx(shift_factor / (shift_factor + 1), abs=5e-3)
    assert {name: each.evaluations for name, each in ran.items()} == {
        **dict.fromkeys(["FlowMatchEuler", "UniPC", "DPM++ 2M", "FlowMatchHeun"], 5)
    }


def test_guidance_in_two_calls_counts_once(flux):
    pipe, call, noise, _ = flux
    with Comparison(pipe, **call, true_cfg_scale=3.0, negative_prompt="blurry") as comparison:
        conditioning = comparison.encode(["a red fox"])
        assert "negative_prompt_embeds" in conditioning
        for each in stock_contenders(pipe.scheduler.config | {"shift": 3.0}, 4):
            comparison.follow(each, noise, conditioning)
            assert each.evaluations == (5 if each.name == "FlowMatchHeun" else 4)


def test_a_learned_schedule_is_run_as_the_pipeline_runs_it(flux):
    pipe, call, noise, conditioning = flux
    stock = pipe.scheduler
    learned = Contender("learned", scheduler_with((4,), config=dict(stock.config)), 4)
    with Comparison(pipe, **call) as comparison:
        end = comparison.follow(learned, noise, conditioning)
    assert pipe.scheduler is stock
    pipe.scheduler = LD3Scheduler.from_config(learned.scheduler.config)
    try:
        with torch.no_grad():
            own = pipe(**conditioning, latents=noise, num_inference_steps=4, output_type="latent", **call).images
    finally:
        pipe.scheduler = stock
    assert torch.equal(own, end) and learned.evaluations == 4


def test_schedules_are_drawn_as_they_were_run(flux, tmp_path):
    pipe, call, noise, conditioning = flux
    contenders = [Contender("learned", scheduler_with((4,), config=dict(pipe.scheduler.config)), 4)]
    contenders += stock_contenders(pipe.scheduler.config, 4)
    with pytest.raises(ValueError, match="FlowMatchEuler was not run|learned was not run"):
        save_schedules(tmp_path / "schedules.png", contenders)
    with Comparison(pipe, **call) as comparison:
        for each in contenders:
            comparison.follow(each, noise, conditioning)
    save_schedules(tmp_path / "schedules.png", contenders)
    assert (tmp_path / "schedules.png").stat().st_size > 10_000


def test_results_are_plain_json(tmp_path):
    learned, failed = contender("LD3", [1.0, 2.0]), contender("A", [math.inf, 1.0])
    save_results(tmp_path / "results.json", learned, [failed, contender("B", [2.0, 3.0])], {"nfe": 5})
    text = (tmp_path / "results.json").read_text()
    assert "Infinity" not in text and '"distance": null' in text and '"difference": [' in text


def test_files_are_whole_or_absent(tmp_path):
    def failing(file):
        file.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "new" / "table.md", failing)
    assert not list((tmp_path / "new").iterdir())
    write_whole(tmp_path / "table.md", lambda file: file.write_text("whole"))
    assert (tmp_path / "table.md").read_text() == "whole"


def test_shown_samples_have_different_prompts():
    prompts = [0, 1, 2, 3, 0, 1, 2, 3]
    assert pick_columns(prompts, 3) == [0, 1, 2]
    assert pick_columns(prompts[3:], 10) == [0, 1, 2, 3]
