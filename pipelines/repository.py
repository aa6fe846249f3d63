# SPDX-License-Identifier: Apache-2.0
"""Folders of pipelines that Diffusers lacks: saved so that they load anywhere, and loaded here without running code of
theirs.

A family's file stands alone, and [`save_repository`] puts it into the folder beside what needs it. Then
`DiffusionPipeline.from_pretrained(folder_or_hub_id, trust_remote_code=True)` works without this project.
[`load_family`] takes the classes of this project instead, so that nobody's code need be trusted.
"""

import importlib
import inspect
import json
import os
import shutil
from pathlib import Path

import diffusers
import safetensors
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import hf_hub_download, snapshot_download


FAMILIES = {  # class of a pipeline -> the file that has it, and the classes of its networks
    "EDMPipeline": "edm",
    "ADMPipeline": "adm",
    "LatentDiffusionPipeline": "ldm",
}
NETWORKS = {
    "EDMUNet2DModel": "edm",
    "ADMUNet2DModel": "adm",
    "ADMClassifier": "adm",
    "LDMClassEmbedder": "ldm",
}
GUIDES = {"ADMClassifier": "classifier", "LDMClassEmbedder": "class_embedder"}  # of which component they are the class
LEARNED_SCHEDULERS = ("LD3Scheduler", "AMEDScheduler")  # of ld3_diffusers
INDEX = DiffusionPipeline.config_name
CONFIG_FILES = ["*.json", "*/*.json"]


def save_repository(
    pipe: DiffusionPipeline, folder: str | os.PathLike, records: dict[str, dict] | None = None
) -> None:
    """Save a pipeline of a family into a new or empty folder, which appears when it is complete.

    Args:
        records: contents of further JSON files, by name.

    Raises:
        ValueError: for another pipeline, or a folder that holds something or cannot be made.
        OSError: if it cannot be written; nothing is left of it.
    """
    if type(pipe).__name__ not in FAMILIES:
        raise ValueError(
            f"a {type(pipe).__name__} is none of {', '.join(FAMILIES)}; save it with pipe.save_pretrained"
        )
    target = new_folder(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name: what a run that was killed left behind, with all the weights, is removed by the next.
    partial = target.with_name(f".{target.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        _write(pipe, partial)
        for name, content in (records or {}).items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except safetensors.SafetensorError as error:  # of a full disk, too
        raise OSError(f"cannot write {str(folder)!r}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def new_folder(folder: str | os.PathLike) -> Path:
    """Where a folder of this name would be made: links and `..` resolved.

    Raises:
        ValueError: if there is something else than an empty folder, or none can be put there.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(folder)!r} is not an empty folder; give a new one")
    if os.path.ismount(target):
        raise ValueError(f"{str(folder)!r} is a mount point, which cannot be replaced; give a new folder in it")
    existing = target.parent
    while not existing.exists():
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"cannot write into {str(existing)!r}, where {str(folder)!r} would be; give another folder")
    return target


def _write(pipe: DiffusionPipeline, folder: Path) -> None:
    pipe.save_pretrained(folder)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["_class_name"] = _with_source(type(pipe), folder)
    for name, part in pipe.components.items():
        if type(part).__name__ in NETWORKS:
            index[name] = _with_source(type(part), folder / name)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _with_source(kind: type, folder: Path) -> list[str]:
    """[file, class] as Diffusers' index names code that lies in a repository; the file is put there."""
    source = Path(inspect.getsourcefile(kind))
    shutil.copyfile(source, folder / source.name)
    return [source.stem, kind.__name__]


def load_family(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype | None = None,
) -> DiffusionPipeline | None:
    """The pipeline of a folder or a Hub repository, made of this project's classes and Diffusers'; None if it is of no
    family.

    Only JSON and safetensors files are read, from the Hub first JSON alone.

    Raises:
        ValueError: if it is of a family, but a part is of an unknown class or missing.
        OSError, HfHubHTTPError: if the Hub cannot be reached or has no such repository.
    """
    local = Path(name_or_path).is_dir()
    folder = Path(name_or_path)
    index_file = folder / INDEX if local else Path(hf_hub_download(name_or_path, INDEX, revision=revision))
    index = json.loads(index_file.read_text(encoding="utf-8"))
    kind = index.get("_class_name") if isinstance(index, dict) else None
    kind = kind[-1] if isinstance(kind, list) and kind else kind
    if not isinstance(kind, str) or kind not in FAMILIES:
        return None
    family = getattr(importlib.import_module(f"pipelines.{FAMILIES[kind]}"), kind)
    wanted = _parts(family, index)
    if not local:
        weights = [f"{name}/*.safetensors" for name in wanted]
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=CONFIG_FILES + weights))
    if variant and not any(_has_variant(folder / name, variant) for name in wanted):
        raise ValueError(f"no part of {name_or_path!r} has the variant {variant!r}; drop it")
    for name in wanted:
        if not (folder / name).is_dir():  # Diffusers would take its path for the name of a repository
            raise ValueError(f"{str(name_or_path)!r} has no folder {name!r}; is it complete?")
    parts = {name: _load(part, folder, name, variant, torch_dtype) for name, part in wanted.items()}
    pipe = family(**parts, **_options(family, index))
    pipe.register_to_config(_name_or_path=str(name_or_path))
    return pipe


def _parts(family: type, index: dict) -> dict[str, type]:
    """Class of each component that is there.

    Raises:
        ValueError: for a class that is neither this project's nor a network or scheduler of Diffusers.
    """
    expected, _ = family._get_signature_keys(family)
    parts = {}
    for name in sorted(expected):
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2:
            if name in family._optional_components:
                continue
            raise ValueError(f"{INDEX} names no {name}, which a {family.__name__} has; is the folder complete?")
        if entry == [None, None] and name in family._optional_components:
            continue
        parts[name] = _class(name, *entry)
    return parts


def _class(part: str, library, name) -> type:
    if not isinstance(library, str) or not isinstance(name, str):
        raise ValueError(f"{INDEX} names no class of the {part}")
    if name in NETWORKS:
        found = getattr(importlib.import_module(f"pipelines.{NETWORKS[name]}"), name)
    elif name in LEARNED_SCHEDULERS:
        found = getattr(importlib.import_module("ld3_diffusers"), name)
    else:
        found = getattr(diffusers, name, None) if library == "diffusers" else None
    wanted = SchedulerMixin if part == "scheduler" else ModelMixin
    if not (isinstance(found, type) and issubclass(found, wanted)) or (name in GUIDES) != (part in GUIDES.values()):
        raise ValueError(
            f"the {part} is a {name!r:.60} of {library!r:.60}, which is not known here; nothing of it was executed"
        )
    return found


def _load(kind: type, folder: Path, name: str, variant: str | None, torch_dtype: torch.dtype | None):
    if not issubclass(kind, ModelMixin):
        return kind.from_pretrained(folder / name)
    own = variant if variant and _has_variant(folder / name, variant) else None
    return kind.from_pretrained(folder / name, use_safetensors=True, torch_dtype=torch_dtype, variant=own)


def _has_variant(folder: Path, variant: str) -> bool:
    return any(folder.glob(f"*.{variant}*.safetensors"))


def _options(family: type, index: dict) -> dict:
    """What a pipeline is made with beside components: numbers and words."""
    _, optional = family._get_signature_keys(family)
    given = {name: index[name] for name in optional if name in index and name not in family._optional_components}
    parameters = inspect.signature(family.__init__).parameters
    for name, value in given.items():
        number = isinstance(parameters[name].default, float)
        if isinstance(value, bool) or not isinstance(value, (int, float) if number else (str, type(None))):
            raise ValueError(f"{INDEX} has {value!r:.60} for {name}, which is {'a number' if number else 'a word'}")
    return given
