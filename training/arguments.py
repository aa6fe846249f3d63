# SPDX-License-Identifier: Apache-2.0
"""Command lines with recipes: a YAML file fills in arguments that the command line does not give."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv` after the entries of the recipe that `--config` names, so that the command line wins.

    A recipe maps argument names without dashes to values: a flag's is true or false, a list gives several values, null leaves
    the default. Types and choices are checked as if typed. A recipe that cannot be read, or an unknown name in it, is a usage
    error.
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


def _recipe_tokens(parser: argparse.ArgumentParser, path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"cannot read the recipe {path!r}: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        parser.error(f"the recipe {path!r} is no mapping of argument names to values; write one `name: value` a line")
    options = {name: action for action in parser._actions for name in action.option_strings}
    unknown = sorted(str(key) for key in recipe if f"--{key}" not in options or key in ("config", "help"))
    if unknown:
        parser.error(f"the recipe {path!r} has unknown entries {', '.join(unknown)}; see --help for the names")
    tokens = []
    for key, value in recipe.items():
        option = f"--{key}"
        if value is None:
            continue
        if options[option].nargs == 0 or isinstance(options[option], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                parser.error(f"{key} in the recipe {path!r} is a flag; write true or false")
            if value:
                tokens.append(option)
            elif f"--no-{key}" in options:
                tokens.append(f"--no-{key}")
        elif isinstance(value, list):
            tokens += [option, *map(str, value)]
        else:
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
