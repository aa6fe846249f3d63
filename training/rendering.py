# SPDX-License-Identifier: Apache-2.0
"""End states as 8-bit pictures, rounded as Diffusers' image processor rounds them, and as PNG files."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .rollout import PipelineRollout
from .whole_files import write_whole


@torch.no_grad()
def rendered(rollout: PipelineRollout, ends: Tensor, decode_batch_size: int = 8) -> Tensor:
    """uint8 (batch, 3, height, width) on the host; black where an end state is not finite.

    Raises:
        ValueError: for videos, or end states that cannot be decoded.
    """
    finite = torch.isfinite(ends.flatten(1)).all(1)
    dtype = _dtype(rollout)
    images = []
    for chunk in torch.where(finite.reshape(-1, *[1] * (ends.ndim - 1)), ends, 0).split(decode_batch_size):
        pixels = rollout.decode(chunk.to(rollout.device, dtype))
        if pixels.ndim != 4:
            raise ValueError(
                f"{type(rollout.pipe).__name__} samples videos, which have no picture metrics here; use --metrics mse, which compares "
                "end states"
            )
        pixels = (pixels * 0.5 + 0.5).clamp(0, 1).float().cpu()
        images.append((pixels * 255).round().to(torch.uint8).expand(-1, 3, -1, -1))
    images = torch.cat(images)
    images[~finite] = 0
    return images


def _dtype(rollout: PipelineRollout) -> torch.dtype:
    autoencoder = getattr(rollout.pipe, "vae", None) or getattr(rollout.pipe, "vqvae", None)
    return torch.float32 if autoencoder is None else autoencoder.dtype


def write_png(file: Path, image: Tensor) -> None:
    """uint8 (3, height, width), whole or not at all."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    write_whole(file, lambda path: picture.save(path, format="PNG"))


def read_png(file: Path) -> Tensor:
    """uint8 (3, height, width)."""
    with Image.open(file) as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.reshape(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def save_sheet(file: Path, images: list[Tensor], captions: list[str], columns: int = 8) -> None:
    """Pictures, uint8 (3, height, width), in rows of `columns`, each under its caption."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.2 * min(columns, len(images)), 1.4 * rows), layout="constrained")
    axes = figure.subplots(rows, min(columns, len(images)), squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(caption, fontsize=7)
    write_whole(file, lambda path: figure.savefig(path, dpi=120))
