# SPDX-License-Identifier: Apache-2.0
"""Two questions about schedules of flow models, answered with a shipped Flux.

    python -m tests.benchmarks.flux_schedules bf16 [--nfe 4 5 8] [--num_unseen 64 --max_train_steps 40]
    python -m tests.benchmarks.flux_schedules resolution [--to 48]

`bf16`: a schedule learned in float32 and one learned in bfloat16, both sampled in bfloat16. `resolution`: a schedule learned at one
resolution and used at another through the pipeline's shift mu, beside one learned there and the stock schedulers. Distances are
mean squared ones to the end points of the 50-evaluation teacher in the dtype and at the resolution of sampling, from unseen
noises and prompts.
"""

import argparse
import json
from pathlib import Path

from ld3_diffusers import LD3Scheduler
from training import demo
from training.call_settings import call_settings
from training.comparison import Comparison, Contender, best_by_name, paired_interval
from training.contenders import stock_contenders
from training.teacher import load_teacher


TEACHER = "examples/teachers/fashion-flux"
SIZES = ("num_train", "num_valid", "num_unseen", "max_train_steps")


def prepared(args, name: str, call: dict, *more: str):
    """Demo arguments for one way of learning, its teacher sets, and the folder with its schedules."""
    given = ["--teacher", TEACHER, "--nfe", *map(str, args.nfe), "--output_dir", str(Path(args.output_dir, name))]
    sizes = {size: getattr(args, size) for size in SIZES if getattr(args, size) is not None}
    settings = demo.parser().parse_args([*given, *(f"--{size}={count}" for size, count in sizes.items())])
    sets = demo.make_sets(settings, call, *more)
    return sets["unseen"], demo.learn(settings, "default", *more)


def judge(comparison: Comparison, unseen, nfe: int, rivals: dict[str, Path]) -> None:
    """Distances of the learned schedules, the first of which is compared with all others, and of the best stock scheduler."""
    contenders = [Contender(name, LD3Scheduler.from_pretrained(folder), nfe) for name, folder in rivals.items()]
    learned = len(contenders)
    contenders += list(stock_contenders(comparison.stock_scheduler.config, nfe))
    for contender in contenders:
        comparison.measure(contender, unseen)
    first = contenders[0]
    print(f"{nfe} evaluations: {first.name} {1e3 * first.mean:.3f}")
    for other in [*contenders[1:learned], best_by_name(contenders[learned:])[0]]:
        mean, low, high = (1e3 * value for value in paired_interval(other.distances, first.distances))
        print(f"    {other.name} {1e3 * other.mean:.3f}, more by {mean:+.3f} [{low:+.3f}, {high:+.3f}]")


def bf16(args, call: dict) -> None:
    _, exact = prepared(args, "float32", call)
    unseen, rounded = prepared(args, "bfloat16", call, "--mixed_precision", "bf16")
    with Comparison(load_teacher(TEACHER, mixed_precision="bf16"), **unseen.call_settings) as comparison:
        for nfe in args.nfe:
            judge(comparison, unseen, nfe, {"learned in bfloat16": rounded, "learned in float32": exact})


def resolution(args, call: dict) -> None:
    _, here = prepared(args, "float32", call)
    there_call = {**call, "height": args.to, "width": args.to}
    unseen, there = prepared(args, f"{args.to}px", there_call)
    with Comparison(load_teacher(TEACHER), **unseen.call_settings) as comparison:
        for nfe in args.nfe:
            judge(
                comparison, unseen, nfe, {f"learned at {call['height']} px": here, f"learned at {args.to} px": there}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", choices=["bf16", "resolution"])
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 8])
    parser.add_argument("--to", type=int, default=48, help="pixels a side")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, help="default: the demo's; CPUs are slow in bfloat16")
    parser.add_argument("--output_dir", default="outputs/flux_schedules")
    args = parser.parse_args()
    call = call_settings(json.loads(Path(TEACHER, demo.QUALITY).read_text()))
    {"bf16": bf16, "resolution": resolution}[args.question](args, call)


if __name__ == "__main__":
    main()
