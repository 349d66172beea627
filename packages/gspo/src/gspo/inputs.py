"""What a caller hands in, as tensors: numbers out of lists, arrays and tensors of any kind, or one sentence that says what is wrong."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

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
    """Refuses what is no tensor, where lists cannot be meant (gradients flow through it).

    Raises:
        ValueError: Naming the argument.
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}")


def as_numbers(name: str, values: Numbers) -> Tensor:
    """``values`` as a floating tensor; floating tensors and arrays keep their dtype, all else becomes float64 (None becomes NaN).

    Raises:
        ValueError: Something in it is no real number, or a whole number too large for float64.

    >>> as_numbers("rewards", [1, True, None])
    tensor([1., 1., nan], dtype=torch.float64)
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise ValueError(f"{name} must be real numbers, got dtype {values.dtype}")
        if values.is_floating_point():
            return values.detach()
        if values.numel() and values.dtype != torch.bool and bool((values.long().abs() > EXACT).any()):
            raise ValueError(f"{name} must be at most 2^53 as whole numbers, got {int(values.long().abs().max())}")
        return values.double()
    if isinstance(values, str | bytes | Mapping | Set):
        raise ValueError(f"{name} must be numbers, one per sample, got {type(values).__name__}")
    if isinstance(values, SupportsArray):
        array = _array(values)
        if array.dtype.kind == "f":
            return torch.tensor(array if array.dtype.itemsize <= 8 else array.astype("float64"))
        values = array.tolist()
    try:
        rows = list(values)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be numbers, one per sample, got {type(values).__name__}") from None
    return torch.tensor([_number(name, value) for value in rows], dtype=torch.float64)


def _array(values: Any) -> Any:
    return values.__array__()


def _number(name: str, value: Any) -> float:
    if value is None:
        return float("nan")
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be numbers (or None), one per sample, got {value!r} among them") from None
    if isinstance(value, int) and abs(value) > EXACT:
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
        if values.dtype != torch.uint64:
            return values.long()
        values = values.tolist()
    elif isinstance(values, str | bytes | Mapping | Set):
        raise ValueError(f"{what}, got {type(values).__name__}")
    elif isinstance(values, SupportsArray):
        values = _array(values).tolist()
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
