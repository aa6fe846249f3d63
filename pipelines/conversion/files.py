# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files read as data: which file it was, and the tensors in it. Nothing that a file says is executed.

- NVIDIA's `.pkl` is a plain pickle of modules with their source; [`ld3_diffusers.inert_pickle`] reads it with the
  names that its EDM files have.
- `torch.save`'s `.pt`, `.pth` and `.ckpt` are read by PyTorch's own restricted reader. Classes of Lightning and
  OmegaConf, which `.ckpt` files mention beside the weights, are stood for by one that does nothing.
- `.safetensors` has no code.
"""

import hashlib
import io
import mmap
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ld3_diffusers.inert_pickle import PERSISTENCE, Instance, Refused, instances, quoted, run

from .nesting import check_nesting


MAX_PICKLE_BYTES = 8 * 2**30  # the largest public one, of ImageNet-64, has 1.2 GB
MAX_OPCODES = 5_000_000  # that of ImageNet-64 has some 200,000
MAX_OBJECTS_BYTES = 64 * 2**20  # of what describes the tensors in an archive of torch.save; genuine ones have 1 MB
NUMBER_FORMATS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}  # NumPy's codes in those of struct
NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before NumPy 2, and since
LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
LIGHTNING_MAPPINGS = ("pytorch_lightning.utilities.parsing.AttributeDict",)
LEGACY_TORCH = (
    b"\x80\x02\x8a\nl\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the number that began files of torch.save before 1.6
)
LEGACY_PICKLES = 5  # in such a file: number, version, system, what was saved, names of the storages after it

# What classes of networks raise that are made of, or filled with, what they never have.
UNBUILDABLE = (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, AttributeError, AssertionError)


class NumberType(Instance):
    """A NumPy type of one number; its state has the order of its bytes."""

    state_type = tuple

    def number(self, content: bytes) -> float | int:
        order = ">" if type(self.state) is tuple and self.state[1:2] == (">",) else "<"
        form = order + NUMBER_FORMATS[self.class_name]
        if type(content) is not bytes or len(content) != struct.calcsize(form):
            raise Refused(f"has a NumPy number that is no {self.class_name}")
        return struct.unpack(form, content)[0]


def _number_type(code, _aligned, _copied) -> NumberType:
    if type(code) is not str or code not in NUMBER_FORMATS:
        raise Refused(f"has a NumPy number of the type {quoted(code)}, which none needs")
    return NumberType(code)


def _number(kind, content) -> float | int:
    if not isinstance(kind, NumberType):
        raise Refused("has a NumPy number without a type")
    return kind.number(content)


EDM_NAMES = {
    **PERSISTENCE,
    **instances("torch.nn.modules.container.ModuleDict"),
    "numpy.dtype": _number_type,
    **dict.fromkeys(NUMPY_SCALARS, _number),
}


class Unfit(ValueError):
    """An option that does not go with a checkpoint, which may be in order."""


class CheckpointFile(NamedTuple):
    """Which file something was converted from."""

    name: str
    size: int  # bytes
    sha256: str


class Inert:
    """Stands for any class that a file mentions beside its weights: takes everything and does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


def identify(file: str | Path) -> CheckpointFile:
    """Name, size and SHA-256 of a file.

    Raises:
        ValueError: if there is no such file, or it cannot be read.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f"there is no file {str(file)!r}; give the path of a checkpoint, or add --download to fetch it"
        )
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error}") from error
    return CheckpointFile(path.name, path.stat().st_size, digest)


def read_edm_pickle(file: str | Path) -> Instance:
    """The network (`ema`) in a `.pkl` of NVIDIA's EDM, as data.

    The file is mapped, so that each tensor's bytes are copied once.

    Raises:
        ValueError: if it is no such file, damaged, or names or does anything else; nothing in it is executed.
    """
    wanted = "a network .pkl of EDM"
    try:
        with open(file, "rb") as stream:
            if stream.read(1) != b"\x80":  # all pickles since 2003 begin so
                raise Refused("is no pickle")
            size = stream.seek(0, 2)
            if size > MAX_PICKLE_BYTES:
                raise Refused(f"is larger than {MAX_PICKLE_BYTES >> 30} GiB")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                snapshot = run(content, EDM_NAMES, MAX_OPCODES)
        network = snapshot.get("ema") if isinstance(snapshot, dict) else None
        if not isinstance(network, Instance):
            raise Refused("holds no network as its 'ema'")
        return network
    except Refused as reason:
        raise ValueError(f"{str(file)!r} {reason}; nothing of it was executed, pass {wanted}") from None
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error}; pass {wanted}") from error


def read_state_dict(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pt`, `.pth`, `.ckpt` or `.safetensors` file by name: its `state_dict`, where there is one.

    Tensors of archives are mapped from the file, not read into memory.

    Raises:
        ValueError: for any other file, a damaged one, or one that names what a checkpoint has no use for; nothing in
        it is executed.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(len(LEGACY_TORCH))
        if zipfile.is_zipfile(file) and start.startswith(b"PK"):
            content = _read_archive(file)
        elif start == LEGACY_TORCH:
            with open(file, "rb") as stream:
                for _ in range(LEGACY_PICKLES):
                    check_nesting(stream, MAX_OPCODES)
            content = _load(file, {}, mapped=False)
        elif Path(file).suffix == ".safetensors":
            content = safetensors.torch.load_file(file)
        else:
            raise Refused("is neither a file of torch.save nor a .safetensors file")
        return _tensors(content, Path(file).stat().st_size)
    except (Refused, safetensors.SafetensorError) as error:
        reason = error if isinstance(error, Refused) else "is a damaged .safetensors file"
        raise ValueError(
            f"{str(file)!r} {reason}; nothing of it was executed, pass a checkpoint with a state dict"
        ) from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {str(file)!r}: {error}; is it complete?") from error


def _read_archive(file: str | Path):
    with zipfile.ZipFile(file) as archive:
        _check_archive(archive, Path(file).stat().st_size)
    try:
        mentioned = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # a parser of what anyone may have written
        raise Refused("is damaged") from None
    return _load(file, {name: _stand_in(name) for name in mentioned}, mapped=True)


def _check_archive(archive: zipfile.ZipFile, most_bytes: int) -> None:
    members = archive.infolist()
    objects = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(objects) != 1:
        checkpoints = [member.filename for member in members if member.filename.endswith((".ckpt", ".pt", ".pth"))]
        raise Refused(
            f"is an archive that torch.save did not write; unpack {quoted(checkpoints[0])} from it"
            if checkpoints
            else "is an archive that torch.save did not write"
        )
    # torch.save never compresses; what is compressed could be a thousand times as large as the file.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Refused("has compressed parts, which torch.save does not write")
    if sum(member.file_size for member in members) > most_bytes:
        raise Refused("has parts that are larger than itself")
    if objects[0].file_size > MAX_OBJECTS_BYTES:
        raise Refused(f"describes its tensors in more than {MAX_OBJECTS_BYTES >> 20} MiB")
    try:
        description = archive.read(objects[0])
    except RuntimeError:  # of an encrypted one
        raise Refused("is damaged") from None
    check_nesting(io.BytesIO(description), MAX_OPCODES)


def _stand_in(name: str) -> type:
    if name in LIGHTNING_MAPPINGS:
        return OrderedDict
    if name in (*NUMPY_SCALARS, "numpy.dtype") or name.startswith(LIGHTNING):
        return Inert
    raise Refused(f"names {quoted(name)}, which is refused")


def _load(file: str | Path, stand_ins: dict[str, type], *, mapped: bool):
    with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # a parser of what anyone may have written; its advice is to allow what it refuses
            named = str(error).partition("GLOBAL ")[2].split()
            raise Refused(
                f"names {quoted(named[0])}, which is refused" if named else "is damaged or refused"
            ) from None


def _tensors(content, most_bytes: int) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise Refused("holds no state dict")
    for name, value in content.items():
        if type(name) is not str or not isinstance(value, Tensor):
            raise Refused(f"has a {type(value).__name__} as {quoted(name)}, where a tensor must be")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise Refused(f"has {quoted(name)} in a form that is no plain tensor")
    # Strides of 0, or many names for one storage, would let a small file be huge tensors.
    if sum(value.nbytes for value in content.values()) > most_bytes:
        raise Refused("has tensors that are larger than the file")
    return {name: value.detach() for name, value in content.items()}


def finite_float32(tensor: Tensor) -> Tensor | None:
    """The tensor in float32; None if it is not of floating point, or not all finite there. Those without values pass."""
    if not tensor.is_floating_point():
        return None
    values = tensor.float()
    return values if values.is_meta or bool(values.isfinite().all()) else None
