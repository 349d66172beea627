"""Numbers that somebody gives: finite ones, whole ones, in one sentence where they are not."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

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
    """For ``__post_init__``: every float of a dataclass, also in its tuples, dicts and nested dataclasses, is finite.

    Raises:
        ValueError: Names the first that is not.
    """
    for field in dataclasses.fields(config):
        _walk(field.name, getattr(config, field.name))


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
