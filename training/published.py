# SPDX-License-Identifier: Apache-2.0
"""A repository of certified schedules, in a folder or on the Hub: reading, extending, writing and uploading it.

One repository is for one teacher. Its root is a variant, and so is each subfolder: the schedules of one solver at one guidance
scale and resolution, with their certificate and pictures, and with the predictors of those whose stages are predicted for each
sample. Whoever publishes first decides what stands in the root.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, metadata_load
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save

from ld3_diffusers import AMEDPredictor, load_scheduler
from ld3_diffusers.hub import CERTIFICATE_NAME, CLIENT_ERRORS, root_error
from ld3_diffusers.schedulers.scheduling_amed import PREDICTOR_FOLDER

from . import certificate as certificates
from . import certificate_form
from .contenders import predictors_of, scheduler_from
from .schedule_folder import CONFIG
from .variant_name import variant_name


CARD = "README.md"
PICTURES = ("samples.png", "schedules.png")
PREDICTOR = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)  # in a folder of its own for each count
# All that a variant may hold, as patterns of paths in its folder.
HELD = (CONFIG, CERTIFICATE_NAME, *PICTURES, *(f"{PREDICTOR_FOLDER.format(nfe='*')}/{name}" for name in PREDICTOR))


@dataclass
class Variant:
    """Content of one folder: config, certificate, pictures by file name, and predictors by number of evaluations."""

    config: dict[str, Any]
    certificate: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)
    predictors: dict[int, AMEDPredictor] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        scheduler = scheduler_from(self.config, self.predictors)
        config = scheduler.to_json_string()
        certificates.check(self.certificate, json.loads(config)["schedules"])
        texts = {CONFIG: config, CERTIFICATE_NAME: certificates.to_json(self.certificate)}
        files = {**{name: text.encode() for name, text in texts.items()}, **self.pictures}
        for nfe, predictor in predictors_of(scheduler).items():
            folder = PREDICTOR_FOLDER.format(nfe=nfe)
            files |= {f"{folder}/{name}": content for name, content in predictor_files(predictor).items()}
        return files


def predictor_files(predictor: AMEDPredictor) -> dict[str, bytes]:
    """What `save_pretrained` writes, without the path that a predictor was loaded from."""
    config = {key: value for key, value in json.loads(predictor.to_json_string()).items() if key != "_name_or_path"}
    weights = {name: tensor.cpu().contiguous() for name, tensor in predictor.state_dict().items()}
    contents = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), save(weights, metadata={"format": "pt"})
    return dict(zip(PREDICTOR, contents))


Repository = dict[str, Variant]  # by subfolder; "" is the root


# ---------------------------------------------------------------------- reading


def read(folder: str | Path) -> Repository:
    """The certified schedules of a folder; {} if it holds none.

    Raises:
        ValueError: for schedules without a certificate, or whatever cannot be read.
    """
    folder = Path(folder)
    _repair(folder)
    if not folder.is_dir():
        return {}
    places = ["", *sorted(path.name for path in folder.iterdir() if (path / CERTIFICATE_NAME).is_file())]
    found = {}
    for name in places:
        place = folder / name
        has_config, has_certificate = (place / CONFIG).is_file(), (place / CERTIFICATE_NAME).is_file()
        if not name and not has_config and not has_certificate:
            continue
        if not (has_config and has_certificate):
            raise ValueError(
                f"{name or 'the root'} has no {CERTIFICATE_NAME if has_config else CONFIG}, so its schedules cannot be extended; "
                "choose another repository"
            )
        scheduler = load_scheduler(place)
        pictures = {p: (place / p).read_bytes() for p in PICTURES if (place / p).is_file()}
        certificate = certificate_form.read(place / CERTIFICATE_NAME)
        found[name] = Variant(dict(scheduler.config), certificate, pictures, dict(predictors_of(scheduler)))
    if found and "" not in found:
        raise ValueError("there are certified schedules in subfolders but none in the root; choose another repository")
    return found


def read_hub(api: HfApi, repo_id: str) -> tuple[Repository, str | None]:
    """The same of a repository on the Hub, and the commit that was read; ({}, None) if there is no such repository.

    Raises:
        ValueError: as [`read`], or if the Hub cannot be reached.
    """
    try:
        commit = api.model_info(repo_id).sha
        wanted = [name for file in HELD for name in (file, f"*/{file}")]
        with tempfile.TemporaryDirectory() as folder:
            api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=wanted)
            return read(folder), commit
    except RepositoryNotFoundError:
        return {}, None
    except CLIENT_ERRORS as error:
        raise ValueError(f"cannot read the repository {repo_id!r}: {_line(error)}") from error


def present_license(api: HfApi, repo_id: str | None, commit: str | None, folder: str | Path) -> str | None:
    """Of the card that there is already, on the Hub at this commit or else in the folder; None if neither says anything.

    Raises:
        ValueError: if the Hub cannot be reached.
    """
    card = {}
    try:
        if commit is not None:
            card = api.model_info(repo_id, revision=commit).card_data or {}
    except CLIENT_ERRORS as error:
        raise ValueError(f"cannot read the card of {repo_id!r}: {_line(error)}") from error
    try:
        return card.get("license") or (metadata_load(Path(folder, CARD)) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None  # no card, or one without readable metadata


def _line(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)  # the Hub's own words, if it answered
    return (said.strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------- extending


def place(published: Repository, certificate: dict[str, Any]) -> str:
    """The subfolder of a variant with this certificate (of its counts only the settings matter).

    Raises:
        ValueError: if the repository is another teacher's.
    """
    if not published:
        return ""
    root = published[""].certificate
    if root["teacher"]["digest"] != certificate["teacher"]["digest"]:
        raise ValueError(
            f"the repository is for another teacher ({root['teacher']['name']}, {root['dtype']}) than {certificate['teacher']['name']}, "
            f"{certificate['dtype']}; choose another repository"
        )
    return variant_name(certificate, root)


def extended(published: Repository, name: str, new: Variant) -> Repository:
    """With the counts of a variant added to what stands there under its name, or in the place of those.

    Raises:
        ValueError: as [`check_extends`].
    """
    old = published.get(name)
    if old is None:
        return {**published, name: new}
    try:
        check_extends(old, new.config, new.certificate)
    except ValueError:
        if not replaces(new.config, old):
            raise
        return {**published, name: new}
    schedules = {**old.config["schedules"], **new.config["schedules"]}
    config = {**new.config, "schedules": {nfe: schedules[nfe] for nfe in sorted(schedules, key=int)}}
    # Pictures are of the smallest count, also where one of them could not be drawn.
    keep = min(map(int, old.config["schedules"])) < min(map(int, new.config["schedules"]))
    pictures = old.pictures if keep else new.pictures
    certificate = certificates.merged(old.certificate, new.certificate)
    new = Variant(config, certificate, pictures, {**old.predictors, **new.predictors})
    return {**published, name: new}


def replaces(config: dict[str, Any], old: Variant) -> bool:
    """Whether all counts of a variant are among those of this scheduler config, so that nothing of it stays."""
    return set(old.config["schedules"]) <= set(config["schedules"])


def check_extends(old: Variant, config: dict[str, Any], certificate: dict[str, Any]) -> None:
    """Raises a `ValueError` if counts of this scheduler config cannot stand beside those of a variant, which was made with other settings.

    Args:
        certificate: of its counts only the settings matter.
    """
    private = {"_diffusers_version", "_class_name", "_use_default_values", "schedules"}
    for key in sorted({*old.config, *config} - private):
        if old.config.get(key) != config.get(key):
            raise ValueError(
                f"what is published there has another {key} in its config: {old.config.get(key)!r}, here "
                f"{config.get(key)!r}; choose another repository"
            )
    certificates.check_alike(old.certificate, certificate)


def restricted(variant: Variant, nfes: list[str]) -> Variant:
    """With these counts alone."""
    config = {**variant.config, "schedules": {nfe: variant.config["schedules"][nfe] for nfe in nfes}}
    counts = {nfe: variant.certificate["counts"][nfe] for nfe in nfes}
    runs = {record["run"]: variant.certificate["runs"][record["run"]] for record in counts.values()}
    pictures = variant.pictures if min(map(int, nfes)) == min(map(int, variant.config["schedules"])) else {}
    predictors = {nfe: predictor for nfe, predictor in variant.predictors.items() if str(nfe) in nfes}
    return Variant(config, {**variant.certificate, "counts": counts, "runs": runs}, pictures, predictors)


def union(local: Repository, remote: Repository) -> Repository:
    """What a folder and the Hub hold together, where the Hub has it; of what both have, the Hub's."""
    if not remote:
        return local
    together = remote
    for variant in local.values():
        name = place(together, variant.certificate)
        together = extended(together, name, variant)
        if name in remote:
            together = extended(together, name, remote[name])
    return together


# ---------------------------------------------------------------------- writing


def contents(repository: Repository, card: str) -> dict[str, bytes]:
    """All files by their path."""
    files = {CARD: card.encode()}
    for name, variant in repository.items():
        files |= {f"{name}/{file}" if name else file: content for file, content in variant.files().items()}
    return files


def outdated(before: Repository, files: dict[str, bytes]) -> list[str]:
    """Paths of what a repository held of this program's own and is not written any more: pictures, predictors, renamed variants."""
    paths = [
        f"{name}/{file}" if name else file
        for name, variant in before.items()
        for file in (CONFIG, CERTIFICATE_NAME, *variant.pictures, *_predictor_paths(variant))
    ]
    return [path for path in paths if path not in files]


def _predictor_paths(variant: Variant) -> list[str]:
    return [f"{PREDICTOR_FOLDER.format(nfe=nfe)}/{name}" for nfe in variant.predictors for name in PREDICTOR]


def write(files: dict[str, bytes], folder: str | Path, gone: Sequence[str] = ()) -> None:
    """Write the files into a copy of the folder, without those `gone`, that then takes its place: all of it or nothing.

    Other files stay.
    """
    folder = Path(folder)
    _repair(folder)
    new, old = _beside(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        if folder.exists():
            shutil.copytree(folder, new)
        for path, content in files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
        for path in gone:
            (new / path).unlink(missing_ok=True)
            for place in map(new.joinpath, Path(path).parents[:-1]):  # the last is the folder itself
                if place.is_dir() and not any(place.iterdir()):
                    place.rmdir()
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where the new folder is made, and where the old one waits until it has taken its place."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _repair(folder: Path) -> None:
    """Bring back a folder whose replacement was interrupted between the two renamings of [`write`]."""
    if not folder.exists() and folder.name and _beside(folder)[1].exists():
        os.rename(_beside(folder)[1], folder)


def check_access(api: HfApi, repo_id: str | None) -> str:
    """The repository's full id, if there is a token that may write to it.

    Raises:
        ValueError: if not.
    """
    if repo_id is None:
        raise ValueError("--push_to_hub needs the repository's name; give --hub_model_id owner/name")
    try:
        user = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError("--push_to_hub needs a token; give --hub_token, or log in with `hf auth login`") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ValueError("the Hub does not accept this token; make a new one, with write access") from error
        raise ValueError(f"cannot reach the Hub: {_line(error)}") from error
    except CLIENT_ERRORS as error:
        raise ValueError(f"cannot reach the Hub: {_line(error)}") from error
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("this token may only read; make one with write access")
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {repo_id!r} is no repository name: {_line(error)}") from error
    owner = repo_id.partition("/")[0]
    writable = [org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read"]
    if owner not in (user["name"], *writable):
        raise ValueError(
            f"{user['name']} may not write to the repositories of {owner}; give --hub_model_id "
            f"{user['name']}/{repo_id.partition('/')[2]}, or another token"
        )
    return repo_id


def upload(
    api: HfApi,
    repo_id: str,
    files: dict[str, bytes],
    parent: str | None,
    *,
    private: bool,
    message: str,
    gone: Sequence[str] = (),
) -> str:
    """Everything in one commit on top of `parent`, the commit that was read (None: there was no repository); returns its address.

    Args:
        gone: paths that `parent` has and the new commit has not.

    Raises:
        ValueError: if the repository has changed since, or the Hub refuses.
    """
    try:
        if parent is None:
            api.create_repo(repo_id, private=private or None, exist_ok=False)
            parent = api.model_info(repo_id).sha
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations += [CommitOperationDelete(path) for path in gone]
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent).commit_url
    except CLIENT_ERRORS as error:
        error = root_error(error)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (409, 412):
            reason = "it was changed by somebody else meanwhile"
        elif status in (401, 403):
            reason = "this token may not write to it"
        else:
            reason = re.sub(r"\s+", " ", _line(error))
        raise ValueError(
            f"nothing was uploaded to {repo_id!r}: {reason}; run the same command again, what was certified is kept"
        ) from error
