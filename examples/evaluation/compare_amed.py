# SPDX-License-Identifier: Apache-2.0
"""AMED-Solver and AMED-Plugin beside their bare solvers, LD3 and UniPC, at 4 to 8 evaluations, per sample and static.

    PYTHONPATH=. python examples/evaluation/compare_amed.py --config training/recipes/fashion-sd.yaml

makes teacher pairs, learns schedules on them (LD3's as compare_schedules.py does), and evaluates everyone from seeds and prompts that nobody saw.
Results go to the folder `amed` beside those of compare_schedules.py. Each part continues when the command is given again.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import compare_schedules

from ld3_diffusers import LD3Scheduler, load_scheduler
from ld3_diffusers.amed import amed_schedule
from training import evaluate, train_amed
from training.arguments import read_recipe


FORMS = {"per sample": "per_sample", "static": "static"}
STUDENTS = {
    "AMED-Solver": ["--solver", "amed", "--solver_order", "2"],
    "AMED iPNDM": ["--solver", "ipndm", "--solver_order", "2"],
    "AMED DPM++": ["--solver", "dpmpp", "--solver_order", "2", "--no-predict_x0"],
    "AMED Euler": ["--solver", "euler", "--solver_order", "1"],
    "AMED DPM-2": ["--solver", "dpm2", "--solver_order", "2"],
}
EVERYWHERE = ("AMED-Solver", "AMED iPNDM", "AMED DPM++")
OTHERS_AT = 6  # evaluations at which the other students take part
# The solvers by themselves, with as many evaluations on a hand-made grid; at odd counts also with an analytical first step. All of
# one name are, for a table, the best of them.
BARE = {
    "DPM-2": "solver=dpm2",
    "iPNDM": "solver=ipndm,solver_order=2",
    "DPM++": "solver=dpmpp,solver_order=2,predict_x0=false",
    "Euler": "solver=euler",
}
GRIDS = ("time_uniform", "logsnr", "polynomial")
STOCK = [f"UniPCMultistepScheduler:name=UniPC,timestep_spacing={spacing}" for spacing in ("linspace", "trailing")]


def folder_of(folder: Path, student: str, form: str) -> Path:
    return folder / f"{student.lower().replace(' ', '-')}-{FORMS[form]}"


def learn(config: list[str], folder: Path, nfes: list[int]) -> None:
    """Pairs, LD3's schedules and those of all students in both forms."""
    compare_schedules.learn_ld3(config, folder.parent, [str(nfe) for nfe in nfes], compare_schedules.BUDGET)
    learn_students(config, folder, nfes, EVERYWHERE, FORMS)
    others = [student for student in STUDENTS if student not in EVERYWHERE]
    learn_students(config, folder, [nfe for nfe in nfes if nfe == OTHERS_AT], others, FORMS)


def learn_students(config: list[str], folder: Path, nfes: list[int], students: Iterable[str], forms: Iterable[str]):
    """A folder of schedules for each student and form; odd counts have an analytical first step."""
    for student in students:
        for form in forms:
            for afs in (False, True):
                counts = [str(nfe) for nfe in nfes if nfe % 2 == afs]
                if counts:
                    options = [*STUDENTS[student], "--form", FORMS[form], "--afs" if afs else "--no-afs"]
                    output = ["--output_dir", str(folder_of(folder, student, form)), "--report_to", "none"]
                    shared = ["--trajectories", str(folder / "trajectories")]
                    resume = ["--allow_worse", "--resume_from_checkpoint", "latest"]
                    train_amed.main([*config, "--nfe", *counts, *options, *output, *shared, *resume])


def save_bare_stages(folder: Path, student: str) -> Path:
    """The learned schedules with the stages of the bare solver in place of the learned ones: where learning began."""
    learned = load_scheduler(folder_of(folder, student, "static"))
    bare = {
        str(nfe): amed_schedule(
            schedule.times[::2], schedule.spec, learned.path, schedule.prediction_type, final=schedule.final
        ).to_dict(learned.path)
        for nfe, schedule in learned.learned_schedules.items()
    }
    place = folder / f"{student.lower().replace(' ', '-')}-bare"
    LD3Scheduler.from_config(learned.config, schedules=bare).save_pretrained(place)
    return place


def contenders(folder: Path, nfes: list[int]) -> list[str]:
    """As `training.evaluate` takes them; LD3, with which the others are compared, first."""
    taking_part = [student for student in STUDENTS if student in EVERYWHERE or OTHERS_AT in nfes]
    learned = [
        f"{folder_of(folder, student, form)}:name={student} {form}" for student in taking_part for form in FORMS
    ]
    learned += [f"{save_bare_stages(folder, student)}:name={student} bare stages" for student in taking_part]
    bare = [
        f"LD3Scheduler:name={name},{solver},discretization={grid}{afs}"
        for name, solver in BARE.items()
        for grid in GRIDS
        for afs in ("", ",afs=true")
    ]
    return [f"{compare_schedules.ld3_folder(folder.parent)}:name=LD3", *learned, *bare, *STOCK]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="training/recipes/fashion-sd.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 7, 8], help="default: 4 to 8")
    parser.add_argument("--num_samples", type=int, default=256, help="to judge on (default: %(default)s)")
    args = parser.parse_args(argv)
    recipe, config = read_recipe(args.config), ["--config", args.config]
    folder = Path(recipe["train_amed"]["output_dir"])
    learn(config, folder, args.nfe)
    seeds = f"{compare_schedules.FIRST_SEED}-{compare_schedules.FIRST_SEED + args.num_samples - 1}"
    output = ["--output_dir", str(Path(recipe["evaluate"]["output_dir"]) / "amed")]
    counts = [str(nfe) for nfe in args.nfe]
    evaluate.main(
        [*config, "--schedulers", *contenders(folder, args.nfe), "--nfe", *counts, "--seeds", seeds, *output]
    )


if __name__ == "__main__":
    main()
