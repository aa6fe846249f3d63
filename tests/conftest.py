# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os
from pathlib import Path


# Two workers with a thread for each core would get in each other's way. The variable is for the programs that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

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
