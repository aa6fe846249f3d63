# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a learning iteration at the true size of Stable Diffusion 1.5 (512 px) and of Flux-dev (1024 px).

    python -m tests.benchmarks.learning_memory [--models sd15 flux-dev] [--nfe 4 10] [--micro_batch_sizes 1 2] [--dtypes bf16]

The networks have the published architectures and random weights; text encoders are not loaded, the autoencoder is. Measured is a
micro-batch with guidance and latent loss: of the default recipe, which differentiates nothing, the end state's derivatives by finite differences,
of "adam" the rollout and its gradient. All in GB of 1e9 bytes, weights included.

On CUDA this is `torch.cuda.max_memory_allocated`, with seconds per iteration. Without a GPU it is accounted: weights and latents
are fake tensors, autograd runs the pipeline at full size and depth on their shapes, and the bytes of all tensors alive at once
are counted. That leaves out the allocator's fragmentation, workspaces of cuDNN and of fused kernels, and the CUDA context.
How true the accounting is shows a smaller configuration of each architecture, which is also run on the CPU: there the measured
peak is that of PyTorch's allocator, with the kernels' workspaces.
"""

import argparse
import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ld3_diffusers import SolverSpec
from training.initial import grid_schedule
from training.learner import Problem, parameters_for
from training.learner_adam import AdamLearner
from training.learner_default import DefaultLearner
from training.recipe import AdamRecipe, DefaultRecipe
from training.rollout import PipelineRollout


GB = 1e9
RECIPES = (("default", False), ("adam", False), ("adam", True))  # and whether the network is recomputed block by block
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages, of real or fake tensors, that operators made while this is entered and that are alive.

    Attributes:
        live, peak: now, and the most so far; assign to start anew.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return output

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)  # views share a storage; it goes with the last of them

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


# ---------------------------------------------------------------------- models


Room = Callable[[], AbstractContextManager]  # where weights are made: their dtype, and their device or fakeness


@dataclass(frozen=True)
class Model:
    """A pipeline without text encoders, and what it is called with."""

    pipe: DiffusionPipeline
    embeddings: dict[str, Tensor]
    shape: tuple[int, ...]
    call: dict[str, float | int]

    @property
    def weights(self) -> list[Tensor]:
        modules = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


VAE_WIDTHS = (128, 256, 512, 512)


def autoencoder(channels: int, widths: tuple[int, ...], **options) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
        **options,
    )


def sd15(pairs: int, room: Room, *, widths=(320, 640, 1280, 1280), side: int = 64, vae_widths=VAE_WIDTHS) -> Model:
    """stable-diffusion-v1-5's configs; all that is not given there is Diffusers' default."""
    with room():
        unet = UNet2DConditionModel(sample_size=side, block_out_channels=widths, cross_attention_dim=768)
        vae = autoencoder(4, vae_widths, scaling_factor=0.18215)
        embeddings = {name: torch.randn(pairs, 77, 768) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Model(pipe, embeddings, (4, side, side), {"guidance_scale": 7.5, "height": 8 * side, "width": 8 * side})


def flux_dev(
    pairs: int, room: Room, *, blocks=(19, 38), heads: int = 24, side: int = 128, vae_widths=VAE_WIDTHS
) -> Model:
    """FLUX.1-dev's configs, which are the defaults of Diffusers' class but for the embedded guidance."""
    with room():
        transformer = FluxTransformer2DModel(
            num_layers=blocks[0], num_single_layers=blocks[1], num_attention_heads=heads, guidance_embeds=True
        )
        vae = autoencoder(16, vae_widths, use_quant_conv=False, use_post_quant_conv=False)
        embeddings = {
            "prompt_embeds": torch.randn(pairs, 512, 4096),
            "pooled_prompt_embeds": torch.randn(pairs, 768),
        }
    pipe = FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    shape = ((side // 2) ** 2, 64)  # 2 x 2 latents of 16 channels are one token
    return Model(pipe, embeddings, shape, {"guidance_scale": 3.5, "height": 8 * side, "width": 8 * side})


def sd15_small(pairs: int, room: Room) -> Model:
    return sd15(pairs, room, widths=(64, 128, 256, 256), side=32, vae_widths=(32,) * 4)


def flux_dev_small(pairs: int, room: Room) -> Model:
    return flux_dev(pairs, room, blocks=(3, 6), heads=3, side=64, vae_widths=(32,) * 4)


# true size, small, GB to fit into, dtypes, sizes of micro-batches
Builder = Callable[[int, Room], Model]
MODELS: dict[str, tuple[Builder, Builder, int, list[str], list[int]]] = {
    "sd15": (sd15, sd15_small, 12, ["fp32", "bf16"], [1, 2]),
    "flux-dev": (flux_dev, flux_dev_small, 40, ["bf16"], [1]),
}


# ---------------------------------------------------------------------- one micro-batch


@dataclass(frozen=True)
class Case:
    build: Builder
    dtype: torch.dtype
    micro_batch_size: int
    nfe: int
    gradient_checkpointing: bool
    recipe: str = "adam"


class Pairs:
    """Synthetic teacher pairs, served as `TeacherSet` does."""

    def __init__(self, model: Model, count: int):
        self.noise, self.end = torch.randn(2, count, *model.shape, dtype=torch.float32).unbind()
        self.embeddings = model.embeddings

    def __len__(self) -> int:
        return len(self.noise)

    def batch(self, indices, device):
        rows = slice(0, len(indices))
        return (
            self.noise[rows].to(device),
            self.end[rows].to(device),
            {name: rows_of[rows].to(device) for name, rows_of in self.embeddings.items()},
        )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def learner_of(case: Case, device: str = "cpu", fake: FakeTensorMode | None = None):
    """(model, function that does what an iteration does for a micro-batch), with weights and pairs that are fake tensors if `fake` is
    given."""

    @contextmanager
    def room() -> Iterator[None]:
        with default_dtype(case.dtype), fake or torch.device(device):
            yield

    model = case.build(case.micro_batch_size, room)
    with room():
        pairs = Pairs(model, case.micro_batch_size)
    with PipelineRollout(model.pipe, gradient_checkpointing=case.gradient_checkpointing, **model.call) as rollout:
        rollout.state_shape(model.embeddings)  # looked at once in a run
        prediction_type = rollout.scheduler.config.prediction_type
        initial = grid_schedule("time_uniform", rollout.path, case.nfe, SolverSpec("unipc"), prediction_type)
        problem = Problem(rollout, pairs, pairs, rollout.path, device=torch.device(device))
        if case.recipe == "adam":
            learner = AdamLearner(problem, AdamRecipe(batch_size=case.micro_batch_size), initial, seed=0)
            compute = learner._differentiate
        else:
            recipe = DefaultRecipe()
            learner = DefaultLearner(problem, recipe, parameters_for(recipe, initial, rollout.path))
            learner.alone = True
            compute = partial(learner._linearise, 0, at_once=1)
        yield model, partial(compute, list(range(case.micro_batch_size)))


def accounted(case: Case) -> tuple[int, int]:
    """Bytes of the weights, and of all tensors at the peak of one micro-batch, on fake tensors.

    Attention is the fused one, as on GPUs, which keeps no N x N matrix; where it cannot be, PyTorch raises.
    """
    with learner_of(case, fake=FakeTensorMode(allow_non_fake_inputs=True)) as (model, compute):
        live = LiveBytes()
        for tensor in model.weights:
            live.add(tensor)
        weights = live.live
        # The mode is left: what has a fake input is fake, and the scheduler computes with its own real times.
        with live, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            compute()
    return weights, live.peak


def measured_on_cpu(case: Case) -> int:
    """Bytes at the peak of one micro-batch that PyTorch's CPU allocator handed out, with the weights and the pairs."""
    with learner_of(case) as (model, compute):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            compute()
        given = (*model.weights, *model.embeddings.values())
        before = {t.untyped_storage() for t in given}
        pairs = 2 * 4 * case.micro_batch_size * math.prod(model.shape)  # noises and ends, float32
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sum(storage.nbytes() for storage in before) + pairs + peak


def measured_on_cuda(case: Case, iterations: int = 3) -> tuple[int, int, float]:
    """Bytes of the weights and at the peak, and seconds per iteration."""
    with learner_of(case, "cuda") as (_, compute):
        weights = torch.cuda.memory_allocated()
        compute()  # kernels are chosen here
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(iterations):
            compute()
        torch.cuda.synchronize()
        return weights, torch.cuda.max_memory_allocated(), (time.perf_counter() - start) / iterations


# ---------------------------------------------------------------------- the program


def check_accounting(names: list[str]) -> None:
    print("accounted against measured, smaller configurations on the CPU, fp32, GB")
    print(f"{'model':<12}{'recipe':>9}{'NFE':>5}{'blocks':>8}{'accounted':>11}{'measured':>10}")
    for name in names:
        for recipe, blocks in RECIPES:
            case = Case(MODELS[name][1], torch.float32, 1, 4, blocks, recipe)
            peak, real = accounted(case)[1], measured_on_cpu(case)
            shown = "yes" if blocks else "no"
            print(f"{name:<12}{recipe:>9}{4:>5}{shown:>8}{peak / GB:>11.3f}{real / GB:>10.3f}", flush=True)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--nfe", nargs="+", type=int, default=[4, 10])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: fp32 and bf16; Flux-dev: bf16")
    parser.add_argument("--micro_batch_sizes", nargs="+", type=int, help="default: 1 and 2; Flux-dev: 1")
    args = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    if not cuda:
        check_accounting(args.models)
    print(
        f"\n{'measured on CUDA' if cuda else 'accounted'}, true size, GB; 'blocks': gradient checkpointing of blocks"
    )
    print(
        f"{'model':<12}{'dtype':>6}{'pairs':>7}{'recipe':>9}{'blocks':>8}{'NFE':>5}{'weights':>9}{'peak':>8}{'limit':>7}{'s/micro-batch':>15}"
    )
    for name in args.models:
        build, _, limit, dtypes, sizes = MODELS[name]
        cases = [
            (dtype, Case(build, DTYPES[dtype], size, nfe, blocks, recipe))
            for dtype in args.dtypes or dtypes
            for size in args.micro_batch_sizes or sizes
            for recipe, blocks in RECIPES
            for nfe in args.nfe
        ]
        for dtype, case in cases:
            weights, peak, *seconds = measured_on_cuda(case) if cuda else accounted(case)
            print(
                f"{name:<12}{dtype:>6}{case.micro_batch_size:>7}{case.recipe:>9}{'yes' if case.gradient_checkpointing else 'no':>8}{case.nfe:>5}"
                f"{weights / GB:>9.2f}{peak / GB:>8.2f}{limit:>7}{format(seconds[0], '.2f') if seconds else '-':>15}",
                flush=True,
            )


if __name__ == "__main__":
    main()
