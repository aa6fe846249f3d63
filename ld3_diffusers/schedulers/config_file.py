# SPDX-License-Identifier: Apache-2.0
"""Reading a `scheduler_config.json` that anyone may have written: nothing in it is trusted, and no part of it is dropped unsaid."""

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import schedulers
from diffusers.utils import logging
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


logger = logging.get_logger(__name__)

CONFIG_NAME = "scheduler_config.json"
OWN_CLASSES = ("LD3Scheduler", "AMEDScheduler")
# A schedule of 1000 evaluations takes 45 KB, and one that is worth learning less than 1: no honest config comes near.
MAX_BYTES = 4 * 2**20


def own_options(cls: type) -> dict[str, inspect.Parameter]:
    return {name: option for name, option in inspect.signature(cls.__init__).parameters.items() if name != "self"}


@cache
def stock_options() -> frozenset[str]:
    """Names of the options of every scheduler in Diffusers: those that a config may carry along for their sake."""
    classes = [getattr(schedulers, name) for name in dir(schedulers) if name.endswith("Scheduler")]
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    return frozenset(names - {"self", "args", "kwargs"})


def unknown_options(config: dict[str, Any], cls: type) -> list[str]:
    """Keys of a config that are options neither of `cls` nor of a stock scheduler."""
    own = own_options(cls)
    unknown = [key for key in config if key not in own and not str(key).startswith("_")]
    return sorted(set(unknown) - stock_options()) if unknown else []


def without_unknown_options(config: dict[str, Any], cls: type) -> dict[str, Any]:
    """A config without what no class could read, which would be saved with it and then refused; that is said once."""
    unknown = unknown_options(config, cls)
    if not unknown:
        return config
    logger.warning(f"ignoring {', '.join(unknown)}, which no scheduler of the installed Diffusers has")
    return {key: value for key, value in config.items() if key not in unknown}


def read_config_file(file, cls: type, archive: dict | None = None) -> dict[str, Any]:
    """The config of a scheduler that is to be made a `cls`, an `LD3Scheduler`.

    Args:
        file: its path; no more of it is read than may be there.
        archive: open entries by path, in which to look for `file` instead (DDUF, in older releases of Diffusers).

    Raises:
        ValueError: if it is too large, no JSON object in UTF-8, or has a key twice, a value that is no finite number or no
            boolean where one must be, an option that nobody knows, or a class that is not in Diffusers.
    """
    if archive:
        text = archive[file].read_text().encode()
    else:
        with open(file, "rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(
                f"it is larger than {MAX_BYTES >> 20} MiB; save it with fewer schedules, or download it again"
            )
        config = _parse(text)
        own = own_options(cls)
        _check_class(config, cls)
        for key, value in config.items():
            # stock DPM-Solver has an option that is -Infinity, and which may ride along
            _check_finite(key, value, infinity=key not in own)
            if key in own and isinstance(own[key].default, bool) and not isinstance(value, (bool, type(None))):
                raise ValueError(f"{key!r} must be true or false, got {value!r:.60}; check where it came from")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot use the scheduler config in {str(file)!r}: {error}") from error
    return config


def _parse(text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=_no_key_twice)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error}); save or download it again") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"it must hold a mapping (a JSON object), got {type(config).__name__}; save or download it again"
        )
    return config


def _no_key_twice(pairs):
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"it has the key {key!r:.60} twice; remove one")
        mapping[key] = value
    return mapping


def _check_finite(key, value, infinity: bool = False) -> None:
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not infinity)):
        raise ValueError(f"{key} must be a finite number, got {value!r}; check where it came from")
    if isinstance(value, (dict, list)):
        for name, child in value.items() if isinstance(value, dict) else ((key, child) for child in value):
            _check_finite(name, child)


def _check_class(config, cls) -> None:
    name = config.get("_class_name")
    if name is None:  # written by hand
        return
    if name in (cls.__name__, *OWN_CLASSES):
        # the last names options to take no notice of, which Diffusers does not save
        unknown = unknown_options(config, cls) + [key for key in config if key == "_use_default_values"]
        if unknown:
            raise ValueError(
                f"it has the unknown options {str(unknown):.200}; update ld3-diffusers (or Diffusers), or remove them"
            )
    elif not (isinstance(name, str) and name.endswith("Scheduler") and hasattr(schedulers, name)):
        raise ValueError(
            f"it was saved by {name!r:.60}, which is neither an LD3Scheduler nor a scheduler of the installed Diffusers, so "
            "that its times and betas may mean anything; update Diffusers, or give the facts to LD3Scheduler yourself"
        )


@contextmanager
def lookup_errors(origin, subfolder: str | None) -> Iterator[None]:
    """Says what Diffusers leaves unsaid about a config that is not at `origin`, or cannot be made a scheduler.

    Raises:
        OSError: if a folder or repository has no config in `subfolder` (Diffusers takes a local folder's root instead), or
            there is no connection.
        ValueError: for an option of the wrong type.
    """
    if subfolder and Path(origin).is_dir() and not Path(origin, subfolder, CONFIG_NAME).is_file():
        raise OSError(missing(origin, subfolder))
    try:
        yield
    except TypeError as error:
        raise ValueError(
            f"the scheduler config in {str(origin)!r} has an entry of the wrong type ({error}); save or download it again"
        ) from error
    except OSError as error:
        cause = error.__context__
        if isinstance(cause, LocalEntryNotFoundError):
            raise OSError(
                f"the scheduler config of {str(origin)!r} was not downloaded before, and the Hub cannot be reached or may not "
                "be (local_files_only, HF_HUB_OFFLINE); load it once with a connection"
            ) from error
        if isinstance(cause, EntryNotFoundError):
            raise OSError(missing(origin, subfolder)) from error
        raise


def missing(origin, subfolder: str | None) -> str:
    place = f"the subfolder {subfolder!r} of {str(origin)!r}" if subfolder else f"the root of {str(origin)!r}"
    return f"there is no {CONFIG_NAME} in {place}; ld3_diffusers.list_variants({str(origin)!r}) lists the subfolders that have one"
