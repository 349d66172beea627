"""Numbers that somebody gives: finite ones, whole ones, in one sentence where they are not."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from typing import Any

import numpy as np

from multicrafter import UserError


def finite(name: str, value: Any) -> float:
    """A real number, also of NumPy or torch, as a float.

    Raises:
        ValueError: It is NaN, infinite or no number.

    >>> finite("lr", 1)
    1.0
    """
    if isinstance(value, (bool, str, bytes)) or value is None:
        raise UserError(f"{name} must be a finite number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{name} must be a finite number, got {type(value).__name__}") from error
    if not math.isfinite(number):
        raise UserError(f"{name} must be a finite number, got {number}")
    return number


def whole(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number, also of NumPy or torch, as an int.

    Raises:
        ValueError: It is no whole number, or less than ``least``.

    >>> whole("seed", 3)
    3
    """
    limit = "" if least is None else f" of at least {least}"
    number: int | None = None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
    elif hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:  # a scalar array or tensor
        item = value.item()
        number = item if type(item) is int else None
    if number is None or (least is not None and number < least):
        raise UserError(f"{name} must be a whole number{limit}, got {value!r}")
    return number


def check_finite(config: Any) -> None:
    """For ``__post_init__``: every value of a dataclass is of its field's type, or one of its choices, and every float is finite.

    Numbers of NumPy and torch become Python's, lists tuples and paths texts, so that a run writes down what it was told.

    Raises:
        ValueError: Names the first that is not.
    """
    hints = _hints(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        _walk(field.name, value)
        found = _of_type(field.name, hints.get(field.name, Any), value)
        if found is not value:
            object.__setattr__(config, field.name, found)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _of_type(name: str, hint: Any, value: Any) -> Any:
    """``value`` as a field of the type ``hint`` holds it; unions and mappings are left to their class."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        others = [a for a in arguments if a is not type(None)]
        if (value is None and len(others) < len(arguments)) or len(others) > 1:
            return value
        return _of_type(name, others[0], value)
    if hint is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{name} must be true or false, got {value!r}"[:300])
        return bool(value)
    if hint is int:
        number = whole(name, value)
        if abs(number) >= 2**63:
            raise UserError(f"{name} must be a whole number of 64 bits, got one of {len(str(abs(number)))} digits")
        return number
    if hint is float:
        return value if type(value) in (int, float) else finite(name, value)
    if hint is str:
        if not isinstance(value, (str, os.PathLike)):
            raise UserError(f"{name} must be a text, got {value!r}"[:300])
        return os.fspath(value)
    if origin is typing.Literal:
        if not isinstance(value, str) or value not in arguments:
            raise UserError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}"[:300])
        return value
    if origin is tuple:
        length = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, (tuple, list)) or (length is not None and len(value) != length):
            raise UserError(f"{name} must be a list{f' of {length} values' if length else ''}, got {value!r}"[:300])
        kinds = [arguments[0]] * len(value) if length is None else arguments
        found = tuple(_of_type(f"{name}[{i}]", kind, x) for i, (kind, x) in enumerate(zip(kinds, value, strict=True)))
        same = type(value) is tuple and all(a is b for a, b in zip(found, value, strict=True))
        return value if same else found
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and not isinstance(value, hint):
        raise UserError(f"{name} must be a {hint.__name__}, got {value!r}"[:300])
    return value


def _walk(name: str, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            _walk(f"{name}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _walk(f"{name}[{key!r}]", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _walk(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value}")
