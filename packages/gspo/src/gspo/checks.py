"""Numbers, choices and functions that a caller gives as settings: right ones, or one sentence that names which is not.

`check_...` asks values, `require_...` the fields of a dataclass.
"""

from __future__ import annotations

import math
import numbers
from typing import Any


def one_line(value: object) -> str:
    """How a sentence shows what came: on one line, and not all of it where it is long."""
    return " ".join(repr(value).split())[:200]


def is_real(value: Any) -> bool:
    """Whether it is a finite real number, NumPy's too, that a float can hold."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, NumPy's too; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_bool(**values: Any) -> None:
    """Refuses what is not True or False.

    Raises:
        ValueError: Naming it.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {one_line(value)}")


def check_function(**values: Any) -> None:
    """Refuses what cannot be called.

    Raises:
        ValueError: Naming it.
    """
    for name, value in values.items():
        if not callable(value):
            raise ValueError(f"{name} must be a function, got {one_line(value)}")


def check_whole(low: int, **values: Any) -> None:
    """Refuses what is no whole number of at least ``low``.

    Raises:
        ValueError: Naming it.
    """
    for name, value in values.items():
        if not (is_whole(value) and value >= low):
            raise ValueError(f"{name} must be at least {low}, as a whole number, got {one_line(value)}")


def check_real(name: str, value: Any, *, least: float = -math.inf) -> None:
    """Refuses what is no finite real number, or is below ``least``; None is left to the caller.

    Raises:
        ValueError: Naming it.
    """
    if value is not None and (not is_real(value) or value < least):
        limit = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name} must be a finite number{limit}, got {one_line(value)}")


def check_positive(**values: Any) -> None:
    """Refuses what is no finite number above 0.

    Raises:
        ValueError: Naming it.
    """
    for name, value in values.items():
        if not (is_real(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {one_line(value)}")


def check_seed(seed: Any) -> None:
    """Refuses a seed that torch's generators do not take.

    Raises:
        ValueError: It is no whole number of 64 bits.
    """
    if not is_whole(seed) or not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"seed must be a whole number of 64 bits, got {one_line(seed)}")


def require_bool(owner: object, *names: str) -> None:
    """Refuses settings of a dataclass that are not True or False: the text "false" would count as True.

    Raises:
        ValueError: Naming the setting.
    """
    check_bool(**{name: getattr(owner, name) for name in names})


def require_kind(owner: object, **kinds: type) -> None:
    """Refuses settings of a dataclass that are no instances of a class.

    Raises:
        ValueError: Naming the setting.
    """
    for name, kind in kinds.items():
        if not isinstance(getattr(owner, name), kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {one_line(getattr(owner, name))}")


def require_whole(owner: object, low: int, *names: str) -> None:
    """Refuses settings of a dataclass that are no whole numbers of at least ``low``.

    Raises:
        ValueError: Naming the setting.
    """
    for name in names:
        value, optional = getattr(owner, name), _optional(owner, name)
        good = is_whole(value) and value >= low
        if not good and not (value is None and optional):
            raise ValueError(
                f"{name} must be at least {low}{' or None' if optional else ''}, as a whole number, got {one_line(value)}"
            )


def require_real(owner: object, *names: str) -> None:
    """Refuses settings of a dataclass that are no finite real numbers.

    Raises:
        ValueError: Naming the setting.
    """
    for name in names:
        value = getattr(owner, name)
        if value is None and not _optional(owner, name):
            raise ValueError(f"{name} must be a finite number, got None")
        check_real(name, value)


def require_positive(owner: object, *names: str) -> None:
    """Refuses settings of a dataclass that are no numbers above 0; infinity is one, where it means no limit.

    Raises:
        ValueError: Naming the setting.
    """
    for name in names:
        value = getattr(owner, name)
        good = isinstance(value, numbers.Real) and not isinstance(value, bool) and value > 0  # type: ignore[operator]
        if not good and not (value is None and _optional(owner, name)):
            raise ValueError(f"{name} must be positive, got {one_line(value)}")


def _optional(owner: object, name: str) -> bool:
    """Whether a setting of a dataclass may be None."""
    return "None" in str(type(owner).__annotations__.get(name, ""))
