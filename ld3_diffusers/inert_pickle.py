# SPDX-License-Identifier: Apache-2.0
"""Pickles read as data: nothing that a file names is imported, and nothing is called but functions of this project.

A pickle is a program for a stack machine that may call any function there is. Here that machine knows a short list of
names, and each stands for a function that makes plain data of its arguments: a dict, an [`Instance`], a
[`StoredTensor`]. All other names are refused.

`pickle.Unpickler` with its own `find_class` would not do: it allocates what lengths and indices in the file ask for,
and hashes any key, which takes forever for tuples of tuples. So `pickletools` parses the opcodes, with their bounds, and
keys must be text.

NVIDIA's `torch_utils.persistence` (EDM, and AMED after it) pickles an object as its state and its class's source, run
on loading. That text stays text.
"""

import io
import math
import pickletools
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


Names = Mapping[str, Any]  # "module.name" -> what stands for it; None: it may be mentioned, not called
PUSH_ARGUMENT = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
    + "SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
PUSH_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
INTEGER_BITS = 128  # the longest that a file has is the magic number of torch.save, of 77
MAX_DIMENSIONS = 8
STORAGE_OPCODES = 200  # of a tensor's storage, whose header has about 50
STORAGE_MAGIC, STORAGE_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before it wrote zip archives


class Refused(ValueError):
    """Why a file is not read: what follows its name in a sentence."""


class Name(NamedTuple):
    """A name that a file mentions, and what stands for it here."""

    text: str
    meaning: Any


class _Quoting(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 2, 100, 40, 40

    def repr_instance(self, value, _level) -> str:
        return repr(value) if value is None or type(value) in (bool, float) else f"a {type(value).__name__}"


quoted: Callable[[Any], str] = _Quoting().repr
"""A value of a file for a message, short and in little time: `repr` takes forever for lists of the same lists."""


@dataclass(eq=False)
class Instance:
    """An object of a class that was never imported; a subclass may have a state of another kind."""

    state_type = dict

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


def load_pickle(file: str | Path, names: Names, *, wanted: str, max_bytes: int, max_opcodes: int) -> Any:
    """The object in a file, as data.

    Args:
        names: what may be named; see `PERSISTENCE`.
        wanted: what the file should be, for the sentence that refuses another one.
        max_bytes, max_opcodes: its largest size and number of instructions, which bound memory and time.

    Raises:
        ValueError: if there is no such file, it is too large, no pickle, damaged, or names or does something else.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no file {str(file)!r}; give the path of {wanted}")
    try:
        if Path(file).stat().st_size > max_bytes:
            raise Refused(f"is larger than {max_bytes >> 20} MiB")
        content = Path(file).read_bytes()
        if content[:1] != b"\x80":  # all pickles since 2003 begin so
            raise Refused("is no pickle")
        return run(io.BytesIO(content), names, max_opcodes)
    except Refused as reason:
        raise ValueError(f"{str(file)!r} {reason}; nothing of it was executed, pass {wanted}") from None


def run(stream: io.BytesIO, names: Names, max_opcodes: int, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What the pickle that begins here makes; the stream is left behind it.

    Args:
        persistent: makes an object of a persistent id; default: there may be none.

    Raises:
        Refused: saying why.
    """
    try:
        return _run(stream, names, max_opcodes, persistent)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, OverflowError):  # from pickletools, or from an empty stack, mark or memo
        raise Refused("is damaged or cut short") from None


def _run(stream, names, max_opcodes, persistent):
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= max_opcodes:
            raise Refused(f"has more than {max_opcodes} instructions")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in PUSH_ARGUMENT:
                stack.append(_of_usual_size(argument))
            case name if name in PUSH_CONSTANT:
                stack.append(PUSH_CONSTANT[name])
            case name if name in PUSH_EMPTY:
                stack.append(PUSH_EMPTY[name]())
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
            case "APPEND" | "APPENDS" as name:
                values = since_mark() if name == "APPENDS" else [stack.pop()]
                _the(list, stack[-1]).extend(values)
            case "ADDITEMS":
                values = since_mark()
                _the(set, stack[-1]).update(_texts(values))
            case "SETITEM" | "SETITEMS" as name:
                values = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
                _the(dict, stack[-1]).update(zip(_texts(values[::2]), values[1::2], strict=True))
            case "GLOBAL":
                stack.append(_name(argument.replace(" ", "."), names))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(_name(".".join(_texts([module, last])), names))
            case "REDUCE" | "NEWOBJ":
                arguments, target = stack.pop(), stack.pop()
                stack.append(_call(target, arguments))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID" if persistent is not None:
                stack.append(persistent(stack.pop()))
            case "STOP":
                return stack.pop()
            case name:
                raise Refused(f"has the instruction {name}, which has no place in it")
    raise Refused("is cut short")


def _of_usual_size(value):
    if type(value) is int and value.bit_length() > INTEGER_BITS:
        raise Refused(f"has an integer of {value.bit_length()} bits")
    return value


def _the(kind: type, value):
    if type(value) is not kind:
        raise Refused(f"fills in a {type(value).__name__} as if it were a {kind.__name__}")
    return value


def _texts(values: list) -> list[str]:
    """Keys, checked: text is hashed quickly, and not to values that its author can foresee."""
    for value in values:
        if type(value) is not str:
            raise Refused(f"has a {type(value).__name__} where only text can be")
    return values


def _name(text: str, names: Names) -> Name:
    if text not in names:
        raise Refused(f"names {quoted(text)}, which is refused")
    return Name(text, names[text])


def _call(target, arguments):
    if not isinstance(target, Name) or not callable(target.meaning) or type(arguments) is not tuple:
        what = target.text if isinstance(target, Name) else f"a {type(target).__name__}"
        raise Refused(f"calls {what}, which is refused")
    try:
        return target.meaning(*arguments)
    except TypeError:
        raise Refused(f"calls {target.text} with arguments that it never has") from None


def _set_state(target, state) -> None:
    if isinstance(target, Instance) and type(state) is target.state_type:
        target.state = state
    elif state or type(target) is not dict:  # Python before 3.11 sets the empty state of a dict's subclass
        raise Refused(f"sets the state of a {type(target).__name__}, which is refused")


# ---------------------------------------------------------------------- what names stand for


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in the file's bytes: as many are made as are asked for."""

    storage: bytes
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, most: int | None = None) -> Tensor:
        """A copy of it, on the CPU wherever it was.

        Raises:
            Refused: if the storage is damaged or smaller than the tensor.
        """
        values = _read_storage(self.storage)
        if not len(self.size) == len(self.stride) <= MAX_DIMENSIONS or not all(
            type(number) is int and 0 <= number < 2**31 for number in (self.offset, *self.size, *self.stride)
        ):
            raise Refused("has a tensor of no possible shape")
        numel = math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        # Strides of 0 would let a small storage be a huge tensor.
        if most is not None and numel > most:
            raise Refused(f"has a tensor of {numel} values, where {most} are the most")
        if numel > len(values) or (numel and last >= len(values)):
            raise Refused("has a tensor that is larger than its storage")
        return values.as_strided(self.size, self.stride, self.offset).clone()


def _read_storage(content: bytes) -> Tensor:
    """(numel,) the storage in what torch.save wrote before zip archives: five pickles, numel, the values."""
    stream = io.BytesIO(content)
    magic, version, system = (run(stream, {}, STORAGE_OPCODES) for _ in range(3))
    if (magic, version) != (STORAGE_MAGIC, STORAGE_VERSION):
        raise Refused("has a tensor's storage in another form than torch.save gives it")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("comes from a big-endian machine")
    described = run(stream, STORAGE_TYPES, STORAGE_OPCODES, persistent=lambda description: description)
    keys = run(stream, {}, STORAGE_OPCODES)
    numel = int.from_bytes(stream.read(8), "little", signed=True)
    values = bytearray(stream.read())
    match described:
        case ("storage", Name(meaning=torch.dtype() as dtype), str() as key, _, int() as count, None):
            if keys == [key] and count == numel and numel * dtype.itemsize == len(values):
                return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
    raise Refused("has a tensor whose storage is damaged")


def _mapping() -> dict:
    return {}


def _text_set(values=None) -> set[str]:
    return set(_texts([] if values is None else _the(list, values)))


def _bytes(content) -> bytes:
    return _the(bytes, content)


def _tensor(storage, offset, size, stride, _requires_grad, _hooks, _metadata=None) -> StoredTensor:
    return StoredTensor(_the(bytes, storage), offset, _the(tuple, size), _the(tuple, stride))


def _parameter(tensor, _requires_grad, _hooks) -> StoredTensor:
    return _the(StoredTensor, tensor)


def _persistent_object(meta) -> Instance:
    match meta:
        case {
            "type": "class",
            "version": 6,
            "module_src": str(),
            "class_name": str() as name,
            "state": dict() as state,
        }:
            return Instance(name, state)
    raise Refused("has an object of another form than version 6 of torch_utils.persistence gives it")


def instances(*names: str) -> dict[str, Callable[[], Instance]]:
    """Meanings of classes that are pickled as what they are: an [`Instance`], made without arguments."""

    def of(name: str) -> Callable[[], Instance]:
        return lambda: Instance(name)

    return {name: of(name) for name in names}


STORAGE_TYPES: Names = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# What every pickle of torch_utils.persistence names.
PERSISTENCE: Names = {
    "builtins.set": _text_set,
    "__builtin__.set": _text_set,  # in protocol 2
    "collections.OrderedDict": _mapping,
    "dnnlib.util.EasyDict": _mapping,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _bytes,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
}
