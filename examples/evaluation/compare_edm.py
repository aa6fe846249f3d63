# SPDX-License-Identifier: Apache-2.0
"""A pixel-space EDM at 3 to 10 evaluations: EDM's own solvers on its grids, stock schedulers, GITS, AMED and LD3.

    PYTHONPATH=. python examples/evaluation/compare_edm.py --config training/recipes/fashion-edm.yaml

makes teacher pairs, learns and searches on them, and evaluates everyone from seeds that nobody saw, all as the recipe says. Results go
where the recipe lets `evaluate` write. Each part continues when the command is given again.
"""

import argparse
from pathlib import Path

import compare_amed
import compare_schedules

from training import evaluate
from training.arguments import read_recipe


STUDENTS = ("AMED iPNDM",)
LD3 = ["--solver", "ipndm", "--solver_order", "3", "--num_train", "128", "--num_valid", "64"]
# Larger rates throw four evaluations off course in the first iterations.
LD3 += ["--learning_rate", "0.02", "--learning_rate_network_times", "0.01", "--lr_warmup_steps", "10"]
LD3 += ["--max_train_steps", "60", "--checkpointing_steps", "20"]
# The solvers of EDM, AMED and GITS, each on the grids that it is used with there. All of one name are, for a table, the best of them.
SOLVERS = {
    "Heun": ("solver=heun", ("polynomial",)),
    "DPM++": ("solver=dpmpp,solver_order=3", ("logsnr", "time_uniform_vp,rho=2")),
    "UniPC": ("solver=unipc,solver_order=3", ("logsnr", "time_uniform_vp,rho=2")),
    "iPNDM": ("solver=ipndm,solver_order=3", ("polynomial", "time_uniform_vp,rho=2")),
    "DEIS": ("solver=deis,solver_order=3", ("polynomial", "time_uniform_vp,rho=2")),
}


def contenders(recipe: dict) -> list[str]:
    """As `training.evaluate` takes them; LD3, with which the others are compared, first."""
    folder, amed = Path(recipe["search_gits"]["output_dir"]).parent, Path(recipe["train_amed"]["output_dir"])
    return [
        f"{compare_schedules.ld3_folder(folder)}:name=LD3",
        *(
            f"{compare_schedules.gits_folder(folder, solver, rescored)}:name=GITS {solver}{' rescored' * rescored}"
            for solver in compare_schedules.SOLVERS
            for rescored in (False, True)
        ),
        *(f"{compare_amed.folder_of(amed, student, 'per sample')}:name={student}" for student in STUDENTS),
        *(
            f"LD3Scheduler:name={name},{solver},discretization={grid}"
            for name, (solver, grids) in SOLVERS.items()
            for grid in grids
        ),
        "stock",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="training/recipes/fashion-edm.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--nfe", type=int, nargs="+", default=list(range(3, 11)), help="default: 3 to 10")
    parser.add_argument("--num_samples", type=int, default=512, help="to judge on (default: %(default)s)")
    args = parser.parse_args(argv)
    recipe, config, counts = read_recipe(args.config), ["--config", args.config], [str(nfe) for nfe in args.nfe]
    compare_schedules.search_and_learn(config, Path(recipe["search_gits"]["output_dir"]).parent, counts, LD3)
    compare_amed.learn_students(config, Path(recipe["train_amed"]["output_dir"]), args.nfe, STUDENTS, ("per sample",))
    seeds = f"{compare_schedules.FIRST_SEED}-{compare_schedules.FIRST_SEED + args.num_samples - 1}"
    evaluate.main([*config, "--schedulers", *contenders(recipe), "--nfe", *counts, "--seeds", seeds])


if __name__ == "__main__":
    main()
