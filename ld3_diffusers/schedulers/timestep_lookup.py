# SPDX-License-Identifier: Apache-2.0
"""Which step a pipeline means by a timestep: it passes a view of one, a copy, or what a cast has left of it."""

import torch
from torch import Tensor


class TimestepLookup:
    """Finds the steps of a schedule by their timesteps.

    Attributes:
        timesteps: (N,) float32, as pipelines read them, on their device, or what a pipeline has made of them.
        values: the same on the host.
    """

    def __init__(self, timesteps: Tensor, device: str | torch.device | None = None):
        self.timesteps = timesteps.to(device=device, dtype=torch.float32)
        self.values = timesteps.detach().float().tolist()

    def index(self, timestep: float | Tensor) -> int:
        """Where a view of `timesteps` lies in it, else the nearest value.

        Raises:
            ValueError: if none is near.
        """
        viewed = self._index_in_view(timestep)
        if viewed is not None:
            return viewed
        value = float(timestep)
        index, nearest = min(enumerate(self.values), key=lambda pair: abs(pair[1] - value))
        if not is_near(value, nearest):
            raise ValueError(
                f"{value:g} is none of this schedule's timesteps; pass an element of `scheduler.timesteps`"
            )
        return index

    def is_step(self, index: int, timestep: float | Tensor) -> bool:
        """Whether a pipeline means step `index` by this value, or by the first of these."""
        viewed = self._index_in_view(timestep)
        if viewed is not None:
            return viewed == index
        return is_near(float(torch.as_tensor(timestep).reshape(-1)[0]), self.values[index])

    def _index_in_view(self, timestep: float | Tensor) -> int | None:
        """Where a view of one of `timesteps` lies in it, which costs no transfer; None for other values."""
        if not isinstance(timestep, Tensor) or timestep.numel() != 1:
            return None
        if self.timesteps.numel() != len(self.values):
            return None  # a pipeline has put a part of them in their place
        if timestep.untyped_storage().data_ptr() != self.timesteps.untyped_storage().data_ptr():
            return None
        return timestep.storage_offset() - self.timesteps.storage_offset()


def is_near(value: float, timestep: float) -> bool:
    """Whether a pipeline may have made the value of a timestep by casting it to bfloat16, which keeps 8 bits."""
    return abs(value - timestep) <= 2**-8 * max(abs(value), 1e-2)
