"""What models and scorers return, as float64 arrays: NumPy's, lists, and tensors of every precision on every device."""

from __future__ import annotations

from typing import Any

import numpy as np

from id_reward.errors import InputError
from id_reward.shapes import Float


def as_floats(values: Any) -> Float[np.ndarray, "*shape"]:
    """Numbers in any array, tensor or nested list, in float64.

    Tensors may be bfloat16, need gradients, or be on a GPU; NumPy alone takes none of these. None becomes NaN.

    Raises:
        ValueError: It holds something that is no real number.

    >>> as_floats([1, None, True]).tolist()
    [1.0, nan, 1.0]
    """
    if type(values) is np.ndarray and values.dtype == np.float64:
        return values
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    elif isinstance(values, (list, tuple)) and any(
        hasattr(v, "detach") or isinstance(v, (list, tuple)) for v in values
    ):
        values = [as_floats(value) for value in values]
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "buifO":
            raise TypeError
        return np.asarray(array, np.float64)
    except (TypeError, ValueError):
        text = repr(values)
        raise InputError(f"numbers are expected, got {text if len(text) < 80 else text[:77] + '...'}") from None


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
