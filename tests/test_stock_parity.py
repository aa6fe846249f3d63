# SPDX-License-Identifier: Apache-2.0
"""At equal levels and network times, `LD3Scheduler` takes the steps of Diffusers' own schedulers, in real tiny pipelines."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ld3_diffusers import LD3Scheduler, Schedule
from tests.schedules import SD_BETAS
from tests.tiny_pipelines import PIPELINES


built = {}


def latents(name, scheduler, steps=6, **call):
    if name not in built:
        built[name] = PIPELINES[name]()
    pipe, kwargs = built[name]
    pipe.scheduler = scheduler
    kwargs = {**kwargs, "num_inference_steps": steps, **call}
    return pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0].double()


def difference(name, stock, mine, steps=6, mine_steps=None):
    a, b = latents(name, stock, steps), latents(name, mine, mine_steps or steps)
    assert a.abs().max() > 0.1  # stock's own result is finite
    return float((a - b).norm() / a.norm())


def multistep(cls, **options):
    return cls(**{**SD_BETAS, **options})


UNIPC = [
    {"solver_type": b, "solver_order": o, "predict_x0": x}
    for b in ("bh1", "bh2")
    for o in (1, 2, 3)
    for x in (True, False)
]
DPMPP = [
    {"algorithm_type": a, "solver_order": o, "solver_type": t}
    for a in ("dpmsolver++", "dpmsolver")
    for o, t in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
]


@pytest.mark.parametrize("options", UNIPC, ids=str)
def test_unipc(options):
    # stock's bh1 and its noise form are infinite on a step that ends in clean data
    final = "zero" if options["predict_x0"] and options["solver_type"] == "bh2" else "sigma_min"
    stock = multistep(UniPCMultistepScheduler, **options, final_sigmas_type=final)
    assert difference("sd", stock, LD3Scheduler.from_config(stock.config, solver="unipc")) < 1e-5


@pytest.mark.parametrize("options", DPMPP, ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpm_solver_multistep(options, prediction_type):
    data = options["algorithm_type"] == "dpmsolver++"
    final = "zero" if data else "sigma_min"
    stock = multistep(DPMSolverMultistepScheduler, **options, final_sigmas_type=final, prediction_type=prediction_type)
    mine = LD3Scheduler.from_config(stock.config, solver="dpmpp", predict_x0=data)
    assert difference("sd", stock, mine) < 1e-5


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_default_grids(cls, spacing):
    stock = multistep(cls, timestep_spacing=spacing, steps_offset=1)
    solver = "unipc" if cls is UniPCMultistepScheduler else "dpmpp"
    assert difference("sd", stock, LD3Scheduler.from_config(stock.config, solver=solver)) < 1e-5


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_zero_terminal_snr(cls):
    stock = multistep(
        cls, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", solver_order=2
    )
    solver = "unipc" if cls is UniPCMultistepScheduler else "dpmpp"
    assert difference("sd", stock, LD3Scheduler.from_config(stock.config, solver=solver)) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    stock = multistep(DEISMultistepScheduler, solver_order=order)
    mine = LD3Scheduler.from_config(stock.config, solver="deis", final_sigmas_type="sigma_min")
    assert difference("sd", stock, mine) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(spacing):
    stock = multistep(
        DDIMScheduler, clip_sample=False, set_alpha_to_one=spacing == "trailing", timestep_spacing=spacing
    )
    final = "zero" if spacing == "trailing" else "sigma_min"
    # stock DDIM steps to the noise level one stride below, on 'leading' grids that of timestep 0 at the end
    mine = LD3Scheduler.from_config(stock.config, solver="ddim", final_sigmas_type=final)
    assert difference("sd", stock, mine, 5) < 1e-5


def starting_alike(stock, mine, steps, mine_steps=None):
    """The k-diffusion classes hold x / alpha and start from sigma or sqrt(sigma^2 + 1): the same noise, scaled to our start."""
    if "sd" not in built:
        built["sd"] = PIPELINES["sd"]()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    stock.set_timesteps(steps)
    mine.set_timesteps(mine_steps or steps)
    start = float((mine.sigmas[0] ** 2 + 1) ** 0.5)  # 1 / alpha
    a = latents("sd", stock, steps, latents=noise * start / float(stock.init_noise_sigma))
    b = latents("sd", mine, mine_steps or steps, latents=noise)
    assert a.abs().max() > 0.1
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("karras", [False, True])
def test_euler_and_heun_at_their_own_grids(karras):
    for cls, solver, factor in ((EulerDiscreteScheduler, "euler", 1), (HeunDiscreteScheduler, "heun", 2)):
        stock = cls(**SD_BETAS, use_karras_sigmas=karras, timestep_spacing="trailing")
        mine = LD3Scheduler.from_config(stock.config, solver=solver)
        steps = 5
        error = starting_alike(stock, mine, steps, factor * steps - (factor - 1))
        assert error < 1e-5


@pytest.mark.parametrize("name", ["flux", "sd3", "z_image", "hunyuan_video", "qwen_image", "ltx"])
def test_flow_match_euler(name):
    stock = PIPELINES[name]()[0].scheduler
    assert isinstance(stock, FlowMatchEulerDiscreteScheduler)
    assert difference(name, stock, LD3Scheduler.from_config(stock.config, solver="euler")) < 1e-5


class FloatTimes:
    """Mixin: stock truncates its flow timesteps to integers; ours are told unrounded."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * 1000


class FlowUniPC(FloatTimes, UniPCMultistepScheduler):
    pass


class FlowDPM(FloatTimes, DPMSolverMultistepScheduler):
    pass


@pytest.mark.parametrize("name", ["wan", "sana"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("cls", [FlowUniPC, FlowDPM])
def test_flow_multistep(name, order, cls):
    stock = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order)
    solver = "unipc" if cls is FlowUniPC else "dpmpp"
    mine = LD3Scheduler.from_config(stock.config, solver=solver)
    # Stock UniPC starts at s = 1 - 1e-6, where lambda is finite and earlier steps weigh in; ours starts at 1.
    assert difference(name, stock, mine) < (1e-3 if cls is FlowUniPC else 1e-5)
    stock.set_timesteps(6)
    mine.use_schedule(Schedule(stock.sigmas, None, mine.spec, "flow", "flow_prediction", final=True))
    assert difference(name, stock, mine) < 1e-5
