# SPDX-License-Identifier: Apache-2.0
"""Reference statistics of real images: files that say by which feature network they were made, and are refused for any other.

The form is EDM's `.npz`: `mu` (d,) and `sigma` (d, d), float64. Files made here also hold `record`, a JSON string with the feature
network's record (`network`), the number of images (`images`) and where they come from (`source`), and maybe `features`, (m, d)
float32 of some images, for metrics that compare samples rather than moments. Files of EDM, AMED or LD3 say nothing of
their network; one must tell.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from .features import FeatureNetwork
from .frechet import Moments
from .whole_files import write_whole


MATCHED = ("network", "preprocessing", "digest", "dim")  # what a reference and a feature network must have in common
SYMMETRY = 1e-8  # of the covariance, relative to its largest entry


@dataclass(frozen=True)
class Reference:
    """Statistics of real images by one feature network.

    Attributes:
        moments: of all images.
        network: the feature network's record; None where the file says nothing.
        images: their number; None where the file says nothing.
        source: where they come from.
        features: (m, d) float32 of some of the images; None: not stored.
        path: the file.
        declared: name of the network as the user told it, for a file that says nothing.
    """

    moments: Moments
    network: dict[str, Any] | None
    images: int | None
    source: dict[str, Any] = field(default_factory=dict)
    features: Tensor | None = None
    path: str = ""
    declared: str | None = None

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of the numbers that it holds."""
        arrays = [self.moments.mean, self.moments.covariance, *([] if self.features is None else [self.features])]
        digest = hashlib.sha256(str(self.moments.count).encode())
        for array in arrays:
            digest.update(array.contiguous().numpy())
        return digest.hexdigest()[:16]

    def check(self, network: FeatureNetwork) -> None:
        """Raises a `ValueError` unless this was made by `network`: the same one, preprocessing and weights."""
        if self.network is None and self.declared != network.name:
            told = (
                f"is told to be of {self.declared!r}"
                if self.declared
                else "does not say which feature network made it"
            )
            raise ValueError(
                f"the reference {self.path!r} {told}, and {network.name!r} is asked for; give --reference_network "
                f"{network.name} only if that is what made it"
            )
        if self.network is not None:
            own, asked = ({key: record.get(key) for key in MATCHED} for record in (self.network, network.record))
            if own != asked:
                raise ValueError(
                    f"the reference {self.path!r} was made by {_sentence(own)}, and {network.name!r} is {_sentence(asked)}; "
                    f"make another one with python -m training.make_reference --feature_network {network.name}"
                )
        if len(self.moments.mean) != network.dim:
            raise ValueError(
                f"the reference {self.path!r} has {len(self.moments.mean)} features, {network.name!r} has {network.dim}; "
                "name the network that made it as --reference_network"
            )

    def stored_features(self) -> Tensor:
        """The features; a `ValueError` where there are none."""
        if self.features is None:
            raise ValueError(
                f"the reference {self.path!r} stores no features, only their moments; make it with "
                "python -m training.make_reference --save_features 10000"
            )
        return self.features

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        record = {"network": self.network, "images": self.images, "source": self.source}
        arrays = {"mu": self.moments.mean.numpy(), "sigma": self.moments.covariance.numpy()}
        if self.features is not None:
            arrays["features"] = self.features.float().numpy()

        def write(file: Path) -> None:
            with file.open("wb") as stream:  # numpy would append .npz to another name
                numpy.savez(stream, record=json.dumps(record), **arrays)

        write_whole(Path(path), write)


def _sentence(record: dict[str, Any]) -> str:
    return f"{record['network']} ({record['dim']} features; {record['preprocessing']}; weights {str(record['digest'])[:8]})"


def load_reference(path: str | Path, declared: str | None = None) -> Reference:
    """A reference from its file.

    Args:
        declared: name of the network that made it, for files that do not say so.

    Raises:
        ValueError: if it cannot be read, or is no reference.
    """
    name = str(path)
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "record", "features") if key in file.files}
    except Exception as error:  # OSError, zip's, and whatever damaged arrays raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the reference {name!r}: {reason}; give an .npz with mu and sigma") from error
    if not {"mu", "sigma"} <= set(arrays):
        raise ValueError(
            f"the reference {name!r} has no mu and sigma; make one with python -m training.make_reference"
        )
    mean, covariance = (torch.from_numpy(numpy.asarray(arrays[key], dtype=numpy.float64)) for key in ("mu", "sigma"))
    _check_arrays(name, mean, covariance)
    facts = _facts(name, arrays.get("record"))
    features = None if "features" not in arrays else torch.from_numpy(arrays["features"]).float()
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
        raise ValueError(f"the features of the reference {name!r} do not fit its mu; make it anew")
    images = facts.get("images")
    return Reference(
        Moments(images, mean, covariance),
        facts.get("network"),
        images,
        facts.get("source") or {},
        features,
        name,
        declared,
    )


def _check_arrays(name: str, mean: Tensor, covariance: Tensor) -> None:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"mu and sigma of the reference {name!r} have shapes {tuple(mean.shape)} and {tuple(covariance.shape)}, not (d,) and "
            "(d, d); give the statistics of one feature network"
        )
    if not bool(mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"mu or sigma of the reference {name!r} is not finite; make it anew")
    if float((covariance - covariance.T).abs().max()) > SYMMETRY * float(covariance.abs().max()):
        raise ValueError(f"sigma of the reference {name!r} is not symmetric, so no covariance; make it anew")


def _facts(name: str, record) -> dict[str, Any]:
    if record is None:
        return {}
    try:
        facts = json.loads(str(record))
        images = facts["images"]
        if not isinstance(facts["network"], dict) or not isinstance(images, int) or images < 2:
            raise ValueError("it names no feature network or number of images")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the record of the reference {name!r} cannot be read ({error}); make it anew") from error
    return facts


def find_reference(references: Sequence[Reference], network: FeatureNetwork, metric: str) -> Reference:
    """The one made by `network`.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if not references:
        raise ValueError(
            f"{metric} compares with real images: give --reference, a file that python -m training.make_reference "
            f"--feature_network {network.name} made"
        )
    fitting, refusals = [], []
    for reference in references:
        try:
            reference.check(network)
            fitting.append(reference)
        except ValueError as error:
            refusals.append(str(error))
    if not fitting:
        raise ValueError("; ".join(refusals) if len(refusals) == 1 else f"{metric}: " + "; or: ".join(refusals))
    if len(fitting) > 1:
        names = ", ".join(reference.path for reference in fitting)
        raise ValueError(f"the references {names} are all of the feature network {network.name!r}; give one of them")
    return fitting[0]
