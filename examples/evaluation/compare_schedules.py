# SPDX-License-Identifier: Apache-2.0
"""Every way to choose times, side by side, at 3 to 10 evaluations: stock schedulers, GITS, DMN, AYS, OSS and LD3.

    PYTHONPATH=. python examples/evaluation/compare_schedules.py --config training/recipes/fashion-sd.yaml

makes teacher pairs, learns and searches on them, and evaluates everyone from seeds and prompts that neither saw, all as the recipe says.
Results go where the recipe lets `evaluate` write. Each part continues when the command is given again.
"""

import argparse
from pathlib import Path

from ld3_diffusers import LD3Scheduler
from training import evaluate, make_teacher_set, search_gits, search_oss, train_ld3
from training.arguments import read_recipe
from training.contenders import is_flow


FIRST_SEED = 3_000_000  # far from those of the pairs
# Learned here are times and network times, by backpropagation; what coefficients add to them: compare_generalised.py.
LD3 = ["--recipe", "adam", "--learn", "times,network_times", "--loss", "l2"]
BUDGET = ["--num_train", "256", "--max_train_steps", "100", "--checkpointing_steps", "25"]
SOLVERS = {
    "UniPC": ["--solver", "unipc", "--solver_order", "2"],
    "iPNDM": ["--solver", "ipndm", "--solver_order", "4"],
}
# Stock schedulers beside those that `stock` names, in the spacings that do well in few steps; flow models have none of these, and no
# AYS table.
NOT_FOR_FLOW = {
    "LMS": ("LMSDiscreteScheduler", ("linspace", "trailing")),
    "DPM2": ("KDPM2DiscreteScheduler", ("linspace", "trailing")),
    "PNDM": ("PNDMScheduler", ("leading", "trailing")),
}


def gits_folder(folder: Path, solver: str, rescored: bool) -> Path:
    return folder / f"gits-{solver.lower()}{'-rescored' if rescored else ''}"


def ld3_folder(folder: Path) -> Path:
    return folder / "ld3"


def learn_ld3(config: list[str], folder: Path, nfe: list[str], options: list[str]) -> None:
    """Pairs, and LD3's schedules, into [`ld3_folder`]."""
    make_teacher_set.main(config)
    output = ["--output_dir", str(ld3_folder(folder)), "--allow_worse", "--resume_from_checkpoint", "latest"]
    train_ld3.main([*config, "--nfe", *nfe, *LD3, *options, *output, "--report_to", "none"])


def search_and_learn(config: list[str], folder: Path, nfe: list[str], options: list[str]) -> None:
    """Pairs, and a folder of schedules of LD3 and each kind of GITS, with one for each number of evaluations."""
    learn_ld3(config, folder, nfe, options)
    for solver in SOLVERS:
        for rescored in (False, True):
            search(config, folder, nfe, solver, rescored)


def search(config: list[str], folder: Path, nfe: list[str], solver: str, rescored: bool) -> None:
    """GITS with a solver of `SOLVERS`, into its [`gits_folder`]."""
    output = ["--output_dir", str(gits_folder(folder, solver, rescored))]
    rescore = "--rescore" if rescored else "--no-rescore"
    search_gits.main([*config, "--nfe", *nfe, *SOLVERS[solver], rescore, *output])


def contenders(recipe: dict, folder: Path) -> list[str]:
    """As `training.evaluate` takes them; LD3, with which the others are compared, first."""
    oss = recipe["search_oss"]["output_dir"]
    gits = [
        f"{gits_folder(folder, solver, rescored)}:name=GITS {solver}{' rescored' if rescored else ''}"
        for solver in SOLVERS
        for rescored in (False, True)
    ]
    more = []
    if not is_flow(LD3Scheduler.load_config(recipe["common"]["pretrained_model_name_or_path"], subfolder="scheduler")):
        more += ["LD3Scheduler:name=AYS UniPC,solver=unipc,discretization=ays"]
        for name, (kind, spacings) in NOT_FOR_FLOW.items():
            more += [f"{kind}:name={name},timestep_spacing={spacing}" for spacing in spacings]
    return [
        f"{ld3_folder(folder)}:name=LD3",
        *gits,
        f"{oss}:name=OSS Euler",
        f"{oss}:name=OSS UniPC,solver=unipc,solver_order=2",
        "LD3Scheduler:name=DMN UniPC,solver=unipc,discretization=dmn",
        "stock",
        "DPMSolverSinglestepScheduler:name=DPM++ 2S",
        *more,
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="training/recipes/fashion-sd.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--nfe", nargs="+", default=[str(nfe) for nfe in range(3, 11)], help="default: 3 to 10")
    parser.add_argument("--num_samples", type=int, default=512, help="to judge on (default: %(default)s)")
    args = parser.parse_args(argv)
    recipe, config = read_recipe(args.config), ["--config", args.config]
    folder = Path(recipe["search_gits"]["output_dir"]).parent
    search_and_learn(config, folder, args.nfe, BUDGET)
    search_oss.main([*config, "--nfe", *args.nfe])
    seeds = f"{FIRST_SEED}-{FIRST_SEED + args.num_samples - 1}"
    evaluate.main([*config, "--schedulers", *contenders(recipe, folder), "--nfe", *args.nfe, "--seeds", seeds])


if __name__ == "__main__":
    main()
