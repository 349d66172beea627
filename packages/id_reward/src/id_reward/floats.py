"""What models and scorers return, as float64 arrays: NumPy's, lists, and tensors of every precision on every device."""

from __future__ import annotations

import contextlib
import math
import numbers
from typing import Any

import numpy as np

from id_reward.errors import InputError
from id_reward.shapes import Float


def as_floats(values: Any) -> Float[np.ndarray, "*shape"]:
    """Numbers in any array, tensor or nested list, in float64.

    Tensors may be bfloat16, need gradients, or be on a GPU; NumPy alone takes none of these. None, and what is masked, becomes NaN.

    Raises:
        ValueError: It holds something that is no real number.

    >>> as_floats([1, None, True]).tolist()
    [1.0, nan, 1.0]
    """
    if type(values) is np.ndarray and values.dtype == np.float64:
        return values
    given = values
    if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in "buif":
        return np.where(np.ma.getmaskarray(values), np.nan, np.ma.getdata(values)).astype(np.float64)
    if hasattr(values, "detach"):
        try:
            tensor = values.detach().cpu()
            values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
        except (RuntimeError, TypeError) as error:  # of the device "meta", sparse, or of a type that NumPy lacks
            raise InputError(f"numbers are expected, got a {type(given).__name__} without readable values") from error
    elif isinstance(values, (list, tuple)) and any(
        hasattr(v, "detach") or isinstance(v, (list, tuple)) for v in values
    ):
        values = [as_floats(value) for value in values]
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "buifO" or (array.dtype.kind == "O" and any(map(_is_text, array.flat))):
            raise TypeError
        return np.asarray(array, np.float64)
    except (TypeError, ValueError, OverflowError):
        text = repr(values)
        raise InputError(f"numbers are expected, got {text if len(text) < 80 else text[:77] + '...'}") from None


def _is_text(value: Any) -> bool:
    """NumPy would read a number out of it."""
    return isinstance(value, (str, bytes))


def finite(
    name: str, value: Any, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> float:
    """A setting that is a finite number, NumPy's and tensors too, as a float.

    Raises:
        ValueError: It is no number, NaN, infinite, or out of range.

    >>> finite("missing_penalty", np.float32(0.5), least=0)
    0.5
    """
    limits = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    limits += [f"at most {most:g}"] * (most < math.inf)
    wanted = f"{name} must be a finite number" + (f", {' and '.join(limits)}" if limits else "")
    number: float | None = None
    if not isinstance(value, (bool, np.bool_, str, bytes)):
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(value)
    if number is None or not math.isfinite(number) or not (least <= number <= most and number > above):
        raise InputError(f"{wanted}, got {value!r}"[:300])
    return number


def whole(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """A setting that is a whole number, NumPy's too, as an int.

    Raises:
        ValueError: It is no whole number, or out of range.

    >>> whole("batch_size", np.int64(8), least=1)
    8
    """
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not good or int(value) < least or (most is not None and int(value) > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {limits}, got {value!r}"[:300])
    return int(value)


def part_values(values: Any, name: str, count: int) -> Float[np.ndarray, " b"]:
    """What a scorer returned for ``count`` pictures; what is not finite becomes NaN.

    Raises:
        ValueError: Not one real number per picture.
    """
    try:
        found = as_floats(values)
    except ValueError as error:
        raise InputError(f"{name} must return {count} numbers: {error}") from None
    if found.shape != (count,):
        raise InputError(f"{name} must return {count} values, got shape {found.shape}")
    return np.where(np.isfinite(found), found, np.nan)
