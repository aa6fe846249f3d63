# SPDX-License-Identifier: Apache-2.0
"""What learned coefficients add to learned times, and one curve for every count, at 3 to 10 evaluations.

    PYTHONPATH=. python examples/evaluation/compare_generalised.py --config training/recipes/fashion-flux.yaml

makes teacher pairs, learns by the recipe (coefficients, times and network times), by the same with times and network times alone, and as LD3
was published; learns a curve for all counts together, and refines it for each; searches (GITS) and learns stages (AMED); and evaluates
everyone, and the stock schedulers, from seeds and prompts that nobody saw. Results go beside those of the recipe's `evaluate`, into
`generalised`. Each part continues when the command is given again.
"""

import argparse
from pathlib import Path

import compare_amed
import compare_schedules

from ld3_diffusers import LD3Scheduler
from training import evaluate, make_teacher_set, train_ld3
from training.arguments import read_recipe
from training.contenders import is_flow, is_preconditioned


# LD3 as its authors run it on pixel and on latent models, but by the distance that is measured here.
PUBLISHED = {True: "published-pixel", False: "published-stable-diffusion"}
NOT_OF_THE_METHOD = ("loss", "loss_space", "guidance_scale")
L2 = ["--loss", "l2", "--loss_space", "latent", "--checkpointing_steps", "25"]
BOTH_TIMES = ["--learn", "times,network_times", "--max_train_steps", "4"]  # few numbers need few pairs
CURVE = ["--curve", "--num_train", "64", "--first_pairs", "8"]
REFINED = ["--first_pairs", "128", "--max_train_steps", "2"]
GITS = {"GITS UniPC rescored": ("UniPC", True), "GITS iPNDM": ("iPNDM", False)}
AMED = "AMED iPNDM"


def published(recipes: Path, in_pixels: bool) -> list[str]:
    """Options of `train_ld3`."""
    settings = read_recipe(recipes / f"{PUBLISHED[in_pixels]}.yaml")
    return [*(f"--{key}={value}" for key, value in settings.items() if key not in NOT_OF_THE_METHOD), *L2]


def learn(config: list[str], folder: Path, nfe: list[int], of_published: list[str]) -> None:
    """A folder of schedules for each way to learn them."""
    counts = [str(count) for count in nfe]
    shared = ["--allow_worse", "--resume_from_checkpoint", "latest", "--report_to", "none"]
    ways = {
        "published": (counts, of_published),
        "generalised": (counts, []),
        "both-times": (counts, BOTH_TIMES),
        "curve": (counts, CURVE),
        "refined": (counts, ["--init", str(folder / "curve"), *REFINED]),
    }
    for name, (given, options) in ways.items():
        output = ["--output_dir", str(folder / name)]
        train_ld3.main([*config, "--nfe", *given, *options, *output, *shared])


def contenders(folder: Path, amed: Path, form: str | None) -> list[str]:
    """As `training.evaluate` takes them; the generalised schedules, with which the others are compared, first."""
    return [
        f"{folder / 'generalised'}:name=generalised",
        f"{folder / 'curve'}:name=curve",
        f"{folder / 'refined'}:name=curve refined",
        f"{folder / 'both-times'}:name=times alone",
        f"{folder / 'published'}:name=LD3 published",
        *(
            f"{compare_schedules.gits_folder(folder, solver, rescored)}:name={name}"
            for name, (solver, rescored) in GITS.items()
        ),
        *([] if form is None else [f"{compare_amed.folder_of(amed, AMED, form)}:name={AMED}"]),
        "stock",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="training/recipes/fashion-flux.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 4, 5, 6, 8, 10], help="default: 3 4 5 6 8 10")
    parser.add_argument("--num_samples", type=int, default=512, help="to judge on (default: %(default)s)")
    parser.add_argument("--amed", action=argparse.BooleanOptionalAction, default=True, help="also learn AMED's stages")
    args = parser.parse_args(argv)
    recipe, config = read_recipe(args.config), ["--config", args.config]
    evaluation = Path(recipe["evaluate"]["output_dir"])
    folder, amed = evaluation.parent / "generalised", Path(recipe["train_amed"]["output_dir"])
    stock = LD3Scheduler.load_config(recipe["common"]["pretrained_model_name_or_path"], subfolder="scheduler")
    of_published = published(Path(args.config).parent, is_preconditioned(stock))
    counts = [str(count) for count in args.nfe]

    make_teacher_set.main(config)
    learn(config, folder, args.nfe, of_published)
    for solver, rescored in GITS.values():
        compare_schedules.search(config, folder, counts, solver, rescored)
    form = "static" if is_flow(stock) else "per sample"
    if args.amed:
        # An analytical first step, which odd counts need, is refused for flow models.
        of_amed = [count for count in args.nfe if count % 2 == 0 or not is_flow(stock)]
        compare_amed.learn_students(config, amed, of_amed, (AMED,), (form,))
    seeds = f"{compare_schedules.FIRST_SEED}-{compare_schedules.FIRST_SEED + args.num_samples - 1}"
    compared = contenders(folder, amed, form if args.amed else None)
    output = ["--output_dir", str(evaluation / "generalised")]
    evaluate.main([*config, "--schedulers", *compared, "--nfe", *counts, "--seeds", seeds, *output])


if __name__ == "__main__":
    main()
