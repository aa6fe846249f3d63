# SPDX-License-Identifier: Apache-2.0
r"""Latent diffusion (Rombach et al., arXiv:2112.10752), unconditional or for classes of ImageNet, sampled in one
pipeline.

Diffusion runs in the latents of an autoencoder, `VQModel` or `AutoencoderKL`: the image is $decode(z / s)$ with its
`scaling_factor` s. The network is Diffusers': an unconditional `UNet2DModel`, or a `UNet2DConditionModel` that attends
to one token, the embedding of the class. Classifier-free guidance of scale w (Ho & Salimans, arXiv:2207.12598)
evaluates one doubled batch, without and with the class:

$$ \epsilon = \epsilon_\emptyset + w (\epsilon_y - \epsilon_\emptyset). $$

This file stands alone: it also works as a Diffusers custom pipeline.
"""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class LDMClassEmbedder(ModelMixin, ConfigMixin):
    """Embeddings of classes, and in the last row that of no class.

    Args:
        num_class_embeds: classes, without the null class.
        embed_dim: width of an embedding, the network's `cross_attention_dim`.
    """

    @register_to_config
    def __init__(self, num_class_embeds: int = 1000, embed_dim: int = 512):
        super().__init__()
        self.embedding = nn.Embedding(num_class_embeds + 1, embed_dim)

    @property
    def null_class(self) -> int:
        return self.config.num_class_embeds

    def forward(self, class_labels: Tensor) -> Tensor:
        """(batch,) class numbers to (batch, 1, embed_dim), one token each."""
        return self.embedding(class_labels)[:, None]


class LatentDiffusionPipeline(DiffusionPipeline):
    """Samples images with a latent-diffusion network.

    Args:
        vae: `VQModel` or `AutoencoderKL`.
        unet: `UNet2DModel`, or with a class embedder `UNet2DConditionModel`.
        scheduler: any of the usual interface, such as `DDIMScheduler` or `LD3Scheduler`.
        class_embedder: None: unconditional.
    """

    model_cpu_offload_seq = "class_embedder->unet->vae"
    _optional_components = ["class_embedder"]

    def __init__(self, vae, unet, scheduler, class_embedder=None):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, class_embedder=class_embedder)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

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
            class_labels: of a class-conditional network, one for all or one each.
            guidance_scale: w of classifier-free guidance; 1: none.
            num_inference_steps: of the scheduler.
            generator: one for all or one each, from which the starting noise is drawn.
            latents: (batch, channels, height, width) unit-normal starting noise.
            output_type: "pil", "np", "pt", or "latent" for the end state, which is s times what the autoencoder
            decodes.

        Raises:
            ValueError: for labels that the network does not have or are missing, guidance without classes, and latents
            of another shape.
        """
        batch_size = _batch_size(batch_size, class_labels, latents, generator)
        guided = guidance_scale != 1
        conditioning = self._conditioning(class_labels, batch_size, guided, guidance_scale)
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
            doubled = torch.cat([latents, latents]) if guided else latents
            output = self.unet(self.scheduler.scale_model_input(doubled, t), t, **conditioning).sample
            if guided:
                without, with_class = output.chunk(2)
                output = without + guidance_scale * (with_class - without)
            latents = self.scheduler.step(output, t, latents, **drawn).prev_sample

        images = latents
        if output_type != "latent":
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditioning(self, class_labels, batch_size: int, guided: bool, guidance_scale: float) -> dict[str, Tensor]:
        """What the network is given beside latents and time."""
        if self.class_embedder is None:
            if class_labels is not None or guided:
                wrong = "class_labels" if class_labels is not None else f"guidance_scale={guidance_scale}"
                raise ValueError(f"the network of this pipeline is unconditional; drop {wrong}")
            return {}
        null = self.class_embedder.null_class
        if class_labels is None:
            raise ValueError(f"the network of this pipeline is class-conditional; give class_labels, 0 to {null - 1}")
        labels = _integers(class_labels)
        if not bool(((labels >= 0) & (labels < null)).all()):
            raise ValueError(f"class_labels must be integers from 0 to {null - 1}, got {labels.tolist()}")
        if len(labels) not in (1, batch_size):
            raise ValueError(f"{len(labels)} class_labels are given for {batch_size} images; give one, or one each")
        labels = labels.expand(batch_size)
        if guided:
            labels = torch.cat([torch.full_like(labels, null), labels])
        return {"encoder_hidden_states": self.class_embedder(labels.to(self._execution_device))}


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
