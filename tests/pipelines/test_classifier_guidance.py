# SPDX-License-Identifier: Apache-2.0
"""Learning through classifier guidance, the gradient of a gradient: true, and without activations kept."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.adm import ADMClassifier
from tests.pipelines.adm_networks import StoredFrequencies
from tests.tiny_pipelines.adm import adm
from tests.training.rollouts import noise_for, schedule_for
from training.gradient_check import check_gradients
from training.rollout import PipelineRollout


GUIDANCE_SCALE = 500.0  # so that guidance outweighs the network, which is random


def rollout_of(**options) -> PipelineRollout:
    pipe, call = adm()
    return PipelineRollout(pipe, class_labels=call["class_labels"], guidance_scale=GUIDANCE_SCALE, **options)


def by_create_graph(classifier, sample, timestep, class_labels):
    """The guidance as one would write it, whose graph keeps the classifier's activations."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if not sample.requires_grad:
            sample = sample.detach().requires_grad_()
        value = classifier.log_probability(sample, timestep, class_labels).sum()
        return torch.autograd.grad(value, sample, create_graph=True)[0]


def test_gradients_agree_with_finite_differences():
    rollout = rollout_of()
    pipe = rollout.pipe.to(torch.float64)
    for network in (pipe.unet, pipe.classifier):  # phases in float64, too
        network.time_proj = StoredFrequencies(torch.tensor([1.0, 0.01], dtype=torch.float64))
    conditioning = rollout.encode()
    noise = noise_for(rollout, conditioning).double().requires_grad_()
    schedule = schedule_for(rollout)
    times, network_times = (v.clone().requires_grad_() for v in (schedule.times, schedule.network_times))
    end = rollout(replace(schedule, times=times, network_times=network_times), noise, conditioning)
    cotangent = torch.randn(end.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((end * cotangent).sum(), [times, network_times, noise])

    def value(field=None, i=None, h=0.0, moved=noise.detach()):
        changed = schedule
        if field is not None:
            entries = getattr(schedule, field).clone()
            entries[i] += h
            changed = replace(schedule, **{field: entries})
        with torch.no_grad():
            return float((rollout(changed, moved, conditioning) * cotangent).sum())

    # Fourth order, with steps that stand clear of the float32 in which pipelines hold timesteps.
    h = 2e-4
    for field, gradient in (("times", gradients[0]), ("network_times", gradients[1])):
        inner = range(1, len(gradient) - (field == "times"))
        expected = torch.tensor(
            [
                (8 * (value(field, i, h) - value(field, i, -h)) - (value(field, i, 2 * h) - value(field, i, -2 * h)))
                / 12
                / h
                for i in inner
            ]
        )
        error = (gradient[list(inner)] - expected).abs().max() / expected.abs().max()
        assert error < 1e-3, (field, gradient, expected)
    direction = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ahead, behind = (value(moved=noise.detach() + s * 1e-4 * direction) for s in (1, -1))
    assert float((gradients[2] * direction).sum()) == pytest.approx((ahead - behind) / 2e-4, rel=1e-4)


def gradients_of_times(rollout: PipelineRollout) -> torch.Tensor:
    rollout.pipe.to(torch.float64)
    conditioning, schedule = rollout.encode(), schedule_for(rollout)
    times = schedule.times.clone().requires_grad_()
    noise = noise_for(rollout, conditioning).double()
    rollout(replace(schedule, times=times), noise, conditioning).square().sum().backward()
    return times.grad


def test_same_gradients_as_of_the_graph_that_keeps_everything(monkeypatch):
    recomputed, unguided = gradients_of_times(rollout_of()), rollout_of()
    unguided.call_kwargs["guidance_scale"] = 0.0
    unguided = gradients_of_times(unguided)
    monkeypatch.setattr(ADMClassifier, "guidance", by_create_graph)
    kept = gradients_of_times(rollout_of())
    assert torch.allclose(recomputed, kept, rtol=1e-9, atol=1e-9 * float(kept.abs().max()))
    assert (unguided - kept).abs().max() > 1e-3 * kept.abs().max()


def kept_bytes(nfe: int) -> int:
    """Bytes of the distinct float32 storages that the graph of a rollout keeps alive, without weights."""
    rollout = rollout_of()
    weights = {p.data_ptr() for part in (rollout.pipe.unet, rollout.pipe.classifier) for p in part.parameters()}
    conditioning = rollout.encode()
    schedule, noise = schedule_for(rollout, nfe), noise_for(rollout, conditioning)
    times, network_times = schedule.times.requires_grad_(), schedule.network_times.requires_grad_()
    saved: list[weakref.ref] = []

    def remember(tensor):
        saved.append(
            weakref.ref(tensor)
        )  # some are freed before the end, with a graph that the guidance had for itself
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        end = rollout(replace(schedule, times=times, network_times=network_times), noise, conditioning)
    gc.collect()
    alive = [tensor for reference in saved if (tensor := reference()) is not None]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive if t.dtype == torch.float32
    }
    assert end.requires_grad
    return sum(size for address, size in storages.items() if address not in weights)


def test_keeps_states_and_no_activations(monkeypatch):
    state = 3 * 16 * 16 * 4
    # an evaluation more: what the networks saw, what they predicted and products of these, each the size of a state
    assert (kept_bytes(10) - kept_bytes(4)) / 6 < 8 * state
    monkeypatch.setattr(ADMClassifier, "guidance", by_create_graph)
    assert (kept_bytes(10) - kept_bytes(4)) / 6 > 40 * state


def test_counts_the_classifier_as_part_of_an_evaluation():
    rollout = rollout_of()
    conditioning, schedule = rollout.encode([7, 1]), schedule_for(rollout)
    schedule = replace(schedule, network_times=schedule.network_times.requires_grad_())
    rollout(schedule, noise_for(rollout, conditioning, 2), conditioning).square().sum().backward()
    counts = rollout.evaluations
    assert (counts.forward, counts.recomputed, counts.backward) == (6, 6, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_time_has_a_gradient(dtype):
    rollout = rollout_of(gradient_checkpointing=dtype == torch.bfloat16)
    rollout.pipe.to(dtype)
    conditioning = rollout.encode()
    with rollout:
        check_gradients(rollout, schedule_for(rollout), noise_for(rollout, conditioning), conditioning)
