# SPDX-License-Identifier: Apache-2.0
r"""EDM: the pixel-space networks and preconditionings of Karras et al. (arXiv:2206.00364), and a pipeline that samples with them.

A sample at noise level $\sigma$ is $x = x_0 + \sigma n$, and a denoiser is

$$ D(x; \sigma) = c_{skip} x + c_{out} F(c_{in} x; c_{noise}). $$

| `preconditioning` | $c_{skip}$ | $c_{out}$ | $c_{in}$ | $c_{noise}$ | $\sigma$ |
|---|---|---|---|---|---|
| `edm` | $\sigma_d^2/(\sigma^2+\sigma_d^2)$ | $\sigma\sigma_d/\sqrt{\sigma^2+\sigma_d^2}$ | $1/\sqrt{\sigma^2+\sigma_d^2}$ | $\ln\sigma/4$ | .002 to 80 |
| `vp` | 1 | $-\sigma$ | $1/\sqrt{\sigma^2+1}$ | $999\,t(\sigma)$ | $\sigma(10^{-5})$ to $\sigma(1)$ |
| `ve` | 1 | $\sigma$ | 1 | $\ln(\sigma/2)$ | .02 to 100 |
| `iddpm` | 1 | $-\sigma$ | $1/\sqrt{\sigma^2+1}$ | 999 - index of the nearest $u_j$ | $u_{999}$ to $u_0$ |

Diffusers' EDM schedulers, and `LD3Scheduler` on their configs, scale the input by EDM's $c_{in}$, tell the network $\ln\sigma/4$ and
expect EDM's F. So that one pipeline and one kind of scheduler serve all four, [`EDMUNet2DModel`] takes and returns these whatever
it was trained with: for the other three, $F = (\sigma\,c_{in} x - \sqrt{\sigma^2+\sigma_d^2}\,\epsilon)/\sigma_d$ with their noise prediction
$\epsilon$, which is the same D.

Networks: DDPM++ and NCSN++ of Song et al. (arXiv:2011.13456), ADM of Dhariwal & Nichol (arXiv:2105.05233). Parameters bear the names of the
public checkpoints. This file stands alone: it also works as a Diffusers custom pipeline.
"""

import inspect
import math

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F


ARCHITECTURES = ("song", "dhariwal")
SIGMA_DATA = 0.5
TRAIN_TIMESTEPS = 1000  # M of the two preconditionings that were trained on discrete times
ATTENTION_CHANNELS = 64  # of a head in Dhariwal's network; Song's has one head


# ---------------------------------------------------------------------- preconditioning: sigma <-> time, coefficients


def vp_sigma(t: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    r"""$\sigma(t) = \sqrt{e^{\beta_d t^2/2 + \beta_{min} t} - 1}$ of variance-preserving diffusion, t in [0, 1]."""
    return torch.expm1(0.5 * beta_d * t**2 + beta_min * t).sqrt()


def vp_time(sigma: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """Inverse of [`vp_sigma`]."""
    twice = 2 * beta_d * torch.log1p(sigma**2)
    # not (sqrt(beta_min^2 + twice) - beta_min) / beta_d, which cancels at small sigma
    return twice / ((beta_min**2 + twice).sqrt() + beta_min) / beta_d


def iddpm_sigmas(steps: int = TRAIN_TIMESTEPS, c_1: float = 0.001, c_2: float = 0.008) -> Tensor:
    r"""(steps + 1,) decreasing noise levels $u_j$ of improved DDPM's cosine schedule (arXiv:2102.09672), the last of them 0.

    $u_{j-1} = \sqrt{(u_j^2+1)/\max(\bar\alpha_{j-1}/\bar\alpha_j, c_1) - 1}$ with $\bar\alpha_j = \sin^2(\frac\pi2 j/(M(1+c_2)))$.
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    alpha_bar = torch.sin(0.5 * math.pi * j / (steps * (1 + c_2))) ** 2
    sigmas = [torch.zeros((), dtype=torch.float64)]
    for j in range(steps, 0, -1):
        ratio = (alpha_bar[j - 1] / alpha_bar[j]).clamp(min=c_1)
        sigmas.append(((sigmas[-1] ** 2 + 1) / ratio - 1).sqrt())
    return torch.stack(sigmas[::-1])


IDDPM_SIGMAS = iddpm_sigmas()
PRECONDITIONINGS: dict[str, tuple[float, float]] = {  # and the noise levels between which they were trained
    "edm": (0.002, 80.0),
    "vp": (float(vp_sigma(torch.tensor(1e-5, dtype=torch.float64))), float(vp_sigma(torch.tensor(1.0).double()))),
    "ve": (0.02, 100.0),
    "iddpm": (float(IDDPM_SIGMAS[-2]), float(IDDPM_SIGMAS[0])),
}


# ---------------------------------------------------------------------- layers


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class ResampledConv2d(nn.Module):
    """Depthwise resampling by a fixed filter, then a convolution; kernel 0: resampling alone.

    `fused`: the convolution comes first, and reaches beyond the border by as much as the filter takes away.
    """

    def __init__(self, in_channels, out_channels, kernel, *, resample=None, filter=(1, 1), bias=True, fused=False):
        super().__init__()
        self.resample, self.fused = resample, fused
        self.weight = self.bias = None
        if kernel:
            conv = nn.Conv2d(in_channels, out_channels, kernel, bias=bias)
            self.weight, self.bias = conv.weight, conv.bias
        if resample:
            taps = torch.tensor(filter, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        pad = 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.fused:
            reach = (self.resample_filter.shape[-1] - 1) // 2
            x = F.conv2d(x, self.weight, padding=pad + reach)
            return self._filtered(x, 0) + self.bias[:, None, None]
        if self.resample:
            x = self._filtered(x, (self.resample_filter.shape[-1] - 1) // 2)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=pad)

    def _filtered(self, x: Tensor, pad: int) -> Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, groups=channels, stride=2, padding=pad)
        return F.conv_transpose2d(x, 4 * taps, groups=channels, stride=2, padding=pad)


class UNetBlock(nn.Module):
    r"""Residual block: $h = conv_1(silu(norm_1(conv_0(silu(norm_0(x))) + a)))$, then $s(h + skip(x))$, then attention.

    `song` adds the embedding's $a$ before `norm1` and has $s = \sqrt{1/2}$; `dhariwal` scales and shifts after it and has s = 1.
    """

    def __init__(
        self, in_channels, out_channels, emb_channels, *, song, heads, resample=None, filter=(1, 1), dropout=0.0
    ):
        super().__init__()
        eps = 1e-6 if song else 1e-5
        self.song, self.heads, self.dropout = song, heads, dropout
        self.norm0 = _group_norm(in_channels, eps)
        self.conv0 = ResampledConv2d(in_channels, out_channels, 3, resample=resample, filter=filter)
        self.affine = nn.Linear(emb_channels, out_channels * (1 if song else 2))
        self.norm1 = _group_norm(out_channels, eps)
        self.conv1 = _zeroed(ResampledConv2d(out_channels, out_channels, 3))
        self.skip = None
        if in_channels != out_channels or resample:
            kernel = 1 if song or in_channels != out_channels else 0
            self.skip = ResampledConv2d(in_channels, out_channels, kernel, resample=resample, filter=filter)
        if heads:
            self.norm2 = _group_norm(out_channels, eps)
            self.qkv = ResampledConv2d(out_channels, 3 * out_channels, 1)
            self.proj = _zeroed(ResampledConv2d(out_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale = math.sqrt(0.5) if self.song else 1.0
        a = self.affine(emb)[:, :, None, None]
        h = self.conv0(F.silu(self.norm0(x)))
        if self.song:
            h = F.silu(self.norm1(h + a))
        else:
            gain, shift = a.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (gain + 1) + shift)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * scale
        if self.heads:
            x = (x + self.proj(self._attention(self.qkv(self.norm2(x))))) * scale
        return x

    def _attention(self, qkv: Tensor) -> Tensor:
        batch, _, height, width = qkv.shape
        # the channels of a head have q, k and v side by side
        q, k, v = qkv.reshape(batch, self.heads, -1, 3, height * width).transpose(2, 4).unbind(3)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(2, 3).reshape(batch, -1, height, width)


def _zeroed(layer: ResampledConv2d) -> ResampledConv2d:
    """A new branch that hardly contributes, from which training starts better."""
    with torch.no_grad():
        layer.weight.mul_(1e-5)
        layer.bias.zero_()
    return layer


class NoiseEmbedding(nn.Module):
    """(batch,) noise labels to (batch, channels): [cos, sin] of their products with frequencies that are geometric or, if `fourier`, random."""

    def __init__(self, channels: int, *, fourier: bool, endpoint: bool):
        super().__init__()
        self.channels, self.fourier, self.endpoint = channels, fourier, endpoint
        if fourier:
            self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def _apply(self, fn, recurse=True):
        """Of casts to fewer digits the phases, hundreds of radians, would keep nothing: only the device is followed."""
        kept = self.freqs if self.fourier else None
        super()._apply(fn, recurse)
        if kept is not None and self.freqs.dtype.itemsize < kept.dtype.itemsize:
            self.freqs = kept.to(self.freqs.device)
        return self

    def frequencies(self, device=None) -> Tensor:
        if self.fourier:
            return 2 * math.pi * self.freqs
        # float32 on the host, as the checkpoints were trained: a last bit is 1e-4 of a phase at label 1000
        i = torch.arange(self.channels // 2, dtype=torch.float32)
        return ((1 / 10000) ** (i / (self.channels // 2 - (1 if self.endpoint else 0)))).to(device)

    def forward(self, labels: Tensor) -> Tensor:
        phase = labels.outer(self.frequencies(labels.device).to(labels.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


# ---------------------------------------------------------------------- the network


class EDMUNet2DModel(ModelMixin, ConfigMixin):
    r"""U-Net of the EDM checkpoints; see the module's docstring for what it takes and returns.

    Args:
        sample_size: height and width, in pixels.
        num_class_embeds: width of one-hot class labels; None: unconditional.
        augment_dim: width of the labels of augmented training images; they are absent when sampling.
        architecture: "song" (DDPM++, NCSN++) or "dhariwal" (ADM).
        model_channels, channel_mult, channel_mult_emb, num_blocks: widths of the levels, of the embedding, and blocks a level.
        attn_resolutions: heights at which blocks have attention.
        embedding_type, channel_mult_noise: of the noise label, "positional" or "fourier"; Song only, as are
        encoder_type: "residual" adds the downsampled input at each level, "standard" does not;
        resample_filter: taps of the resampling filter.
        preconditioning: "edm", "vp", "ve" or "iddpm".
        sigma_data: standard deviation of the data, of EDM's preconditioning.

    Raises:
        ValueError: for an unknown architecture, preconditioning, embedding or encoder.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["map_noise"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
        architecture: str = "song",
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
        preconditioning: str = "edm",
        sigma_data: float = SIGMA_DATA,
    ):
        super().__init__()
        for name, value, known in (
            ("architecture", architecture, ARCHITECTURES),
            ("preconditioning", preconditioning, tuple(PRECONDITIONINGS)),
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "residual")),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; use one of {', '.join(known)}")
        if sample_size % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"sample_size {sample_size} cannot be halved {len(channel_mult) - 1} times; give a multiple of {2 ** (len(channel_mult) - 1)}"
            )
        song, classes = architecture == "song", num_class_embeds or 0
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * (channel_mult_noise if song else 1)
        self.gradient_checkpointing = False

        self.map_noise = NoiseEmbedding(noise_channels, fourier=embedding_type == "fourier" and song, endpoint=song)
        self.map_label = self.map_augment = None
        if classes:
            self.map_label = nn.Linear(classes, noise_channels if song else emb_channels, bias=song)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False)
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        def block(in_channels, out_channels, *, attention=False, resample=None):
            heads = 0 if not attention else 1 if song else out_channels // ATTENTION_CHANNELS
            taps = resample_filter if song else (1, 1)
            return UNetBlock(
                in_channels, out_channels, emb_channels,
                song=song, heads=heads, resample=resample, filter=taps, dropout=dropout,
            )  # fmt: skip

        self.enc = nn.ModuleDict()
        skips, aux_channels = [], in_channels
        channels = model_channels * (1 if song else channel_mult[0])
        for level, mult in enumerate(channel_mult):
            size = sample_size >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = ResampledConv2d(in_channels, channels, 3)
            else:
                self.enc[f"{size}x{size}_down"] = block(channels, channels, resample="down")
                if song and encoder_type == "residual":
                    self.enc[f"{size}x{size}_aux_residual"] = ResampledConv2d(
                        aux_channels, channels, 3, resample="down", filter=resample_filter, fused=True
                    )
                    aux_channels = channels
            skips.append(channels)
            for i in range(num_blocks):
                name = f"{size}x{size}_block{i}"
                self.enc[name] = block(channels, model_channels * mult, attention=size in attn_resolutions)
                channels = model_channels * mult
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = sample_size >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{size}x{size}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}x{size}_up"] = block(channels, channels, resample="up")
            for i in range(num_blocks + 1):
                attention = size in attn_resolutions and (i == num_blocks or not song)
                name = f"{size}x{size}_block{i}"
                self.dec[name] = block(channels + skips.pop(), model_channels * mult, attention=attention)
                channels = model_channels * mult
        norm, conv = _group_norm(channels, 1e-6 if song else 1e-5), _zeroed(ResampledConv2d(channels, out_channels, 3))
        if song:
            self.dec[f"{sample_size}x{sample_size}_aux_norm"] = norm
            self.dec[f"{sample_size}x{sample_size}_aux_conv"] = conv
        else:
            self.out_norm, self.out_conv = norm, conv

    @property
    def mid_block(self) -> nn.Module:
        """The bottleneck, from which AMED predicts: the encoder's last block."""
        return list(self.enc.values())[-1]

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels between which the network was trained."""
        return PRECONDITIONINGS[self.config.preconditioning]

    # ------------------------------------------------------------------ the bare network

    def raw(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The network alone, in its own units.

        Args:
            x: (batch, in_channels, height, width), scaled by the network's own $c_{in}$.
            noise_labels: (batch,) its own $c_{noise}$.
            class_labels: see [`forward`].
            augment_labels: (batch, augment_dim); None: absent.

        Returns:
            (batch, out_channels, height, width).
        """
        song = self.config.architecture == "song"
        emb = self.map_noise(noise_labels).to(x.dtype)
        if song:
            emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)
        if self.map_label is not None and song:
            emb = emb + self.map_label(self._one_hot(class_labels, x) * math.sqrt(self.config.num_class_embeds))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(x.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and not song:
            emb = emb + self.map_label(self._one_hot(class_labels, x))
        emb = F.silu(emb)

        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith("_conv"):
                x = layer(x)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
                continue
            else:
                x = self._run(layer, x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("_aux_norm"):
                x = F.silu(layer(x))
            elif name.endswith("_aux_conv"):
                x = layer(x)
            else:
                x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
                x = self._run(layer, x, emb)
        return x if song else self.out_conv(F.silu(self.out_norm(x)))

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, emb)
        return block(x, emb)

    def _one_hot(self, labels: Tensor | None, x: Tensor) -> Tensor:
        classes = self.config.num_class_embeds
        if labels is None:
            return x.new_zeros(1, classes)
        if labels.is_floating_point():
            return labels.to(x.dtype)
        return (labels[:, None] == torch.arange(classes, device=labels.device)).to(x.dtype)

    # ------------------------------------------------------------------ in EDM's units

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        r"""EDM's F.

        Args:
            sample: (batch, in_channels, height, width), $x/\sqrt{\sigma^2+\sigma_d^2}$.
            timestep: $\ln\sigma/4$, a number or (batch,).
            class_labels: (batch,) class numbers, where -1 is none, or (batch, num_class_embeds) weights of classes; None: none.
        """
        times = torch.as_tensor(timestep, device=sample.device)
        times = times.to(torch.float64 if sample.dtype == torch.float64 else torch.float32).expand(len(sample))
        kind = self.config.preconditioning
        if kind == "edm":
            output = self.raw(sample, times, class_labels)
            return UNet2DOutput(sample=output) if return_dict else (output,)
        sigma_data, sigma = self.config.sigma_data, torch.exp(4 * times)
        norm = (sigma**2 + sigma_data**2).sqrt()
        if kind == "vp":
            c_in, c_noise, sign = norm / (sigma**2 + 1).sqrt(), (TRAIN_TIMESTEPS - 1) * vp_time(sigma), 1
        elif kind == "ve":
            c_in, c_noise, sign = norm, torch.log(sigma / 2), -1
        else:
            nearest = (IDDPM_SIGMAS.to(sigma) - sigma[:, None]).abs().argmin(1)
            c_in, c_noise, sign = norm / (sigma**2 + 1).sqrt(), (TRAIN_TIMESTEPS - 1 - nearest).to(sigma), 1
        c_in, sigma, norm = (_per_sample(factor, sample) for factor in (c_in, sigma, norm))
        noise = sign * self.raw(c_in * sample, c_noise, class_labels)[:, : self.config.in_channels]
        output = (sigma * sample - norm * noise) / sigma_data
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def denoise(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """D(x; sigma), (batch, in_channels, height, width), of a state x at noise level sigma, a number or (batch,)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        variance = sigma**2 + self.config.sigma_data**2
        c_in, c_skip = 1 / variance.sqrt(), self.config.sigma_data**2 / variance
        c_out = sigma * self.config.sigma_data / variance.sqrt()
        c_in, c_skip, c_out = (_per_sample(factor, x) for factor in (c_in, c_skip, c_out))
        return c_skip * x + c_out * self(c_in * x, 0.25 * sigma.log(), class_labels).sample


def _per_sample(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


# ---------------------------------------------------------------------- the pipeline


class EDMPipeline(DiffusionPipeline):
    r"""Samples pixels with an EDM-preconditioned network, unconditionally or for class labels.

    Args:
        unet: an [`EDMUNet2DModel`], or a `UNet2DModel` trained as EDM's F, such as those that consistency models were distilled from.
        scheduler: `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler` or `LD3Scheduler`.
        timestep_scale: the network is told this times the scheduler's timestep; 1000 for the teachers of consistency models.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler, timestep_scale: float = 1.0):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(timestep_scale=timestep_scale)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | None = None,
        num_inference_steps: int = 18,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            batch_size: how many; default: one a label or latent, else 1.
            class_labels: of a class-conditional network, one for all or one each.
            num_inference_steps: of the scheduler.
            generator: one for all or one each, from which the starting noise is drawn.
            latents: (batch, channels, height, width) unit-normal starting noise.
            output_type: "pil", "np", "pt", or "latent" for the end state, in [-1, 1].

        Raises:
            ValueError: for labels that the network does not have or are missing, and latents of another shape.
        """
        batch_size = _batch_size(batch_size, class_labels, latents, generator)
        config = self.scheduler.config
        if config.get("sigma_data") is None and config.get("noise_path") != "edm":
            raise ValueError(
                f"{type(self.scheduler).__name__} does not know EDM's preconditioning, which this network has; use EDMEulerScheduler, "
                "EDMDPMSolverMultistepScheduler, or LD3Scheduler on the config of one of these"
            )
        labels = self._labels(class_labels, batch_size)
        device, config = self._execution_device, self.unet.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}, and this call samples {shape}; draw them so"
            )
        else:
            latents = latents.to(device, self.unet.dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # stochastic schedulers draw noise from it
        drawn = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, t)
            output = self.unet(scaled, t * self.config.timestep_scale, class_labels=labels).sample
            latents = self.scheduler.step(output, t, latents, **drawn).prev_sample

        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels, batch_size: int) -> Tensor | None:
        classes = self.unet.config.num_class_embeds
        if not classes:
            if class_labels is not None:
                raise ValueError("the network of this pipeline is unconditional; drop class_labels")
            return None
        if class_labels is None:
            raise ValueError(
                f"the network of this pipeline is class-conditional; give class_labels, 0 to {classes - 1}"
            )
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
