# SPDX-License-Identifier: Apache-2.0
r"""Align Your Steps: published noise levels of 10 steps (Sabour et al., arXiv:2404.14507), as Diffusers ships them.

The authors minimised an upper bound on the divergence between the sampler's distribution and the data's, for three
models. Diffusers' `AysSchedules` has 11 levels a model, the last one 0; it stands for the level of `t_min`, the authors'
own end, here:

| name | table | path |
|---|---|---|
| `ays_sd15` | Stable Diffusion 1.5, timesteps 999, 850, ..., 24 | discrete betas |
| `ays_sdxl` | Stable Diffusion XL, timesteps 999, 845, ..., 13 | discrete betas |
| `ays_svd` | Stable Video Diffusion, sigma/alpha 700, 54.5, ..., 0.034 | variance-exploding |
| `ays` | the one that fits the path; of the first two, which share their betas, `ays_sd15` | |

The image models' tables are read in timesteps, whose sigmas Diffusers lists rounded. For N other than 10,
$\log\sigma^{edm}$ is interpolated linearly in i/N, as the authors do.
"""

from typing import NamedTuple

import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from .noise_path import NoisePath, float64


class AYSTable(NamedTuple):
    model: str
    key: str  # in Diffusers' `AysSchedules`, before "Timesteps" and "Sigmas"
    path_kind: str


TABLES = {
    "ays_sd15": AYSTable("Stable Diffusion 1.5", "StableDiffusion", "vp_discrete"),
    "ays_sdxl": AYSTable("Stable Diffusion XL", "StableDiffusionXL", "vp_discrete"),
    "ays_svd": AYSTable("Stable Video Diffusion", "StableDiffusionVideo", "ve"),
}
# The tables' sigmas have three decimals: SDXL's last, .113, is .1114 at its timestep.
SAME_SIGMA = 0.02


def _sigmas(table: AYSTable, path: NoisePath) -> Tensor | None:
    """sigma/alpha (11,) of the table's levels on a path, the last that of `t_min`; None if the table is not for it."""
    if path.kind != table.path_kind:
        return None
    listed = sigmas = float64(AysSchedules[f"{table.key}Sigmas"])[:-1]
    if f"{table.key}Timesteps" in AysSchedules:
        times = path.time(float64(AysSchedules[f"{table.key}Timesteps"]))
        if bool(times.max() > path.t_max * (1 + 1e-9)):
            return None
        sigmas = path.sigma_edm(times)
    first, last = path.sigma_edm(float64([path.t_max, path.t_min]))
    away = torch.cat([sigmas / listed, first[None] / listed[:1]]) - 1
    if bool((away.abs() > SAME_SIGMA).any()) or not bool(last < listed[-1]):
        return None
    return torch.cat([first[None], sigmas[1:], last[None]])


def ays(name: str, path: NoisePath, num_steps: int) -> Tensor:
    """The times (num_steps + 1,) of a table of the module's docstring, from the path's `t_max` to its `t_min`.

    Raises:
        ValueError: if no table, or not this one, was made for such a path.
    """
    found = {
        key: sigmas
        for key, table in TABLES.items()
        if name in ("ays", key) and (sigmas := _sigmas(table, path)) is not None
    }
    if not found:
        first = float(path.sigma_edm(float64(path.t_max)))
        other = "flow_linear" if path.kind == "flow" else "polynomial"
        wanted = " or ".join(t.model for key, t in TABLES.items() if name in ("ays", key))
        raise ValueError(
            f"discretization {name!r} is not applicable: its levels were made for {wanted}, and this {path.kind!r} path, "
            f"whose sigma/alpha starts at {first:.4g}, is of another model; use {other!r}"
        )
    log_sigma = next(iter(found.values())).log()
    position = torch.linspace(0, len(log_sigma) - 1, num_steps + 1, dtype=torch.float64)
    left = position.floor().long().clamp(max=len(log_sigma) - 2)
    return path.inverse_lam(-torch.lerp(log_sigma[left], log_sigma[left + 1], position - left))
