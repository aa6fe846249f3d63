# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub in memory, on loopback: as much of it as the real `huggingface_hub` client calls for model repositories.

Repositories with commits, branches and tags, LFS uploads, model cards and their tags, search, and the errors that the client
tells apart. A commit is atomic: what an interrupted upload left behind is in no revision. Not here: data sets, Spaces, pull
requests, xet, multipart uploads and pagination.

with HubServer() as hub:  # HF_ENDPOINT=hub.endpoint and HF_HUB_DISABLE_XET=1 in the environment of the client
    HfApi(hub.endpoint, token=hub.token).create_repo("user/name")
"""

import base64
import hashlib
import json
import re
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_repository import File, HubError, Repo, read_card


# What the real Hub's .gitattributes sends to LFS, of the files that occur here.
LFS_SUFFIXES = {".bin", ".npz", ".png", ".pt", ".safetensors"}

Request = namedtuple("Request", "method query user body")
Reply = namedtuple("Reply", "content headers", defaults=[{}])
ROUTES = []


def route(methods: str, pattern: str):
    """Registers a method of `HubServer`, whose arguments are what {repo}, {revision} and {path} of the pattern match."""
    regex = re.compile(
        pattern.format(repo=r"(?P<repo>[\w.-]+/[\w.-]+)", revision=r"(?P<revision>[^/]+)", path="(?P<path>.+)")
    )

    def register(function):
        ROUTES.append((methods.split(), regex, function.__name__))
        return function

    return register


class HubServer:
    """
    Attributes:
        endpoint: for `HF_ENDPOINT`.
        tokens: token -> the user whose it is, who may write in the namespace of that name alone.
        token: that of "user".
        repos: by id; `private`, `gated`, `downloads` and `likes` of each may be set.
        requests: "METHOD /path?query" of all that came in.
    """

    def __init__(self, port: int = 0):
        self.token = "hf_token_of_user"
        self.tokens = {self.token: "user", "hf_token_of_other": "other"}
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self._lfs: dict[str, bytes] = {}
        self._failures: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.hub = self
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused, as without a network. Stopping again does nothing."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def fail_next(self, part: str, status: int = 400) -> None:
        """Answer the next request whose "METHOD /path" holds `part` with an error; the client repeats those above 499."""
        self._failures.append((part, status))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        return {path: file.content for path, file in self.repos[repo_id].at(revision).files.items()}

    def answer(self, method: str, target: str, authorization: str | None, body: bytes) -> Reply:
        with self._lock:
            self.requests.append(f"{method} {target}")
            url = urlsplit(target)
            for failure in self._failures:
                if failure[0] in f"{method} {url.path}":
                    self._failures.remove(failure)
                    raise HubError(failure[1], "this failure was asked for")
            token = (authorization or "").removeprefix("Bearer ")
            if token and token not in self.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            request = Request(method, parse_qs(url.query), self.tokens.get(token), body)
            for methods, pattern, name in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and method in methods:
                    groups = {key: unquote(text) for key, text in match.groupdict().items() if text is not None}
                    return getattr(self, name)(request, **groups)
            raise HubError(404, f"this Hub has no {method} {url.path}")

    def _readable(self, repo_id: str, user: str | None) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.partition("/")[0] != user):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, repo_id: str, user: str | None) -> Repo:
        repo = self._readable(repo_id, user)
        self._check_writer(repo_id, user)
        return repo

    @staticmethod
    def _check_writer(repo_id: str, user: str | None) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != repo_id.partition("/")[0]:
            raise HubError(403, f"{user} has no right to write to {repo_id}")

    # ------------------------------------------------------------------ accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        return Reply({"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    @route("POST", "/api/repos/create")
    def create_repo(self, request):
        wanted = json.loads(request.body)
        repo_id = f"{wanted.get('organization') or request.user}/{wanted['name']}"
        self._check_writer(repo_id, request.user)
        url = {"url": f"{self.endpoint}/{repo_id}", "id": repo_id}
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", content=url)
        repo = Repo(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.add_commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        self.repos[repo_id] = repo
        return Reply(url)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request):
        wanted = json.loads(request.body)
        del self.repos[
            self._writable(f"{wanted.get('organization') or request.user}/{wanted['name']}", request.user).id
        ]
        return Reply({})

    @route("GET", "/api/models")
    def list_models(self, request):
        def only(key, default=None):
            return request.query.get(key, [default])[0]

        found = [repo.info() for repo in self.repos.values()]
        found = [info for info in found if not info["private"] or info["author"] == request.user]
        found = [info for info in found if set(request.query.get("filter", ())) <= set(info["tags"])]
        found = [info for info in found if only("author") in (None, info["author"])]
        found = [info for info in found if only("search", "").lower() in info["id"].lower()]
        if only("sort"):
            found.sort(key=lambda info: info[only("sort")], reverse=True)
        return Reply(found[: int(only("limit", len(found)))])

    @route("GET", "/api/models/{repo}(?:/revision/{revision})?")
    def model_info(self, request, repo, revision="main"):
        return Reply(self._readable(repo, request.user).info(revision))

    @route("GET", "/api/models/{repo}/refs")
    def list_refs(self, request, repo):
        repo = self._readable(repo, request.user)
        refs = {
            kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]
            for kind, names in (("branches", repo.branches), ("tags", repo.tags), ("converts", {}))
        }
        return Reply(refs)

    @route("POST", "/api/models/{repo}/(?P<kind>branch|tag)/{revision}")
    def create_ref(self, request, repo, kind, revision):
        repo, wanted = self._writable(repo, request.user), json.loads(request.body)
        names, name = (repo.branches, revision) if kind == "branch" else (repo.tags, wanted["tag"])
        if name in names:
            raise HubError(409, f"Reference {name} already exists")
        names[name] = repo.at(wanted.get("startingPoint", "main") if kind == "branch" else revision).sha
        return Reply({})

    # ------------------------------------------------------------------ uploads

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        try:
            read_card(json.loads(request.body)["content"])
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid YAML", content={"errors": [{"message": str(error)}]})
        return Reply({"errors": [], "warnings": []})

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, request, repo, revision):
        present = self._writable(repo, request.user).at(revision).files
        modes = [
            {
                "path": wanted["path"],
                "uploadMode": "lfs" if PurePosixPath(wanted["path"]).suffix in LFS_SUFFIXES else "regular",
                "shouldIgnore": False,
                "oid": present[wanted["path"]].etag if wanted["path"] in present else None,
            }
            for wanted in json.loads(request.body)["files"]
        ]
        return Reply({"files": modes})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo):
        self._writable(repo, request.user)
        objects = json.loads(request.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self._lfs:
                wanted["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"}}
        return Reply({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]+)")
    def lfs_upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self._lfs[oid] = request.body
        return Reply({})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, request, repo, revision):
        repo = self._writable(repo, request.user)
        lines = [json.loads(line) for line in request.body.splitlines()]
        (header,) = [line["value"] for line in lines if line["key"] == "header"]
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if header.get("parentCommit") not in (None, repo.branches[revision]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(revision).files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self._lfs:
                    raise HubError(400, f"The LFS object {value['oid']} was not uploaded")
                files[value["path"]] = File(self._lfs[value["oid"]], lfs=True)
            elif line["key"] in ("deletedFile", "deletedFolder"):
                gone = [p for p in files if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for path in gone:
                    del files[path]
        sha = repo.add_commit(revision, header["summary"], files).sha
        return Reply({"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo.id}/commit/{sha}"})

    # ------------------------------------------------------------------ downloads

    @route("GET", "/api/models/{repo}/tree/{revision}(?:/{path})?")
    def list_tree(self, request, repo, revision, path=""):
        files = self._readable(repo, request.user).at(revision).files
        inside = {p: file for p, file in sorted(files.items()) if not path or p.startswith(path + "/")}
        if path and not inside:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        folders = {str(parent) for p in inside for parent in PurePosixPath(p).parents}
        folders = {folder for folder in folders if folder != "." and folder.startswith(path and path + "/")}
        entries = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)]
        entries += [file.entry(p) for p, file in inside.items()]
        if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if str(PurePosixPath(entry["path"]).parent) == (path or ".")]
        return Reply(entries)

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, request, repo, revision):
        files = self._readable(repo, request.user).at(revision).files
        form = parse_qs(request.body.decode())
        return Reply([files[path].entry(path) for path in form.get("paths", ()) if path in files])

    @route("HEAD GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request, repo, revision, path):
        repo = self._readable(repo, request.user)
        if repo.gated and request.user != repo.id.partition("/")[0]:
            raise HubError(403 if request.user else 401, f"Access to model {repo.id} is restricted", "GatedRepo")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        headers["ETag"] = f'"{file.etag}"'
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return Reply(file.content, headers)


class Handler(BaseHTTPRequestHandler):
    # HTTP/1.0 closes each connection: none that the client keeps can outlive its server.
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            status, reply = 200, self.server.hub.answer(self.command, self.path, self.headers["Authorization"], body)
        except HubError as error:
            status, reply = error.status, Reply(error.content, error.headers)
        content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(reply.content, bytes) else "application/json"
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def log_message(self, *_):
        pass
