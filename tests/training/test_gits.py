# SPDX-License-Identifier: Apache-2.0
"""GITS: its cost matrices and schedules against the authors' numbers, against the definition, and against all other schedules."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ld3_diffusers import Schedule, SolverSpec
from ld3_diffusers.noise_path import VE, RectifiedFlow, VPLinear
from tests.training.rollouts import make, noise_for
from tests.training.toy import PREDICTION, Mixture, ToyRollout
from training.gits import METRICS, cost_sums, dynamic_programme
from training.trajectory import Trajectory, record


with np.load(Path(__file__).parents[1] / "golden" / "gits.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files}
TEACHERS = {"ipndm": SolverSpec("ipndm", 4), "euler": SolverSpec("euler"), "heun": SolverSpec("heun")}
FLOW = RectifiedFlow()


def golden_toy() -> ToyRollout:
    return ToyRollout(Mixture(GOLDEN["mu"], GOLDEN["s"], GOLDEN["w"]), VE())


def teacher(path, grid, spec, final=False) -> Schedule:
    return Schedule(
        spec.make().expand(path, grid), None, spec, path.kind, PREDICTION.get(path.kind, "epsilon"), final=final
    )


@pytest.fixture(scope="module", params=TEACHERS)
def golden_trajectory(request):
    name = request.param
    rollout = golden_toy()
    schedule = teacher(rollout.path, GOLDEN["t_steps"], TEACHERS[name])
    return name, record(rollout, schedule, GOLDEN["warmup_latents"])


@pytest.mark.parametrize("metric", METRICS)
def test_costs_and_schedules_are_the_authors(golden_trajectory, metric):
    name, trajectory = golden_trajectory
    golden = GOLDEN[f"{name}/{metric}/cost"]
    # in parts, as the program adds them up
    parts = [
        Trajectory(trajectory.z, trajectory.states[b], trajectory.derivatives[b]) for b in (slice(40), slice(40, 64))
    ]
    cost = sum(cost_sums(part, metric) for part in parts) / 64
    assert (cost.tril() == 0).all()
    torch.testing.assert_close(cost, golden, rtol=1e-7, atol=1e-9)

    for c, coeff in enumerate(GOLDEN["coeffs"].tolist()):
        for matrix in (golden, cost):
            ways = dynamic_programme(matrix, 11, coeff)
            for n, count in enumerate(GOLDEN["num_steps"].tolist()):
                authors = GOLDEN[f"{name}/{metric}/dp"][c, n, :count].tolist()
                objective = float(GOLDEN[f"{name}/{metric}/objective"][c, n])
                assert objective_of(golden, ways[count - 2], coeff) == pytest.approx(objective, rel=1e-7, abs=1e-9)
                if ways[count - 2] != authors:  # only where two schedules tie, which rounding then decides
                    assert matrix is cost
                    assert objective_of(golden, authors, coeff) == pytest.approx(
                        objective_of(golden, ways[count - 2], coeff), rel=1e-9, abs=1e-12
                    )


def objective_of(cost, way, coeff) -> float:
    return math.fsum(coeff**k * float(cost[i, j]) for k, (i, j) in enumerate(itertools.pairwise(way)))


def cost_by_definition(trajectory, metric):
    """Jump by jump, sample by sample."""
    count, cost = len(trajectory.z), torch.zeros(len(trajectory.z), len(trajectory.z), dtype=torch.float64)
    for x, d in zip(trajectory.states, trajectory.derivatives):
        line = (x[-1] - x[0]) / torch.linalg.vector_norm(x[-1] - x[0])

        def deviation(a, last=x[-1], line=line):
            return torch.linalg.vector_norm((last - a) - ((last - a) @ line) * line)

        for i, j in itertools.combinations(range(count), 2):
            y = x[i] + (trajectory.z[j] - trajectory.z[i]) * d[i]
            if metric == "dev":
                cost[i, j] += deviation(y) - (deviation(x[j]) if j < count - 1 else 0)
            else:
                cost[i, j] += torch.linalg.vector_norm(y - x[j], ord=int(metric[1]))
    return cost


@pytest.mark.parametrize("metric", METRICS)
def test_closed_forms_are_the_definition(metric):
    """On a path that bends at random, and at the sizes of EDM's space, where products cancel."""
    generator = torch.Generator().manual_seed(1)
    z = torch.linspace(80**0.2, 0, 13, dtype=torch.float64) ** 5
    noise = torch.randn(3, 1, 20, generator=generator, dtype=torch.float64)
    bend = 0.1 * torch.randn(3, 13, 20, generator=generator, dtype=torch.float64)
    trajectory = Trajectory(z, z[:, None] * noise + bend, noise + bend[:, 1:])
    torch.testing.assert_close(
        cost_sums(trajectory, metric), cost_by_definition(trajectory, metric), rtol=1e-9, atol=0
    )


def test_programme_finds_the_cheapest_of_all_schedules():
    generator = torch.Generator().manual_seed(2)
    cost = torch.randn(9, 9, generator=generator, dtype=torch.float64).triu(1)
    for coeff in (0.8, 1.0, 1.15):
        ways = dynamic_programme(cost, 8, coeff)
        for steps, way in enumerate(ways, 1):
            every = [[0, *inner, 8] for inner in itertools.combinations(range(1, 8), steps - 1)]
            assert way == min(every, key=lambda one: objective_of(cost, one, coeff))


def test_of_equal_schedules_the_first_index_is_taken():
    assert dynamic_programme(torch.zeros(6, 6), 4) == [[0, 5], [0, 1, 5], [0, 1, 2, 5], [0, 1, 2, 3, 5]]


def test_a_larger_coeff_puts_more_levels_at_low_noise():
    cost = GOLDEN["ipndm/l2/cost"]
    inner = [np.mean(dynamic_programme(cost, 6, coeff)[-1][1:-1]) for coeff in (0.8, 1.0, 1.2)]
    assert inner[0] < inner[1] < inner[2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_steps": 6}, "a teacher's grid of 6 points has schedules of 1 to 5 steps, not 6"),
        ({"coeff": 0.0}, "coeff must be a positive number, got 0.0"),
        ({"coeff": math.nan}, "coeff must be a positive number"),
        ({"cost": torch.full((6, 6), math.nan)}, "the cost matrix is not finite"),
    ],
)
def test_impossible_programmes_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dynamic_programme(**{"cost": torch.ones(6, 6), "num_steps": 2, **options})


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'bdev'; use one of dev, l1, l2"):
        cost_sums(Trajectory(torch.zeros(2), torch.zeros(1, 2, 1), torch.zeros(1, 1, 1)), "bdev")


# ---------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("spec", [SolverSpec("euler"), SolverSpec("unipc"), SolverSpec("heun"), SolverSpec("dpm2")])
@pytest.mark.parametrize("path", [VPLinear(), FLOW], ids=lambda path: path.kind)
def test_states_and_derivatives_are_those_of_the_ode(path, spec):
    """Of a single Gaussian the ODE's solution is known: y = x_0 std(z) / std(z_0), of which d is the derivative."""
    std = 0.5
    rollout = ToyRollout(Mixture(torch.zeros(1, 4), torch.full((1,), std), torch.ones(1)), path)
    grid = torch.linspace(path.t_max, 0, 200, dtype=torch.float64)
    grid = grid**2 if path.kind == "vp_linear" else grid
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trajectory = record(rollout, teacher(path, grid, spec), noise)
    levels = path.levels(grid)
    torch.testing.assert_close(trajectory.z, levels.z)
    assert trajectory.z[-1] == 0

    spread = ((levels.alpha * std) ** 2 + levels.sigma**2).sqrt() / levels.scale
    slope = (levels.z if path.kind == "vp_linear" else levels.z - (1 - levels.z) * std**2) / spread  # d spread / dz
    exact = noise[:, None] * (spread / spread[0] / levels.scale[0])[:, None]
    tolerance = {"rtol": 0, "atol": 0.03 if spec.solver == "euler" else 2e-3}
    torch.testing.assert_close(trajectory.states, exact, **tolerance)
    by_state = trajectory.states[:, :-1] * (slope / spread)[:-1, None]
    torch.testing.assert_close(trajectory.derivatives, by_state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sd", "flux", "sd3", "dit"])
def test_a_pipelines_euler_trajectory_is_a_chain_of_its_derivatives(name):
    """Through the real pipelines: guidance, prediction types, resolution shift, a start at s = 1, noise that it draws itself."""
    rollout, call = make(name)
    with rollout:
        conditioning = rollout.encode()
        noise = noise_for(rollout, conditioning, 2)
        config, path = rollout.scheduler.config, rollout.path
        grid = torch.linspace(path.t_max, 0, 7, dtype=torch.float64)
        schedule = Schedule(grid, None, SolverSpec("euler"), path.kind, config.prediction_type)
        trajectory = record(rollout, schedule, noise, conditioning)
        shifted = schedule.table(path, mu=rollout.mu).times
        end = rollout(schedule, noise, conditioning)
        assert (rollout.mu != 0) == (name in ("flux", "sd3"))
    z = path.levels(shifted).z
    torch.testing.assert_close(trajectory.z, z)
    steps = trajectory.states[:, :-1] + (z[1:] - z[:-1])[:, None] * trajectory.derivatives
    scale = float(trajectory.states.abs().max())
    # float32 states of size alpha y, which the smallest alpha magnifies
    tolerance = 1e-6 * scale / float(path.levels(shifted).scale.min())
    torch.testing.assert_close(steps, trajectory.states[:, 1:], rtol=0, atol=tolerance)
    torch.testing.assert_close(trajectory.states[:, -1], end.double().flatten(1), rtol=0, atol=tolerance)


def test_a_teacher_has_no_analytical_first_step():
    with pytest.raises(ValueError, match="use a teacher without afs"):
        record(golden_toy(), teacher(VE(), GOLDEN["t_steps"], SolverSpec("euler", afs=True)), GOLDEN["warmup_latents"])


def test_a_trajectory_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="trajectory is not finite; use --mixed_precision no"):
        record(golden_toy(), teacher(VE(), GOLDEN["t_steps"], SolverSpec("euler")), torch.full((1, 192), math.inf))
