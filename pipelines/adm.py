# SPDX-License-Identifier: Apache-2.0
r"""ADM: pixel-space U-Nets guided by the gradient of a classifier (Dhariwal & Nichol, arXiv:2105.05233).

The network predicts the noise of a variance-preserving sample $z$ at timestep $\tau$, the classifier $p(y \mid z, \tau)$ was trained on such
samples, and guidance of scale $w$ replaces the prediction by

$$ \hat\epsilon = \epsilon(z, \tau, y) - w \sqrt{1 - \bar\alpha_\tau}\; \nabla_z \log p(y \mid z, \tau). $$

$\bar\alpha_\tau$ is the model's own noise schedule at the timestep that the networks are told, which may be fractional:

| `noise_path` | $\log\bar\alpha_\tau$ |
|---|---|
| `vp_discrete` | linear between the training steps of the scheduler's betas, and 0 at $\tau = -1$ |
| `vp_linear` | $-\frac12 19.9 t^2 - 0.1 t$ with $t = \tau/999$ (arXiv:2011.13456), the convention of AMED |

This file stands alone: it also works as a Diffusers custom pipeline.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


POOLS = ("attention", "adaptive", "spatial")
POOLED_CHANNELS = 2048  # hidden width of the "spatial" pool
NOISE_PATHS = ("vp_discrete", "vp_linear")


# ---------------------------------------------------------------------- noise schedule

BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def log_alpha_bar(timestep: Tensor, config: Mapping[str, Any], noise_path: str | None = None) -> Tensor:
    r"""$\log\bar\alpha$ at fractional timesteps of any shape, differentiable; see the module's docstring.

    Args:
        config: of a scheduler: its betas, and its `noise_path` if it has one.
        noise_path: in place of that one.

    Raises:
        ValueError: for another noise path.
    """
    noise_path = noise_path or config.get("noise_path", "vp_discrete")
    if noise_path == "vp_linear":
        t = timestep / 999
        return -9.95 * t**2 - 0.1 * t
    if noise_path != "vp_discrete":
        raise ValueError(f"classifier guidance has no noise path {noise_path!r}; use one of {', '.join(NOISE_PATHS)}")
    betas = DDIMScheduler(**{key: config[key] for key in BETA_KEYS if key in config})
    table, position = F.pad(betas.alphas_cumprod.double().log(), (1, 0)).to(timestep), timestep + 1
    left = position.detach().floor().clamp(0, len(table) - 2)
    low, high = table[left.long()], table[left.long() + 1]
    return low + (position - left) * (high - low)


# ---------------------------------------------------------------------- networks


class ADMUNet2DModel(UNet2DModel):
    """Diffusers' `UNet2DModel`, whose attention may have a fixed number of heads in place of a fixed width of heads.

    Of networks with learned variance `out_channels` is twice `in_channels`; [`ADMPipeline`] uses the first half.

    Args:
        num_attention_heads: of each attention; None: `attention_head_dim` decides.
        unet: arguments of `UNet2DModel`; those of the public checkpoints are set by `pipelines.conversion.adm`.

    Raises:
        ValueError: if both are given, or the heads do not divide a level's channels.
    """

    ignore_for_config = ["unet"]

    @register_to_config
    def __init__(self, num_attention_heads: int | None = None, **unet):
        if num_attention_heads is not None and unet.setdefault("attention_head_dim", None) is not None:
            raise ValueError("num_attention_heads and attention_head_dim exclude each other; give one")
        super().__init__(**unet)
        if num_attention_heads is None:
            return
        for attention in (part for part in self.modules() if isinstance(part, Attention)):
            width, rest = divmod(attention.inner_dim, num_attention_heads)
            if rest:
                raise ValueError(f"{num_attention_heads} heads do not divide {attention.inner_dim} channels")
            attention.heads = attention.sliceable_head_dim = num_attention_heads
            attention.scale = width**-0.5

    @staticmethod
    def _get_init_keys(input_class):
        # Diffusers reads from the signature which entries of a config to load; ours leaves most to the base.
        keys = inspect.signature(UNet2DModel.__init__).parameters.keys() | {"num_attention_heads"}
        return keys if input_class is ADMUNet2DModel else UNet2DModel._get_init_keys(input_class)


class AttentionPool(nn.Module):
    """One vector of a feature map: attention of its mean to itself and all positions, then a linear map.

    Args:
        channels, head_dim: of the feature map, and of a head.
        positions: height times width.
        out_features: length of the vector.
    """

    def __init__(self, channels: int, head_dim: int, positions: int, out_features: int):
        super().__init__()
        self.heads = channels // head_dim
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(2)
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + self.positional_embedding
        tokens = tokens.transpose(1, 2)
        # only the first token's result is used
        query, key, value = self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens)
        query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        return self.to_out(F.scaled_dot_product_attention(query, key, value).flatten(1))


class ADMClassifier(ModelMixin, ConfigMixin):
    r"""Classifier of noisy images, $p(y \mid z, \tau)$: encoder and middle of the U-Net, then a pool.

    Args:
        sample_size: height and width of images, in pixels; the pool "attention" has an embedding for each position.
        in_channels, num_classes: channels of images, number of classes.
        block_out_channels, layers_per_block, down_block_types, downsample_type, attention_head_dim, norm_num_groups, norm_eps,
            resnet_time_scale_shift: of the encoder, as `UNet2DModel` has them.
        pool: "attention" ([`AttentionPool`]), "adaptive" (mean over positions), or "spatial" (means of all the encoder's feature maps).

    Raises:
        ValueError: for an unknown pool.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        num_classes: int = 1000,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        downsample_type: str = "resnet",
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        pool: str = "attention",
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"unknown pool {pool!r}; use one of {', '.join(POOLS)}")
        width, coarsest = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, 4 * width)
        levels = len(block_out_channels)
        common = {
            "temb_channels": 4 * width,
            "resnet_eps": norm_eps,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "attention_head_dim": attention_head_dim,
        }
        self.down_blocks = nn.ModuleList(
            get_down_block(
                kind,
                num_layers=layers_per_block,
                in_channels=block_out_channels[max(level - 1, 0)],
                out_channels=block_out_channels[level],
                add_downsample=level < levels - 1,
                downsample_padding=1,
                downsample_type=downsample_type,
                **common,
            )
            for level, kind in enumerate(down_block_types)
        )
        self.mid_block = UNetMidBlock2D(in_channels=coarsest, attn_groups=norm_num_groups, **common)
        self.norm_out = None if pool == "spatial" else nn.GroupNorm(norm_num_groups, coarsest, eps=norm_eps)
        if pool == "attention":
            positions = (sample_size >> (levels - 1)) ** 2
            self.head = AttentionPool(coarsest, attention_head_dim, positions, num_classes)
        elif pool == "adaptive":
            self.head = nn.Linear(coarsest, num_classes)
        else:
            # the input convolution's, each layer's, each downsampling's and the middle's feature map
            features = width + layers_per_block * sum(block_out_channels) + sum(block_out_channels[:-1]) + coarsest
            hidden = nn.Linear(features, POOLED_CHANNELS)
            self.head = nn.Sequential(hidden, nn.ReLU(), nn.Linear(POOLED_CHANNELS, num_classes))

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Logits, (batch, num_classes).

        Args:
            sample: (batch, in_channels, height, width), as the U-Net is given it.
            timestep: a number or (batch,), fractional, as the U-Net is told it.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        emb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        hidden_states = self.conv_in(sample)
        features = [hidden_states]
        for block in self.down_blocks:
            hidden_states, outputs = block(hidden_states, emb)
            features += outputs
        hidden_states = self.mid_block(hidden_states, emb)
        if self.config.pool == "spatial":
            return self.head(torch.cat([x.mean((2, 3)) for x in (*features, hidden_states)], dim=1))
        hidden_states = F.silu(self.norm_out(hidden_states))
        return self.head(hidden_states if self.config.pool == "attention" else hidden_states.mean((2, 3)))

    def guidance(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor) -> Tensor:
        r"""$\nabla_z \log p(y \mid z, \tau)$, (batch, in_channels, height, width), under `torch.no_grad` too.

        Differentiable in sample and timestep. What is kept for that is these two, and no activation.

        Args:
            sample, timestep: as in [`forward`].
            class_labels: (batch,) y.
        """
        timestep = torch.as_tensor(timestep, device=sample.device)
        return _Guidance.apply(self, sample, timestep, class_labels)

    def log_probability(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor) -> Tensor:
        r"""$\log p(y \mid z, \tau)$, (batch,), in float32 at least; arguments as in [`guidance`]."""
        logits = self(sample, timestep)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.log_softmax(logits, dim=1).gather(1, class_labels[:, None])[:, 0]


class _Guidance(torch.autograd.Function):
    r"""The gradient $g = \nabla_z \log p(y \mid z, \tau)$, whose backward pass multiplies by second derivatives.

    For a cotangent v it returns $\nabla_z (v \cdot g)$ and $\partial_\tau (v \cdot g)$ from a graph of g made anew. `torch.utils.checkpoint`
    around g with `create_graph=True` has the same values, but recomputes the classifier in the forward pass too.
    """

    @staticmethod
    def forward(ctx, classifier: ADMClassifier, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        ctx.classifier = classifier
        ctx.save_for_backward(sample, timestep, class_labels)
        with torch.inference_mode(False), torch.enable_grad():
            sample = sample.detach().clone().requires_grad_()
            value = classifier.log_probability(sample, timestep.detach().clone(), class_labels.clone()).sum()
            return torch.autograd.grad(value, sample)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent: Tensor):
        sample, timestep, class_labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:3]
        # fused attention has no second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            sample = sample.detach().requires_grad_()
            timestep = timestep.detach().requires_grad_(needed[1])
            value = ctx.classifier.log_probability(sample, timestep, class_labels).sum()
            gradient = torch.autograd.grad(value, sample, create_graph=True)[0]
            inputs = [x for x, wanted in zip((sample, timestep), needed) if wanted]
            results = iter(torch.autograd.grad(gradient, inputs, cotangent))
        return None, *(next(results) if wanted else None for wanted in needed), None


# ---------------------------------------------------------------------- the pipeline


class ADMPipeline(DiffusionPipeline):
    r"""Samples pixels, unconditionally, for class labels, or guided to them by a classifier; see the module's docstring.

    The data prediction is clamped to [-1, 1], as in the original samplers, where the scheduler's `clip_sample` says so.

    Args:
        unet: an [`ADMUNet2DModel`] or a `UNet2DModel` that predicts noise, and perhaps the variance, which is dropped.
        scheduler: any of the schedulers of variance-preserving diffusion, with the betas of training.
        classifier: an [`ADMClassifier`], for guidance.
        noise_path: of $\bar\alpha$; None: as the scheduler's config says (`LD3Scheduler`), else "vp_discrete".

    Raises:
        ValueError: for an unknown noise path.
    """

    model_cpu_offload_seq = "unet"  # a classifier in this sequence would drive the U-Net out at each step
    _optional_components = ["classifier"]

    def __init__(self, unet, scheduler, classifier=None, noise_path: str | None = None):
        super().__init__()
        if noise_path not in (None, *NOISE_PATHS):
            raise ValueError(f"unknown noise_path {noise_path!r}; use one of {', '.join(NOISE_PATHS)}")
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        self.register_to_config(noise_path=noise_path)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def predict_noise(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        r"""$\hat\epsilon$, (batch, in_channels, height, width); differentiable in sample and timestep.

        Args:
            sample: (batch, in_channels, height, width), z.
            timestep: () or (batch,), fractional.
            class_labels: (batch,) y; None: of unconditional networks without guidance.
            guidance_scale: w; without a classifier it is not used.

        Raises:
            ValueError: for guidance with a scheduler of another prediction type than noise or of another noise path.
        """
        labels = class_labels if self.unet.config.num_class_embeds else None
        noise = self.unet(sample, timestep, class_labels=labels, return_dict=False)[0][:, : sample.shape[1]]
        if self.classifier is None or guidance_scale == 0:
            return noise
        config = self.scheduler.config
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError("classifier guidance needs a scheduler whose prediction_type is 'epsilon'")
        times = timestep.to(sample.device, torch.promote_types(sample.dtype, torch.float32))
        sigma = (-torch.expm1(log_alpha_bar(times, config, self.config.noise_path))).sqrt().to(sample.dtype)
        gradient = self.classifier.guidance(sample, timestep, class_labels)
        return noise - guidance_scale * sigma.reshape(-1, *[1] * (sample.ndim - 1)) * gradient

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            batch_size: how many; default: one a label or latent, else 1.
            class_labels: of a class-conditional network, and of guidance: one for all or one each.
            guidance_scale: of the classifier's gradient; 0: none. Pipelines without a classifier are not guided.
            num_inference_steps: of the scheduler.
            generator: one for all or one each, from which the starting noise is drawn.
            latents: (batch, channels, height, width) unit-normal starting noise.
            output_type: "pil", "np", "pt", or "latent" for the end state, in [-1, 1].

        Raises:
            ValueError: for labels that are missing or unknown, guidance without a classifier, and latents of another shape.
        """
        batch_size = _batch_size(batch_size, class_labels, latents, generator)
        if self.scheduler.config.get("sigma_data") is not None:
            raise ValueError(
                f"{type(self.scheduler).__name__} is for EDM's preconditioning, which this network does not have; use DDIMScheduler, "
                "DPMSolverMultistepScheduler, LD3Scheduler or another one on betas"
            )
        if self.classifier is None and guidance_scale not in (0, 1):
            raise ValueError(f"guidance_scale {guidance_scale} needs a classifier; load one, or drop it")
        labels = self._labels(class_labels, batch_size, guidance_scale)
        device, config = self._execution_device, self.unet.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, but this call samples {shape}; draw them so")
        else:
            latents = latents.to(device, self.unet.dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # stochastic schedulers draw noise from it
        drawn = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, t)
            noise = self.predict_noise(scaled, t, labels, guidance_scale)
            latents = self.scheduler.step(noise, t, latents, **drawn).prev_sample

        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels, batch_size: int, guidance_scale: float) -> Tensor | None:
        counts = [self.unet.config.num_class_embeds, self.classifier and self.classifier.config.num_classes]
        classes = min((count for count in counts if count), default=0)
        if class_labels is None:
            if counts[0] or (classes and guidance_scale != 0):
                raise ValueError(
                    f"this pipeline samples for classes; give class_labels, 0 to {classes - 1}"
                    + ("" if counts[0] else ", or guidance_scale=0")
                )
            return None
        if not classes:
            raise ValueError("the network of this pipeline is unconditional and has no classifier; drop class_labels")
        labels = _integers(class_labels)
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise ValueError(f"class_labels must be integers from 0 to {classes - 1}, got {labels.tolist()}")
        if len(labels) not in (1, batch_size):
            raise ValueError(f"{len(labels)} class_labels are given for {batch_size} images; give one, or one each")
        return labels.expand(batch_size).to(self._execution_device)


def _batch_size(batch_size: int | None, class_labels, latents: Tensor | None, generator) -> int:
    """How many samples a call makes: as many as it says, else as it has of anything.

    Raises:
        ValueError: for no sample, and generators of another number.
    """
    several = (batch for batch in (class_labels, latents, generator) if hasattr(batch, "__len__"))
    given = [len(batch) for batch in several if getattr(batch, "ndim", 1)]
    batch_size = max(given, default=1) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(generator, list) and len(generator) not in (1, batch_size):
        raise ValueError(f"{len(generator)} generators are given for {batch_size} images; give one, or one each")
    return batch_size


def _integers(class_labels) -> Tensor:
    """(n,) of one label or several."""
    try:
        labels = torch.as_tensor(class_labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        labels = torch.empty(0)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"class_labels must be integers, got {class_labels!r:.60}")
    return labels
