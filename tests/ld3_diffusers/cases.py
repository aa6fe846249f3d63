# SPDX-License-Identifier: Apache-2.0
"""Every solver, order and variant, and one path of each kind."""

import torch

from ld3_diffusers.noise_path import VE, RectifiedFlow, VPCosine, VPDiscrete, VPLinear, alphas_cumprod_from_config
from ld3_diffusers.solvers import ORDERS, VARIANTS, make_solver


SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

PATHS = {
    "vp_discrete": VPDiscrete(alphas_cumprod_from_config(SD).double().log() / 2),
    "vp_linear": VPLinear(),
    "vp_cosine": VPCosine(),
    "ve": VE(),
    "edm": VE(sigma_data=0.5, preconditioned=True),
    "flow": RectifiedFlow(),
}


def _solvers():
    """Built without `lower_order_final`, so that a row's order depends on what came before it only."""
    for name, orders in ORDERS.items():
        for order in orders:
            for variant in VARIANTS.get(name, (None,)):
                if name == "dpmpp" and variant == "heun" and order != 2:
                    continue  # the variant exists at order 2 only
                for form in ("data", "noise") if name in ("dpmpp", "unipc") else (None,):
                    label = "-".join(str(part) for part in (name, order, variant, form) if part is not None)
                    options = {"order": order, "variant": variant, "predict_x0": form != "noise"}
                    yield label, make_solver(name, lower_order_final=False, **options)


SOLVERS = dict(_solvers())


def allowed(solver, path):
    """Whether the solver has a form for this path; which it refuses is tested on its own."""
    try:
        solver.form(path)
    except ValueError:
        return False
    return True


PAIRS = [(label, name) for label in SOLVERS for name in PATHS if allowed(SOLVERS[label], PATHS[name])]


def grid(*times):
    return torch.tensor(times, dtype=torch.float64)


def random_steps(path, count, seed, t_first=None, t_last=None):
    """`count` strictly decreasing random times, no two nearer than a fifth of the mean step in logit of the range."""
    generator = torch.Generator().manual_seed(seed)
    gaps = 0.2 + torch.rand(count - 1, generator=generator, dtype=torch.float64)
    position = torch.cat([grid(0.0), gaps.cumsum(0)])
    position = position / position[-1]
    lam = torch.lerp(
        path.lam(grid(path.t_max if t_first is None else t_first)) if path.kind != "flow" else grid(-4.0),
        path.lam(grid(path.t_min if t_last is None else t_last)) if path.kind != "flow" else grid(4.0),
        position,
    )
    return path.inverse_lam(lam).clamp(max=path.t_max)
