# SPDX-License-Identifier: Apache-2.0
"""Solvers against the original authors' numbers: LD3 in VP space, diff-sampler (AMED, GITS) in sigma space."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ld3_diffusers.noise_path import VE, VPDiscrete, VPLinear
from ld3_diffusers.schedulers.thresholding import dynamic_threshold
from ld3_diffusers.solvers import make_solver
from ld3_diffusers.step_table import Executor, build_table


with np.load(Path(__file__).parents[1] / "golden" / "solvers.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files}

# Rounding of the states, which are of size 1 to 80, grows by at most 25; measured agreement is 1e-12.
TOLERANCE = {"rtol": 0, "atol": 1e-11}


def keys(*parts):
    """Parametrisation by the keys of a group, short names as ids."""
    found = [key for key in GOLDEN if all(part in key for part in parts)]
    return pytest.mark.parametrize("key", found, ids=[key.split("/", 3 if "sigma" in key else 1)[-1] for key in found])


def mixture(space):
    return [GOLDEN[f"{space}/gmm/{part}"] for part in ("mu", "s", "w")]


def vp_network(path):
    mu, s, w = mixture("vp_space")

    def network(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        flat = x.flatten(1)
        variance = alpha**2 * s**2 + sigma**2
        residual = flat[:, None] - alpha * mu
        logits = w.log() - (residual**2).sum(-1) / (2 * variance) - flat.shape[1] / 2 * variance.log()
        clean = (torch.softmax(logits, -1)[..., None] * (mu + (alpha * s**2 / variance)[:, None] * residual)).sum(1)
        return ((flat - alpha * clean) / sigma).reshape(x.shape)

    return network


def denoise(x, sigma):
    mu, s, w = mixture("sigma_space")
    flat, variance = x.flatten(1), s**2 + sigma**2
    logits = w.log() - ((flat[:, None] - mu) ** 2).sum(-1) / (2 * variance) - flat.shape[1] / 2 * variance.log()
    parts = ((s**2)[:, None] * flat[:, None] + sigma**2 * mu) / variance[:, None]
    return (torch.softmax(logits, -1)[..., None] * parts).sum(1).reshape(x.shape)


def sample(table, network, noise, threshold=None):
    executor, x = Executor(table, threshold), noise * table.start
    for t in table.network_times:
        x = executor.step(x, network(x, t))
    return x


def test_every_key_is_compared():
    solves = [key for key in GOLDEN if "/solve/" in key or "/quirk/" in key]
    vp = [key for key in solves if key.startswith("vp_space/")]
    assert len(vp) == 2 * 3 * 3 * 12  # models, pairs of time vectors, step counts, solvers
    assert len(solves) == len(vp) + sum("sigma_space/" in key and "/poly7/" in key and "=" in key for key in GOLDEN)
    assert {key.split("/")[3] for key in solves if "sigma" in key} == {
        *("euler", "heun", "dpm", "ipndm", "ipndm_v", "deis", "dpmpp", "unipc")
    }


@keys("vp_space/", "/solve/")
def test_ld3(key):
    _, name, _, pair, count, solver_name = key.split("/")
    path = VPLinear() if name == "vp_linear" else VPDiscrete(GOLDEN["vp_space/sd/log_alpha_table"])
    times, network_times = (GOLDEN[f"vp_space/{name}/times/{pair}/{count}/{t}"] for t in ("t1", "t2"))
    kind, _, variant = (
        solver_name.removeprefix("dpm_solver++").removeprefix("uni_pc").removeprefix("ipndm").partition("_")
    )
    ours = {"d": "dpmpp", "u": "unipc", "i": "ipndm"}[solver_name[0]]
    solver = make_solver(ours, order=int(kind), variant=variant or None)
    table = build_table(solver, path, times, network_times[:-1], prediction_type="epsilon")
    torch.testing.assert_close(sample(table, vp_network(path), GOLDEN["vp_space/x_T"]), GOLDEN[key], **TOLERANCE)


@keys("sigma_space/", "/poly7/", "=")
def test_diff_sampler(key):
    _, _, _, name, text = key.split("/", 4)
    options = {k: {"True": True, "False": False}.get(v, v) for k, v in (part.split("=") for part in text.split(","))}
    order = int(options["max_order"]) if "max_order" in options else None
    solver = make_solver(
        {"dpm": "dpm2"}.get(name, name),
        order=order,
        variant=options.get("variant", options.get("deis_mode")),
        predict_x0=options.get("predict_x0"),
        lower_order_final=options.get("lower_order_final", False),  # upstream's deis and ipndm never lower it
        r=float(options["r"]) if "r" in options else None,
    )
    path = VE()
    times = solver.expand(path, GOLDEN["sigma_space/t_steps/poly7"])
    afs = options.get("afs", False)
    table = build_table(solver, path, times, prediction_type="epsilon", analytical_first_step=afs)
    assert len(table) == len(times) - 1 - afs

    # Upstream's bound has no upper limit.
    threshold = (lambda x0: dynamic_threshold(x0, 0.995, float("inf"))) if options.get("thresholding") else None
    result = sample(table, lambda x, t: (x - denoise(x, t)) / t, GOLDEN["sigma_space/latents"], threshold)
    if options.get("denoise_to_zero"):
        result = denoise(result, times[-1])
    # The threshold is a quantile that upstream and this project take in float32.
    torch.testing.assert_close(result, GOLDEN[key], **({"rtol": 0, "atol": 1e-6} if threshold else TOLERANCE))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_tabulated_deis_coefficients(order):
    solver, path = make_solver("deis", order=order, variant="tab", lower_order_final=False), VE()
    table = build_table(solver, path, GOLDEN["sigma_space/t_steps/poly7"], prediction_type="epsilon")
    golden = GOLDEN[f"sigma_space/deis_coeff/poly7/tab_o{order}"]
    assert (golden[0] == 0).all()  # upstream takes Euler's step there
    torch.testing.assert_close(table.history[1:], golden[1:, : table.history.shape[1]], rtol=0, atol=1e-11)
    torch.testing.assert_close(table.state, torch.ones(6, dtype=torch.float64))
