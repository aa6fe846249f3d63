# SPDX-License-Identifier: Apache-2.0
"""Feature networks: uint8 images to the vectors between which distributions of images are compared, and their identity.

A distance between distributions is one of its network, its weights and its preprocessing together. A [`FeatureNetwork`]
carries all three as a `record`, by which references made by another one are told apart.

| name | network, preprocessing |
|---|---|
| `inception` | Inception-v3 of 2015-12-05 as EDM, AMED and LD3 use it: TensorFlow 1's bilinear resize to 299, (x - 128) / 128 |
| `inception_ldm` | the same weights as pytorch-fid and latent diffusion use them: PyTorch's bilinear resize, [-1, 1] |
| `transformers:<Hub id or folder>` | projected image embeddings of CLIP and its kin, else the pooled output (DINOv2: CLS token) |
| `<file.py>:<name>`, `<package.module>:<name>` | your own |
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from torch.nn import functional as F


INCEPTION = ("inception", "inception_ldm")
TRANSFORMERS = "transformers:"
INCEPTION_SIDE = 299
PREPROCESSING = {
    "inception": "bilinear resize of TensorFlow 1 to 299 x 299, (x - 128) / 128",
    "inception_ldm": "bilinear resize of PyTorch to 299 x 299, x / 127.5 - 1",
}
_PROBE = (1, 3, 64, 64)
CHUNK_SIZE = 2048  # rows of features in memory at once


class Features(Protocol):
    """Features, or logits, of one contender by one network, in the order of the samples; they may lie on disk."""

    def __len__(self) -> int: ...

    def chunks(self) -> Iterator[Tensor]:
        """(k, d) float32 after (k, d) float32, in order."""
        ...

    def select(self, indices: list[int]) -> Tensor:
        """(len(indices), d) float32, in the order of `indices`."""
        ...


@dataclass(frozen=True)
class StoredFeatures:
    """[`Features`] in memory, (n, d)."""

    rows: Tensor
    chunk_size: int = CHUNK_SIZE

    def __len__(self) -> int:
        return len(self.rows)

    def chunks(self) -> Iterator[Tensor]:
        yield from self.rows.split(self.chunk_size)

    def select(self, indices: list[int]) -> Tensor:
        return self.rows[torch.as_tensor(indices, dtype=torch.long)]


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """uint8 (n, 3, height, width) RGB images on any device to (n, dim) float32 features on the host, without a gradient.

    Attributes:
        name: as the user typed it.
        record: `network`, `preprocessing`, `digest` of the weights, `dim`: what a reference must have been made with.
        device: where it computes.
        extract: images on `device` to features.
        classify: images on `device` to logits; None: no class outputs.
    """

    name: str
    record: dict[str, Any]
    device: torch.device
    extract: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None

    @property
    def dim(self) -> int:
        return self.record["dim"]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        features = self.extract(images.to(self.device)).detach().float().cpu()
        if features.shape != (len(images), self.dim):
            raise ValueError(
                f"the feature network {self.name!r} gave {tuple(features.shape)} for {len(images)} images, not "
                f"({len(images)}, {self.dim}); return one vector an image"
            )
        return features

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(n, classes) float32 on the host.

        Raises:
            ValueError: if the network has no class outputs.
        """
        if self.classify is None:
            raise ValueError(
                f"the feature network {self.name!r} has no class outputs; the Inception score needs a classifier"
            )
        check_images(images)
        return self.classify(images.to(self.device)).detach().float().cpu()


def check_images(images: Tensor) -> None:
    """Raises a `ValueError` unless these are uint8 (n, 3, height, width)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"feature networks take uint8 images (n, 3, height, width), got {images.dtype} {tuple(images.shape)}; round to 8 "
            "bits and repeat grey images thrice"
        )


def weights_digest(module: nn.Module) -> str:
    """Hexadecimal digest of all weights with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def load_feature_network(name: str, device="cpu", *, inception_weights: str | Path | None = None) -> FeatureNetwork:
    """The network of that name.

    Args:
        name: see the table above.
        inception_weights: file of torch-fidelity's Inception weights (`weights-inception-2015-12-05-6726825d.pth`), for
            machines without a connection; default: fetched once.

    Raises:
        ValueError: for an unknown name, or a network that cannot be loaded, saying why.
    """
    device = torch.device(device)
    if name in INCEPTION:
        return _inception(name, device, inception_weights)
    if name.startswith(TRANSFORMERS):
        return _transformers(name, device)
    place, _, attribute = name.rpartition(":")
    if place and attribute.isidentifier():
        return _own(name, place, attribute, device)
    raise ValueError(
        f"unknown feature network {name!r}; use inception, inception_ldm, transformers:<Hub id or folder>, <file.py>:<name> or "
        "<package.module>:<name>"
    )


# ---------------------------------------------------------------------- Inception


def _inception(name: str, device: torch.device, weights: str | Path | None) -> FeatureNetwork:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    except ImportError as error:
        raise ValueError(
            f"the feature network {name!r} needs the packages torch-fidelity and torchvision ({error}); install them with "
            "`pip install torch-fidelity`, or choose another --feature_network"
        ) from error
    extractor = _with_weights(FeatureExtractorInceptionV3, weights).to(device)
    # Its parts are registered in the order in which its forward pass calls them; the last one classifies.
    trunk, head = nn.Sequential(*list(extractor.children())[:-1], nn.Flatten()), extractor.fc
    size = (INCEPTION_SIDE, INCEPTION_SIDE)

    def prepare(images: Tensor) -> Tensor:
        if name == "inception":
            return (interpolate_bilinear_2d_like_tensorflow1x(images.float(), size, align_corners=False) - 128) / 128
        return 2 * F.interpolate(images.float() / 255, size, mode="bilinear", align_corners=False) - 1

    def features(images: Tensor) -> Tensor:
        return trunk(prepare(images))

    record = {
        "network": "Inception-v3 of 2015-12-05, 2048 features of pool3",
        "preprocessing": PREPROCESSING[name],
        "digest": weights_digest(extractor),
        "dim": head.in_features,
    }
    # The class outputs without a bias, as the Inception score has always been computed.
    return FeatureNetwork(name, record, device, features, lambda images: features(images) @ head.weight.T)


def _with_weights(extractor: Callable[..., nn.Module], weights: str | Path | None) -> nn.Module:
    if weights is not None:
        # torch-fidelity unpickles whatever the file holds; here it may hold tensors only.
        try:
            torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # OSError, pickle's, zip's, torch's own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"cannot read the Inception weights {str(weights)!r}: {reason}; give the file that torch-fidelity fetches"
            ) from error
    try:
        return extractor("inception", ["2048"], feature_extractor_weights_path=weights)
    except OSError as error:
        raise ValueError(
            f"the Inception weights could not be fetched ({error}); connect, or name their file with --inception_weights"
        ) from error
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(weights)!r} does not hold the Inception weights of torch-fidelity; give the file that it fetches"
        ) from error


# ---------------------------------------------------------------------- transformers


def load_from_transformers(kind: Any, name: str, **options) -> Any:
    """`kind.from_pretrained(name, **options)`; a `ValueError` says why it cannot be loaded."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load {name!r} with transformers: {reason}; give a model's folder or Hub id, or connect"
        ) from error


def whole_image(processor: Any) -> dict[str, Any]:
    """Options of an image processor with which it resizes the whole image to the network's size and cuts nothing off.

    So do the programs behind the published FD-DINOv2 and CMMD numbers.
    """
    crop = getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False) or crop is None:
        return {}
    return {"size": {"height": crop["height"], "width": crop["width"]}, "do_center_crop": False}


def prepared_pixels(processor: Any, images: Tensor, **options) -> Tensor:
    """What an image processor makes of uint8 images (n, 3, height, width)."""
    return processor(
        images=list(images.cpu()), input_data_format="channels_first", return_tensors="pt", **options
    ).pixel_values


def image_embeddings(model: Any, pixels: Tensor) -> Tensor:
    """(n, d) projected image embeddings of CLIP and its kin; of other networks the pooled output, or else the first token."""
    if hasattr(model, "get_image_features"):
        outputs = model.get_image_features(pixel_values=pixels)
    else:
        outputs = model(pixel_values=pixels)
    if isinstance(outputs, Tensor):
        return outputs
    pooled = outputs.get("pooler_output")
    return outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def _transformers(name: str, device: torch.device) -> FeatureNetwork:
    from transformers import AutoImageProcessor, AutoModel

    source = name.removeprefix(TRANSFORMERS)
    # One backend everywhere: torchvision's resize is not Pillow's.
    processor = load_from_transformers(AutoImageProcessor, source, backend="pil")
    model = load_from_transformers(AutoModel, source, dtype=torch.float32).eval().requires_grad_(False).to(device)
    options = whole_image(processor)
    settings = {**processor.to_dict(), **options}
    kept = ("size", "do_center_crop", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
    size = settings.get("size") or {}

    def features(images: Tensor) -> Tensor:
        return image_embeddings(model, prepared_pixels(processor, images, **options).to(device))

    with torch.no_grad():
        dim = features(torch.zeros(_PROBE, dtype=torch.uint8)).shape[1]
    details = ", ".join(f"{key} {_plain(settings[key])}" for key in kept if settings.get(key) is not None)
    record = {
        "network": f"{type(model).__name__} of transformers",
        "preprocessing": f"Pillow: {details}" if size else "Pillow",
        "digest": weights_digest(model),
        "dim": dim,
    }
    return FeatureNetwork(name, record, device, features)


def _plain(setting: Any) -> Any:
    """A setting as it reads in every version: sizes as width x height, numbers as they are."""
    if hasattr(setting, "items"):
        return " x ".join(str(value) for _, value in sorted(setting.items()) if value is not None)
    return int(setting) if isinstance(setting, int) and not isinstance(setting, bool) else setting


# ---------------------------------------------------------------------- your own


def _own(name: str, place: str, attribute: str, device: torch.device) -> FeatureNetwork:
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_package(place)
    if not hasattr(module, attribute):
        raise ValueError(f"{place} has no {attribute!r}; the feature network {name!r} must be a name in it")
    network = getattr(module, attribute)
    if not callable(network):
        raise ValueError(
            f"the feature network {name!r} is no function, class or module; it must map images to features"
        )
    if not isinstance(network, nn.Module) and _is_factory(network):
        network = network()
    if isinstance(network, nn.Module):
        network = network.eval().requires_grad_(False).to(device)
    given = dict(getattr(network, "record", None) or {})
    record = {
        "network": given.get("network") or f"{module.__name__.rpartition('.')[2]}:{attribute}",
        "preprocessing": given.get("preprocessing") or "its own",
        "digest": given.get("digest") or _own_digest(network, module),
        "dim": given.get("dim") or getattr(network, "dim", None),
    }
    if record["dim"] is None:
        with torch.no_grad():
            record["dim"] = network(torch.zeros(_PROBE, dtype=torch.uint8, device=device)).shape[1]
    return FeatureNetwork(name, record, device, network, getattr(network, "logits", None))


def _is_factory(network: Callable) -> bool:
    if inspect.isclass(network):
        return True
    if not inspect.isfunction(network):
        return False
    parameters = inspect.signature(network).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _own_digest(network: Any, module: Any) -> str:
    if isinstance(network, nn.Module):
        return weights_digest(network)
    # A function's weights cannot be seen; its file can.
    return hashlib.sha256(Path(inspect.getsourcefile(module)).read_bytes()).hexdigest()[:32]


def _module_of_file(path: Path):
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; name the feature network as <file.py>:<name>")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    # As if the file were run: it may import its neighbours.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _module_of_package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {name!r}: {error}; name the feature network as <package.module>:<name>"
        ) from error
