# SPDX-License-Identifier: Apache-2.0
"""Loading a teacher pipeline, freeing its text encoders, and telling one teacher from another."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.schedulers.stock_config import MODEL_KEYS
from pipelines.repository import load_family

from .denoisers import companions, denoisers
from .request_file import digest


SAMPLED_ELEMENTS = 1024  # of each weight that the digest reads
GUIDES = ("classifier", "class_embedder")  # of the pipelines that Diffusers lacks
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_teacher(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    mixed_precision: str | None = "no",
    device="cpu",
    text_encoders: bool = True,
) -> DiffusionPipeline:
    """A pipeline from a folder or the Hub, in the dtype of `mixed_precision`, on `device` (None: where it is loaded, on the host).

    Those of `pipelines/` are made of this project's classes, whatever code lies beside their weights.

    Without `text_encoders` their weights, and those of a safety checker, are not read: for stored embeddings, see
    [`ConditioningStore.has_text`].

    Raises:
        ValueError: if there is no such pipeline, or it cannot be fetched or read, saying which.
    """
    check_teacher_name(name_or_path)
    dtype = DTYPES[mixed_precision or "no"]
    try:
        pipe = load_family(name_or_path, revision=revision, variant=variant or None, torch_dtype=dtype)
        if pipe is None:
            options = {}
            if not text_encoders:
                options = dict.fromkeys(
                    _around_sampling(DiffusionPipeline.load_config(name_or_path, revision=revision))
                )
            pipe = DiffusionPipeline.from_pretrained(
                name_or_path, revision=revision, variant=variant or None, torch_dtype=dtype, **options
            )
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        place = "the folder" if Path(name_or_path).is_dir() else "the Hub (there is no such local folder)"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the teacher {name_or_path!r} from {place}: {reason}") from error
    return pipe if device is None else pipe.to(device)


def _around_sampling(names: Iterable[str]) -> list[str]:
    """Those components that read prompts, or look at finished pictures; tokenizers, which weigh nothing, are left."""
    return [name for name in names if name.startswith("text_encoder") or name == "safety_checker"]


@contextmanager
def encoding(pipe: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """To encode prompts on `device` with one network there at a time: text encoders may not fit beside the denoiser.

    Put the pipeline on a device afterwards.
    """
    if device.type == "cpu" or pipe.model_cpu_offload_seq is None:
        pipe.to(device)
        yield
        return
    pipe.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipe.remove_all_hooks()


def free_text_encoders(pipe: DiffusionPipeline) -> None:
    """Take the weights of text encoders, and of a safety checker, out of the pipeline and of memory."""
    for name in _around_sampling(pipe.components):
        setattr(pipe, name, None)
    clear_device_cache(garbage_collection=True)


def check_teacher_name(name_or_path: str) -> None:
    """Raises a `ValueError` unless this is a pipeline folder or has the form of a Hub id."""
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"the folder {name_or_path!r} holds no pipeline (no model_index.json); give a saved pipeline's folder"
            )
    elif not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name_or_path):
        raise ValueError(
            f"the teacher {name_or_path!r} is neither an existing folder nor a Hub id of the form owner/name; check the path"
        )


def scheduler_digest(config) -> str:
    """Of what the config of any scheduler of a pipeline says of the model: noise path, prediction type and shift."""
    scheduler = LD3Scheduler.from_config(config, schedules=None)
    return digest({key: scheduler.config[key] for key in MODEL_KEYS})


def teacher_digest(pipe) -> str:
    """Hexadecimal digest of a pipeline's denoisers and what guides them: names, shapes, dtypes and evenly spaced weights.

    Any training or adapter changes it. It identifies a teacher; it does not protect against one made to collide.
    """
    return _weights_digest(_sampled_from(pipe))


def encoders_digest(pipe) -> str:
    """The same of its text encoders and autoencoder: all networks but those that sampling calls, and a safety checker."""
    others = set(pipe.components) - set(_sampled_from(pipe)) - {"safety_checker"}
    modules = {name: pipe.components[name] for name in others}
    return _weights_digest({name: module for name, module in modules.items() if isinstance(module, torch.nn.Module)})


def _sampled_from(pipe) -> dict[str, torch.nn.Module]:
    guides = {name: getattr(pipe, name, None) for name in GUIDES}
    guides = {name: module for name, module in guides.items() if isinstance(module, torch.nn.Module)}
    return {**denoisers(pipe), **companions(pipe), **guides}


@torch.no_grad()
def _weights_digest(modules: dict[str, torch.nn.Module]) -> str:
    found = hashlib.sha256()
    for component, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            found.update(f"{component}.{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // SAMPLED_ELEMENTS)][:SAMPLED_ELEMENTS].contiguous().cpu()
            found.update(sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
