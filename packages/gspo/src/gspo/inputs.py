"""What a caller hands in, as tensors: numbers out of lists, arrays and tensors of any kind, or one sentence that says what is wrong."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from gspo.checks import one_line

EXACT = 2**53
"""Whole numbers up to here are exact in float64."""


@runtime_checkable
class SupportsArray(Protocol):
    """A NumPy array, or what turns into one (pandas, JAX)."""

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        """The array."""
        ...


Numbers = Shaped[Tensor, " b"] | Sequence[Any] | SupportsArray
"""One real number per sample: a tensor or array of any real dtype, or a list in which None means "not there"."""

Ids = Shaped[Tensor, " b"] | Sequence[Any] | SupportsArray
"""One whole number per sample."""


def require_tensor(**values: object) -> None:
    """Refuses what is no tensor of real numbers, where lists cannot be meant (gradients flow through it).

    Raises:
        ValueError: Naming the argument.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}")
        _require_real_values(name, value)


def require_floating(**values: object) -> None:
    """`require_tensor`, and refuses whole numbers: what is drawn in their dtype would be cut to whole numbers.

    Raises:
        ValueError: Naming the argument.
    """
    require_tensor(**values)
    for name, value in values.items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor, got dtype {value.dtype}")


def _require_real_values(name: str, value: Tensor) -> None:
    """Refuses tensors whose values are complex, or cannot be read one by one."""
    if value.is_complex():
        raise ValueError(f"{name} must be real numbers, got dtype {value.dtype}")
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        kind = "the device meta" if value.is_meta else str(value.dtype if value.is_quantized else value.layout)
        raise ValueError(f"{name} must be a dense tensor with values, got one of {kind}")


def one_by_one(name: str, values: Any) -> list[Any]:
    """The entries of an ordered container, by their places: a column of pandas has labels, which are not places.

    Raises:
        ValueError: It has no order, or is one text.
    """
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, got {type(values).__name__}")
    return list(values)


def as_numbers(name: str, values: Numbers) -> Tensor:
    """``values`` as a floating tensor; floating ones keep dtype and device, all else becomes float64 on the CPU.

    None becomes NaN, and so does what a masked array masks.

    Raises:
        ValueError: Something in it is no real number, or a whole number too large for float64.

    >>> as_numbers("rewards", [1, True, None])
    tensor([1., 1., nan], dtype=torch.float64)
    """
    if isinstance(values, Tensor):
        _require_real_values(name, values)
        if values.is_floating_point():
            return values.detach()
        if values.numel() and values.dtype != torch.bool:
            low, high = int(values.min()) if values.dtype != torch.uint64 else 0, max(values.flatten().tolist())
            if low < -EXACT or high > EXACT:
                raise ValueError(f"{name} must be at most 2^53 as whole numbers, got {high if high > EXACT else low}")
        return values.cpu().double()  # not every device has it
    if isinstance(values, str | bytes | Mapping | Set):
        raise ValueError(f"{name} must be numbers, one per sample, got {type(values).__name__}")
    if isinstance(values, SupportsArray):
        array = _unmasked(values)
        if array.dtype.kind == "f":
            # torch takes no other byte order and no negative stride
            kind = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else "float64"
            return torch.tensor(array.astype(kind, order="C"))
        values = array.tolist()
    try:
        rows = list(values)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be numbers, one per sample, got {type(values).__name__}") from None
    return torch.tensor([_number(name, value) for value in rows], dtype=torch.float64)


def _array(values: Any) -> Any:
    return values.__array__()


def _unmasked(values: Any) -> Any:
    """The array, with NaN where a masked one of NumPy has no value: its ``__array__`` knows of no mask."""
    if hasattr(values, "filled") and hasattr(values, "mask"):
        kind = values.dtype.kind
        values = values if kind == "f" or not values.mask.any() else values.astype("float64")
        return values.filled(math.nan) if kind == "f" or values.dtype.kind == "f" else values.filled()
    return _array(values)


def _number(name: str, value: Any) -> float:
    if value is None or type(value).__name__ == "NAType":  # pandas
        return float("nan")
    if isinstance(value, Tensor):
        _require_real_values(name, value)
        value = value.item() if value.numel() == 1 else value
    try:
        if isinstance(value, str | bytes) or getattr(getattr(value, "dtype", None), "kind", "") == "c":
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name} must be numbers (or None), one per sample, got {one_line(value)} among them"
        ) from None
    if isinstance(value, numbers.Integral) and abs(int(value)) > EXACT:
        raise ValueError(f"{name} must be at most 2^53 as whole numbers, got {value}")
    return number


def as_ids(name: str, values: Ids) -> Int[Tensor, " b"]:
    """``values`` as int64, exactly; never rounded.

    Raises:
        ValueError: Something in it is no whole number, or does not fit 64 bits.

    >>> as_ids("group_ids", [2**53, 2**53 + 1]).unique().numel()
    2
    """
    what = f"{name} must be whole numbers of 64 bits, one per sample"
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex():
            raise ValueError(f"{what}, got dtype {values.dtype}")
        _require_real_values(name, values)
        if values.dtype != torch.uint64:
            return values.long()
        values = values.tolist()
    elif isinstance(values, str | bytes | Mapping | Set):
        raise ValueError(f"{what}, got {type(values).__name__}")
    elif isinstance(values, SupportsArray):
        values = _unmasked(values).tolist()
    try:
        return torch.tensor([operator.index(value) for value in values], dtype=torch.int64)  # type: ignore[union-attr]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        shown = repr(values)
        raise ValueError(f"{what}, got {shown if len(shown) < 100 else shown[:96] + ' ...'}") from None


def floating_dtype(values: Numbers) -> torch.dtype:
    """The dtype of an answer to ``values``: their own if it is floating, the default dtype else."""
    if isinstance(values, Tensor):
        return values.dtype if values.is_floating_point() else torch.get_default_dtype()
    if isinstance(values, SupportsArray) and _array(values).dtype.kind == "f":
        return as_numbers("values", values).dtype
    return torch.get_default_dtype()
