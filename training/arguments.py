# SPDX-License-Identifier: Apache-2.0
"""Command lines with recipes: a YAML file fills in arguments that the command line does not give."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml


SECTIONS = (
    *("make_teacher_set", "search_gits", "search_oss", "train_ld3", "train_amed", "publish"),
    *("sample", "evaluate", "make_reference"),
)  # the programs, by their parsers' names
COMMON, ABOUT = "common", "about"


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv` after the entries of the recipe that `--config` names, so that the command line wins.

    A recipe maps argument names without dashes to values: a flag's is true or false, a list gives several values, null leaves
    the default. Types and choices are checked as if typed.

    One file may serve several programs. It then has sections: `common` for all, one named like each program (`parser.prog`),
    which adds to `common` and overrides it, and `about` for facts that no program reads.

    A recipe that cannot be read, an unknown section, or an unknown name in the program's entries, is a usage error.
    """
    parser.allow_abbrev = False
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe: values for arguments that are not given here")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, given = finder.parse_known_args(argv)
    recipe = [] if found.config is None else _recipe_tokens(parser, found.config)
    namespace = parser.parse_args([*recipe, *given])
    namespace.config = found.config
    return namespace


def read_recipe(path: str | Path) -> dict:
    """The content of a recipe file.

    Raises:
        ValueError: if it cannot be read, or is no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {str(path)!r}: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(
            f"the recipe {str(path)!r} is no mapping of argument names to values; write one `name: value` a line"
        )
    return recipe


def recipe_entries(recipe: dict, program: str) -> dict:
    """What a recipe says to a program: all of it if it is flat, else `common` and then the program's section.

    Raises:
        ValueError: for an unknown section, or one that is no mapping.
    """
    known = (COMMON, *SECTIONS, ABOUT)
    if not any(name in recipe for name in known):
        return recipe
    unknown = [str(name) for name in recipe if name not in known]
    if unknown:
        raise ValueError(f"unknown sections {', '.join(unknown)}; a recipe with sections has only {', '.join(known)}")
    entries = {}
    for name in (COMMON, program):
        section = {} if recipe.get(name) is None else recipe[name]
        if not isinstance(section, dict):
            raise ValueError(f"the section {name} is no mapping of argument names to values")
        entries.update(section)
    return entries


def _recipe_tokens(parser: argparse.ArgumentParser, path: str) -> list[str]:
    with usage_errors(parser):
        recipe = read_recipe(path)
        try:
            return _tokens(parser, recipe_entries(recipe, parser.prog))
        except ValueError as error:
            raise ValueError(f"the recipe {path!r}: {error}") from error


def _tokens(parser: argparse.ArgumentParser, entries: dict) -> list[str]:
    options = {name: action for action in parser._actions for name in action.option_strings}
    unknown = sorted(str(key) for key in entries if f"--{key}" not in options or key in ("config", "help"))
    if unknown:
        raise ValueError(f"unknown entries {', '.join(unknown)} for {parser.prog}; see --help for the names")
    tokens = []
    for key, value in entries.items():
        option = f"--{key}"
        flag = options[option].nargs == 0 or isinstance(options[option], argparse.BooleanOptionalAction)
        if value is None:
            continue
        if flag and not isinstance(value, bool):
            raise ValueError(f"{key} is a flag; write true or false")
        if isinstance(value, bool) and not flag:
            raise ValueError(f"{key} is no flag, and YAML reads its value as {value}; put it in quotes")
        if isinstance(value, dict) or isinstance(value, list) and options[option].nargs is None:
            raise ValueError(f"{key} takes one value, got {value}")
        if flag and value:
            tokens.append(option)
        elif flag and f"--no-{key}" in options:
            tokens.append(f"--no-{key}")
        elif isinstance(value, list):
            tokens += [option, *map(str, value)]
        elif not flag:
            tokens.append(f"{option}={value}")
    return tokens


@contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn a `ValueError` into one sentence on standard error and exit code 2."""
    try:
        yield
    except ValueError as error:
        parser.error(" ".join(str(error).split()))


def check_writable(output_dir: str) -> None:
    """Raises a `ValueError` unless `output_dir` is a writable folder or can be made one."""
    existing = Path(output_dir).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(
            f"cannot write to {str(output_dir)!r}: {str(existing)!r} is not a writable folder; choose another --output_dir"
        )
