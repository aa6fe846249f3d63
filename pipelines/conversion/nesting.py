# SPDX-License-Identifier: Apache-2.0
"""How much the tuples of a pickle hold, counted before PyTorch's reader runs it.

That reader hashes whatever is a key, and prints some of what it refuses. Both go through a tuple of tuples value by
value, and a few bytes of a pickle make one of 2^100 values out of the same tuple twice, twice, twice. Checkpoints have
no use for such a thing. So a walk over the opcodes, which makes nothing, counts for each value what it holds.
"""

import pickletools
from typing import BinaryIO, NamedTuple

from ld3_diffusers.inert_pickle import PUSH_ARGUMENT, PUSH_CONSTANT, PUSH_EMPTY, Refused


MAX_VALUES = 1000  # in a tuple and the tuples in it; arguments of a tensor have some 20
POP_AND_FILL = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
FILL = ("APPENDS", "SETITEMS")
NAMED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Value(NamedTuple):
    """What is known of a value on the stack.

    Attributes:
        size: values that it holds through tuples, itself included.
        plain: whether it is text, a number, a name, or a tuple of these alone.
        is_name: of a class or function.
    """

    size: int = 1
    plain: bool = True
    is_name: bool = False


def check_nesting(stream: BinaryIO, max_opcodes: int) -> None:
    """Walk the pickle that begins here; the stream is left behind it.

    Raises:
        Refused: if a tuple in it holds too much, or if it is damaged or does what no checkpoint does.
    """
    try:
        _walk(stream, max_opcodes)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, OverflowError):  # from pickletools, or from an empty stack, mark or memo
        raise Refused("is damaged or cut short") from None


def _walk(stream: BinaryIO, max_opcodes: int) -> None:
    stack, marks, memo = [], [], {}

    def last(count: int) -> list[Value]:
        if count > len(stack):
            raise IndexError
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= max_opcodes:
            raise Refused(f"has more than {max_opcodes} instructions")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in PUSH_ARGUMENT or name in PUSH_CONSTANT or name == "SHORT_BINSTRING":
                stack.append(Value())
            case name if name in PUSH_EMPTY:
                stack.append(Value(plain=False))
            case "GLOBAL":
                stack.append(Value(is_name=True))
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(_tuple(last(NAMED_TUPLES[name] if name in NAMED_TUPLES else len(stack) - marks.pop())))
            case name if name in FILL:
                last(len(stack) - marks.pop())
            case name if name in POP_AND_FILL:
                last(POP_AND_FILL[name])
            case "REDUCE" | "NEWOBJ":
                target, arguments = last(2)
                if not target.is_name:
                    raise Refused("calls what is no name, which is refused")
                stack.append(Value(arguments.size, plain=False))  # torch.Size is a tuple
            case "BINPERSID":
                if not stack.pop().plain:
                    raise Refused("has a tensor's storage in another form than torch.save gives it")
                stack.append(Value(plain=False))
            case "STOP":
                return
            case name:
                raise Refused(f"has the instruction {name}, which has no place in it")
    raise Refused("is cut short")


def _tuple(values: list[Value]) -> Value:
    size = 1 + sum(value.size for value in values)
    if size > MAX_VALUES:
        raise Refused(f"has tuples in tuples that hold more than {MAX_VALUES} values")
    return Value(size, all(value.plain for value in values))
