# SPDX-License-Identifier: Apache-2.0
"""The network that places AMED's stages (Zhou et al., arXiv:2312.00094), of 8,971 parameters."""

import hashlib
import inspect
import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .amed import FORMS, STUDENTS, StepPrediction
from .schedule import is_number


LARGEST = 4096  # of all sizes, so that a config cannot ask for all memory
FEATURE_SIZE = 8  # of the pooled bottleneck; published for images whose bottleneck has that size by itself


class AMEDPredictor(ModelMixin, ConfigMixin):
    r"""$(r, c, a)$ of a step from $t_n$ to $t_{n+1}$, see [`amed`].

    Per sample, from the denoiser's bottleneck h at $t_n$, averaged over channels and pooled to 8 x 8, and from both noise levels z:

    $$ v = [\,W_2\,\mathrm{silu}(W_1 h),\ \mathrm{silu}(W_0 e(z_n)),\ \mathrm{silu}(W_0 e(z_{n+1}))\,], \qquad
       r = \mathrm{sigmoid}(w_r v), \quad c = 1 + s_c(2\,\mathrm{sigmoid}(w_c v) - 1), \quad a = 1 + s_a(2\,\mathrm{sigmoid}(w_a v) - 1) $$

    with $e(z) = [\sin(z f_k), \cos(z f_k)]$, $f_k = 10000^{-k/3}$, k = 0..3; all layers have biases. The static form has a free logit
    in place of each $w v$ for each step, at first 0, which is the bare solver; it looks at nothing.

    Args:
        form: "per_sample" or "static".
        scale_dir: $s_c$, how far c may be from 1; 0: no such head.
        scale_time: $s_a$, the same of a.
        hidden_dim, bottleneck_input_dim, bottleneck_output_dim, noise_channels: sizes.
        num_steps: student steps; needed by the static form.
        solver, solver_order, predict_x0, lower_order_final, afs: the student that it was trained with, see [`SolverSpec`].
        z_max, z_min: range of the noise levels that it was trained on.
        bottleneck: the denoiser's module whose output h is.

    Raises:
        ValueError: for an unknown form or student, a scale outside [0, 1), or impossible sizes.
    """

    @register_to_config
    def __init__(
        self,
        form: str = "per_sample",
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
        hidden_dim: int = 128,
        bottleneck_input_dim: int = FEATURE_SIZE**2,
        bottleneck_output_dim: int = 4,
        noise_channels: int = 8,
        num_steps: int | None = None,
        solver: str = "amed",
        solver_order: int | None = None,
        predict_x0: bool = True,
        lower_order_final: bool = True,
        afs: bool = False,
        z_max: float | None = None,
        z_min: float | None = None,
        bottleneck: str = "mid_block",
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r} of a predictor; use one of {', '.join(FORMS)}")
        if solver not in STUDENTS:
            raise ValueError(f"{solver!r} is no solver of AMED steps; use one of {', '.join(STUDENTS)}")
        for name, scale in (("scale_dir", scale_dir), ("scale_time", scale_time)):
            if not is_number(scale) or not 0 <= scale < 1:
                raise ValueError(f"{name} must be a number of at least 0 and below 1, got {scale!r:.60}")
        for name, z in (("z_max", z_max), ("z_min", z_min)):
            if z is not None and not is_number(z):
                raise ValueError(f"{name} must be a finite number, got {z!r:.60}")
        steps = 1 if num_steps is None else num_steps
        sizes = (hidden_dim, bottleneck_input_dim, bottleneck_output_dim, noise_channels, steps)
        if not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
            raise ValueError(f"sizes of a predictor are integers from 1 to {LARGEST}, got {str(sizes):.100}")
        if noise_channels % 2 or noise_channels < 4:
            raise ValueError(f"noise_channels must be even and at least 4, got {noise_channels}")
        if math.isqrt(bottleneck_input_dim) ** 2 != bottleneck_input_dim:
            raise ValueError(f"bottleneck_input_dim must be a square, as 8 x 8 = 64, got {bottleneck_input_dim}")
        self._scales = {"fc_r": None, "fc_scale_dir": scale_dir, "fc_scale_time": scale_time}
        heads = [name for name, scale in self._scales.items() if scale != 0]
        if form == "static":
            if num_steps is None:
                raise ValueError("the static form needs num_steps, the number of student steps")
            self.logits = nn.ParameterList([nn.Parameter(torch.zeros(len(heads))) for _ in range(num_steps)])
            return
        self.map_layer0 = nn.Linear(noise_channels, noise_channels)
        self.enc_layer0 = nn.Linear(bottleneck_input_dim, hidden_dim)
        self.enc_layer1 = nn.Linear(hidden_dim, bottleneck_output_dim)
        width = bottleneck_output_dim + 2 * noise_channels
        for name in heads:
            setattr(self, name, nn.Linear(width, 1))
        nn.init.xavier_uniform_(self.map_layer0.weight)
        for name in ("enc_layer0", "enc_layer1", *heads):
            nn.init.normal_(getattr(self, name).weight, std=getattr(self, name).in_features ** -0.5)
        for layer in self.children():
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def start_bare(self) -> None:
        """Let all heads begin at 0, which is the bare solver, in place of the published random start."""
        for name in self._scales:
            if hasattr(self, name):
                getattr(self, name).weight.zero_()

    def forward(
        self, features: Tensor | None, z: Tensor | float, z_next: Tensor | float, step: int = 0
    ) -> StepPrediction:
        """The prediction for `step`, float64 on the CPU, where step tables are made.

        Args:
            features: (batch, height, width) means over the channels of the bottleneck; None: zeros, of one sample, as for an
                analytical first step, which calls no network.
            z, z_next: noise levels of the step's ends; one each.

        Returns:
            (batch,) values each; of the static form ().
        """
        if self.config.form == "static":
            values = dict(zip([name for name, scale in self._scales.items() if scale != 0], self.logits[step]))
        else:
            v = self._hidden(features, z, z_next)
            values = {name: getattr(self, name)(v)[:, 0] for name, scale in self._scales.items() if scale != 0}
        shares = (
            torch.sigmoid(torch.stack([*values.values()])).cpu().double()
        )  # one transfer; Apple's GPUs have no float64
        shares = dict(zip(values, shares.unbind()))
        one = torch.ones_like(shares["fc_r"])
        scales = [
            1 + scale * (2 * shares[name] - 1) if name in shares else one
            for name, scale in self._scales.items()
            if name != "fc_r"
        ]
        return StepPrediction(shares["fc_r"], *scales)

    def _hidden(self, features, z, z_next) -> Tensor:
        weight = self.enc_layer0.weight
        side = math.isqrt(self.config.bottleneck_input_dim)
        if features is None:
            features = weight.new_zeros(1, side, side)
        if features.shape[-2:] != (side, side):
            features = nn.functional.adaptive_avg_pool2d(features[:, None].float(), side)[:, 0]
        pooled = features.flatten(1).to(weight)
        encoded = self.enc_layer1(nn.functional.silu(self.enc_layer0(pooled)))
        levels = torch.stack([torch.as_tensor(level, dtype=torch.float64) for level in (z, z_next)])
        times = nn.functional.silu(self.map_layer0(self._embedding(levels).to(weight))).flatten()
        return torch.cat([encoded, times.expand(len(encoded), -1)], 1)

    def _embedding(self, z: Tensor) -> Tensor:
        half = self.config.noise_channels // 2
        frequencies = (1 / 10000) ** (torch.arange(half, dtype=torch.float32) / (half - 1))  # float32, as published
        angles = z[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)

    def digest(self) -> str:
        """Sixteen hexadecimal digits of the weights and of what they were trained for.

        Options at their defaults do not enter, so that those of later versions leave it as it is.
        """
        options = inspect.signature(type(self).__init__).parameters
        kept = {key: self.config[key] for key in sorted(options) if key != "self"}
        kept = {key: value for key, value in kept.items() if value != options[key].default}
        content = hashlib.sha256(repr(kept).encode())
        for name, tensor in sorted(self.state_dict().items()):
            content.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]
