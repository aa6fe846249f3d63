# SPDX-License-Identifier: Apache-2.0
"""AMED's steps computed directly: with a step's start and its stage as two states, in EDM's variables; on rectified flow in s.
Also predictors of random weights.

y = x/alpha and z = sigma/alpha (flow: x and s). Where the stage is at z_s and the network is told the level w = a z_s, the data
prediction D is that of the state y at w, and the direction d = (y - D)/z_s.
"""

import torch

from ld3_diffusers import AMEDPredictor
from ld3_diffusers.step_table import Executor


MATRIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
START = torch.randn(4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def network(x, t):
    """A network that is not linear in its input, nor in its time; t is () or (batch,)."""
    t = t.reshape(-1, 1)
    return torch.tanh(x @ MATRIX / 2 + t) + 0.3 * torch.sin(3 * t + x)


def _column(value):
    return value if value.ndim == 0 else value[:, None]


class DirectSteps:
    """Runs a schedule of AMED steps from x, of shape (batch, 6)."""

    def __init__(self, path, prediction_type):
        self.path, self.prediction_type = path, prediction_type

    def level(self, t):
        return t if self.path.kind == "flow" else self.path.sigma(t) / self.path.alpha(t)

    def scale(self, t):
        return torch.ones_like(t) if self.path.kind == "flow" else self.path.alpha(t)

    def data(self, y, told):
        """D(y; w), w the level of the time told."""
        kind, told = self.prediction_type, _column(told)
        x, alpha, sigma = self.scale(told) * y, self.path.alpha(told), self.path.sigma(told)
        c_in = 1 / (sigma**2 + self.path.sigma_data**2).sqrt() if self.path.kind == "ve" else 1
        output = network(c_in * x, told)
        if kind == "sample":
            return output
        if kind == "epsilon":
            return (x - sigma * output) / alpha
        if kind == "flow_prediction":
            return x - sigma * output
        if self.path.kind == "ve":  # EDM's c_skip and c_out
            return x / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * output
        return alpha * x - sigma * output

    def __call__(self, schedule, x):
        rows = len(schedule.times) - 1
        solver, times = schedule.spec.solver, schedule.times
        y, before, told, past = x / _column(self.scale(times[0])), None, schedule.network_times, []
        scales = schedule.direction_scales
        for i in range(rows):
            z, z_next, c = (_column(v) for v in (self.level(times[i]), self.level(times[i + 1]), scales[i]))
            data = self.data(y, told[i])
            d = (y - data) / z
            if solver in ("euler", "ipndm"):
                order = min({"euler": 1, "ipndm": schedule.spec.solver_order}[solver], i + 1)
                past = [d, *past][:order]
                y = y + c * (z_next - z) * self.extrapolated(past)
            elif solver == "dpmpp":
                past = [data if schedule.spec.predict_x0 else d, *past]
                y = self.multistep(schedule, i, y, past, c)
            elif i % 2 == 0:
                before = y, z, d
                y = y + c * (z_next - z) * d
            else:
                y = self.two_stage(solver, *before, y, z, z_next, d, c)
        return y * _column(self.scale(times[-1]))

    @staticmethod
    def extrapolated(past):
        weights = [[1], [3, -1], [23, -16, 5], [55, -59, 37, -9]][len(past) - 1]
        return sum(w * d for w, d in zip(weights, past)) / sum(weights)

    @staticmethod
    def two_stage(solver, y, z, d, y_stage, z_stage, z_next, d_stage, c):
        step = c * (z_next - z)
        if solver == "amed":
            return y + step * d_stage
        if solver == "heun":
            return y + step * (d + d_stage) / 2
        if (z_next == 0).any():  # dpm2 has no r there, and goes on from the stage
            return y_stage + c * (z_next - z_stage) * d_stage
        r = torch.log(z_stage / z) / torch.log(z_next / z)
        return y + step * (d_stage / (2 * r) + (1 - 1 / (2 * r)) * d)

    def multistep(self, schedule, i, y, past, c):
        """DPM-Solver++(2M) in x; its factor multiplies the model's terms."""
        path, times = self.path, schedule.times[: i + 2]
        alpha, sigma = (_column(part[i]) for part in (path.alpha(times), path.sigma(times)))
        alpha_next, sigma_next = (_column(part[i + 1]) for part in (path.alpha(times), path.sigma(times)))
        m = past[0]
        if 0 < i < len(schedule.times) - 2:  # of first order at both ends
            lam = torch.log(path.alpha(times[i - 1 :]) / path.sigma(times[i - 1 :]))
            h, h_before = lam[2] - lam[1], lam[1] - lam[0]
            m = m + _column(h / (2 * h_before)) * (past[0] - past[1])
        x = y * _column(self.scale(times[i]))
        if schedule.spec.predict_x0:
            x = sigma_next / sigma * x + c * (alpha_next - alpha * sigma_next / sigma) * m
        else:
            x = alpha_next / alpha * x + c * (sigma_next - sigma * alpha_next / alpha) * m
        return x / _column(self.scale(times[i + 1]))


def by_table(table, x):
    """The same through a step table."""
    executor = Executor(table)
    for t, scale in zip(table.network_times, table.input_scale):
        x = executor.step(x, network(_column(scale) * x, t))
    return x


def random_predictor(seed=0, **options):
    """With weights, biases and logits that are all random."""
    predictor = AMEDPredictor(**{"scale_dir": 0.01, "scale_time": 0.2, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return predictor
