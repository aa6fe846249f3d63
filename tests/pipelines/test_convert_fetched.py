# SPDX-License-Identifier: Apache-2.0
"""The conversion program with `--download`: names and addresses of files, and wrong answers that became the checkpoint."""

import hashlib
import json
import os
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pipelines.conversion.download import PUBLIC
from pipelines.convert import main
from pipelines.repository import load_family

from .edm_files import golden, make_wrapper, snapshot_bytes, write_edm
from .test_convert import public, torch_file
from .test_download import Handler


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.resumes, server.breaks, server.ranges = b"", True, [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_fetched_and_converted(tmp_path, server):
    server.content, server.breaks = snapshot_bytes(make_wrapper(golden("edm_ddpmpp_uncond"))), [1000]
    url = f"{server.url}/edm.pkl"
    known = ["--size", str(len(server.content)), "--sha256", hashlib.sha256(server.content).hexdigest()]
    main(["edm", str(tmp_path / "a.pkl"), "--output_dir", str(tmp_path / "a"), "--download", url, *known])
    assert len(server.ranges) > 1 and load_family(str(tmp_path / "a")).unet.config.sample_size == 16
    facts = json.loads((tmp_path / "a" / "conversion.json").read_text())
    assert url not in json.dumps(facts) and facts["sources"][0]["size"] == len(server.content)


@pytest.mark.parametrize(
    "download", [["--download", "edm.pkl"], ["--download", "URL/edm.pkl"], ["edm.pkl", "--download"]]
)
def test_the_name_that_is_fetched_is_the_checkpoints(tmp_path, server, monkeypatch, download):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PUBLIC, "edm.pkl", f"{server.url}/edm.pkl")
    server.content = snapshot_bytes(make_wrapper(golden("edm_ddpmpp_uncond")))
    main(["edm", *(word.replace("URL", server.url) for word in download), "--output_dir", "a"])
    assert sorted(os.listdir()) == ["a", "edm.pkl"]
    assert json.loads(Path("a", "conversion.json").read_text())["sources"][0]["name"] == "edm.pkl"


def test_some_checkpoint_must_be_named(tmp_path, capsys):
    assert "name a checkpoint" in refusal(capsys, "edm", "--output_dir", tmp_path / "a")
    assert "name a checkpoint" in refusal(capsys, "edm", "--output_dir", tmp_path / "a", "--download")


def test_a_file_that_is_there_needs_no_address(tmp_path, capsys):
    file = write_edm(tmp_path / "mine.pkl", golden("edm_ddpmpp_uncond"))
    main(["edm", str(file), "--download", "--output_dir", str(tmp_path / "a")])
    assert load_family(str(tmp_path / "a")).unet.config.sample_size == 16
    file.write_bytes(b"else")
    assert "fetched from" not in refusal(capsys, "edm", file, "--download", "--output_dir", tmp_path / "b")


def test_no_file_is_fetched_before_the_address_of_each_is_known(tmp_path, capsys, server):
    server.content = torch_file(public("guided_unet_cond"))
    files = [tmp_path / "unet.pt", "--classifier", tmp_path / "unknown.pt"]
    message = refusal(capsys, "adm", *files, "--download", f"{server.url}/a", "--output_dir", tmp_path / "a")
    assert "'unknown.pt' is neither an http" in message and server.ranges == [] and os.listdir(tmp_path) == []


def test_a_wrong_answer_is_said_to_be_fetched(tmp_path, capsys, server, monkeypatch):
    server.content, url = b"<html>not here</html>", f"{server.url}/a.pt"
    arguments = ("adm", tmp_path / "a.pt", "--download", url, "--output_dir", tmp_path / "a")
    for _ in range(2):  # now, and from an earlier run
        message = refusal(capsys, *arguments)
        assert message.endswith(f"; it was fetched from {url}: delete it to fetch again")
    assert len(server.ranges) == 1
    (tmp_path / "a.pt").write_bytes(torch_file({"a": torch.zeros(2)}))
    message = refusal(capsys, *arguments)
    assert "makes no such network" in message and message.endswith(f"from {url}: delete it to fetch again")
    # an option that does not fit is no fault of the file, and of two files it is the one that is refused
    (tmp_path / "a.pt").write_bytes(torch_file(public("guided_unet_cond")))
    assert "fetched from" not in refusal(capsys, *arguments, "--num_head_channels", "48")
    monkeypatch.setitem(PUBLIC, "classifier.pt", f"{server.url}/classifier.pt")
    more = ("--num_head_channels", "32", "--classifier", tmp_path / "classifier.pt")
    assert refusal(capsys, *arguments, *more).endswith(f"from {server.url}/classifier.pt: delete it to fetch again")
