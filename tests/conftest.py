# SPDX-License-Identifier: Apache-2.0
import atexit
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest


def isolate_from_the_hub() -> tuple[socket.socket, Path]:
    """Set the environment, here and for programs that tests start, so that no test can reach the real Hub or a user's cache.

    huggingface_hub reads it once, on import. The socket keeps the port of `HF_ENDPOINT` free without listening on it: until
    the `hub` fixture starts its server there, connections are refused.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    home = Path(tempfile.mkdtemp(prefix="hf-home-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{reserved.getsockname()[1]}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return reserved, home


reserved_socket, hf_home = isolate_from_the_hub()

# Two workers with a thread for each core would get in each other's way. The variable is for the programs that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# MKL otherwise adds in an order that depends on where in memory weights lie, and loaded ones lie elsewhere than those that were saved.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

import torch  # noqa: E402


def declare_torchvision_operators():
    """Make `import torchvision` work beside a CPU build of PyTorch.

    torchvision's wheel on PyPI is built for CUDA. Beside a CPU build its library cannot be loaded, and its import
    (and so that of Diffusers) fails on the first operator that it gives a fake kernel. These operators are never called
    here, so that declaring them is enough.
    """
    (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
    try:
        torch.ops.load_library(next(Path(folder).glob("_C*.so")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


if importlib.util.find_spec("torchvision") is not None:
    _torchvision_library = declare_torchvision_operators()  # kept: what it declares goes when it goes

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def hub():
    """An empty Hub at `HF_ENDPOINT`, and an empty cache of what was downloaded from it."""
    from tests.hub_server import HubServer

    shutil.rmtree(hf_home / "hub", ignore_errors=True)
    with HubServer(reserved_socket.getsockname()[1]) as server:
        yield server
