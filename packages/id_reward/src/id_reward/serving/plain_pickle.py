"""Plain data out of a pickle, without unpickling it.

Some trainers speak pickle to their scorers (verl-omni's HTTP client does). Unpickling what comes over a network runs whatever its sender
wants. A pickle of dictionaries, lists, strings, bytes and numbers needs none of that: its instructions are read by `pickletools.genops`,
which executes nothing, and those that build plain data are carried out here. Any other instruction is refused.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from id_reward.errors import InputError

MARK = object()
MOST_INSTRUCTIONS = 100_000
VALUES = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _to_mark(stack: list[Any]) -> list[Any]:
    """What was put on the stack since the last mark."""
    at = len(stack) - 1
    while stack[at] is not MARK:
        at -= 1
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _put_into(container: Any, name: str, items: list[Any]) -> None:
    """Appends to a list, or sets keys of a dictionary."""
    if name.startswith("APPEND") and type(container) is list:
        container.extend(items)
    elif name.startswith("SETITEM") and type(container) is dict and len(items) % 2 == 0:
        container.update(zip(items[::2], items[1::2]))
    else:
        raise ValueError(name)


def _carry_out(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction."""
    if name in VALUES:
        stack.append(argument)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name in NEW:
        stack.append(NEW[name]())
    elif name == "MARK":
        stack.append(MARK)
    elif name in ("APPEND", "SETITEM"):
        count = 1 if name == "APPEND" else 2
        items = [stack.pop() for _ in range(count)][::-1]
        _put_into(stack[-1], name, items)
    elif name in ("APPENDS", "SETITEMS"):
        items = _to_mark(stack)
        _put_into(stack[-1], name, items)
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name in TUPLES:
        stack.append(tuple([stack.pop() for _ in range(TUPLES[name])][::-1]))
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name not in ("PROTO", "FRAME"):
        raise InputError(
            f"a pickle must hold dictionaries, lists, strings, bytes and numbers, got the instruction {name}"
        )


def read_plain(data: bytes) -> Any:
    r"""The plain data in a pickle of protocol 2 or later.

    Raises:
        InputError: It holds anything else, or is no pickle.

    >>> import pickle
    >>> read_plain(pickle.dumps({"prompts": ["a"], "images": [b"\x00"]}))
    {'prompts': ['a'], 'images': [b'\x00']}
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if count == MOST_INSTRUCTIONS:
                raise InputError(f"a pickle must have at most {MOST_INSTRUCTIONS:,} instructions")
            if instruction.name == "STOP":
                (result,) = stack
                return result
            _carry_out(instruction.name, argument, stack, memo)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"a pickle must be whole and of plain data, got: {type(error).__name__}") from error
    raise InputError("a pickle must be whole, but its end is missing")


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def write_plain(content: Mapping[str, str | Sequence[float]]) -> bytes:
    """A pickle of protocol 2 of a dictionary with texts and lists of numbers: what such a client expects as an answer.

    >>> read_plain(write_plain({"scores": [0.5, 1.0]}))
    {'scores': [0.5, 1.0]}
    """
    parts = [b"\x80\x02}"]  # PROTO 2, EMPTY_DICT
    for name, value in content.items():
        parts.append(_text(name))
        if isinstance(value, str):
            parts.append(_text(value))
        else:
            parts += [
                b"](",
                *(b"G" + struct.pack(">d", number) for number in value),
                b"e",
            ]  # EMPTY_LIST, MARK, BINFLOAT, APPENDS
        parts.append(b"s")  # SETITEM
    return b"".join([*parts, b"."])  # STOP
