# SPDX-License-Identifier: Apache-2.0
"""Learning through Flux: times before the resolution shift, bfloat16's rounding of what the network is told, both kinds of guidance."""

import pytest
import torch

from ld3_diffusers import LD3Scheduler, Schedule, SolverSpec
from ld3_diffusers.noise_path import RectifiedFlow, shift_flow_time
from tests.tiny_pipelines import PIPELINES
from tests.training.rollouts import make, noise_for, schedule_for
from training import make_teacher_set, train_ld3
from training.gradient_check import check_gradients
from training.teacher_set import TeacherSet
from training.told_times import find_told


def embedded(rollout, schedule, noise, conditioning):
    """Times, in 1000ths, that the transformer embeds at each evaluation: what it is told after all casts."""
    seen = []
    part = rollout.pipe.transformer.time_text_embed.time_proj
    hook = part.register_forward_pre_hook(lambda _part, inputs: seen.append(float(inputs[0][0])))
    with torch.no_grad():
        rollout(schedule, noise, conditioning)
    hook.remove()
    return torch.tensor(
        seen[:: len(seen) // schedule.nfe], dtype=torch.float64
    )  # the guidance scale is embedded second


def test_rounded_network_times_are_what_the_network_embeds():
    rollout, _ = make("flux")
    with rollout:
        rollout.pipe.to(torch.bfloat16)
        conditioning = rollout.encode()
        noise = noise_for(rollout, conditioning)
        schedule = schedule_for(rollout, nfe=4)
        with torch.no_grad():
            end = rollout(schedule, noise, conditioning)
        rounded = rollout.rounded(schedule)
        assert rollout.mu != 0 and not torch.equal(rounded.network_times, schedule.network_times)
        timesteps = 1000 * shift_flow_time(rounded.network_times, rollout.mu)
        torch.testing.assert_close(embedded(rollout, rounded, noise, conditioning), timesteps, rtol=1e-12, atol=0)
        # learning goes through the same rounding, in the solver's formulas too, so that nothing is lost by it
        with torch.no_grad():
            assert torch.equal(rollout(rounded, noise, conditioning), end)
        exact = 1000 * shift_flow_time(schedule.network_times, rollout.mu)
        assert bool(((timesteps - exact).abs() <= exact * 2**-7).all())


def test_float32_is_left_alone():
    rollout, _ = make("flux")
    with rollout:
        conditioning = rollout.encode()
        schedule = schedule_for(rollout)
        with torch.no_grad():
            rollout(schedule, noise_for(rollout, conditioning), conditioning)
        assert rollout.rounded(schedule) is schedule


@pytest.mark.parametrize(
    "way", ["cast", "cast, / 1000, * 1000", "cast, / 1000", "/ 1000, cast, * 1000", "/ 1000, cast"]
)
def test_the_way_a_time_takes_is_recognised(way):
    """Each way, on the times at which ways differ; what is found maps to itself."""
    timesteps = torch.linspace(1000, 40, 12)
    single = timesteps.bfloat16()
    given = {
        "cast": single,
        "cast, / 1000, * 1000": single / 1000,
        "cast, / 1000": single / 1000,
        "/ 1000, cast, * 1000": (timesteps / 1000).bfloat16(),
        "/ 1000, cast": (timesteps / 1000).bfloat16(),
    }[way]
    inside = given * 1000 if way.endswith("* 1000") else given.double() * (1 if way == "cast" else 1000)
    told = find_told(timesteps, list(given), inside.double().tolist())
    everything = torch.linspace(1, 1000, 4001, dtype=torch.float64)
    assert torch.equal(told(told(everything)), told(everything))
    assert float((told(everything) - everything).abs().max()) <= (8 if "* 1000" in way or way == "/ 1000, cast" else 4)
    if way == "cast, / 1000, * 1000":  # three roundings: 502 is embedded as 504
        assert told(torch.tensor([502.0], dtype=torch.float64)) == 504


def test_an_unknown_rounding_is_not_guessed():
    timesteps = torch.linspace(1000, 40, 12)
    given = (0.5 * timesteps).bfloat16()
    assert find_told(timesteps, list(given), []) is None
    assert find_told(timesteps, list(timesteps), []) is None  # float32


def test_stable_diffusion_is_told_exact_times_in_bfloat16_too():
    rollout, _ = make("sd")
    with rollout:
        rollout.pipe.to(torch.bfloat16)
        schedule = schedule_for(rollout)
        conditioning = rollout.encode()
        with torch.no_grad():
            rollout(schedule, noise_for(rollout, conditioning), conditioning)
        assert rollout.rounded(schedule) is schedule


def test_gradients_pass_bfloat16s_rounding():
    rollout, _ = make("flux")
    with rollout:
        rollout.pipe.to(torch.bfloat16)
        conditioning = rollout.encode()
        check_gradients(rollout, schedule_for(rollout), noise_for(rollout, conditioning), conditioning)


def test_a_schedule_follows_another_resolutions_shift():
    schedule = Schedule([1.0, 0.7, 0.4, 0.0], [0.99, 0.65, 0.35], SolverSpec("euler"), "flow", "flow_prediction")
    path = RectifiedFlow()
    for tokens, final in ((256, False), (4096, False), (4096, True)):
        entry = Schedule(schedule.times, schedule.network_times, schedule.spec, "flow", "flow_prediction", final=final)
        scheduler = LD3Scheduler(
            noise_path="flow",
            prediction_type="flow_prediction",
            use_dynamic_shifting=True,
            schedules={"3": entry.to_dict(path)},
        )
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        scheduler.set_timesteps(3, mu=mu)
        own = 0.0 if final else mu  # exactly additive in logit s
        expected = torch.sigmoid(torch.logit(schedule.times[1:-1]) + own)
        torch.testing.assert_close(scheduler.sigmas[1:-1].double(), expected, rtol=1e-6, atol=0)
        expected = 1000 * torch.sigmoid(torch.logit(schedule.network_times) + own)
        torch.testing.assert_close(scheduler.timesteps.double(), expected, rtol=1e-6, atol=0)
        assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    pipe, _ = PIPELINES["flux"]()
    pipe.save_pretrained(folder / "flux")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    return folder


def pairs(room, name, *more):
    given = ["--teacher", str(room / "flux"), "--output_dir", str(room / name), "--num_samples", "6"]
    given += ["--num_inference_steps", "12", "--prompts_file", str(room / "prompts.txt"), "--resolution", "16"]
    make_teacher_set.main([*given, "--max_sequence_length", "12", *more])
    return TeacherSet.load(room / name)


def learn(room, name, output, *more):
    given = ["--teacher", str(room / "flux"), "--teacher_set", str(room / name), "--output_dir", str(output)]
    given += ["--nfe", "3", "--num_train", "4", "--num_valid", "2", "--max_train_steps", "3", "--report_to", "none"]
    train_ld3.main([*given, "--allow_worse", *more])
    return LD3Scheduler.from_pretrained(output)


def test_the_program_saves_what_a_bfloat16_network_saw(room, tmp_path):
    pairs(room, "bf16", "--mixed_precision", "bf16")
    entry = learn(room, "bf16", tmp_path / "out", "--mixed_precision", "bf16").config.schedules["3"]
    facts = entry["provenance"]
    assert facts["dtype"] == "bfloat16" and facts["mu"] != 0 and entry["final"] is False
    assert entry["times"][0] == 1.0
    timesteps = 1000 * shift_flow_time(torch.tensor(entry["network_times"], dtype=torch.float64), facts["mu"])
    told = (timesteps.bfloat16() / 1000 * 1000).double()
    torch.testing.assert_close(timesteps, told, rtol=1e-12, atol=0)


def test_true_guidance_is_part_of_the_pairs_and_of_learning(room, tmp_path):
    plain, guided = pairs(room, "plain"), pairs(room, "guided", "--true_cfg_scale", "3", "--negative_prompt", "")
    assert guided.call_settings["true_cfg_scale"] == 3
    assert not torch.equal(plain.batch([0])[1], guided.batch([0])[1])
    scheduler = learn(room, "guided", tmp_path / "out")
    facts = scheduler.config.schedules["3"]["provenance"]
    assert facts["true_cfg_scale"] == 3 and facts["negative_prompt"] == "" and facts["max_sequence_length"] == 12

    # judged as it samples: the two calls of guidance in the user's own pipeline
    pipe, _ = PIPELINES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    noise, target, _ = guided.batch([4, 5])
    call = {"prompt": guided.prompts[:2], "negative_prompt": "", "true_cfg_scale": 3.0, "max_sequence_length": 12}
    end = pipe(**call, num_inference_steps=3, height=16, width=16, latents=noise, output_type="latent").images
    assert float(((end - target) ** 2).mean()) == pytest.approx(facts["loss"], rel=1e-4)


def test_true_guidance_needs_something_to_guide_away_from(room, capsys):
    with pytest.raises(SystemExit):
        pairs(room, "refused", "--true_cfg_scale", "3")
    assert "give one, --negative_prompt='' for the empty one" in " ".join(capsys.readouterr().err.split())
