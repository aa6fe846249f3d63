# SPDX-License-Identifier: Apache-2.0
"""DM-NonUniform: the bound against quadrature, its grids against those of LD3's authors (tests/golden)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ld3_diffusers.discretization import discretization
from ld3_diffusers.dmn import _median_minimum, dmn_objective
from ld3_diffusers.noise_path import VE, RectifiedFlow, VPDiscrete, VPLinear


with np.load(Path(__file__).parents[1] / "golden" / "schedules.npz") as file:
    GOLDEN = {
        (name, steps): torch.from_numpy(file[f"vp_space/{name}/grid/dmn/N{steps}"]).double()
        for name in ("vp_linear", "sd")
        for steps in (5, 10)
    }
    PATHS = {
        "vp_linear": VPLinear(),
        "sd": VPDiscrete(torch.from_numpy(file["vp_space/sd/log_alpha_table"])),
    }


@pytest.mark.parametrize("name", PATHS)
def test_five_steps_are_ld3s(name):
    torch.testing.assert_close(discretization("dmn", PATHS[name], 5), GOLDEN[name, 5], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_ten_steps_are_ld3s_up_to_the_scatter_of_the_method(name):
    # A run of the method from a start that is 1e-13 away ends up to .03 away in t, and LD3's is one such run: no
    # procedure that does not share its rounding bit for bit can come closer on purpose.
    path, golden = PATHS[name], GOLDEN[name, 10]
    times = discretization("dmn", path, 10)
    torch.testing.assert_close(times, golden, rtol=0, atol=0.03)
    assert torch.equal(times, discretization("dmn", path, 10))
    bound, theirs, uniform = (
        dmn_objective(path.lam(t), latent=True).item()
        for t in (times, golden, discretization("time_uniform", path, 10))
    )
    assert bound < 1.2 * theirs < 0.7 * uniform


def test_no_small_move_of_five_steps_lowers_the_bound():
    path = PATHS["sd"]
    lam = path.lam(discretization("dmn", path, 5))
    bound = dmn_objective(lam, latent=True)
    moves = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (1e-3, 1e-2, 1e-1):
        moved = lam + size * torch.nn.functional.pad(moves / moves.norm(dim=1, keepdim=True), (1, 1))
        assert (dmn_objective(moved, latent=True) > bound).all()


def test_the_bound_of_a_flow_begins_below_pure_noise():
    path = RectifiedFlow()
    times = discretization("dmn", path, 5)
    assert (times[0].item(), times[-1].item()) == (1.0, path.t_min) and (times.diff() < 0).all()
    # The same grid as on a path that begins at `start`, but for its first time.
    for start in (0.9, 0.99, 0.999):
        begun = discretization("dmn", path, 5, start=start)
        torch.testing.assert_close(begun[1:], discretization("dmn", path, 5, t_max=start)[1:], rtol=0, atol=1e-12)
        assert begun[0] == 1 and torch.equal(begun, times) == (start == 0.99)


@pytest.mark.parametrize(
    "path, options",
    [(RectifiedFlow(), {"start": 1.0}), (RectifiedFlow(), {"start": 1e-3}), (VE(), {"start": 100.0})],
)
def test_starts_that_bound_nothing(path, options):
    with pytest.raises(ValueError, match="give a `start` above"):
        discretization("dmn", path, 5, **options)


def quadrature_of_the_bound(lam, latent):
    """The same bound with the integrals of e^lambda times the Lagrange basis by brute force."""
    steps, total, signed = len(lam) - 1, 0.0, np.zeros(len(lam))
    for s in range(steps):
        order = min(s + 1, steps - s, 3)
        nodes = lam[s + 1 - order : s + 1]
        alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * nodes)), 1 / np.sqrt(1 + np.exp(2 * nodes))
        weight = sigma**2 / alpha if latent else sigma / alpha
        grid = np.linspace(lam[s], lam[s + 1], 4001)
        basis = [np.prod([(grid - b) / (a - b) for b in nodes if b != a] + [np.ones(4001)], axis=0) for a in nodes]
        terms = weight * np.array([np.trapezoid(np.exp(grid) * b, grid) for b in basis])
        if order == 1 or (steps <= 7 and s < 3):
            total += np.linalg.norm(terms)
        else:
            signed[s + 1 - order : s + 1] += terms
    return total + np.abs(signed).sum()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("latent", [True, False])
def test_dmn_objective_is_the_integral_it_claims(steps, latent):
    lam = torch.linspace(-2.5, 3.5, steps + 1, dtype=torch.float64)
    lam = lam + 0.2 * torch.sin(torch.arange(steps + 1, dtype=torch.float64))
    both = dmn_objective(torch.stack([lam, lam - 0.3]), latent)
    alone = [dmn_objective(lam, latent).item(), dmn_objective(lam - 0.3, latent).item()]
    assert both.tolist() == pytest.approx(alone, rel=1e-13)
    assert dmn_objective(lam, latent).item() == pytest.approx(quadrature_of_the_bound(lam.numpy(), latent), rel=1e-5)
    assert torch.autograd.gradcheck(lambda x: dmn_objective(x, latent), lam.requires_grad_())


def test_dmn_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    _median_minimum.cache_clear()
    with pytest.raises(ImportError, match="pip install scipy"):
        discretization("dmn", VPLinear(), 5)
