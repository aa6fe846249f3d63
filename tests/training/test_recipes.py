# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a file with sections says to which program, and that every shipped one fits the programs' arguments."""

from pathlib import Path

import pytest

from ld3_diffusers import SolverSpec
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


RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))
FLAT = [path for path in RECIPES if path.name.startswith("published-")]
SECTIONED = [path for path in RECIPES if path not in FLAT]
REAL = [path for path in SECTIONED if not path.name.startswith("fashion-")]
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
        "train_ld3:\n  nfe: [4, 5, 6]\n  seed: 4\n  train_batch_size: 8\n  gradient_checkpointing: true\n"
        "  lower_order_final: false\n  variant: null\n"
        "publish:\n"
    )
    return path


def test_each_program_reads_common_and_its_own_section(recipe):
    made, learned = read("make_teacher_set", recipe), read("train_ld3", recipe)
    for args in (made, learned):
        assert args.pretrained_model_name_or_path == "some/teacher" and args.mixed_precision == "fp16"
    assert (made.num_samples, made.train_batch_size, made.seed) == (12, 4, 3)
    assert (learned.nfe, learned.recipe_batch_size, learned.seed) == ([4, 5, 6], 8, 4)
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
    assert (made.prompts_file is None) != (made.dataset_name is None)
    # The teacher must see more than its best student.
    assert made.num_inference_steps > max(learned.nfe)


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_recipes_for_real_models_say_what_they_cost_and_that_they_were_not_run(path):
    recipe = read_recipe(path)
    assert set(recipe) - {"train_amed"} == {"about", "common", "make_teacher_set", "train_ld3", "publish"}
    about, made, learned = recipe["about"], read("make_teacher_set", path), read("train_ld3", path)
    assert about["status"] == "not run on the real weights" and {"licence", "gated", "memory", "time"} <= set(about)
    iterations = learning_arguments.recipe_of(learned).max_steps
    assert about["network_evaluations"] == {
        "teacher": made.num_samples * made.num_inference_steps,
        "learning": iterations * learned.recipe_batch_size * sum(learned.nfe) * 4,
    }
    # Judging is on captions that learning has not seen.
    assert recipe["publish"]["dataset_name"] == made.dataset_name
    assert recipe["publish"]["dataset_split"] != made.dataset_split
