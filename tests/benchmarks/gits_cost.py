# SPDX-License-Identifier: Apache-2.0
"""What GITS's cost matrix costs: in closed form, and jump by jump as it is defined.

    python -m tests.benchmarks.gits_cost [--samples 256] [--points 61] [--shape 4 32 32] [--batch 16] [--defined_batch 256]

Trajectories are random, as large as a teacher's. Both forms get the same samples, the closed one `--batch` at once, as the program
does, the definition `--defined_batch` at once (by default all), and add up the same float64 sums. Printed are the times of both in
one run, their ratio, how far apart the matrices are, and the largest memory of tensors that are alive at once.
"""

import argparse
import math
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.gits import cost_sums
from training.trajectory import Trajectory


def jump_by_jump(trajectory: Trajectory, metric: str) -> torch.Tensor:
    """As the cost is defined: one image-sized state for every pair of levels."""
    z, states, derivatives = trajectory.z, trajectory.states, trajectory.derivatives
    count, last = len(z), states[:, -1]
    line = torch.nn.functional.normalize(last - states[:, 0], dim=-1)

    def deviation(state: torch.Tensor) -> torch.Tensor:
        rest = last - state
        return torch.linalg.vector_norm(rest - (rest * line).sum(-1, keepdim=True) * line, dim=-1)

    cost = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count - 1):
        for j in range(i + 1, count):
            landed = states[:, i] + (z[j] - z[i]) * derivatives[:, i]
            if metric == "dev":
                own = deviation(states[:, j]) if j < count - 1 else torch.zeros(())
                cost[i, j] = (deviation(landed) - own).sum()
            else:
                cost[i, j] = torch.linalg.vector_norm(landed - states[:, j], dim=-1).sum()
    return cost


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have returned and that still live, `held` from the start."""

    def __init__(self, *held: torch.Tensor):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in held}
        self.live = self.peak = sum(tensor.untyped_storage().nbytes() for tensor in held)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key, size):
        self.seen.discard(key)
        self.live -= size


def batches(samples: int, batch: int, points: int, dim: int):
    """Noise that a mean bend takes to data, seeded anew for every batch, so that both forms see the same."""
    z = (torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), points, dtype=torch.float64)) ** 7
    for first in range(0, samples, batch):
        generator = torch.Generator().manual_seed(first)
        options = {"generator": generator, "dtype": torch.float64}
        count = min(batch, samples - first)
        noise, bend = torch.randn(count, 1, dim, **options), torch.randn(count, 1, dim, **options)
        states = z[:, None] * noise + torch.log1p(z)[:, None] * bend
        yield Trajectory(
            z, states, noise + bend / (1 + z[:-1, None]) + 0.01 * torch.randn(count, points - 1, dim, **options)
        )


def joined(parts: list[Trajectory]) -> Trajectory:
    states, derivatives = (torch.cat([getattr(part, name) for part in parts]) for name in ("states", "derivatives"))
    return Trajectory(parts[0].z, states, derivatives)


def measured(form, metric: str, args, at_once: int) -> tuple[float, torch.Tensor, float]:
    """Seconds, mean costs, and the peak memory in MiB with `at_once` trajectories."""
    seconds, total, waiting = 0.0, 0.0, []
    for trajectory in batches(args.samples, args.batch, args.points, math.prod(args.shape)):
        waiting.append(trajectory)
        if sum(len(part.states) for part in waiting) < min(at_once, args.samples):
            continue
        trajectory, waiting = joined(waiting), []
        started = time.perf_counter()
        total = total + form(trajectory, metric)
        seconds += time.perf_counter() - started
    if waiting:
        raise ValueError("the samples are no multiple of the batches; give other numbers")
    with LiveBytes(trajectory.states, trajectory.derivatives) as memory:
        form(trajectory, metric)
    return seconds, total / args.samples, memory.peak / 2**20


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--samples", type=int, default=256)
    p.add_argument("--points", type=int, default=61)
    p.add_argument("--shape", type=int, nargs="+", default=[4, 32, 32])
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--defined_batch", type=int, help="a multiple of --batch (default: all samples)")
    args = p.parse_args(argv)
    defined_batch = args.defined_batch or args.samples
    print(f"{args.samples} samples of {args.shape}, {args.points} points; {args.batch} and {defined_batch} at once")
    for metric in ("dev", "l2"):
        closed, ours, memory = measured(cost_sums, metric, args, args.batch)
        defined, theirs, other_memory = measured(jump_by_jump, metric, args, defined_batch)
        apart = float((ours - theirs).abs().max() / theirs.abs().max())
        print(
            f"{metric}: closed form {closed:.2f} s, jump by jump {defined:.2f} s, ratio {defined / closed:.1f}; largest difference "
            f"{apart:.1e} of the largest cost; peak memory {memory:.0f} and {other_memory:.0f} MiB"
        )


if __name__ == "__main__":
    main()
