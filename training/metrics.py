# SPDX-License-Identifier: Apache-2.0
"""Metrics by name: how far samples are from the teacher's, from their prompts, and as a set from real images.

| name | what | compares with |
|---|---|---|
| `mse` | mean squared difference of the end states (latents) | the teacher, sample by sample |
| `psnr` | peak signal-to-noise ratio of the images, dB; finite also for equal ones | the teacher, sample by sample |
| `lpips`, `stlpips` | perceptual distances of the images | the teacher, sample by sample |
| `clip_score` | 100 max(cos(image, prompt), 0) by CLIP | its prompt, sample by sample |
| `fid` | Frechet distance of features; FID where they are Inception's | a reference |
| `kid` | unbiased MMD of features, also for small sets | a reference with stored features |
| `is` | Inception score of the feature network's class outputs | - |
| `cmmd` | MMD of CLIP embeddings | a reference with stored features, by CLIP |
| `fd_dinov2` | Frechet distance of DINOv2's features (Stein et al., arXiv:2306.04675) | a reference, by DINOv2 |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from .clip_score import CLIPScore
from .features import INCEPTION, TRANSFORMERS, FeatureNetwork, Features, load_feature_network
from .features import StoredFeatures as StoredFeatures  # for those who measure
from .frechet import Moments, frechet_distance, frechet_influence
from .inception_score import SPLITS, inception_score, inception_score_influence
from .kernel_distance import (
    CMMD_SCALE,
    SUBSET_SIZE,
    cmmd,
    cmmd_kernel,
    discrepancy_influence,
    kernel_inception_distances,
    kid_kernel,
    mean_kernel,
)
from .objectives import l2, make_distance
from .references import Reference, find_reference, load_reference


METRICS = ("mse", "psnr", "lpips", "stlpips", "fid", "kid", "is", "clip_score", "cmmd", "fd_dinov2")
CLIP_MODEL = "openai/clip-vit-large-patch14-336"  # CMMD's
DINOV2_MODEL = "facebook/dinov2-large"
SAMPLES_PER_FEATURE = 5  # below, a Frechet distance is mostly bias; 10,000 of Inception, as its authors advise
PERCEPTUAL_BATCH = 16


@dataclass(frozen=True)
class Samples:
    """What one contender, or the teacher, made.

    Attributes:
        ends: (n, ...) float32 end states; None for images from files.
        images: uint8 (n, 3, height, width).
        prompts: one a sample; None where there are none.
    """

    ends: Tensor | None
    images: Tensor
    prompts: list[str] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Metric:
    """A number for a contender.

    Attributes:
        name: as typed.
        label: for tables.
        scale: by which tables multiply the values.
    """

    name: str
    label: str
    scale: float = 1.0
    higher_is_better: bool = False
    needs_teacher: bool = False
    needs_prompts: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleMetric(Metric):
    """One value a sample, by `function` of the samples and the teacher's."""

    function: Callable[[Samples, Samples | None], Tensor]

    def measure(self, samples: Samples, teacher: Samples | None = None) -> Tensor:
        """(n,) float64.

        Raises:
            ValueError: if the teacher's samples, the prompts or the end states are missing, or do not pair.
        """
        if self.needs_teacher:
            if teacher is None:
                raise ValueError(
                    f"{self.name} compares with the teacher's samples; give a teacher, or drop {self.name}"
                )
            if samples.images.shape != teacher.images.shape:
                raise ValueError(
                    f"{self.name} pairs samples with the teacher's, and these are {tuple(samples.images.shape)} and "
                    f"{tuple(teacher.images.shape)}; use the same number and size"
                )
        if self.needs_prompts and samples.prompts is None:
            raise ValueError(f"{self.name} needs the samples' prompts; give them, or drop {self.name}")
        return self.function(samples, teacher).double().cpu()


@dataclass(frozen=True, eq=False, kw_only=True)
class SetMetric(Metric):
    """One value a set of samples.

    Attributes:
        network: what looks at the images.
        outputs: which of its outputs `score` takes: "features" or "logits".
        minimum: the fewest samples for which it is defined.
        advised: with fewer a warning is due.
        reference: what it compares with; None: nothing.
        function: outputs to the value.
        influence_function: outputs to (n,) first-order influences of the samples on the value, of mean 0.
        instead: what to do where samples are too few, after "sample more".
    """

    network: FeatureNetwork
    outputs: str = "features"
    minimum: int
    advised: int
    reference: Reference | None = None
    function: Callable[[Features], float]
    influence_function: Callable[[Features], Tensor]
    instead: str = ""

    def score(self, features: Features) -> float:
        """Raises a `ValueError` where it is not defined for so few samples."""
        _check_minimum(self, len(features))
        return self.function(features)

    def influence(self, features: Features) -> Tensor:
        """(n,) float64, of mean 0, by which samples are bootstrapped as if each had a value of its own: the value + its influence."""
        _check_minimum(self, len(features))
        return self.influence_function(features)


def _check_minimum(metric: SetMetric, count: int) -> None:
    if count < metric.minimum:
        raise ValueError(
            f"{metric.label} is undefined for {count} samples, it needs at least {metric.minimum}; sample more{metric.instead}"
        )


def count_warnings(metrics: Sequence[Metric], count: int) -> list[str]:
    """Sentences about metrics that so few samples make little trustworthy.

    Raises:
        ValueError: for one that is undefined with so few.
    """
    warnings = []
    for metric in metrics:
        if isinstance(metric, SetMetric):
            _check_minimum(metric, count)
            if count < metric.advised:
                warnings.append(
                    f"{metric.label} of {count} samples is rough; trust it from about {metric.advised} on, and compare only "
                    "values of equally many"
                )
    return warnings


# ---------------------------------------------------------------------- making them


def make_metrics(
    names: Sequence[str],
    *,
    feature_network: str = "inception",
    reference: str | Path | Sequence[str | Path] | None = None,
    reference_network: str | None = None,
    clip_model: str = CLIP_MODEL,
    dinov2_model: str = DINOV2_MODEL,
    lpips_net: str = "vgg",
    inception_weights: str | Path | None = None,
    device="cpu",
) -> list[Metric]:
    """The metrics of these names; those of one feature network share it.

    Args:
        names: of `METRICS`.
        feature_network: of `fid`, `kid` and `is`; see training/features.py.
        reference: one or several files; each metric takes the one that its network made.
        reference_network: name of the network that made files which do not say so.
        clip_model: Hub id or folder, for `clip_score` and `cmmd`.
        dinov2_model: Hub id or folder, for `fd_dinov2`.
        lpips_net: "vgg" or "alex".
        inception_weights: file of the Inception weights, in place of fetching them.

    Raises:
        ValueError: for an unknown name, a network that cannot be loaded, or a reference that is missing or of another network.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; use some of {', '.join(METRICS)}")
    paths = [reference] if isinstance(reference, (str, Path)) else list(reference or ())
    references = [load_reference(path, reference_network) for path in paths]

    @cache
    def network(name: str) -> FeatureNetwork:
        weights = inception_weights if name in INCEPTION else None
        return load_feature_network(name, device, inception_weights=weights)

    clip, dinov2 = f"{TRANSFORMERS}{clip_model}", f"{TRANSFORMERS}{dinov2_model}"
    makers: dict[str, Callable[[], Metric]] = {
        "mse": lambda: SampleMetric(name="mse", label="MSE", scale=1e3, needs_teacher=True, function=_mse),
        "psnr": lambda: SampleMetric(
            name="psnr", label="PSNR", higher_is_better=True, needs_teacher=True, function=_psnr
        ),
        "lpips": lambda: _perceptual("lpips", f"LPIPS ({lpips_net})", lpips_net, device),
        "stlpips": lambda: _perceptual("stlpips", "ST-LPIPS", lpips_net, device),
        "clip_score": lambda: _clip_score(clip_model, device),
        "fid": lambda: _frechet("fid", network(feature_network), references),
        "kid": lambda: _kid(network(feature_network), references),
        "is": lambda: _inception_score(network(feature_network)),
        "cmmd": lambda: _cmmd(network(clip), references, clip_model),
        "fd_dinov2": lambda: _frechet("fd_dinov2", network(dinov2), references),
    }
    if not references:
        # Before any network is loaded.
        for name, by in (("fid", feature_network), ("kid", feature_network), ("cmmd", clip), ("fd_dinov2", dinov2)):
            if name in names:
                raise ValueError(
                    f"{name} compares with real images: give --reference, a file that python -m training.make_reference "
                    f"--feature_network {by} made"
                )
    return [makers[name]() for name in dict.fromkeys(names)]


def _short(name: str) -> str:
    """Without folders or the owner on the Hub."""
    return name.rstrip("/").rpartition("/")[2]


def _mse(samples: Samples, teacher: Samples) -> Tensor:
    if samples.ends is None or teacher.ends is None:
        raise ValueError("mse compares end states, which images from files do not have; use psnr")
    return l2(samples.ends.float(), teacher.ends.float())


def _psnr(samples: Samples, teacher: Samples) -> Tensor:
    own, other = samples.images.double(), teacher.images.double()
    found = peak_signal_noise_ratio(own, other, data_range=255.0, reduction="none", dim=(1, 2, 3))
    # Equal pictures are infinitely good, and one of them would hide all others in a mean: as if one value differed by one level.
    return found.clamp(max=10 * math.log10(255**2 * own[0].numel()))


def _perceptual(name: str, label: str, lpips_net: str, device) -> SampleMetric:
    try:
        distance = make_distance(name, "pixel", lpips_net)
    except ImportError as error:
        raise ValueError(str(error)) from error

    @torch.no_grad()
    def function(samples: Samples, teacher: Samples) -> Tensor:
        pairs = zip(samples.images.split(PERCEPTUAL_BATCH), teacher.images.split(PERCEPTUAL_BATCH))
        return torch.cat([distance(*(x.to(device).float() / 127.5 - 1 for x in pair)).cpu() for pair in pairs])

    return SampleMetric(name=name, label=label, needs_teacher=True, function=function)


def _clip_score(model: str, device) -> SampleMetric:
    score = CLIPScore(model, device)
    return SampleMetric(
        name="clip_score",
        label=f"CLIP score ({_short(model)})",
        higher_is_better=True,
        needs_prompts=True,
        function=lambda samples, _teacher: score(samples.images, samples.prompts),
    )


def _frechet(name: str, network: FeatureNetwork, references: list[Reference]) -> SetMetric:
    found = find_reference(references, network, name)
    labels = {"inception": "FID", "inception_ldm": "FID (as latent diffusion)"}
    label = labels.get(network.name, f"Frechet distance ({_short(network.name)})")
    return SetMetric(
        name=name,
        label="FD-DINOv2" if name == "fd_dinov2" else label,
        network=network,
        minimum=network.dim + 1,
        advised=SAMPLES_PER_FEATURE * network.dim,
        instead=", or use kid: the covariance of no more samples than features is singular",
        reference=found,
        function=lambda features: frechet_distance(Moments.of(features.chunks()), found.moments),
        influence_function=lambda features: frechet_influence(features, found.moments),
    )


def _kid(network: FeatureNetwork, references: list[Reference]) -> SetMetric:
    found = find_reference(references, network, "kid")
    rows = found.stored_features()

    return SetMetric(
        name="kid",
        label="KID" if network.name in INCEPTION else f"Kernel distance ({_short(network.name)})",
        scale=1e3,
        network=network,
        minimum=2,
        advised=SUBSET_SIZE,
        reference=found,
        function=lambda features: float(kernel_inception_distances(features, rows).mean()),
        influence_function=lambda features: discrepancy_influence(features, rows, kid_kernel),
    )


def _inception_score(network: FeatureNetwork) -> SetMetric:
    if network.classify is None:
        raise ValueError(
            f"the Inception score needs class outputs, and the feature network {network.name!r} has none; use inception or a "
            "classifier, or drop is"
        )
    return SetMetric(
        name="is",
        label="Inception score" if network.name in INCEPTION else f"Inception score ({_short(network.name)})",
        higher_is_better=True,
        network=network,
        outputs="logits",
        minimum=SPLITS,
        advised=500 * SPLITS,
        function=inception_score,
        influence_function=inception_score_influence,
    )


def _cmmd(network: FeatureNetwork, references: list[Reference], model: str) -> SetMetric:
    found = find_reference(references, network, "cmmd")
    rows = found.stored_features()

    @cache
    def within() -> float:
        return mean_kernel(cmmd_kernel, StoredFeatures(rows), StoredFeatures(rows))

    return SetMetric(
        name="cmmd",
        label="CMMD" if model == CLIP_MODEL else f"CMMD ({_short(model)})",
        network=network,
        minimum=2,
        advised=SUBSET_SIZE,
        reference=found,
        function=lambda features: cmmd(features, rows, within()),
        influence_function=lambda features: CMMD_SCALE * discrepancy_influence(features, rows, cmmd_kernel),
    )
