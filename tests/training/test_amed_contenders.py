# SPDX-License-Identifier: Apache-2.0
"""AMED's schedules in comparisons: attached while they run, known by their predictors, measured step by step where that means something."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ld3_diffusers import AMEDScheduler, LD3Scheduler, SolverSpec
from ld3_diffusers.amed import StepPrediction, amed_schedule, with_step
from ld3_diffusers.discretization import append_zero, discretization
from ld3_diffusers.noise_path import VPLinear
from tests.amed_runs import per_sample, predictor_for, serving, static_schedule
from tests.tiny_pipelines import PIPELINES
from tests.training.toy import perfect_gain, single_gaussian
from training import evaluate, sample
from training.comparison import Comparison, Contender
from training.contenders import NamedScheduler, copy_of, sampler_key
from training.local_error import local_errors, refined, step_ends
from training.scheduler_specs import parse_scheduler


NFE, STD = 6, 0.6


@pytest.fixture(scope="module")
def sd():
    return PIPELINES["sd"]()[0]


@pytest.fixture(scope="module")
def room(sd, tmp_path_factory):
    """A teacher, and schedules of predicted and of static stages for it."""
    folder = tmp_path_factory.mktemp("room")
    sd.save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    per_sample(sd.scheduler.config, solver="ipndm").save_pretrained(folder / "predicted")
    serving(AMEDScheduler, sd.scheduler.config, *static_schedule(sd.scheduler.config)).save_pretrained(
        folder / "static"
    )
    return folder


def named(text, pipe) -> NamedScheduler:
    return NamedScheduler(parse_scheduler(text), pipe.scheduler.config)


@pytest.fixture
def comparison(sd):
    with Comparison(sd, height=32, width=32, guidance_scale=2.0) as comparison:
        yield comparison


def inputs(comparison):
    conditioning = comparison.encode(["a red fox", "a blue bird"])
    shape = comparison.state_shape(conditioning)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), conditioning


def hooks(pipe) -> int:
    """Hooks on the denoiser and its bottleneck."""
    return len(pipe.unet._forward_pre_hooks) + len(pipe.unet.mid_block._forward_hooks)


# ---------------------------------------------------------------------- taking part


def test_it_samples_as_the_attached_scheduler_and_leaves_nothing_behind(room, sd, comparison):
    noise, conditioning = inputs(comparison)
    [contender] = named(str(room / "predicted"), sd).contenders(NFE)
    assert type(contender.scheduler) is AMEDScheduler and contender.setting == "ipndm 4, stages per sample"
    before = hooks(sd)
    ends = comparison.follow(contender, noise, conditioning)
    assert contender.evaluations == NFE and hooks(sd) == before
    assert torch.equal(comparison.follow(contender, noise, conditioning), ends)

    stock, sd.scheduler = sd.scheduler, AMEDScheduler.from_pretrained(room / "predicted")
    sd.scheduler.attach(sd)
    call = {**conditioning, "guidance_scale": 2.0, "height": 32, "width": 32, "output_type": "latent"}
    expected = sd(**call, latents=noise, num_inference_steps=NFE).images
    sd.scheduler.detach()
    sd.scheduler = stock
    assert torch.equal(ends, expected)

    bare = copy_of(contender.scheduler, schedules={str(NFE): without_predictor(contender.scheduler)})
    assert type(bare) is LD3Scheduler
    assert not torch.equal(comparison.follow(Contender("bare", bare, NFE), noise, conditioning), ends)


def without_predictor(scheduler) -> dict:
    return {key: value for key, value in scheduler.config.schedules[str(NFE)].items() if key != "predictor"}


def test_it_is_detached_when_the_pipeline_fails(room, sd, comparison, monkeypatch):
    noise, conditioning = inputs(comparison)
    [contender] = named(str(room / "predicted"), sd).contenders(NFE)
    before, own = hooks(sd), comparison.scheduler
    monkeypatch.setattr(type(sd.unet), "forward", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        comparison.follow(contender, noise, conditioning)
    assert hooks(sd) == before and comparison.pipe.scheduler is comparison.scheduler is own


def test_a_pipeline_without_a_bottleneck_says_so():
    pipe, _ = PIPELINES["flux"]()
    scheduler = per_sample(pipe.scheduler.config)
    with Comparison(pipe, height=32, width=32) as comparison:
        noise, conditioning = inputs(comparison)
        with pytest.raises(ValueError, match="without a bottleneck .* use static schedules"):
            comparison.follow(Contender("amed", scheduler, NFE), noise, conditioning)


def test_static_stages_run_without_attaching(room, sd, comparison, monkeypatch):
    monkeypatch.setattr(AMEDScheduler, "attach", lambda *_: 1 / 0)
    noise, conditioning = inputs(comparison)
    [contender] = named(str(room / "static"), sd).contenders(NFE)
    assert contender.setting == "amed 2, static stages"
    saved = Contender("saved", AMEDScheduler.from_pretrained(room / "static"), NFE)
    ends = comparison.follow(contender, noise, conditioning)
    assert torch.equal(comparison.follow(saved, noise, conditioning), ends)


@pytest.mark.parametrize("form, own, order", [("predicted", "ipndm", 4), ("static", "amed", 2)])
def test_stages_serve_no_other_solver(room, sd, form, own, order):
    for option in ("solver=euler", "solver_order=3,solver=ipndm", f"solver={own},starting_scale=sigma"):
        with pytest.raises(
            ValueError, match=f"AMED's stages were learned for {own} {order} and serve no other solver"
        ):
            named(f"{room / form}:{option}", sd)
    [asked] = named(f"{room / form}:solver={own}", sd).contenders(NFE)
    [plain] = named(str(room / form), sd).contenders(NFE)
    assert asked.setting == plain.setting and type(asked.scheduler) is type(plain.scheduler)


def test_what_samples_differently_has_another_key(room, sd):
    [first], [again] = (named(str(room / "predicted"), sd).contenders(NFE) for _ in range(2))
    assert first.scheduler is not again.scheduler and sampler_key(first) == sampler_key(again)
    other = copy_of(first.scheduler)
    predictor = predictor_for("ipndm")
    with torch.no_grad():
        predictor.fc_r.bias += 1e-6
    other.set_predictor(NFE, predictor)
    assert sampler_key(Contender("other", other, NFE)) != sampler_key(first)


# ---------------------------------------------------------------------- errors of single steps


PREDICTIONS = [StepPrediction(0.4, 1.03), StepPrediction(0.6, 0.95), StepPrediction(0.5, 1.1)]


def placed(path, solver, to_zero=False, **options):
    ends = discretization("logsnr", path, 3)
    ends = append_zero(ends[:-1]) if to_zero else ends
    schedule = amed_schedule(ends, SolverSpec(solver, **options), path, "epsilon")
    for n, prediction in enumerate(PREDICTIONS):
        schedule = with_step(schedule, n, prediction, path)
    return schedule


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("solver", ["amed", "euler"])
def test_steps_err_where_both_of_their_rows_have_led(solver, to_zero):
    r"""By hand, with $y = x/\alpha$: $y_s = y + (z_s - z) d$, then $y' = y + c (z' - z) d_s$, of Euler $y' = y_s + c (z' - z_s) d_s$."""
    path = VPLinear()
    gaussian, schedule = single_gaussian(path, STD), placed(path, solver, to_zero)
    assert step_ends(schedule) == [1, 3, 5]
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = local_errors(gaussian, schedule, noise, substeps=64)
    assert found.isnan().tolist() == [True, False] * 3
    times = schedule.times
    for n, (_, c, _) in enumerate(PREDICTIONS):
        t, stage, end = times[2 * n : 2 * n + 3]
        (z, z_s, z_), (alpha, alpha_s, alpha_) = (
            path.sigma_edm(times[2 * n : 2 * n + 3]),
            path.alpha(times[2 * n : 2 * n + 3]),
        )
        x = noise * perfect_gain(path, STD, float(times[0]), float(t))
        y_s = x / alpha + (z_s - z) * gaussian.network(x, t, path)
        d = gaussian.network(alpha_s * y_s, stage, path)
        y = y_s + c * (z_ - z_s) * d if solver == "euler" else x / alpha + c * (z_ - z) * d
        last = max(float(end), path.t_min)
        exact = noise * perfect_gain(path, STD, float(times[0]), last)
        if end == 0:  # the teacher asks no network below t_min: one row leads from there
            level = torch.tensor(last, dtype=torch.float64)
            exact = (exact - path.sigma(level) * gaussian.network(exact, level, path)) / path.alpha(level)
        error = (alpha_ * y - exact).square().mean() / (alpha_**2 + path.sigma(end) ** 2)
        assert float(found[2 * n + 1]) == pytest.approx(float(error), rel=5e-3)


def test_an_analytical_first_step_has_its_error_at_the_first_evaluation():
    path = VPLinear()
    schedule = placed(path, "amed", afs=True)
    assert schedule.nfe == 5 and step_ends(schedule) == [0, 2, 4]
    teacher, ends = refined(schedule, path, 4)
    torch.testing.assert_close(teacher.times[1:][ends], schedule.times[[2, 4, 6]], rtol=0, atol=0)
    assert teacher.direction_scales is None


def test_stages_of_each_sample_have_no_errors_of_their_own(sd):
    scheduler = per_sample(sd.scheduler.config)
    with pytest.raises(ValueError, match="predicted for each sample have no table of their own"):
        local_errors(None, scheduler.learned_schedules[NFE], None)


# ---------------------------------------------------------------------- the programs


def arguments(room, output, **given) -> list[str]:
    given |= {"teacher": room / "sd", "prompts_file": room / "prompts.txt", "output_dir": output, "nfe": NFE}
    given |= {"guidance_scale": 2, "resolution": 32, "batch_size": 2}
    return [f"--{name}={value}" for name, value in given.items()]


def test_an_evaluation_measures_draws_and_says_what_it_leaves_out(room, sd, comparison, tmp_path):
    argv = arguments(room, tmp_path, seeds="0-3", teacher_steps=8, save_images=2, blocks=0)
    schedulers = [f"{room / 'predicted'}", f"{room / 'static'}", "UniPCMultistepScheduler:name=UniPC"]
    evaluate.main([*argv, "--local_errors", "--metrics", "mse", "--schedulers", *schedulers])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["predicted"]["setting"] == "ipndm 4, stages per sample" and rows["predicted"]["evaluations"] == NFE
    assert rows["static"]["setting"] == "amed 2, static stages"
    assert rows["predicted"]["local_errors"] is None and rows["UniPC"]["local_errors"] is None
    measured = rows["static"]["local_errors"]
    assert measured[::2] == [None] * 3 and all(error > 0 for error in measured[1::2])
    for name in ("predicted", "static"):  # of the first, the bare solver's
        [contender] = named(str(room / name), sd).contenders(NFE)
        schedule, path = contender.scheduler.learned_schedules[NFE], comparison.path
        assert rows[name]["schedule"]["levels"] == pytest.approx(path.levels(schedule.times).z.tolist(), rel=1e-6)
        told = path.levels(schedule.network_times).z.tolist()
        assert rows[name]["schedule"]["told"] == pytest.approx(told, rel=1e-4)
    [note] = [warning for warning in results["warnings"] if "predicted" in warning]
    assert note.startswith("the stages of predicted are predicted for each sample: ")
    assert (tmp_path / "schedules.png").exists() and (tmp_path / "local_errors.png").exists()


def test_pictures_are_sampled_as_in_any_batch(room, tmp_path):
    for batch_size in (1, 3):
        argv = arguments(room, tmp_path / str(batch_size), seeds="0-2", scheduler=room / "predicted")
        sample.main([*argv, "--save_latents", f"--batch_size={batch_size}"])
    for seed in range(3):
        one, other = (load_file(tmp_path / size / "latents" / f"{seed:06d}.safetensors")["latents"] for size in "13")
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
