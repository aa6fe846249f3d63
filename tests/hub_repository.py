# SPDX-License-Identifier: Apache-2.0
"""What the test Hub of hub_server.py keeps: model repositories, their commits and files, and what their cards say."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

import yaml


EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)


class HubError(Exception):
    """An answer that is an error; the client tells errors apart by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, content=None):
        self.status, self.content = status, content or {"error": message}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """What the client compares its local file with."""
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.oid

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.etag, "size": len(self.content), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid, **lfs}


@dataclass(frozen=True)
class Commit:
    """All that a revision holds; `sha` is made from it, so that clients may cache by it."""

    sha: str
    message: str
    files: dict[str, File]
    date: str


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    downloads: int = 0
    likes: int = 0
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add_commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        state = [self.id, len(self.commits), self.branches.get(branch), message]
        state += sorted((path, file.etag) for path, file in files.items())
        sha = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        date = (EPOCH + timedelta(minutes=len(self.commits))).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[sha] = Commit(sha, message, files, date)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def info(self, revision: str = "main") -> dict:
        commit = self.at(revision)
        card = read_card(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}
        return {
            "id": self.id,
            "modelId": self.id,
            "author": self.id.partition("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": EPOCH.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "downloads": self.downloads,
            "likes": self.likes,
            "tags": card_tags(card),
            "cardData": card,
            **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
            "siblings": [{"rfilename": p, "size": len(f.content)} for p, f in sorted(commit.files.items())],
        }


def read_card(text: str) -> dict:
    """The YAML at the top of a model card; a `yaml.YAMLError` if it is none."""
    match = re.match(r"---\n(.*?)\n---(\n|$)", text, flags=re.DOTALL)
    return (yaml.safe_load(match[1]) if match else None) or {}


def card_tags(card: dict) -> list[str]:
    def several(value):
        return value if isinstance(value, list) else [value] if value else []

    relation = card.get("base_model_relation")
    models = several(card.get("base_model"))
    tags = several(card.get("library_name")) + several(card.get("pipeline_tag")) + several(card.get("tags"))
    tags += [f"base_model:{model}" for model in models]
    tags += [f"base_model:{relation}:{model}" for model in models if relation]
    tags += [f"license:{name}" for name in several(card.get("license"))]
    return list(dict.fromkeys(tags))
