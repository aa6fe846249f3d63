# SPDX-License-Identifier: Apache-2.0
"""What each kind of parameter buys: times, network times, coefficients of one, two and all predictions, and a relaxed objective.

    PYTHONPATH=. python examples/evaluation/ablation.py --config training/recipes/fashion-flux.yaml

learns each way on the pairs of the recipe, and evaluates all from seeds and prompts that nobody saw. Results go beside those of the recipe's
`evaluate`, into `ablation`. Each part continues when the command is given again.
"""

import argparse
from pathlib import Path

import compare_schedules

from training import evaluate, make_teacher_set, train_ld3
from training.arguments import read_recipe


# Relaxed objectives move the student's noise, which Levenberg-Marquardt does not: beside Adam stands Adam without.
ADAM = ["--recipe", "adam", "--checkpointing_steps", "25"]
WAYS = {
    "times": ["--learn", "times"],
    "+ network times": ["--learn", "times,network_times"],
    "+ coefficients of 1": ["--coefficient_window", "1"],
    "+ coefficients of 2": ["--coefficient_window", "2"],
    "+ coefficients of all": [],
    "the same by Adam": ADAM,
    "the same by Adam, relaxed": [*ADAM, "--relaxation", "1e-3"],
}
SUBJECT = "+ coefficients of all"


def folder_of(folder: Path, name: str) -> Path:
    return folder / name.replace("+ ", "").replace(", ", "-").replace(" ", "-")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="training/recipes/fashion-flux.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--nfe", nargs="+", default=["5", "8"], help="default: 5 8")
    parser.add_argument("--num_samples", type=int, default=512, help="to judge on (default: %(default)s)")
    args = parser.parse_args(argv)
    evaluation, config = Path(read_recipe(args.config)["evaluate"]["output_dir"]), ["--config", args.config]
    folder = evaluation.parent / "ablation"
    make_teacher_set.main(config)
    for name, options in WAYS.items():
        output = ["--output_dir", str(folder_of(folder, name)), "--allow_worse", "--report_to", "none"]
        train_ld3.main([*config, "--nfe", *args.nfe, "--resume_from_checkpoint", "latest", *options, *output])
    compared = [f"{folder_of(folder, name)}:name={name.replace(',', '')}" for name in WAYS]
    seeds = f"{compare_schedules.FIRST_SEED}-{compare_schedules.FIRST_SEED + args.num_samples - 1}"
    output = ["--subject", SUBJECT, "--output_dir", str(evaluation / "ablation")]
    evaluate.main([*config, "--schedulers", *compared, "--nfe", *args.nfe, "--seeds", seeds, *output])


if __name__ == "__main__":
    main()
