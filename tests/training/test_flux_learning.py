# SPDX-License-Identifier: Apache-2.0
"""Learning through Flux: times before the resolution shift, bfloat16's rounding of what the network is told, both kinds of guidance."""

import pytest
import torch

from ld3_diffusers import LD3Scheduler, Schedule, SolverSpec
from ld3_diffusers.noise_path import RectifiedFlow, shift_flow_time
from tests.tiny_pipelines import PIPELINES
from tests.training.rollouts import make, noise_for, schedule_for
from training import make_teacher_set, train_ld3
from training.denoisers import denoisers, replaced
from training.gradient_check import check_gradients
from training.teacher_set import TeacherSet


def told(rollout, schedule, noise, conditioning):
    """What the transformer's `timestep` argument is at each evaluation, times 1000."""
    seen = []
    network = denoisers(rollout.pipe)["transformer"]

    def watch(forward):
        def watched(*args, **kwargs):
            seen.append(kwargs["timestep"].detach().clone())
            return forward(*args, **kwargs)

        return watched

    with torch.no_grad(), replaced(network, "forward", watch(network.forward)):
        rollout(schedule, noise, conditioning)
    return torch.stack([time[0] for time in seen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_network_times_are_what_the_network_sees(dtype):
    rollout, _ = make("flux")
    with rollout:
        rollout.pipe.to(dtype)
        conditioning = rollout.encode()
        noise = noise_for(rollout, conditioning)
        schedule = schedule_for(rollout, nfe=4)
        rounded = rollout.rounded(schedule, conditioning)
        assert rollout.mu != 0
        if dtype == torch.float32:
            assert rounded is schedule
            return
        assert not torch.equal(rounded.network_times, schedule.network_times)
        timesteps = 1000 * shift_flow_time(rounded.network_times, rollout.mu)
        torch.testing.assert_close(timesteps, timesteps.to(dtype).double(), rtol=1e-12, atol=0)
        # half a unit in the last of bfloat16's 8 bits
        exact = 1000 * shift_flow_time(schedule.network_times, rollout.mu)
        assert bool(((timesteps - exact).abs() <= exact * 2**-8).all())
        # the pipeline's own cast maps both to the same, so that nothing changes in it
        assert torch.equal(told(rollout, rounded, noise, conditioning), told(rollout, schedule, noise, conditioning))
        with torch.no_grad():
            assert torch.equal(rollout(rounded, noise, conditioning), rollout(schedule, noise, conditioning))


def test_stable_diffusion_is_told_exact_times_in_bfloat16_too():
    rollout, _ = make("sd")
    with rollout:
        rollout.pipe.to(torch.bfloat16)
        schedule = schedule_for(rollout)
        assert rollout.rounded(schedule, rollout.encode()) is schedule


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
    train_ld3.main([*given, "--validation_steps", "1", "--allow_worse", *more])
    return LD3Scheduler.from_pretrained(output)


def test_the_program_saves_what_a_bfloat16_network_saw(room, tmp_path):
    pairs(room, "bf16", "--mixed_precision", "bf16")
    entry = learn(room, "bf16", tmp_path / "out", "--mixed_precision", "bf16").config.schedules["3"]
    facts = entry["provenance"]
    assert facts["dtype"] == "bfloat16" and facts["mu"] != 0 and entry["final"] is False
    assert entry["times"][0] == 1.0
    timesteps = 1000 * shift_flow_time(torch.tensor(entry["network_times"], dtype=torch.float64), facts["mu"])
    torch.testing.assert_close(timesteps, timesteps.bfloat16().double(), rtol=1e-12, atol=0)


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
