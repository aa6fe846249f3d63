# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a file with sections says to which program, and that every shipped one fits the programs' arguments."""

import itertools
from pathlib import Path

import pytest

from ld3_diffusers import SolverSpec
from pipelines import convert
from pipelines.conversion.download import PUBLIC
from training import (
    amed_arguments,
    evaluate,
    learning_arguments,
    make_teacher_set,
    publish,
    sample,
    search_gits,
    search_oss,
)
from training.arguments import parse, read_recipe
from training.call_settings import check_call_arguments
from training.learner_default import FEWEST_HELD_OUT
from training.learning_arguments import solver_of
from training.prompts import read_prompts
from training.published_results import data_sets


RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))
FLAT = [path for path in RECIPES if path.name.startswith("published-")]
SECTIONED = [path for path in RECIPES if path not in FLAT]
REAL = [path for path in SECTIONED if not path.name.startswith("fashion-")]
# The data sets of the papers' tables whose teachers pipelines.convert makes, and what LD3's authors learned them with.
CONVERTED = {
    **dict.fromkeys(("cifar10", "ffhq-64", "afhqv2-64", "imagenet-64"), "pixel"),
    **dict.fromkeys(("imagenet-256-adm", "lsun-bedroom-256"), "pixel"),
    **dict.fromkeys(("lsun-bedroom-ldm", "ffhq-ldm", "imagenet-256-ldm"), "latent"),
}
REPORTED = [path for path in REAL if path.stem in CONVERTED or path.stem in ("sd14", "sd15")]
LEARNERS = ("train_ld3", "search_gits", "train_amed")
LABELS = "training/recipes/imagenet-labels.txt"
PARSERS = {
    "make_teacher_set": make_teacher_set.parser,
    "train_ld3": learning_arguments.parser,
    "train_amed": lambda: amed_arguments.parser("Learn."),
    "publish": publish.parser,
    "search_gits": search_gits.parser,
    "search_oss": search_oss.parser,
    "sample": sample.parser,
    "evaluate": evaluate.parser,
}


def name_of(path):
    return path.stem


def read(program, path, *given):
    """The program's arguments, with the recipe alone: what it leaves open is None."""
    parser = PARSERS[program]()
    for action in parser._actions:
        action.required = False
    return parse(parser, ["--config", str(path), *given])


def refuse(program, path, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        read(program, path)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---------------------------------------------------------------------- files with sections


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "about: {anything: [1, 2], nfe: many}\n"
        "common:\n  teacher: some/teacher\n  mixed_precision: fp16\n  seed: 3\n"
        "make_teacher_set:\n  num_samples: 12\n  train_batch_size: 4\n"
        "train_ld3:\n  nfe: [4, 5, 6]\n  seed: 4\n  micro_batch_size: 8\n  gradient_checkpointing: true\n"
        "  lower_order_final: false\n  variant: null\n"
        "publish:\n"
    )
    return path


def test_each_program_reads_common_and_its_own_section(recipe):
    made, learned = read("make_teacher_set", recipe), read("train_ld3", recipe)
    for args in (made, learned):
        assert args.pretrained_model_name_or_path == "some/teacher" and args.mixed_precision == "fp16"
    assert (made.num_samples, made.train_batch_size, made.seed) == (12, 4, 3)
    assert (learned.nfe, learned.recipe_micro_batch_size, learned.seed) == ([4, 5, 6], 8, 4)
    assert learned.gradient_checkpointing and not learned.lower_order_final and learned.variant is None


def test_the_command_line_wins(recipe):
    args = read("train_ld3", recipe, "--nfe", "7", "--seed", "5", "--lower_order_final")
    assert (args.nfe, args.seed, args.lower_order_final) == ([7], 5, True)


@pytest.mark.parametrize(
    "content, message",
    [
        ("common: {seed: 1}\nlearn: {nfe: 4}\n", "unknown sections learn; a recipe with sections has only common"),
        ("common: {seed: 1}\nnfe: 4\n", "unknown sections nfe"),
        ("about: {}\nnfe: 4\n", "unknown sections nfe"),
        ("common: {num_samples: 4}\n", "unknown entries num_samples for train_ld3"),
        ("train_ld3: {num_samples: 4}\n", "unknown entries num_samples for train_ld3"),
        ("train_ld3: 4\n", "the section train_ld3 is no mapping"),
        ("train_ld3: {config: a.yaml}\n", "unknown entries config"),
        ("train_ld3: {nfe: [4, many]}\n", "invalid int value: 'many'"),
        ("train_ld3: {nfe: []}\n", "expected at least one argument"),
        ("train_ld3: {seed: [1, 2]}\n", "seed takes one value, got [1, 2]"),
        ("seed: {a: 1}\n", "seed takes one value"),
        ("train_ld3: {mixed_precision: no}\n", "mixed_precision is no flag, and YAML reads its value as False"),
        ("train_ld3: {allow_worse: 1}\n", "allow_worse is a flag; write true or false"),
        ("train_ld3: {solver: magic}\n", "invalid choice: 'magic'"),
    ],
)
def test_what_does_not_fit_is_a_usage_error(tmp_path, capsys, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert message in refuse("train_ld3", path, capsys)


def test_what_another_program_is_told_is_not_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train_ld3: {nfe: 4}\nmake_teacher_set: {nothing: 1}\n")
    assert read("train_ld3", path).nfe == [4]


# ---------------------------------------------------------------------- the files of training/recipes


def check_arguments(program, args):
    """What the program itself refuses before it loads anything, but for what must exist."""
    if program == "make_teacher_set":
        check_call_arguments(args)
        SolverSpec(args.solver, args.solver_order).make()
    elif program == "train_ld3":
        args.nfe = args.nfe or [5]
        learning_arguments.check(args)
        learning_arguments.recipe_of(args)
        SolverSpec(args.solver, args.solver_order, args.solver_type).make()
    elif program == "train_amed":
        args.nfe = args.nfe or [4]
        amed_arguments.check(args)
        solver_of(args)
    elif program == "search_gits":
        search_gits.check(args)
        solver_of(args)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_shipped_recipes_fit_the_programs(path):
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    for program in ["train_ld3"] if path in FLAT else PARSERS:
        check_arguments(program, read(program, path))


@pytest.mark.parametrize("path", SECTIONED, ids=name_of)
def test_the_second_program_goes_on_where_the_first_ends(path):
    made, learned = read("make_teacher_set", path), read("train_ld3", path)
    assert made.output_dir == learned.teacher_set == f"outputs/{path.stem}/teacher-set"
    assert learned.output_dir == f"outputs/{path.stem}/schedules"
    for name in ("pretrained_model_name_or_path", "mixed_precision", "variant", "revision"):
        assert getattr(made, name) == getattr(learned, name)
    conditions = [place for place in (made.prompts_file, made.dataset_name, made.class_labels) if place is not None]
    unconditional = path.stem in CONVERTED and not path.stem.startswith("imagenet")
    assert len(conditions) == (0 if unconditional else 1)
    # The teacher must see more than its best student.
    assert made.num_inference_steps > max(learned.nfe)


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_recipes_for_real_models_say_what_they_cost_and_that_they_were_not_run(path):
    recipe = read_recipe(path)
    assert {"about", "common", "make_teacher_set", "train_ld3", "publish"} <= set(recipe)
    about, made, learned = recipe["about"], read("make_teacher_set", path), read("train_ld3", path)
    assert about["status"] == "not run on the real weights" and {"licence", "gated", "memory", "time"} <= set(about)
    evaluations = {"teacher": made.num_samples * made.num_inference_steps, "learning": learning_evaluations(learned)}
    if path.stem in CONVERTED and "search_gits" in recipe:
        searched = read("search_gits", path)
        pairs = (searched.num_train + searched.num_valid) * searched.teacher_steps
        evaluations["searching"] = pairs + searched.num_train * (searched.num_grid_points - 1)
    assert about["network_evaluations"] == evaluations
    # Judging is on captions that learning has not seen.
    assert recipe["publish"].get("dataset_name") == made.dataset_name
    assert made.dataset_name is None or recipe["publish"]["dataset_split"] != made.dataset_split


def learning_evaluations(args) -> int:
    """Network evaluations of one sample; an evaluation that is differentiated counts as four: forward, again, backward as two."""
    recipe = learning_arguments.recipe_of(args)
    if recipe.name == "default":
        pairs = [min(recipe.first_pairs * 2**i, args.num_train) for i in range(recipe.max_steps)]
        held_out = [min(max(count, FEWEST_HELD_OUT), args.num_valid) for count in pairs]
        tried = 1 + 3  # the schedule as it is, and dampings, mostly
        evaluations = 0
        for i, n in itertools.product(range(recipe.max_steps), args.nfe):
            # Row r's state depends on the r (r + 5) / 2 numbers of the rows before.
            along = sum(min(recipe.directions, r * (r + 5) // 2) for r in range(1, n))
            evaluations += pairs[i] * (3 * n + along) + held_out[i] * tried * n
        return evaluations
    iterations = -(-args.num_train // recipe.batch_size)
    first_validation = min(args.num_valid, recipe.valid_batch_size)
    # Every sample is differentiated and tried again; validation noises are moved once a round in the same way.
    a_round = iterations * (recipe.batch_size * 5 + first_validation) + args.num_valid * 5
    return (recipe.rounds_v1 + recipe.rounds_v2) * a_round * sum(args.nfe)


# ---------------------------------------------------------------------- the data sets of the papers' tables


def test_there_is_a_recipe_for_every_data_set():
    names = {path.stem for path in REPORTED}
    assert names == {*CONVERTED, "sd14", "sd15"} and set(data_sets()) < names


@pytest.mark.parametrize("path", [path for path in REPORTED if path.stem in CONVERTED], ids=name_of)
def test_ld3_learns_as_published(path):
    kind, section = CONVERTED[path.stem], read_recipe(path)["train_ld3"]
    published = read_recipe(path.with_name(f"published-{kind}.yaml"))
    # The authors' best numbers are of another solver than their configs.
    for name in set(published) - {"solver", "solver_type"}:
        assert section[name] == published[name], name
    assert section["solver"] == ("unipc" if path.stem == "imagenet-256-adm" else "ipndm")
    made = read("make_teacher_set", path)
    grids = {"latent": "time_uniform", "pixel": "logsnr"}
    grid = {"cifar10": "polynomial", "imagenet-256-adm": "time_uniform"}.get(path.stem, grids[kind])
    steps = 10 if path.stem == "imagenet-256-ldm" else 20
    assert (made.solver, made.solver_order, made.num_inference_steps) == ("unipc", 3, steps)
    # Their teacher ends where their students do; ImageNet's ADM, of which they report nothing, is left as it was.
    end = {"pixel": "bh1", "latent": "bh2"}[kind], "sigma_min"
    assert (made.solver_type, made.final_sigmas_type) == ((None, None) if path.stem == "imagenet-256-adm" else end)
    assert made.discretization == grid and made.num_samples == section["num_train"] + section["num_valid"]


@pytest.mark.parametrize("path", [path for path in REPORTED if path.stem in CONVERTED], ids=name_of)
def test_teachers_are_what_the_named_command_converts(path):
    folder = f"outputs/{path.stem}/teacher"
    assert read_recipe(path)["common"] == {"pretrained_model_name_or_path": folder}
    comments = path.read_text().partition("about:")[0].replace("\\\n#", "")
    command = next(line for line in comments.splitlines() if "pipelines.convert" in line)
    args = convert.parser().parse_args(command.partition("pipelines.convert")[2].split())
    family = path.stem.rpartition("-")[2] if path.stem.endswith(("adm", "ldm")) else "edm"
    assert args.family == ("consistency" if path.stem == "lsun-bedroom-256" else family)
    assert args.output_dir == folder
    if args.download is not None:
        assert Path(args.checkpoint).name in PUBLIC and getattr(args, "classifier", None) in (None, *PUBLIC)


@pytest.mark.parametrize("path", REPORTED, ids=name_of)
def test_all_programs_sample_alike(path):
    recipe = read_recipe(path)
    sampling = {"make_teacher_set", "sample", "evaluate"}
    sampling |= {name for name in LEARNERS if name in recipe and "teacher_set" not in recipe[name]}
    scale = {"imagenet-256-adm": 4.0, "imagenet-256-ldm": 2.0, "sd14": 7.5, "sd15": 7.5}.get(path.stem)
    for program in sampling:
        args = read(program, path)
        assert args.guidance_scale == scale, program
        labels = getattr(args, "class_labels", None) or args.prompts_file
        wanted = "0-999" if program in ("sample", "evaluate") else LABELS
        assert labels == (wanted if path.stem.startswith("imagenet") else None), program
    assert path.stem not in data_sets() or data_sets()[path.stem].guidance_scale in (None, scale)


def test_labels_of_imagenet_are_all_of_them_once():
    labels = [int(label) for label in read_prompts(RECIPES[0].with_name("imagenet-labels.txt"))]
    assert sorted(labels) == list(range(1000)) and labels != sorted(labels)


@pytest.mark.parametrize("path", REPORTED, ids=name_of)
def test_evaluations_are_as_published(path, tmp_path, monkeypatch):
    recipe, args = read_recipe(path), read("evaluate", path)
    learned = {name: read(name, path) for name in LEARNERS if name in recipe}
    monkeypatch.chdir(tmp_path)
    for made in learned.values():
        Path(made.output_dir).mkdir(parents=True)
        Path(made.output_dir, "scheduler_config.json").write_text("{}")
    if path.stem in CONVERTED:
        Path(args.pretrained_model_name_or_path).mkdir()
        Path(args.pretrained_model_name_or_path, "model_index.json").write_text("{}")
    args.dataset_name = None  # captions of the Hub
    seeds, _, specs = evaluate.check(args)
    assert args.metrics == ["fid"] and args.published_results == (path.stem if path.stem in data_sets() else None)
    assert len(seeds) == (data_sets()[path.stem].samples if args.published_results else len(seeds)) >= 30000
    assert {made.output_dir for made in learned.values()} == {spec.source for spec in specs if spec.is_saved}
    assert len({spec.name for spec in specs}) == len(specs)
    assert {nfe for made in learned.values() for nfe in made.nfe} == set(args.nfe)
    assert all(spec.options["solver_order"] == 4 for spec in specs if spec.source == "LD3Scheduler")
    # EDM's statistics say nothing of their network; those that make_reference makes do.
    edm = path.stem in ("cifar10", "ffhq-64", "afhqv2-64", "imagenet-64")
    assert args.reference_network == ("inception" if edm else None)
    if edm:
        assert Path(args.reference[0]).name == data_sets()[path.stem].reference
