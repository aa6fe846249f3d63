# SPDX-License-Identifier: Apache-2.0
"""The executor's two paths, the analytical first step, validation."""

import math
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ld3_diffusers.schedulers.thresholding import dynamic_threshold
from ld3_diffusers.solvers import make_solver
from ld3_diffusers.step_table import Executor, build_table, conversion, sum_rule_error

from .cases import PAIRS, PATHS, SOLVERS, grid, random_steps


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(label="unipc-3-bh2-data", path="vp_linear", rows=7, prediction_type=None, **options):
    path = PATHS[path]
    times = SOLVERS[label].expand(path, random_steps(path, rows + 1, seed=2))
    prediction_type = prediction_type or ("flow_prediction" if path.kind == "flow" else "epsilon")
    return build_table(SOLVERS[label], path, times, prediction_type=prediction_type, **options)


def outputs_of(table, shape=(2, 3, 4), dtype=torch.float64):
    return [random(*shape, seed=10 + i, dtype=dtype) for i in range(len(table))]


def formula(table, x, outputs):
    """The step table's definition, with every prediction kept."""
    predictions = [] if table.first_prediction is None else [table.first_prediction * x]
    for i, output in enumerate(outputs):
        predictions.insert(0, table.p[i] * x + table.q[i] * output)
        x = table.state[i] * x + sum(c * m for c, m in zip(table.history[i], predictions))
    return x


def execute(table, x, outputs, threshold=None):
    executor = Executor(table, threshold)
    for output in outputs:
        x = executor.step(x, output)
    return x


@pytest.mark.parametrize("label, path", [pair for pair in PAIRS if pair[1] in ("vp_discrete", "edm", "flow")])
def test_both_paths_follow_the_definition(label, path):
    table = make(label, path)
    x, outputs = random(2, 3, 4), outputs_of(table)
    expected = formula(table, x, outputs)
    scale = expected.abs().max().item()
    fused = execute(table, x, outputs)
    plain = execute(table, x, outputs, threshold=lambda m: m)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-13 * max(scale, 80))
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-13 * max(scale, 80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("label", ["euler-1", "unipc-3-bh2-data", "ipndm-4", "heun-2"])
def test_arithmetic_is_in_float32(label, dtype):
    table = make(label, "vp_discrete", prediction_type="v_prediction")
    x, outputs = random(2, 3, 4, dtype=dtype), outputs_of(table, dtype=dtype)
    expected = formula(table, x.double(), [o.double() for o in outputs])  # of the same rounded inputs
    for threshold in (None, lambda m: m):
        result = execute(table, x, outputs, threshold)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_state_output_and_times():
    solver, path = SOLVERS["unipc-3-bh2-data"], PATHS["vp_linear"]
    times = (random_steps(path, 5, seed=1) * 0.99).requires_grad_()
    x = random(1, 2).requires_grad_()
    outputs = [random(1, 2, seed=k).requires_grad_() for k in range(4)]

    def run(times, x, *outputs):
        return execute(build_table(solver, path, times, prediction_type="epsilon"), x, outputs)

    assert torch.autograd.gradcheck(run, (times, x, *outputs), eps=1e-7, atol=1e-5, rtol=1e-5)
    fixed = build_table(solver, path, times.detach(), prediction_type="epsilon")
    assert torch.autograd.gradcheck(lambda x, *o: execute(fixed, x, o), (x, *outputs))
    with torch.no_grad():
        fused = execute(fixed, x, outputs)
    torch.testing.assert_close(fused, run(times, x, *outputs).detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("switch", range(1, 6))
def test_gradients_may_be_asked_for_on_the_way(switch, afs):
    # A pipeline may guide by a gradient at some steps only: the history must not be lost.
    table = make("ipndm-4", rows=6 + afs, analytical_first_step=afs, prediction_type="v_prediction")
    x, outputs = random(2, 3, 4), outputs_of(table)
    expected, executor = formula(table, x, outputs), Executor(table)
    for i, output in enumerate(outputs):
        x = executor.step(x.detach().requires_grad_(i == switch), output)
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-11)


def test_tables_of_a_batch_step_each_sample_by_its_own():
    solver, path = SOLVERS["dpm2-2"], PATHS["vp_linear"]
    times = torch.stack([solver.expand(path, random_steps(path, 4, seed)) for seed in range(2)], 1)
    together = build_table(solver, path, times, prediction_type="epsilon")
    x, outputs = random(2, 3, 4), outputs_of(together)
    result = execute(together, x, outputs)
    for k in range(2):
        alone = build_table(solver, path, times[:, k], prediction_type="epsilon")
        torch.testing.assert_close(result[k : k + 1], formula(alone, x[k : k + 1], [o[k : k + 1] for o in outputs]))


def test_threshold_bounds_the_data_prediction():
    table = make("dpmpp-2-midpoint-data")
    x, outputs = random(2, 3, 40), outputs_of(table, (2, 3, 40))
    state, predictions = x, []
    for i, output in enumerate(outputs):
        m = table.p[i] * state + table.q[i] * output
        s = torch.quantile(m.abs().flatten(1), 0.9, dim=1).clamp(1.0, 1.5)[:, None, None]
        predictions.insert(0, m.clamp(-s, s) / s)
        state = table.state[i] * state + sum(c * m for c, m in zip(table.history[i], predictions))
    result = execute(table, x, outputs, lambda m: dynamic_threshold(m, 0.9, 1.5))
    torch.testing.assert_close(result, state, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(result, formula(table, x, outputs), atol=0.1)


def test_hold_and_own_conversions():
    path, table = PATHS["flow"], make("ipndm-2", "flow", rows=3)
    x, outputs = random(2, 3, 4), outputs_of(table)
    held = torch.tensor([[True, False, False], [False, False, True]])[..., None]
    result = Executor(table).step(x, outputs[0], hold=held)
    free = formula(table, x, outputs[:1])
    assert torch.equal(result[held.expand_as(x)], x[held.expand_as(x)])
    torch.testing.assert_close(result[~held.expand_as(x)], free[~held.expand_as(x)])

    own = torch.tensor([[0.9, 0.5, 0.3], [0.2, 0.7, 0.6]], dtype=torch.float64)[..., None]
    table = make("dpmpp-1-midpoint-data", "flow", rows=3)
    result = Executor(table).step(x, outputs[0], p_q=conversion(path, "data", "flow_prediction", own))
    torch.testing.assert_close(result, table.state[0] * x + table.history[0, 0] * (x - own * outputs[0]))


@pytest.mark.parametrize(
    "label", ["euler-1", "ddim-1", "dpmpp-3-midpoint-data", "unipc-3-bh2-noise", "ipndm-4", "heun-2"]
)
@pytest.mark.parametrize("path", ["vp_linear", "ve"])
@pytest.mark.parametrize("scale", ["variance", "sigma"])
def test_analytical_first_step(label, path, scale):
    full, folded = (make(label, path, analytical_first_step=afs, starting_scale=scale) for afs in (False, True))
    assert len(folded) == len(full) - 1
    alpha, sigma = PATHS[path].alpha(full.times[0]), PATHS[path].sigma(full.times[0])
    assert full.start == (sigma if scale == "sigma" else (alpha**2 + sigma**2).sqrt())
    noise, outputs = random(2, 3, 4), outputs_of(full)
    outputs[0] = full.start * noise / (alpha**2 + sigma**2).sqrt()
    expected = formula(full, full.start * noise, outputs)
    tolerance = {"rtol": 1e-10, "atol": 1e-10 * expected.abs().max().item()}
    torch.testing.assert_close(execute(folded, folded.start * noise, outputs[1:]), expected, **tolerance)
    plain = execute(folded, folded.start * noise, outputs[1:], lambda m: m)
    torch.testing.assert_close(plain, expected, **tolerance)
    with pytest.raises(ValueError, match="build it with afs=False"):
        sum_rule_error(folded, PATHS[path])


def test_analytical_first_step_needs_another():
    with pytest.raises(ValueError, match="at least two steps or set afs=False"):
        make("euler-1", rows=1, analytical_first_step=True)


def test_stepping_past_the_end():
    table = make("euler-1", rows=2)
    executor, x = Executor(table), random(1, 3)
    for _ in range(2):
        x = executor.step(x, x)
    with pytest.raises(ValueError, match="all 2 steps of this schedule are taken; call set_timesteps"):
        executor.step(x, x)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("label", SOLVERS)
@pytest.mark.parametrize("afs", [False, True])
def test_a_fused_step_is_few_operations_and_no_synchronisation(label, afs):
    table = make(label, analytical_first_step=afs)
    executor, x = Executor(table), random(1, 4, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        for i in range(len(table)):
            with Count() as count:
                x = executor.step(x, torch.ones_like(x))
            # what reads a value on the host, or copies to it, would make the host wait for a GPU
            assert not {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"} & set(count.names)
            if i:  # the first step allocates
                shaping = {"view", "_unsafe_view", "reshape", "ones_like", "alias", "t", "detach", "lift_fresh"}
                assert 1 <= len([name for name in count.names if name not in shaping]) <= 3, count.names


BAD_TIMES = [
    ([1.0, 0.5, 0.2], [1.0], r"needs N \+ 1 times and N network times, got 3 and 1"),
    ([1.0], [], "got 1 and 0"),
    (1.0, 1.0, "got 0 and 0"),
    ([1.0, math.nan, 0.2], [1.0, 0.5], r"times\[1\] is not finite"),
    ([1.0, 0.5, 0.2], [1.0, math.inf], r"network_times\[1\] is not finite"),
    ([1.2, 0.5, 0.2], [1.0, 0.5], r"times\[0\] = 1.2 is outside the path; give times in \[0, 1\]"),
    ([1.0, 0.5, -0.1], [1.0, 0.5], r"times\[2\] = -0.1 is outside the path"),
    ([1.0, 0.5, 0.6], [1.0, 0.5], r"times\[2\] = 0.6 is above times\[1\] = 0.5"),
    ([1.0, 0.5, 0.2], [0.5, 0.6], r"network_times\[1\] = 0.6 is above network_times\[0\] = 0.5"),
    ([1.0, 0.0, 0.0], [1.0, 0.5], r"times\[1\] is 0, but only the last of the times may be 0"),
    ([1.0, 0.5, 0.0], [1.0, 0.0], r"network_times\[1\] is 0, but .* no network time"),
    ([[1.0, 1.0], [0.5, 0.4], [0.2, 0.45]], [[1.0, 1.0], [0.5, 0.4]], r"times\[2\] = 0.45 is above times\[1\] = 0.4"),
]


@pytest.mark.parametrize("times, network_times, match", BAD_TIMES)
def test_bad_times(times, network_times, match):
    with pytest.raises(ValueError, match=match):
        build_table(make_solver("euler"), PATHS["vp_linear"], times, network_times, prediction_type="epsilon")


def test_equal_levels_of_a_multistep_solver():
    with pytest.raises(ValueError, match=r"history\[2, 0\] is not finite; move the times apart"):
        build_table(make_solver("dpmpp"), PATHS["vp_linear"], grid(1, 0.5, 0.5, 0.2, 0.1), prediction_type="epsilon")


def test_long_tables_are_cheap():
    path = PATHS["vp_discrete"]
    start = time.process_time()
    build_table(SOLVERS["unipc-3-bh2-data"], path, random_steps(path, 1001, 0), prediction_type="epsilon")
    assert time.process_time() - start < 2


def test_a_step_takes_no_part_in_autocast_and_runs_where_there_is_none(monkeypatch):
    times = grid(0.9, 0.6, 0.3, 0.0)
    table = build_table(make_solver("unipc"), PATHS["flow"], times, prediction_type="flow_prediction")
    seen, addmv = [], torch.addmv

    def observed(*args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return addmv(*args, **options)

    monkeypatch.setattr(torch, "addmv", observed)
    executor, x = Executor(table), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            x = executor.step(x, torch.randn(2, 4))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 3 and x.dtype == torch.float32
    executor, x = Executor(table), torch.empty(2, 4, device="meta")
    for _ in range(3):
        x = executor.step(x, torch.empty(2, 4, device="meta"))
    assert x.shape == (2, 4)
