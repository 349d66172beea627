"""What the pure functions are handed: tensors of the right kind and sizes, or one sentence that says which is not."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["real", "floating", "whole", "boolean"]
KINDS: dict[Kind, Callable[[Tensor], bool]] = {
    "real": lambda t: t.dtype != torch.bool and not t.is_complex(),
    "floating": lambda t: t.is_floating_point(),
    "whole": lambda t: t.dtype != torch.bool and not t.is_floating_point() and not t.is_complex(),
    "boolean": lambda t: t.dtype == torch.bool,
}


def one_line(value: object) -> str:
    """How a sentence shows what came: on one line, and not all of it where it is long."""
    return " ".join(repr(value).split())[:200]


def check_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses what is none of the choices.

    Raises:
        ValueError: Names them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {one_line(value)}")


def check_tensors(kind: Kind, sizes: dict[str, int], **given: tuple[Any, str]) -> None:
    """Refuses tensors of another kind, and sizes that do not fit one another. Compiled graphs never check.

    Args:
        kind: Of all of them.
        sizes: By letter; those that are new are written into it.
        given: The tensor and its letters, by name; a question mark behind them allows None.

    Raises:
        ValueError: Names the first that does not fit.

    >>> sizes: dict[str, int] = {}
    >>> check_tensors("floating", sizes, h=(torch.ones(2, 3), "n d"), weight=(torch.ones(4, 3), "e d"))
    >>> sizes
    {'n': 2, 'd': 3, 'e': 4}
    """
    if torch.compiler.is_compiling():
        return
    for name, (value, shape) in given.items():
        if value is None and shape.endswith("?"):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}")
        letters = shape.rstrip("?").split()
        known = [f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes]
        fits = value.dim() == len(letters)
        if not fits or any(sizes.setdefault(letter, n) != n for letter, n in zip(letters, value.shape, strict=True)):
            wanted = f"({', '.join(letters)}){' with ' if known else ''}{' and '.join(known)}"
            raise ValueError(f"{name} must have the shape {wanted}, got {tuple(value.shape)}")
        if not KINDS[kind](value):
            raise ValueError(f"{name} must hold {kind} values, got {value.dtype}")


def check_index(name: str, index: Tensor, num_experts: int) -> None:
    """Refuses experts that there are not; -1 is none. An accelerator is not waited for.

    Raises:
        ValueError: One is outside [-1, num_experts).
    """
    if torch.compiler.is_compiling() or index.device.type != "cpu" or not index.numel():
        return
    low, high = (int(x) for x in index.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(f"{name} must be in [-1, {num_experts}), got {low if low < -1 else high}")


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuses what is no whole number in [low, high].

    Raises:
        ValueError: Names it.
    """
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        limit = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be a whole number {limit}, got {one_line(value)}")
