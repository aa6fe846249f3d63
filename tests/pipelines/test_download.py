# SPDX-License-Identifier: Apache-2.0
"""Fetching files from a server on loopback: whole, continued after a break, checked, and never half under their own name."""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.conversion.download import PUBLIC, address, download, file_name


CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; breaks off after `server.breaks` bytes once for each entry of that list."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        if self.path == "/missing":
            return self.answer(404, b"")
        start = 0
        if self.headers.get("Range") and self.server.resumes:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if start >= len(self.server.content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(self.server.content)}"})
        body, status = self.server.content[start:], 206 if start else 200
        headers = {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{start + len(body)}"} if start else {}
        self.answer(status, body, headers)

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.server.breaks and body:
            self.wfile.write(body[: self.server.breaks.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**16)  # what a break can cost; else 10 MB
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.resumes, server.breaks, server.ranges = CONTENT, True, [], []
        server.url = f"http://127.0.0.1:{server.server_port}/a.pkl"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("known", [{}, {"size": len(CONTENT)}, {"sha256": SHA256}, {"size": len(CONTENT), "sha256": SHA256.upper()}])  # fmt: skip
def test_whole_file(server, tmp_path, known):
    download(server.url, tmp_path / "new" / "a.pkl", **known)
    assert (tmp_path / "new" / "a.pkl").read_bytes() == CONTENT and os.listdir(tmp_path / "new") == ["a.pkl"]
    assert server.ranges == [None]
    download(server.url, tmp_path / "new" / "a.pkl", **known)
    assert server.ranges == [None]  # it is not fetched again


def test_continues_where_it_stopped(server, tmp_path):
    (tmp_path / "a.pkl.part").write_bytes(CONTENT[:300_000])
    download(server.url, tmp_path / "a.pkl", sha256=SHA256)
    assert server.ranges == ["bytes=300000-"] and os.listdir(tmp_path) == ["a.pkl"]


def test_continues_by_itself_after_a_break(server, tmp_path):
    server.breaks = [200_000]
    download(server.url, tmp_path / "a.pkl", sha256=SHA256)
    assert server.ranges == [None, f"bytes={200_000 // 2**16 * 2**16}-"]


def test_what_came_stays_when_the_server_is_gone(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.breaks = [100_000] + [0] * 20
    with pytest.raises(ValueError, match=f"cannot fetch {server.url}: .*start again to continue"):
        download(server.url, tmp_path / "a.pkl")
    assert os.listdir(tmp_path) == ["a.pkl.part"]
    assert (tmp_path / "a.pkl.part").read_bytes() == CONTENT[: 2**16]
    server.breaks = []
    download(server.url, tmp_path / "a.pkl", sha256=SHA256)
    assert os.listdir(tmp_path) == ["a.pkl"] and server.ranges[-1] == f"bytes={2**16}-"


def test_a_server_that_cannot_continue_sends_all_again(server, tmp_path):
    server.resumes = False
    (tmp_path / "a.pkl.part").write_bytes(CONTENT[:300_000])
    download(server.url, tmp_path / "a.pkl", sha256=SHA256)
    assert (tmp_path / "a.pkl").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more"])
def test_a_part_as_long_as_the_file_or_longer(server, tmp_path, part):
    (tmp_path / "a.pkl.part").write_bytes(part)
    download(server.url, tmp_path / "a.pkl", sha256=SHA256)
    assert (tmp_path / "a.pkl").read_bytes() == CONTENT


def test_a_part_that_was_complete_is_not_fetched_again_where_its_size_is_known(server, tmp_path):
    (tmp_path / "a.pkl.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "a.pkl", size=len(CONTENT))
    assert server.ranges == [] and os.listdir(tmp_path) == ["a.pkl"]


def test_another_file_is_refused_and_does_not_stay(server, tmp_path):
    with pytest.raises(ValueError, match=f"has the SHA-256 {SHA256}, and --sha256 is 00; http.* is another file"):
        download(server.url, tmp_path / "a.pkl", sha256="00")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="cannot fetch|bytes, and --size is"):
        download(server.url, tmp_path / "a.pkl", size=len(CONTENT) - 1)
    assert not (tmp_path / "a.pkl").exists()
    download(server.url, tmp_path / "a.pkl", size=len(CONTENT))
    assert (tmp_path / "a.pkl").read_bytes() == CONTENT


def test_another_file_that_is_there_is_refused_and_stays(server, tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"mine")
    for known in ({"size": 5}, {"sha256": SHA256}):
        with pytest.raises(ValueError, match="it was there already"):
            download(server.url, tmp_path / "a.pkl", **known)
    assert (tmp_path / "a.pkl").read_bytes() == b"mine" and server.ranges == []


def test_an_empty_answer_is_refused_and_does_not_stay(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer(200, b""))
    with pytest.raises(ValueError, match="is empty; http.* is another file, or damaged"):
        download(server.url, tmp_path / "a.pkl")
    assert os.listdir(tmp_path) == []
    (tmp_path / "a.pkl").touch()
    with pytest.raises(ValueError, match="is empty; it was there already"):
        download(server.url, tmp_path / "a.pkl")


def test_a_file_that_is_there_needs_no_address(server, tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"mine")
    download("unknown.pkl", tmp_path / "a.pkl", size=4)
    with pytest.raises(ValueError, match="'unknown.pkl' is neither an http"):
        download("unknown.pkl", tmp_path / "b.pkl")


def test_names_of_files():
    assert file_name("cin256-v2.ckpt") == "cin256-v2.ckpt" and file_name("http://a.b/c/d.pt?e=f/g") == "d.pt"
    with pytest.raises(ValueError, match="names no file"):
        file_name("http://a.b/")


def test_addresses(server, tmp_path):
    assert all(url.startswith("https://") for url in PUBLIC.values())
    assert address("256x256_diffusion.pt").endswith("/jul-2021/256x256_diffusion.pt")
    for wrong in ("nothing.pkl", "file:///etc/passwd", "ftp://a/b", "http://"):
        with pytest.raises(ValueError, match="neither an http.* nor the name of a public file"):
            address(wrong)
    with pytest.raises(ValueError, match="cannot fetch .*/missing: .*404"):
        download(server.url.replace("a.pkl", "missing"), tmp_path / "a.pkl")
    assert not (tmp_path / "a.pkl").exists()
