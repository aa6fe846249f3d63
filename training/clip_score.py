# SPDX-License-Identifier: Apache-2.0
r"""CLIP score (Hessel et al., arXiv:2104.08718): 100 max(cos(image, prompt), 0) of CLIP's embeddings, sample by sample."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .features import check_images, image_embeddings, load_from_transformers, prepared_pixels, whole_image


class CLIPScore:
    """Images and their prompts to scores.

    Args:
        name: Hub id or folder of a `CLIPModel` of transformers with its tokenizer and image processor.

    Raises:
        ValueError: if it cannot be loaded.
    """

    def __init__(self, name: str, device="cpu", batch_size: int = 32):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.device, self.batch_size = torch.device(device), batch_size
        self.processor = load_from_transformers(AutoImageProcessor, name, backend="pil")
        self.tokenizer = load_from_transformers(AutoTokenizer, name)
        model = load_from_transformers(CLIPModel, name, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(n,) float64 scores of uint8 images (n, 3, height, width), the i-th with prompt i; longer prompts are truncated.

        Raises:
            ValueError: if there are not as many prompts as images.
        """
        check_images(images)
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts do not pair; give one prompt an image")
        starts = range(0, len(images), self.batch_size)
        scores = [self._batch(images[k : k + self.batch_size], list(prompts[k : k + self.batch_size])) for k in starts]
        return torch.cat(scores) if scores else torch.empty(0, dtype=torch.float64)

    def _batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = prepared_pixels(self.processor, images, **whole_image(self.processor)).to(self.device)
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = self.model.get_text_features(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        )
        text = text if isinstance(text, Tensor) else text.pooler_output
        cosine = F.cosine_similarity(image_embeddings(self.model, pixels).double(), text.double())
        return (100 * cosine.clamp(min=0)).cpu()
