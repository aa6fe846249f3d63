# SPDX-License-Identifier: Apache-2.0
"""Published schedules on the Hugging Face Hub: finding them, seeing what a repository holds, and publishing a whole pipeline.

for found in find_schedules(base_model="stabilityai/stable-diffusion-2-1-base", nfe=5):
    print(found.repo_id, list_variants(found.repo_id))
pipe.scheduler = load_scheduler(found.repo_id, subfolder=...)  # then attach(pipe), where `stages` is "per sample"

A repository of schedules has a `scheduler_config.json` in its root, in subfolders, or both, each perhaps with a `certificate.json`
beside it, and with the predictors of schedules whose stages are predicted for each sample (AMED). Its card has the tags
`ld3-schedule` and, for each number of evaluations, `ld3-nfe-<number>`.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .schedulers import AMEDScheduler, LD3Scheduler
from .schedulers.config_file import CONFIG_NAME, lookup_errors


SCHEDULE_TAG = "ld3-schedule"
NFE_TAG = "ld3-nfe-"
CERTIFICATE_NAME = "certificate.json"
# What the Hub's client raises without a network, or for an answer that is an error; RuntimeError where a large file's upload failed.
CLIENT_ERRORS = (HTTPError, EntryNotFoundError, OSError, RuntimeError)

# Diffusers downloads a component whose class is not its own only as a file of the repository, and asks that for the base class.
SHIM_NAME = "ld3_shim"
SHIM = """# SPDX-License-Identifier: Apache-2.0
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401

from ld3_diffusers import AMEDScheduler, LD3Scheduler  # noqa: F401
"""
PIPELINE_CARD = """---
library_name: diffusers
tags:
- diffusers
- ld3
---
A Diffusers pipeline that samples with a learned timestep schedule. With ld3-diffusers installed:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
```

The code to trust is `{folder}/{shim}.py`, which imports the scheduler from ld3-diffusers and does nothing else.
`num_inference_steps` counts network evaluations; `print(pipe.scheduler)` lists those that were learned.
"""


@dataclass(frozen=True)
class PublishedSchedules:
    """A repository of schedules on the Hub, as its tags describe it.

    Attributes:
        repo_id: for [`list_variants`] and [`load_scheduler`].
        base_model: Hub id of the model that the schedules are for; None if the card names none.
        nfe: numbers of evaluations with a learned schedule in any of the variants.
        downloads, likes, last_modified: as the Hub counts them.
    """

    repo_id: str
    base_model: str | None
    nfe: tuple[int, ...]
    downloads: int | None
    likes: int | None
    last_modified: datetime | None


@dataclass(frozen=True)
class Variant:
    """One config of a repository of schedules. What its schedules do not agree on, or do not say, is None.

    Attributes:
        subfolder: for [`load_scheduler`]; None: the root.
        solver, solver_order: of the learned schedules; order None: the solver's default.
        nfe: numbers of evaluations with a learned schedule.
        guidance_scale, height, width, dtype: what they were learned with.
        certified: a certificate of all counts lies beside the config; whether it is true, only measuring again can tell.
        stages: of AMED's schedules "static", or "per sample", which [`AMEDScheduler`] serves and attaches to the pipeline.
    """

    subfolder: str | None
    solver: str | None
    solver_order: int | None
    nfe: tuple[int, ...]
    guidance_scale: float | None
    height: int | None
    width: int | None
    dtype: str | None
    certified: bool
    stages: str | None = None


def find_schedules(
    base_model: str | None = None,
    nfe: int | None = None,
    *,
    author: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> list[PublishedSchedules]:
    """Repositories of schedules on the Hub, those with the most downloads first.

    Args:
        base_model: Hub id of the model, e.g. "stabilityai/stable-diffusion-2-1-base".
        nfe: a number of evaluations that must have been learned.
        author: user or organization who published them.
        limit: how many to return at most.
        token: to see private repositories; default: that of `hf auth login`.

    Raises:
        ValueError: for a bad argument, or if the Hub cannot be asked.
    """
    for name, value in (("base_model", base_model), ("author", author)):
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{name} must be a name on the Hub, got {value!r}; leave it out to search all")
    for name, value in (("nfe", nfe), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}; leave it out to search all")
    tags = [SCHEDULE_TAG]
    tags += [f"base_model:{base_model}"] if base_model else []
    tags += [f"{NFE_TAG}{nfe}"] if nfe else []
    with _hub_errors("search the Hub for schedules"):
        found = HfApi(token=token).list_models(filter=tags, author=author, sort="downloads", limit=limit, full=True)
        return [_published(info) for info in found]


def _published(info) -> PublishedSchedules:
    tags = info.tags or []
    # the Hub adds "base_model:<relation>:<id>" for models derived from others
    models = [tag.removeprefix("base_model:") for tag in tags if re.fullmatch("base_model:[^:]+", tag)]
    counts = {int(tag.removeprefix(NFE_TAG)) for tag in tags if re.fullmatch(NFE_TAG + "[0-9]{1,4}", tag)}
    base_model = models[0] if models else None
    return PublishedSchedules(
        info.id, base_model, tuple(sorted(counts)), info.downloads, info.likes, info.last_modified
    )


def load_scheduler(
    pretrained_model_name_or_path: str | os.PathLike,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options,
) -> LD3Scheduler:
    """The scheduler of a folder or a Hub repository as the class that saved it, an [`AMEDScheduler`] with its predictors or an
    [`LD3Scheduler`].

    Args:
        subfolder, revision, token, options: as of [`LD3Scheduler.from_pretrained`].

    Raises:
        OSError, ValueError: as there.
    """
    places = {"revision": revision, "token": token, **options}
    kind, _ = _saved(pretrained_model_name_or_path, subfolder, **places)
    return kind.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **places)


def _saved(origin: str | os.PathLike, subfolder: str | None = None, **places) -> tuple[type[LD3Scheduler], dict]:
    """The class that saved a scheduler, and its config."""
    with lookup_errors(origin, subfolder):
        config = LD3Scheduler.load_config(origin, subfolder=subfolder, **places)
    return AMEDScheduler if config.get("_class_name") == AMEDScheduler.__name__ else LD3Scheduler, config


def list_variants(
    repo_id: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> list[Variant]:
    """What a repository of schedules (or a folder that has the form of one) holds, the root first.

    Only configs and certificates are downloaded, and kept: once listed, a repository can be listed and its schedules loaded
    without a connection, but for those whose stages are predicted for each sample.

    Args:
        revision: branch, tag or commit.
        token: for private repositories; default: that of `hf auth login`.

    Raises:
        ValueError: if there is no such repository, it has no learned schedule or a bad one, or the Hub cannot be reached.
    """
    folder = Path(repo_id)
    if not folder.is_dir():
        names = [pattern + name for name in (CONFIG_NAME, CERTIFICATE_NAME) for pattern in ("", "*/")]
        with _hub_errors(f"download the schedules of {str(repo_id)!r}"):
            folder = Path(snapshot_download(str(repo_id), revision=revision, token=token, allow_patterns=names))
    places = {path.parent.relative_to(folder).as_posix() for path in folder.rglob(CONFIG_NAME)}
    variants = [_variant(folder, place) for place in sorted(places, key=lambda place: (place != ".", place))]
    variants = [variant for variant in variants if variant.nfe]
    if not variants:
        raise ValueError(
            f"{str(repo_id)!r} holds no learned schedule; find_schedules(base_model) lists repositories that do"
        )
    return variants


def _variant(folder: Path, place: str) -> Variant:
    try:
        kind, config = _saved(folder / place)
        with lookup_errors(folder / place, None):
            scheduler = kind.from_config(config)  # without predictors
    except ValueError as error:
        raise ValueError(f"the schedules in the subfolder {place!r} cannot be used: {error}") from error
    curve = scheduler.config.curve
    entries = [*(scheduler.config.schedules or {}).values(), *([] if curve is None else [curve])]
    provenances = [entry.get("provenance") or {} for entry in entries]
    stages = {schedule.stages for schedule in scheduler.learned_schedules.values()}
    return Variant(
        subfolder=None if place == "." else place,
        solver=_common(entries, "solver", str),
        solver_order=_common(entries, "solver_order", int),
        nfe=tuple(scheduler.served_counts),
        guidance_scale=_common(provenances, "guidance_scale", (int, float)),
        height=_common(provenances, "height", int),
        width=_common(provenances, "width", int),
        dtype=_common(provenances, "dtype", str),
        # Certificates speak of schedules alone.
        certified=(folder / place / CERTIFICATE_NAME).is_file()
        and not (scheduler.config.curve or scheduler.config.interpolate),
        stages=stages.pop() if len(stages) == 1 else None,
    )


def _common(mappings: list[dict], key: str, kind):
    """The value that all have for `key`, if there is one and it is of this kind."""
    first, *others = [mapping.get(key) for mapping in mappings] or [None]
    return first if isinstance(first, kind) and all(value == first for value in others) else None


def save_pipeline(
    pipe,
    save_directory: str | os.PathLike,
    *,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    **save_kwargs,
) -> CommitInfo | None:
    """Save a whole pipeline with its [`LD3Scheduler`] or [`AMEDScheduler`] so that it loads anywhere, and publish it if asked to.

    `pipe.save_pretrained` names a class that Diffusers does not have, and refuses to download. Here a file of two imports lies
    beside the scheduler's config: `DiffusionPipeline.from_pretrained(folder_or_repository, trust_remote_code=True)`, where
    ld3-diffusers is installed, needs nothing else.

    Args:
        save_directory: a new or empty folder. It is filled under another name, and renamed when complete.
        push_to_hub: upload it too, in one commit.
        repo_id: repository to upload to, made if it is not there; default: the name of the folder, of one's own.
        token: that may write to it; default: that of `hf auth login`.
        private: whether a new repository is private.
        save_kwargs: for `pipe.save_pretrained`, e.g. `variant="fp16"`.

    Returns:
        The commit on the Hub, if there is one.

    Raises:
        ValueError: for a pipeline with another scheduler, a folder that holds something, or an upload that failed.
    """
    parts = pipe.components.items()
    learned = {name: type(part).__name__ for name, part in parts if type(part) in (LD3Scheduler, AMEDScheduler)}
    if not learned:
        raise ValueError(
            f"the scheduler of this pipeline is a {type(getattr(pipe, 'scheduler', None)).__name__}; set pipe.scheduler to an "
            "LD3Scheduler first, or save it with pipe.save_pretrained"
        )
    if repo_id is not None and not push_to_hub:
        raise ValueError(f"repo_id={repo_id!r} is where to upload to; add push_to_hub=True, or leave it out")
    target = Path(save_directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(save_directory)!r} is not an empty folder; give a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as partial:
        complete = Path(partial, target.name)
        pipe.save_pretrained(complete, **save_kwargs)
        index = json.loads((complete / "model_index.json").read_text(encoding="utf-8"))
        for name, kind in learned.items():
            (complete / name / f"{SHIM_NAME}.py").write_text(SHIM, encoding="utf-8")
            index[name] = [SHIM_NAME, kind]
        (complete / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(complete, target)
    if push_to_hub:
        return _upload(target, repo_id or target.name, next(iter(learned)), HfApi(token=token), private)
    return None


def _upload(folder: Path, repo_id: str, learned: str, api: HfApi, private: bool | None) -> CommitInfo:
    with _hub_errors(f"upload {str(folder)!r} (saved; `hf upload {repo_id} {folder}` is another try)"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, "README.md"):  # a card that somebody wrote stays
            card = PIPELINE_CARD.format(repo_id=repo_id, folder=learned, shim=SHIM_NAME)
            (folder / "README.md").write_text(card, encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload pipeline with a learned schedule"
        )


def root_error(error: Exception) -> Exception:
    """What failed; of the upload of a large file the client raises a bare RuntimeError that only has it as its cause."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


@contextmanager
def _hub_errors(action: str) -> Iterator[None]:
    """Turns what the Hub's client raises into a `ValueError` with what to do."""
    try:
        yield
    except CLIENT_ERRORS as error:
        error = root_error(error)
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RevisionNotFoundError):
            why = "there is no such revision; check its name"
        elif isinstance(error, RepositoryNotFoundError):
            why = "there is no such repository, or it is private or gated; check its name, or pass a token that may read it"
        elif status in (401, 403):
            why = "the Hub refuses this token; pass one with the right to do this, or log in with `hf auth login`"
        elif isinstance(error, OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set; unset it"
        elif isinstance(error, LocalEntryNotFoundError):
            why = "the Hub cannot be reached and they were not downloaded before; check the connection"
        elif status is None and isinstance(error, HTTPError):
            why = "the Hub cannot be reached; check the connection"
        else:
            why = "the Hub refused or failed; try again"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot {action}: {why} ({reason})") from error
