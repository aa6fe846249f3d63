# SPDX-License-Identifier: Apache-2.0
"""AMED's hooks: what they refuse, that nothing of them stays, and that offloaded and compiled networks sample the same."""

import copy
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.amed_runs import PROMPTS, per_sample, watched
from tests.tiny_pipelines import PIPELINES


NFE = 4
NETWORKS = ("unet", "controlnet")
built = {}


def pipeline(name):
    """The pipeline with new copies of its networks, and a call for two prompts."""
    if name not in built:
        pipe, call = PIPELINES[name]()
        built[name] = (
            pipe,
            call,
            {key: pipe.components[key] for key in ("scheduler", *NETWORKS) if key in pipe.components},
        )
    pipe, call, parts = built[name]
    for key, part in parts.items():
        setattr(pipe, key, copy.deepcopy(part))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {**call, "num_inference_steps": NFE, "prompt": PROMPTS[:2], "negative_prompt": [""] * 2, "latents": latents}
    return pipe, call | ({"image": call["image"].repeat(2, 1, 1, 1)} if "image" in call else {})


def attach(pipe):
    pipe.scheduler = per_sample(pipe.scheduler.config, NFE // 2)
    pipe.scheduler.attach(pipe)
    return pipe.scheduler


def traces(pipe):
    """Where a hook or a wrapper could stay, of every module."""
    modules = {
        f"{key}.{path}": m for key in NETWORKS if hasattr(pipe, key) for path, m in getattr(pipe, key).named_modules()
    }
    hooks = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return {
        path: (
            sorted(vars(module)),
            vars(module).get("forward"),
            *(list(vars(module)[name].items()) for name in hooks),
        )
        for path, module in modules.items()
    }


class Broken(Exception):
    pass


# ---------------------------------------------------------------------- detaching


@pytest.mark.parametrize("name", ["sd", "sd_controlnet", "sdxl"])
def test_detaching_restores_the_pipeline_exactly(name):
    pipe, call = pipeline(name)
    stock = pipe.scheduler
    before, image = traces(pipe), pipe(**call)[0]
    scheduler = attach(pipe)
    assert traces(pipe) != before
    pipe(**call)
    scheduler.detach()
    assert traces(pipe) == before
    pipe.scheduler = stock
    assert torch.equal(pipe(**call)[0], image)
    scheduler.detach()  # again


def test_attaching_twice_is_attaching_once():
    pipe, call = pipeline("sd")
    before = traces(pipe)
    scheduler = attach(pipe)
    image = pipe(**call)[0]
    scheduler.attach(pipe)
    assert (len(pipe.unet._forward_pre_hooks), len(pipe.unet.mid_block._forward_hooks)) == (1, 1)
    assert torch.equal(pipe(**call)[0], image)
    scheduler.detach()
    assert traces(pipe) == before


@pytest.mark.parametrize("where", ["conv_in", "conv_out"])
@pytest.mark.parametrize("when", [1, 2], ids=["step", "stage"])
def test_a_network_that_failed_midway_leaves_nothing_behind(where, when):
    pipe, call = pipeline("sd")
    before = traces(pipe)
    scheduler = attach(pipe)
    image = pipe(**call)[0]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == when:
            raise Broken

    hook = getattr(pipe.unet, where).register_forward_hook(fail)
    with pytest.raises(Broken):
        pipe(**call)
    hook.remove()
    assert torch.equal(pipe(**call)[0], image)  # the next run knows nothing of it
    hook = getattr(pipe.unet, where).register_forward_hook(fail)
    calls.clear()
    with pytest.raises(Broken):
        pipe(**call)
    hook.remove()
    scheduler.detach()
    assert traces(pipe) == before


def test_an_exception_while_attaching_leaves_nothing_behind(monkeypatch):
    pipe, _ = pipeline("sd_controlnet")
    before = traces(pipe)
    pipe.scheduler = per_sample(pipe.scheduler.config, NFE // 2)

    def refuse(*_args, **_kwargs):
        raise Broken

    monkeypatch.setattr(pipe.controlnet, "register_forward_pre_hook", refuse)  # the last one
    with pytest.raises(Broken):
        pipe.scheduler.attach(pipe)
    monkeypatch.undo()
    assert traces(pipe) == before


def test_another_scheduler_is_not_disturbed_while_attached():
    pipe, call = pipeline("sd")
    stock = pipe.scheduler
    image = pipe(**call)[0]
    scheduler = attach(pipe)
    own = pipe(**call)[0]

    def interrupt(pipe, i, _t, _tensors):
        pipe._interrupt = i == 0  # a stage is due
        return {}

    pipe(**call, callback_on_step_end=interrupt)
    pipe.scheduler = stock
    assert torch.equal(pipe(**call)[0], image)
    pipe.scheduler = scheduler
    assert torch.equal(pipe(**call)[0], own)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "dit"])
def test_pipelines_without_a_bottleneck(name):
    pipe, _ = PIPELINES[name]()
    pipe.scheduler = per_sample(UniPCMultistepScheduler().config)
    with pytest.raises(ValueError, match=f"{type(pipe).__name__} has .*, without a bottleneck .* static schedules"):
        pipe.scheduler.attach(pipe)


class Network(nn.Module):
    """Zeros; its bottleneck is whatever it is told."""

    def __init__(self, bottleneck):
        super().__init__()
        self.mid_block = nn.Module()
        self.mid_block.forward = bottleneck

    def forward(self, sample, timestep):
        self.mid_block(sample)
        return torch.zeros_like(sample)


def sample_with(bottleneck=lambda x: x, copies=2, calls=1, shape=(2, 4, 8, 8)):
    """As a pipeline does, with a network called `calls` times a step for `copies` of the samples."""
    pipe = SimpleNamespace(unet=Network(bottleneck), scheduler=per_sample(UniPCMultistepScheduler().config, NFE // 2))
    pipe.scheduler.attach(pipe)
    pipe.scheduler.set_timesteps(NFE)
    x = torch.randn(shape)
    for t in pipe.scheduler.timesteps:
        for _ in range(calls):
            output = pipe.unet(pipe.scheduler.scale_model_input(torch.cat([x] * copies), t), t)[: len(x)]
        x = pipe.scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(
    "case, message",
    [
        ({"copies": 3}, "has 6 samples in its network for 2 samples; .* a doubled batch: use static schedules"),
        ({"calls": 2}, "calls its network 2 times a step for 2 samples; .* use static schedules"),
        ({"bottleneck": lambda x: (x, x)}, r"is no \(batch, channels, height, width\) tensor; use static schedules"),
        ({"bottleneck": lambda x: x[:, :, None]}, r"is no \(batch, channels, height, width\) tensor; use static"),
        ({"bottleneck": lambda x: torch.cat([x] * 2), "copies": 1}, "has 4 entries for 2 samples, such as frames"),
        ({"bottleneck": lambda x: x[:1]}, "has 1 entries for 4 samples"),
    ],
    ids=["tripled", "twice", "tuple", "5-D", "frames", "fewer"],
)
def test_networks_that_cannot_be_served(case, message):
    sample_with()
    with pytest.raises(ValueError, match=message):
        sample_with(**case)


def test_animated_pipelines_are_refused():
    pipe, call = PIPELINES["animatediff"]()
    with pytest.raises(ValueError, match="such as frames of a video; use static schedules"):
        attach(pipe)
        pipe(**{**call, "num_inference_steps": NFE})


def test_pipelines_with_another_scheduler_or_network():
    pipe, call = pipeline("sd")
    with pytest.raises(ValueError, match="not the pipeline's scheduler; set pipe.scheduler to it first"):
        per_sample(pipe.scheduler.config).attach(pipe)
    attach(pipe)
    pipe.unet = copy.deepcopy(built["sd"][2]["unet"])
    with pytest.raises(ValueError, match="not called as it was attached; call .*attach.* after exchanging it"):
        pipe(**call)
    pipe.scheduler.attach(pipe)
    pipe(**call)


# ---------------------------------------------------------------------- offloaded and compiled networks


def model_offload(network):
    accelerate.cpu_offload_with_hook(network, execution_device="cpu")


def sequential_offload(network):
    accelerate.cpu_offload(network, "cpu")


def bare_hook(network):
    add_hook_to_module(network, accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))


@pytest.mark.parametrize("first", ["offload", "attach"])
@pytest.mark.parametrize("offload", [model_offload, sequential_offload, bare_hook])
def test_offloaded_networks(offload, first):
    pipe, call = pipeline("sd_controlnet")
    scheduler = attach(pipe)
    expected = pipe(**call)[0]
    if first == "offload":
        scheduler.detach()
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for module in modules:
        offload(module)
    with_offload = traces(pipe)
    if first == "offload":
        scheduler.attach(pipe)
    assert torch.equal(pipe(**call)[0], expected)
    scheduler.detach()
    if first == "offload":
        assert traces(pipe) == with_offload
    for module in modules:
        remove_hook_from_module(module, recurse=True)
    assert not any(part for parts in traces(pipe).values() for part in parts[2:])


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_networks(pipe, how, backend):
    """Returns a counter of graphs for each network."""
    counters = {name: CompileCounterWithBackend(backend) for name in NETWORKS if hasattr(pipe, name)}
    for name, counter in counters.items():
        if how == "wrapped":
            setattr(pipe, name, torch.compile(getattr(pipe, name), backend=counter, fullgraph=True))
        else:
            getattr(pipe, name).compile(backend=counter, fullgraph=True)
    return counters


def graphs(counters):
    return {name: counter.frame_count for name, counter in counters.items()}


@pytest.mark.parametrize(
    "name, backend, how",
    [
        ("sd", "eager", "wrapped"),
        ("sd", "eager", "in place"),
        pytest.param("sd_controlnet", "eager", "wrapped", marks=pytest.mark.slow),
        pytest.param("sd", "aot_eager", "in place", marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_see_one_shape(fresh_compiler, name, backend, how):
    pipe, call = pipeline(name)
    scheduler = attach(pipe)
    expected = pipe(**call)[0]
    scheduler.detach()
    counters = compile_networks(pipe, how, backend)
    scheduler.attach(pipe)
    for _ in range(2):
        torch.testing.assert_close(pipe(**call)[0], expected, rtol=1e-4, atol=1e-4)
        assert set(graphs(counters).values()) == {1}
    with watched(pipe.unet) as calls:
        pipe(**call)
    assert all(times.shape == (4,) for _, times in calls)
    scheduler.detach()


@pytest.mark.parametrize("how", ["in place"])
def test_networks_may_be_compiled_after_attaching(fresh_compiler, how):
    pipe, call = pipeline("sd")
    scheduler = attach(pipe)
    expected = pipe(**call)[0]
    counters = compile_networks(pipe, how, "eager")
    for _ in range(2):
        assert torch.equal(pipe(**call)[0], expected)
        assert graphs(counters) == {"unet": 1}
    scheduler.detach()
    assert not any(part for parts in traces(pipe).values() for part in parts[2:])


@pytest.mark.parametrize("how", ["wrapped"])
def test_a_network_that_was_compiled_without_the_hook_is_refused_until_reset(fresh_compiler, how):
    """Dynamo does not look whether hooks were added: for a call of the same shapes it takes the old graph."""
    pipe, call = pipeline("sd")
    scheduler = attach(pipe)
    asked = []
    note = pipe.unet.register_forward_pre_hook(lambda _module, *given: asked.append(given), with_kwargs=True)
    expected = pipe(**call)[0]
    note.remove()
    scheduler.detach()
    counters = compile_networks(pipe, how, "eager")
    with torch.no_grad():
        pipe.unet(*asked[0][0], **asked[0][1])
    scheduler.attach(pipe)
    with pytest.raises(ValueError, match=r"bottleneck was not seen; .* .or call torch.compiler.reset\(\) then"):
        pipe(**call)
    assert graphs(counters) == {"unet": 1}
    torch.compiler.reset()
    assert torch.equal(pipe(**call)[0], expected)
    scheduler.detach()


# ---------------------------------------------------------------------- what must not go wrong silently


def test_another_pipeline_with_the_same_network_after_a_run_that_was_broken_off():
    pipe, call = pipeline("sd")
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": UniPCMultistepScheduler.from_config(pipe.scheduler.config)}
    )
    image = other(**call)[0]
    scheduler = attach(pipe)

    def interrupt(pipe, i, _t, _tensors):
        pipe._interrupt = i == 0  # a stage is due
        return {}

    pipe(**call, callback_on_step_end=interrupt)
    assert torch.equal(other(**call)[0], image)
    scheduler.detach()


def test_a_controlnet_that_is_not_attached_is_refused():
    pipe, call = pipeline("sd_controlnet")
    kept = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    pipe.scheduler = per_sample(pipe.scheduler.config, NFE // 2)
    pipe.scheduler.attach(StableDiffusionPipeline(**{**kept, "scheduler": pipe.scheduler}))
    with pytest.raises(ValueError, match="a ControlNet that is not attached"):
        pipe(**call)


def test_perturbed_attention_guidance_is_refused():
    pipe, call = pipeline("sd")
    scheduler = attach(pipe)
    type(pipe).do_perturbed_attention_guidance = True  # as PAG's pipelines have it
    try:
        with pytest.raises(ValueError, match="perturbed attention"):
            pipe(**call)
    finally:
        del type(pipe).do_perturbed_attention_guidance
    scheduler.detach()


def test_pipelines_that_do_not_scale_their_input_cannot_scale_times():
    pipe, call = PIPELINES["ldm"]()
    pipe.scheduler = per_sample(pipe.scheduler.config, NFE // 2)
    pipe.scheduler.attach(pipe)
    with pytest.raises(ValueError, match="does not call scale_model_input"):
        pipe(**{**call, "num_inference_steps": NFE})


def test_noise_is_added_as_asked_for_after_a_run():
    pipe, call = pipeline("sd")
    scheduler = attach(pipe)
    zero, one, asked = torch.zeros(3, 1), torch.ones(3, 1), torch.tensor([900.0, 500.0, 100.0])
    scheduler.set_timesteps(NFE)
    expected = scheduler.add_noise(zero, one, asked)
    pipe(**call)
    assert torch.equal(scheduler.add_noise(zero, one, asked), expected)
    scheduler.detach()
