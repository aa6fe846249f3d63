# SPDX-License-Identifier: Apache-2.0
"""Bounds on the data prediction: not linear, so no part of a step table."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..noise_path import NoisePath
from ..schedule import SolverSpec


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    r"""Clamp to ±s and divide by s, s the `ratio` quantile of each sample's |x0|, between 1 and `max_value`
    (Saharia et al., Imagen, arXiv:2205.11487)."""
    flat = x0.float().abs().flatten(1)
    s = torch.quantile(flat, ratio, dim=1).clamp(min=1.0, max=max(max_value, 1.0))
    s = s.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return torch.maximum(torch.minimum(x0, s), -s) / s


def make_threshold(config) -> Callable[[Tensor], Tensor] | None:
    if config["thresholding"]:
        return _Threshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    if config["clip_sample"]:
        return _Clip(config["clip_sample_range"])
    return None


def check_bounds_data(spec: SolverSpec, path: NoisePath) -> None:
    """Raises a `ValueError` if a solver does not extrapolate the data prediction, so that there is nothing to bound."""
    if spec.make().form(path) != "data":
        raise ValueError(
            f"clip_sample and thresholding bound the data prediction, which {spec.solver} does not extrapolate; "
            "use ddim, dpmpp or unipc with predict_x0=True, or switch them off"
        )


class _Threshold:  # classes, so that schedulers can be pickled
    def __init__(self, ratio, max_value):
        self.ratio, self.max_value = ratio, max_value

    def __call__(self, x0):
        return dynamic_threshold(x0, self.ratio, self.max_value)


class _Clip:
    def __init__(self, bound):
        self.bound = bound

    def __call__(self, x0):
        return x0.clamp(-self.bound, self.bound)
