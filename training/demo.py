# SPDX-License-Identifier: Apache-2.0
"""The whole way once: learn a schedule for a pipeline, load it into a fresh one, compare it with stock schedulers.

    python -m training.demo [--nfe 5] [--recipes default published] [--output_dir outputs/demo]

makes three teacher sets (to learn on, to select on, to judge on: the last with prompts and seeds that learning never sees), learns
with each recipe, saves into `<output_dir>/<recipe>`, loads that with `LD3Scheduler.from_pretrained(folder)`, prints one table and writes
`comparison.png`, `schedules.png`, `table.md` and `results.json` into `<output_dir>/nfe-<n>`. Interrupted, it leaves nothing broken; started again, it
continues.
"""

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm

from ld3_diffusers import LD3Scheduler, SolverSpec
from ld3_diffusers.solvers import SOLVERS

from . import make_teacher_set, train_ld3
from .arguments import check_writable, usage_errors
from .comparison import Contender, best_by_name, sample, stock_contenders
from .decoding import decode
from .recipe import RECIPES
from .report import pick_columns, save_grid, save_results, save_schedules, table, wins_everywhere, write_whole
from .teacher_set import TeacherSet, check_disjoint


TEACHER = Path("examples/teachers/fashion-sd")
# name: first seed, which wordings of the captions
SETS = {"train": (0, "train"), "valid": (1_000_000, "train"), "unseen": (2_000_000, "held_out")}
RECIPE_FILES = {
    "default": ["--config", "training/recipes/fashion-sd.yaml"],
    # the authors' settings, 25 + 25 pairs included, but for LPIPS, whose weights are a download: both recipes minimise what
    # the table shows
    "published": [
        "--config",
        "training/recipes/published-stable-diffusion.yaml",
        "--loss",
        "l2",
        "--loss_space",
        "latent",
    ],
}
MAGNIFIED = 4  # differences in the picture


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("demo", description=__doc__.split("\n")[0])
    p.add_argument(
        "--teacher", default=str(TEACHER), help="pipeline folder with a prompts.json (default: %(default)s)"
    )
    p.add_argument("--nfe", type=int, default=5, help="network evaluations of the schedule (default: %(default)s)")
    p.add_argument(
        "--solver", choices=sorted(SOLVERS), default="unipc", help="of the learned schedule (default: %(default)s)"
    )
    p.add_argument("--solver_order", type=int, help="default: the solver's own")
    p.add_argument(
        "--recipes", nargs="+", choices=sorted(RECIPES), default=["default"], help="the first one is the subject"
    )
    p.add_argument("--num_train", type=int, default=64)
    p.add_argument("--num_valid", type=int, default=32)
    p.add_argument("--num_unseen", type=int, default=128, help="pairs to judge on")
    p.add_argument(
        "--max_train_steps", type=int, default=100, help="iterations of the default recipe (default: %(default)s)"
    )
    p.add_argument("--output_dir", default="outputs/demo")
    p.add_argument("--seed", type=int, default=0)
    return p


def write_prompts(teacher: Path, folder: Path) -> dict[str, Path]:
    """One JSON list a split, taking turns through the classes so that any first few prompts show them all."""
    files = {}
    for split, classes in json.loads((teacher / "prompts.json").read_text()).items():
        if not isinstance(classes, dict):
            continue
        longest = max(map(len, classes.values()))
        prompts = [captions[i] for i in range(longest) for captions in classes.values() if i < len(captions)]
        files[split] = folder / f"prompts-{split}.json"
        content = json.dumps(prompts, indent=1)
        write_whole(files[split], lambda file, content=content: file.write_text(content))
    return files


def make_sets(args, guidance_scale: float) -> dict[str, TeacherSet]:
    folder = Path(args.output_dir)
    prompts = write_prompts(Path(args.teacher), folder)
    sizes = {"train": args.num_train, "valid": args.num_valid, "unseen": args.num_unseen}
    for name, (seed, split) in SETS.items():
        make_teacher_set.main(
            ["--teacher", args.teacher, "--output_dir", str(folder / name), "--num_samples", str(sizes[name])]
            + ["--prompts_file", str(prompts[split]), "--guidance_scale", str(guidance_scale), "--seed", str(seed)]
            + ["--train_batch_size", "32", "--split", name]
        )
    sets = {name: TeacherSet.load(folder / name) for name in SETS}
    for name in ("train", "valid"):
        check_disjoint(sets[name], sets["unseen"])
    return sets


def learn(args, recipe: str, guidance_scale: float) -> Path:
    """One folder a recipe, which serves every number of evaluations that it was asked for so far."""
    sets, folder = Path(args.output_dir), Path(args.output_dir) / recipe
    present = LD3Scheduler.from_pretrained(folder) if (folder / "scheduler_config.json").is_file() else None
    if present is not None and args.nfe in present.learned_counts:
        entry = present.config.schedules[str(args.nfe)]
        if entry["solver"] != args.solver or args.solver_order not in (None, entry["solver_order"]):
            raise ValueError(
                f"{folder} has a schedule for {args.nfe} evaluations of {entry['solver']} {entry['solver_order']} already; "
                "choose another --output_dir"
            )
        print(f"{folder} has a schedule for {args.nfe} evaluations already; using it")
        return folder
    options = RECIPE_FILES[recipe] + (["--max_train_steps", str(args.max_train_steps)] if recipe == "default" else [])
    train_ld3.main(
        ["--teacher", args.teacher, "--teacher_set", str(sets / "train"), "--validation_set", str(sets / "valid")]
        + ["--nfe", str(args.nfe), "--solver", args.solver]
        + ([] if args.solver_order is None else ["--solver_order", str(args.solver_order)])
        + ["--recipe", recipe, "--guidance_scale", str(guidance_scale), "--seed", str(args.seed)]
        + ["--output_dir", str(folder), "--checkpointing_steps", "25", "--checkpoints_total_limit", "1"]
        + ["--resume_from_checkpoint", "latest", "--allow_worse", *options]
    )
    return folder


@torch.no_grad()
def compare(args, folders: dict[str, Path], unseen: TeacherSet, guidance_scale: float, output: Path) -> bool:
    """Prints and writes everything; whether the first recipe's schedule wins against all stock schedulers."""
    pipe = DiffusionPipeline.from_pretrained(args.teacher)
    learned = []
    for recipe, folder in folders.items():
        scheduler = LD3Scheduler.from_pretrained(folder)
        solver = SolverSpec(args.solver, args.solver_order).make()
        setting = f"{solver.name} {solver.order}, learned times"
        learned.append(Contender(f"LD3 {recipe}", scheduler, args.nfe, setting))
    contenders = [*learned, *stock_contenders(pipe.scheduler.config, args.nfe)]
    for contender in tqdm(contenders, desc="comparing"):
        sample(pipe, contender, unseen, guidance_scale=guidance_scale)
    stock = best_by_name(contenders[len(learned) :])
    subject, others = learned[0], [*learned[1:], *stock]
    text = table(subject, others)
    won = wins_everywhere(subject, stock)
    verdict = f"{subject.name} is ahead of every stock scheduler beyond the interval: {'yes' if won else 'NO'}"
    print("\n" + text + "\n\n" + verdict)
    write_whole(output / "table.md", lambda file: file.write_text(text + "\n\n" + verdict + "\n"))
    facts = {"nfe": args.nfe, "solver": args.solver, "guidance_scale": guidance_scale, "seed": args.seed, "wins": won}
    save_results(output / "results.json", subject, others, facts)

    indices = [int(i) for i in unseen.pairs["prompt_index"]]
    shown = pick_columns(indices, 10)
    target = unseen.batch(shown)[1]
    teacher, best, ours = (decode(pipe, ends) for ends in (target, stock[0].ends[shown], subject.ends[shown]))
    rows = {
        f"teacher\n{unseen.provenance['num_inference_steps']} evaluations": teacher,
        f"best stock, {stock[0].name}\n{stock[0].evaluations} evaluations": best,
        f"learned\n{subject.evaluations} evaluations": ours,
        f"|best stock - teacher| x {MAGNIFIED}": MAGNIFIED * (best - teacher).abs() - 1,
        f"|learned - teacher| x {MAGNIFIED}": MAGNIFIED * (ours - teacher).abs() - 1,
    }
    captions = [textwrap.fill(unseen.prompts[indices[i]], 16) for i in shown]
    save_grid(output / "comparison.png", rows, captions)
    save_schedules(output / "schedules.png", [*learned, *[c for c in stock if c.name != "Heun"]])
    print(f"\nwrote {output}/table.md, results.json, comparison.png and schedules.png")
    return won


def main(argv=None) -> None:
    command_line = parser()
    args = command_line.parse_args(argv)
    diffusers_logging.set_verbosity_error()
    reference = Path(args.teacher) / "reference" / "reference.json"
    if not reference.is_file():
        command_line.error(
            f"{args.teacher} is not the shipped teacher: it has no reference/reference.json; see --teacher"
        )
    if "published" in args.recipes and args.solver != "unipc":
        command_line.error("the published recipe's settings are for unipc; drop --solver, or learn with train_ld3")
    guidance_scale = float(json.loads(reference.read_text())["samples"]["guidance_scale"])
    output = Path(args.output_dir) / f"nfe-{args.nfe}"
    start = time.perf_counter()
    with usage_errors(command_line):
        check_writable(args.output_dir)
        SolverSpec(args.solver, args.solver_order).make()
        if args.nfe < 1 or args.num_unseen < 2:
            raise ValueError("--nfe must be at least 1 and --num_unseen at least 2; raise them")
    try:
        sets = make_sets(args, guidance_scale)
        with usage_errors(command_line):
            folders = {recipe: learn(args, recipe, guidance_scale) for recipe in args.recipes}
        compare(args, folders, sets["unseen"], guidance_scale, output)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
