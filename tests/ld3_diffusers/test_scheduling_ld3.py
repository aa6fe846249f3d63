# SPDX-License-Identifier: Apache-2.0
import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ld3_diffusers import LD3Scheduler, ScheduleCurve
from ld3_diffusers.step_table import Executor
from tests.schedules import FLOW, SD_BETAS, outputs, plausible_schedule, run, scheduler_with
from tests.tiny_pipelines import PIPELINES


ALL_SOLVERS = [("euler", None), ("ddim", None), ("dpmpp", 2), ("dpmpp", 3), ("unipc", 2), ("unipc", 3), ("ipndm", 4)]
ALL_SOLVERS += [("ipndm_v", 3), ("abv", 3), ("deis", 3), ("heun", None), ("dpm2", None)]


def test_attributes_that_pipelines_read():
    s = LD3Scheduler(**SD_BETAS)
    assert isinstance(s, SchedulerMixin) and s.order == 1 and len(s) == 1000
    assert s.num_inference_steps is None and s.step_index is None and s.begin_index is None
    assert s.init_noise_sigma == 1.0 and s.config.get("num_train_timesteps") == 1000
    stock = DDPMScheduler(**SD_BETAS)
    torch.testing.assert_close(s.alphas_cumprod, stock.alphas_cumprod, rtol=1e-6, atol=0)
    torch.testing.assert_close(s.betas, stock.betas, rtol=1e-4, atol=0)
    assert torch.equal(s.timesteps, torch.arange(999.0, -1, -1)) and s.index_for_timestep(999) == 0
    assert torch.isfinite(LD3Scheduler(noise_path="edm").sigmas).all()
    assert "UniPCMultistepScheduler" in s._compatibles and "FlowMatchEulerDiscreteScheduler" in s._compatibles
    # pipelines look these names up in the signatures
    assert {"timesteps", "sigmas", "mu", "device"} <= set(inspect.signature(s.set_timesteps).parameters)
    assert {"generator", "per_token_timesteps"} <= set(inspect.signature(s.step).parameters)


def test_set_timesteps_gives_the_two_vectors_and_resets_all_state():
    s = scheduler_with((5, 7))
    schedule = plausible_schedule(s.path, 5)
    x, rest = outputs(5)
    s.set_timesteps(5)
    assert s.timesteps.dtype == torch.float32 and s.timesteps.shape == (5,) and s.sigmas.shape == (6,)
    np.testing.assert_allclose(s.timesteps, s.path.timestep(schedule.network_times), rtol=1e-6)
    np.testing.assert_allclose(s.sigmas, s.path.sigma_edm(schedule.times), rtol=1e-6)
    first = run(s, x, rest)
    assert s.step_index == 5 and s.num_inference_steps == 5
    with pytest.raises(ValueError, match="all 5 steps"):
        s.step(rest[0], s.timesteps[4], x)
    s.set_begin_index(2)
    s.set_timesteps(5)
    assert s.step_index is None and s.begin_index is None
    again = run(s, x, rest)  # no history may be left over
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    s.set_timesteps(7)
    assert len(s.timesteps) == 7 and s.learned_counts == [5, 7]


def test_the_steps_are_those_of_the_table_in_float64():
    s = scheduler_with((6,), "unipc", 3)
    s.set_timesteps(6)
    x, rest = outputs(6, dtype=torch.float64)
    executor = Executor(plausible_schedule(s.path, 6, "unipc", 3).table(s.path))
    y = x
    for output, mine in zip(rest, run(s, x, rest)):
        y = executor.step(y, output)
        torch.testing.assert_close(mine, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"timesteps": None, "num_inference_steps": 0}, {"num_inference_steps": 2.5}])
def test_counts_that_are_none(kwargs):
    with pytest.raises(ValueError, match="num_inference_steps"):
        LD3Scheduler().set_timesteps(**kwargs)


# Where the scheduler is ------------------------------------------------------------------------------------------------


def test_index_of_views_whatever_their_values():
    s = scheduler_with((5,))
    s.set_timesteps(5)
    for k, t in enumerate(s.timesteps[2:]):
        assert s.index_for_timestep(t) == k + 2
    assert s.index_for_timestep(s.timesteps[3:4]) == 3
    s.timesteps.fill_(7.0)  # only where it lies counts
    assert [s.index_for_timestep(t) for t in s.timesteps] == list(range(5))


def test_index_where_a_pipeline_puts_others_in_place_of_the_timesteps():
    s = scheduler_with((8,))
    s.set_timesteps(8)
    told = s.timesteps
    s.timesteps = told.to(torch.bfloat16)
    s.timesteps.fill_(7.0)  # still, only where it lies counts
    assert [s.index_for_timestep(t) for t in s.timesteps] == list(range(8))
    s.timesteps = told[3:]
    assert [s.index_for_timestep(t) for t in s.timesteps] == list(range(3, 8))


def test_index_by_value_survives_bfloat16_and_refuses_strangers():
    s = scheduler_with((8,))
    s.set_timesteps(8)
    for k, t in enumerate(s.timesteps):
        assert s.index_for_timestep(float(t)) == k
        assert s.index_for_timestep(t.to(torch.bfloat16)) == k
        assert s.index_for_timestep(t.clone()) == k
    with pytest.raises(ValueError, match="none of this schedule's timesteps"):
        s.index_for_timestep(float(s.timesteps[2] + s.timesteps[3]) / 2)
    x, rest = outputs(1)
    with pytest.raises(ValueError, match="none of this schedule's timesteps"):
        s.step(rest[0], 5000.0, x)
    assert s.step_index is None


@pytest.mark.parametrize(("solver", "order"), ALL_SOLVERS)
@pytest.mark.parametrize("nfe", [5, 6])
def test_a_tail_is_a_schedule_of_its_own_times(solver, order, nfe):
    s = scheduler_with((nfe,), solver, order)
    full = plausible_schedule(s.path, nfe, solver, order)
    for begin in (1, 2, nfe - 1):
        x, rest = outputs(nfe - begin, dtype=torch.float64)
        executor = Executor(full.table(s.path, first=begin))
        torch.testing.assert_close(executor.table.times, full.times[begin:])
        expected = [x := executor.step(x, output) for output in rest]
        x, rest = outputs(nfe - begin, dtype=torch.float64)
        s.set_timesteps(nfe)
        sliced = run(s, x, rest, begin)  # the loop's t alone tells where it is
        s.set_timesteps(nfe)
        s.set_begin_index(begin)
        told = [s.step(output, 12345.0, x)[0] if k == 0 else None for k, output in enumerate(rest[:1])]
        torch.testing.assert_close(sliced, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(told[0], expected[0], rtol=1e-12, atol=1e-12)
        if full.spec.make().stages == 1:
            fresh = LD3Scheduler(**SD_BETAS)
            fresh.use_schedule(
                type(full)(full.times[begin:], full.network_times[begin:], full.spec, full.noise_path, "epsilon")
            )
            fresh.set_timesteps(nfe - begin)
            torch.testing.assert_close(run(fresh, x, rest), sliced, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["heun", "dpm2"])
@pytest.mark.parametrize("begin", range(7))
def test_every_tail_of_a_two_stage_schedule_lands_on_the_data(solver, begin):
    """A network that knows the data is integrated exactly by any consistent table, wherever it is entered."""
    s = LD3Scheduler(**SD_BETAS)
    schedule = plausible_schedule(s.path, 7, solver)
    schedule = type(schedule)(schedule.times, None, schedule.spec)
    s.use_schedule(schedule)
    s.set_timesteps(7)
    data, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    alpha, sigma = s.path.alpha(schedule.times), s.path.sigma(schedule.times)
    x = alpha[begin] * data + sigma[begin] * noise
    for k in range(begin, 7):
        x = s.step((x - alpha[k] * data) / sigma[k], s.timesteps[k], x)[0]
    torch.testing.assert_close(x, data, rtol=1e-9, atol=1e-9)


# Precision and shape ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_a_step(dtype):
    s = scheduler_with((5,), "dpmpp", 3)
    s.set_timesteps(5)
    x, rest = outputs(5, dtype=dtype)
    for mine, k in zip(run(s, x, rest), range(5)):
        assert mine.dtype == dtype
    exact = Executor(s._table)
    s.set_timesteps(5)
    for t, output in zip(s.timesteps, rest):
        mine = s.step(output, t, x)[0]
        wanted = exact.step(x.float(), output.float()).to(dtype)
        assert torch.equal(mine, wanted)
        x = mine
    assert s.step_index == 5


def test_float32_state_with_half_output_keeps_the_outputs_dtype():
    s = LD3Scheduler()
    s.set_timesteps(3)
    x, (output, *_) = outputs(1)
    assert s.step(output.half(), s.timesteps[0], x).prev_sample.dtype == torch.float16


def test_step_refuses_what_it_can_see():
    s = LD3Scheduler()
    x, (output,) = outputs(1)
    with pytest.raises(ValueError, match="set_timesteps before step"):
        s.step(output, 999, x)
    s.set_timesteps(3)
    with pytest.raises(ValueError, match="learned variance"):
        s.step(torch.cat([output, output], 1), s.timesteps[0], x)


def test_outputs_are_equivalent():
    a, b = scheduler_with(), scheduler_with()
    x, rest = outputs(5)
    a.set_timesteps(5)
    b.set_timesteps(5)
    for ta, tb, output in zip(a.timesteps, b.timesteps, rest):
        out = a.step(output, ta, x, return_dict=True, generator=torch.Generator().manual_seed(1))
        assert torch.equal(out.prev_sample, b.step(output, tb, x, return_dict=False)[0])
        assert out[0] is out.prev_sample


@pytest.mark.parametrize("steps", [25, 50, 999, 1000])
def test_any_count_without_a_learned_schedule(steps):
    s = LD3Scheduler(**SD_BETAS)
    s.set_timesteps(steps)
    assert len(s.timesteps) == steps and len(s.sigmas) == steps + 1
    x, rest = outputs(2, (1, 2, 4, 4))
    s.step(rest[0], s.timesteps[0], x)
    s.scale_model_input(x, 0.0)
    assert s.add_noise(x, rest[0], s.timesteps[5][None]).shape == x.shape
    stock = UniPCMultistepScheduler(**SD_BETAS)
    stock.set_timesteps(steps)
    if steps < 1000:  # where stock's rounding would repeat a level
        assert torch.equal(s.timesteps.long(), stock.timesteps)
    assert len(set(s.timesteps.tolist())) == steps


def test_trained_betas():
    betas = np.linspace(0.002, 0.01, 500)
    s = LD3Scheduler(num_train_timesteps=500, trained_betas=betas)
    np.testing.assert_allclose(s.betas, betas, rtol=1e-3)
    s.set_timesteps(10)
    assert s.timesteps[0] == 499


# Scales and noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_path", ["ve", "edm"])
def test_scale_model_input_has_no_state(noise_path):
    s = scheduler_with((5,), "dpmpp", config={"noise_path": noise_path, "sigma_min": 0.01, "sigma_max": 50.0})
    s.set_timesteps(5)
    x, rest = outputs(5)
    assert s.init_noise_sigma == pytest.approx(50.0)
    tau = plausible_schedule(s.path, 5).network_times
    data = 0.5 if noise_path == "edm" else 1.0
    for k, (t, output) in enumerate(zip(s.timesteps, rest)):
        wanted = x * float(1 / (tau[k] ** 2 + data**2).sqrt())
        for _ in range(2):  # a ControlNet pipeline scales twice
            torch.testing.assert_close(s.scale_model_input(x, t), wanted)
        s.step(output, t, x)
    assert LD3Scheduler().scale_model_input(x, 0.0) is x


def test_edm_agrees_with_the_stock_edm_scheduler():
    stock = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)
    s = LD3Scheduler.from_config(stock.config, solver="euler")
    stock.set_timesteps(6)
    s.set_timesteps(6)
    torch.testing.assert_close(s.sigmas, stock.sigmas, rtol=1e-5, atol=1e-6)
    x, rest = outputs(6)
    x = x * 50
    y = x
    for a, b, output in zip(s.timesteps, stock.timesteps, rest):
        torch.testing.assert_close(s.scale_model_input(x, a), stock.scale_model_input(y, b), rtol=1e-4, atol=1e-5)
        x = s.step(output, a, x)[0]
        y = stock.step(output, b, y)[0]
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_add_noise_before_and_during_sampling():
    s, stock = LD3Scheduler(**SD_BETAS), DDPMScheduler(**SD_BETAS)
    x, (noise, output) = outputs(2)
    t = torch.tensor([10, 700])
    torch.testing.assert_close(s.add_noise(x, noise, t), stock.add_noise(x, noise, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.get_velocity(x, noise, t), stock.get_velocity(x, noise, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.scale_noise(x, t, noise), s.add_noise(x, noise, t))

    s = scheduler_with((5,))
    s.set_timesteps(5)
    times = plausible_schedule(s.path, 5).times

    def level(k):
        return float(s.path.alpha(times[k])) * x + float(s.path.sigma(times[k])) * noise

    # timesteps tell the network's times; the state lives at the level of the same index
    torch.testing.assert_close(s.add_noise(x, noise, s.timesteps[:1].repeat(2)), level(0))
    s.set_begin_index(0)
    torch.testing.assert_close(s.add_noise(x, noise, s.timesteps[:1]), level(0))
    # an inpainting loop asks for the next timestep right after the step
    s.step(output, s.timesteps[0], x)
    torch.testing.assert_close(s.add_noise(x, noise, s.timesteps[1:2]), level(1))


def from_a_picture(scheduler, begin, **asked):
    """The noised picture, the network's times and the end, as an image-to-image pipeline goes."""
    x, (noise, *rest) = outputs(6)
    scheduler.set_timesteps(5, **asked)
    timesteps = scheduler.timesteps[begin:]
    scheduler.set_begin_index(begin)
    noised = scheduler.add_noise(x, noise, timesteps[:1].repeat(2))
    x = noised
    for t, output in zip(timesteps, rest):
        x = scheduler.step(output, t, scheduler.scale_model_input(x, t)).prev_sample
    return noised, timesteps.clone(), x


@pytest.mark.parametrize(
    "config, asked",
    [
        ({**SD_BETAS, "timestep_spacing": "leading", "steps_offset": 1}, {}),
        ({**FLOW, "use_dynamic_shifting": True}, {"mu": 0.7, "sigmas": np.linspace(1, 0.2, 5)}),
        ({"noise_path": "edm", "sigma_min": 0.002, "sigma_max": 80.0}, {}),
    ],
    ids=["vp", "flow", "edm"],
)
def test_a_picture_is_gone_on_from_as_without_a_learned_schedule_and_it_is_said_once(config, asked, caplog):
    learned = scheduler_with((5,), "dpmpp", 3, config=LD3Scheduler(**config).config)
    bare = LD3Scheduler.from_config(learned.config, schedules=None)
    for begin in (1, 3, 3):
        expected = from_a_picture(bare, begin, **asked)
        for mine, its in zip(from_a_picture(learned, begin, **asked), expected):
            assert torch.equal(mine, its)
        assert learned.schedule.spec == bare.spec and learned.step_index == 5
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in said] == [
        f"sampling begins in a noised picture, at step {begin} of 5" for begin in (1, 3)
    ]
    # from pure noise it serves what was learned
    learned.set_timesteps(5, **asked)
    assert learned.schedule is learned.learned_schedules[5]


def test_a_picture_noised_to_the_first_level_and_a_schedule_in_use_keep_what_was_learned():
    learned = scheduler_with((5,), "dpmpp", 3)
    schedule = learned.learned_schedules[5]
    from_a_picture(learned, 0)
    assert learned.schedule is schedule
    learned.use_schedule(schedule)
    from_a_picture(learned, 2)
    assert learned.schedule is schedule


@pytest.mark.parametrize("set_inside", [False, True])
def test_a_picture_is_gone_on_from_across_inference_mode(set_inside):
    learned = scheduler_with((5,), "dpmpp", 3)
    bare = LD3Scheduler.from_config(learned.config, schedules=None)
    x, (noise,) = outputs(1)
    noised = []
    for s in (learned, bare):
        with torch.inference_mode(set_inside):
            s.set_timesteps(5)
        s.set_begin_index(2)
        with torch.inference_mode(not set_inside):
            noised.append(s.add_noise(x, noise, s.timesteps[2:3]))
    assert torch.equal(*noised) and torch.equal(learned.timesteps, bare.timesteps)


@pytest.mark.parametrize("first_is_right", [False, True])
def test_a_pipeline_that_has_copied_its_timesteps_is_refused_from_a_picture(first_is_right):
    s = scheduler_with((5,), "dpmpp", 3)
    x, (noise, output) = outputs(2)
    s.set_timesteps(5)
    copied = s.timesteps[2:].clone()
    s.set_begin_index(2)
    x = s.add_noise(x, noise, copied[:1])
    if first_is_right:
        copied[0] = s.timesteps[2]
        x = s.step(output, copied[:1].repeat(2), x).prev_sample
    with pytest.raises(ValueError, match="copied the learned schedule's timesteps; load the scheduler without"):
        s.step(output, copied[int(first_is_right)], x)


def test_noise_that_begins_nowhere_or_a_refused_count_leave_what_was_learned():
    s = scheduler_with((5,), "dpmpp", 3)
    x, (noise,) = outputs(1)
    s.set_timesteps(5)
    learned = s.timesteps.clone()
    with pytest.raises(ValueError, match="num_inference_steps = 5"):
        s.set_timesteps(4)
    for t in s.timesteps:  # previews, not a start
        s.add_noise(x, noise, t[None])
    assert torch.equal(s.timesteps, learned) and s.schedule is s.learned_schedules[5] and s.begin_index is None
    s.set_begin_index(2)
    s.add_noise(x, noise, s.timesteps[2:3])
    assert s.schedule.spec == s.spec and not torch.equal(s.timesteps, learned)


def test_flow_noise_and_velocity():
    s = LD3Scheduler(**FLOW)
    x, (noise,) = outputs(1)
    s.set_timesteps(4)
    t = s.timesteps[1:2]
    a = float(t) / 1000
    torch.testing.assert_close(s.scale_noise(x, t, noise), (1 - a) * x + a * noise)
    torch.testing.assert_close(s.get_velocity(x, noise, t), noise - x)


# Copies, names, checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_step_alike(clone):
    s = scheduler_with((6,), "unipc", 3)
    s.set_timesteps(6)
    x, rest = outputs(6)
    other = clone(s)
    assert other.config == s.config
    first, second = run(s, x, rest), run(other, x, rest)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    s.set_timesteps(6)
    x = s.step(rest[0], s.timesteps[0], x)[0]
    x = s.step(rest[1], s.timesteps[1], x)[0]
    other = clone(s)
    assert other.step_index == 2
    first, second = run(s, x, rest[2:], 2), run(other, x, rest[2:], 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    s.set_timesteps(6)
    other.set_timesteps(6)
    assert torch.equal(s.timesteps, other.timesteps)


def test_repr_shows_where_schedules_come_from():
    text = repr(scheduler_with((4, 5), "dpmpp", provenance={"teacher": "user/model", "guidance_scale": 7.5}))
    assert "4 evaluations: dpmpp" in text and "teacher='user/model'" in text and "guidance_scale=7.5" in text
    assert "no provenance" in repr(scheduler_with())


def test_check_compares_with_the_pipeline():
    pipe, _ = PIPELINES["sd"]()
    facts = {"denoiser": "UNet2DConditionModel", "in_channels": 4, "dtype": "float32"}
    good = scheduler_with(config=pipe.scheduler.config, provenance=facts)
    good.check(pipe)
    with pytest.raises(ValueError, match="in_channels 9 .here 4."):
        scheduler_with(config=pipe.scheduler.config, provenance={**facts, "in_channels": 9}).check(pipe)
    with pytest.raises(ValueError, match="dtype 'float16'"):
        scheduler_with(config=pipe.scheduler.config, provenance={"dtype": "float16"}).check(pipe)
    with pytest.raises(ValueError, match="prediction_type='v_prediction'"):
        scheduler_with(config={**SD_BETAS, "prediction_type": "v_prediction"}).check(pipe)
    with pytest.raises(ValueError, match="beta_end"):
        scheduler_with(config={**SD_BETAS, "beta_end": 0.02}).check(pipe)
    flux, _ = PIPELINES["flux"]()
    with pytest.raises(ValueError, match="noise_path"):
        good.check(flux)
    zeros = {"times": torch.zeros(3, 2), "network_times": torch.zeros(3, 2), "residuals": torch.zeros(0, 3, 2)}
    curve = ScheduleCurve(zeros, (5, 8), provenance={**facts, "dtype": "bfloat16"}).to_dict(good.path)
    both = LD3Scheduler.from_config(good.config, curve=curve)
    assert both.learned_counts == [5]
    with pytest.raises(ValueError, match="the curve was learned with another dtype 'bfloat16'"):
        both.check(pipe)


# Learned counts --------------------------------------------------------------------------------------------------------


def test_one_config_serves_several_counts_and_no_other():
    s = scheduler_with((3, 5, 10))
    assert s.learned_counts == [3, 5, 10]
    for nfe in (10, 3, 5):
        s.set_timesteps(nfe)
        wanted = s.path.timestep(plausible_schedule(s.path, nfe).network_times)
        np.testing.assert_allclose(s.timesteps, wanted, rtol=1e-6)
    before = s.timesteps.clone()
    with pytest.raises(ValueError, match="no schedule was learned for 28 evaluations; .* 3 or 5 or 10"):
        s.set_timesteps(28)
    assert torch.equal(before, s.timesteps) and s.num_inference_steps == 5
    step = s.step(*(outputs(1)[1][0], s.timesteps[0], outputs(1)[0]))
    assert torch.isfinite(step.prev_sample).all()


def test_interpolation_only_when_asked_for():
    s = scheduler_with((4, 8), interpolate=True)
    s.set_timesteps(6)
    near = plausible_schedule(s.path, 8).times[:-1]
    wanted = np.interp(np.linspace(0, 7, 6), np.arange(8), s.path.lam(near))
    np.testing.assert_allclose(-np.log(s.sigmas[:-1]), wanted, rtol=1e-5, atol=1e-5)
    assert s.sigmas[-1] == 0
    s.set_timesteps(8)
    np.testing.assert_allclose(s.sigmas[:-1], s.path.sigma_edm(near), rtol=1e-6)


def test_a_named_discretization_serves_the_other_counts():
    s = scheduler_with((5,), discretization="logsnr")
    s.set_timesteps(9)
    lam = -s.sigmas[:-1].double().log()
    torch.testing.assert_close(lam.diff(), lam.diff().mean().expand(8), rtol=1e-4, atol=1e-4)


def test_fractional_times_reach_the_network_unrounded():
    pipe, call = PIPELINES["sd"]()
    pipe.scheduler = scheduler_with((5,), config=pipe.scheduler.config)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: seen.append(float(args[1])), with_kwargs=True)
    pipe(**call, generator=torch.Generator().manual_seed(0))
    wanted = pipe.scheduler.path.timestep(plausible_schedule(pipe.scheduler.path, 5).network_times)
    assert seen == wanted.float().tolist()
    assert all(t != round(t) for t in seen)
