# SPDX-License-Identifier: Apache-2.0
"""`AMEDScheduler`: static schedules, predicted ones, and how both are kept."""

import copy
import json
import pickle

import pytest
import torch

from ld3_diffusers import AMEDPredictor, AMEDScheduler, LD3Scheduler, Schedule
from ld3_diffusers.amed import STUDENTS, step_levels, with_step
from ld3_diffusers.schedule import check_checksum, interpolate
from ld3_diffusers.step_table import Executor
from tests.schedules import FLOW, SD_BETAS, outputs, run

from .amed_schedulers import NOISE, PATH, Denoiser, bare, pipeline, predicting, sample, scheduler_with, static
from .amed_steps import random_predictor
from .cases import PATHS


# Static schedules -----------------------------------------------------------------------------------------------------

ON_PATHS = [(solver, "vp") for solver in STUDENTS] + [(solver, "flow") for solver in STUDENTS]


def static_on(solver, path, afs=False):
    if path == "vp":
        return static(4 - afs, solver, afs), SD_BETAS
    return static(4, solver, path=PATHS["flow"], kind="flow_prediction"), FLOW


@pytest.mark.parametrize("solver, path", ON_PATHS)
@pytest.mark.parametrize("cls", [AMEDScheduler, LD3Scheduler])
def test_static_schedules_keep_every_bit(solver, path, cls, tmp_path):
    schedule, config = static_on(solver, path)
    scheduler = scheduler_with(schedule, cls=cls, config=config)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    kept = loaded.learned_schedules[4]
    for name in ("times", "network_times", "direction_scales"):
        assert torch.equal(getattr(kept, name), getattr(schedule, name))
    assert loaded.config.schedules == scheduler.config.schedules
    entry = schedule.to_dict(scheduler.path)
    assert Schedule.from_dict(json.loads(json.dumps(entry))).to_dict(scheduler.path) == entry


@pytest.mark.parametrize(
    "solver, path, afs", [(*pair, False) for pair in ON_PATHS] + [(solver, "vp", True) for solver in STUDENTS]
)
def test_static_schedules_run_alike_in_both_schedulers(solver, path, afs, tmp_path):
    schedule, config = static_on(solver, path, afs)
    amed = scheduler_with(schedule, config=config)
    amed.save_pretrained(tmp_path)
    others = [LD3Scheduler.from_config(amed.config), LD3Scheduler.from_pretrained(tmp_path)]
    x, rest = outputs(schedule.nfe)
    results = []
    for scheduler in (amed, *others, AMEDScheduler.from_config(others[0].config)):
        scheduler.set_timesteps(schedule.nfe)
        y, states = x * scheduler.init_noise_sigma, []
        for t, output in zip(scheduler.timesteps, rest):
            scaled = scheduler.scale_model_input(y, t)
            y = scheduler.step(output + scaled, t, y).prev_sample
            states += [scaled, y]
        results.append(states)
    for states in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states, results[0], strict=True))


def test_bare_schedules_leave_the_input_alone():
    # A pipeline that never calls scale_model_input is served as long as no time is scaled.
    for nfe in (4, 6, 8, 10):
        scheduler = scheduler_with(bare(nfe))
        scheduler.set_timesteps(nfe)
        x, rest = outputs(nfe)
        assert len(run(scheduler, x, rest)) == nfe
    scheduler = scheduler_with(static())
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="this pipeline does not call scale_model_input"):
        run(scheduler, x, rest)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("solver", STUDENTS)
def test_checksum_covers_the_direction_scales(solver, index):
    entry = static(solver=solver).to_dict(PATH)
    entry["direction_scales"][index] *= 1 + 1e-4
    with pytest.raises(ValueError, match="its config was edited"):
        check_checksum(Schedule.from_dict(entry).table(PATH), entry["checksum"])
    with pytest.raises(ValueError, match="schedules\\['4'\\]: this schedule builds another step table"):
        AMEDScheduler.from_config(SD_BETAS, schedules={"4": entry})


@pytest.mark.parametrize("solver", STUDENTS)
def test_interpolation_is_refused(solver):
    with pytest.raises(ValueError, match="stages cannot be interpolated; use num_inference_steps = 4"):
        interpolate({4: static(solver=solver)}, 5, PATH)
    scheduler = scheduler_with(static(solver=solver), interpolate=True)
    with pytest.raises(ValueError, match="stages cannot be interpolated; use num_inference_steps = 4"):
        scheduler.set_timesteps(6)


@pytest.mark.parametrize("nfe, afs", [(5, False), (4, True)])
def test_counts_are_rows(nfe, afs):
    # An entry under a count that its rows do not make; whole steps make no such count.
    schedule = static(6 - afs, afs=afs)
    with pytest.raises(ValueError, match=f"makes {6 - afs} network evaluations; rename the key to '{6 - afs}'"):
        AMEDScheduler.from_config(SD_BETAS, schedules={str(nfe): schedule.to_dict(PATH)})


# Predicted stages -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_table(table, net, rows, x=None):
    executor, x = Executor(table, fused=False), NOISE * table.start.reshape(-1, 1, 1, 1) if x is None else x
    for row in range(rows):
        scale = table.input_scale[row].reshape(-1, 1, 1, 1)
        x = executor.step(x, net(scale * x, table.timesteps[row].float()))
    return x


@pytest.mark.parametrize("solver", STUDENTS)
@pytest.mark.parametrize("afs", [False, True])
def test_sampling_is_the_table_of_its_predictions(solver, afs):
    nfe = 6 - afs
    scheduler = predicting(nfe, solver, afs)
    pipe = pipeline(scheduler)
    end = sample(pipe, nfe)

    # The same with each bottleneck looked at directly, and the table of all steps at the end.
    predictor, known, net = scheduler.predictors[nfe], scheduler.learned_schedules[nfe], Denoiser().double()
    schedule, means = known, []
    net.mid_block.register_forward_hook(lambda _module, _arguments, output: means.append(output.mean(1)))
    for n in range(int(afs), 3):
        run_table(schedule.table(PATH), net, 2 * n - afs + 1)
        prediction = predictor(means[-1], *step_levels(known, n, PATH), n)
        assert float(prediction.r.std()) > 1e-4  # the samples differ
        schedule = with_step(schedule, n, prediction, PATH)
    table = schedule.table(PATH)
    for told, expected in zip(pipe.unet.told, table.timesteps, strict=True):
        assert torch.equal(told.expand(3), expected.float().expand(3))
    torch.testing.assert_close(end, run_table(table, net, nfe), rtol=1e-12, atol=1e-12)


def test_samples_do_not_depend_on_their_batch():
    pipe = pipeline(predicting())
    together = sample(pipe, 4)
    for k in range(3):
        torch.testing.assert_close(sample(pipe, 4, NOISE[k : k + 1])[0], together[k], rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_samples_bit_equal(tmp_path):
    scheduler = scheduler_with(bare(4), bare(5, "ipndm", True), static(6, "dpmpp"))
    scheduler.set_predictor(4, random_predictor(solver="amed"))
    scheduler.set_predictor(5, random_predictor(seed=1, solver="ipndm", afs=True))
    scheduler.save_pretrained(tmp_path)
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    assert files == {
        "scheduler_config.json",
        *(f"predictor-{nfe}/{name}" for nfe in (4, 5) for name in ("config.json", weights)),
    }
    loaded = AMEDScheduler.from_pretrained(tmp_path)
    assert sorted(loaded.predictors) == [4, 5]
    mine, theirs = pipeline(scheduler), pipeline(loaded)
    for nfe in (4, 5, 6):
        assert torch.equal(sample(mine, nfe), sample(theirs, nfe))
    # once more over it, and below a pipeline's folder
    loaded.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "pipe" / "scheduler")
    for place in ({}, {"subfolder": "pipe/scheduler"}):
        again = pipeline(AMEDScheduler.from_pretrained(tmp_path, **place))
        assert torch.equal(sample(again, 5), sample(mine, 5))


def test_saving_is_whole_or_nothing(tmp_path, monkeypatch):
    first, second = predicting(), predicting(seed=1)
    first.save_pretrained(tmp_path / "old")
    expected = sample(pipeline(first), 4)

    def fail(self, folder, **kwargs):
        self.save_config(folder)
        raise OSError("no space left on device")

    monkeypatch.setattr(AMEDPredictor, "save_pretrained", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space"):
            second.save_pretrained(tmp_path / name)
    assert not any((tmp_path / "new").iterdir())
    assert torch.equal(sample(pipeline(AMEDScheduler.from_pretrained(tmp_path / "old")), 4), expected)


def test_a_predictor_set_is_a_copy():
    predictor = random_predictor()
    scheduler = scheduler_with(bare())
    scheduler.set_predictor(4, predictor.train())
    assert predictor.training and all(parameter.requires_grad for parameter in predictor.parameters())
    kept = scheduler.predictors[4]
    assert not kept.training and not any(parameter.requires_grad for parameter in kept.parameters())
    with torch.no_grad():
        predictor.fc_r.weight.add_(1.0)  # as learning goes on
    digest = scheduler.learned_schedules[4].predictor["digest"]
    assert kept.digest() == digest != predictor.digest()


def test_an_analytical_first_step_is_predicted_once():
    scheduler = predicting(5, "ipndm", True)
    schedule, predictor = scheduler.learned_schedules[5], scheduler.predictors[5]
    z = PATH.levels(schedule.times[::2]).z
    r, c, a = (value.squeeze() for value in predictor(torch.zeros(1, 8, 8), z[0], z[1]))
    stage = PATH.levels(schedule.times[1]).z
    torch.testing.assert_close(stage, z[1] ** r * z[0] ** (1 - r), rtol=1e-9, atol=0)
    assert schedule.direction_scales[:2].tolist() == [1.0, float(c)]
    torch.testing.assert_close(PATH.levels(schedule.network_times[1]).z, a * stage, rtol=1e-9, atol=0)


@pytest.mark.parametrize("begin", [1, 2, 3, 4])
@pytest.mark.parametrize("solver, afs", [("amed", False), ("ipndm", False), ("ipndm", True), ("dpmpp", True)])
def test_tails(solver, afs, begin):
    nfe = 6 - afs
    scheduler = predicting(nfe, solver, afs)
    pipe = pipeline(scheduler)
    scheduler.set_timesteps(nfe)
    x, told = NOISE, []
    with torch.no_grad():
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(pipe.unet(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            told.append(pipe.unet.told[-1])
    # The stage that it begins with is bare; its network times are those of the predictions.
    live = scheduler._live
    assert torch.isfinite(x).all() and len(told) == nfe - begin
    for row, t in enumerate(told, start=begin + afs):
        torch.testing.assert_close(
            t.double().expand(3), PATH.timestep(live.network_times[row]).expand(3), rtol=1e-6, atol=0
        )
    expected = run_table(live.table(PATH, first=begin), Denoiser().double(), nfe - begin, NOISE)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
)
def test_copies_are_not_attached(copied):
    scheduler = predicting()
    pipe = pipeline(scheduler)
    expected = sample(pipe, 4)
    other = copied(scheduler)
    with pytest.raises(ValueError, match="call scheduler.attach"):
        other.set_timesteps(4)
    assert torch.equal(sample(pipe, 4), expected)  # the first still is
    assert torch.equal(sample(pipeline(other), 4), expected)
    assert other.predictors[4] is not scheduler.predictors[4]


def test_use_without_attaching():
    scheduler = predicting()
    with pytest.raises(ValueError, match="predicted for each sample.* call scheduler.attach\\(pipe\\) first"):
        scheduler.set_timesteps(4)
    pipe = pipeline(scheduler)
    sample(pipe, 4)
    scheduler.detach()
    with pytest.raises(ValueError, match="call scheduler.attach"):
        scheduler.set_timesteps(4)
    # detached on the way, or another network called
    scheduler.attach(pipe)
    for lose in (scheduler.detach, lambda: setattr(pipe, "unet", Denoiser().double())):
        scheduler.attach(pipe)
        scheduler.set_timesteps(4)
        lose()
        t = scheduler.timesteps[0]
        with pytest.raises(ValueError, match="denoiser was not called as it was attached"):
            scheduler.step(pipe.unet(NOISE, t), t, NOISE)
    with pytest.raises(ValueError, match="not the pipeline's scheduler; set pipe.scheduler"):
        predicting().attach(pipe)


def test_pushing_uploads_the_predictors_too(tmp_path, hub):
    scheduler = predicting()
    scheduler.push_to_hub("user/one", token=hub.token)
    scheduler.save_pretrained(tmp_path / "two", push_to_hub=True, repo_id="user/two", token=hub.token)
    for name in ("user/one", "user/two"):
        loaded = AMEDScheduler.from_pretrained(name)
        assert loaded.predictors[4].digest() == scheduler.predictors[4].digest()
