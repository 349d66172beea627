"""What callers hand over, made into lists once, at the door; and what tells two pictures apart.

Data sets, trainers and notebooks keep references in lists, tuples, NumPy arrays of paths, stacks of pixels, tensors, columns of pandas,
pyarrow or datasets, and generators. Behind this door they are lists of lists, whose objects stay alive while they are worked on.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from id_reward.errors import InputError
from id_reward.images import require_file, to_rgb

FILES = (str, os.PathLike, bytes, bytearray, memoryview)


def _is_missing(item: Any) -> bool:
    """None, NaN, and the missing values of pandas."""
    return item is None or type(item).__name__ in ("NAType", "NaTType") or (isinstance(item, float) and item != item)


def _short(item: Any) -> str:
    """A thing as a message shows it."""
    shape = getattr(item, "shape", None)
    return (f"{type(item).__name__} of shape {tuple(shape)}" if isinstance(shape, tuple) else repr(item))[:100]


def _one_by_one(items: Any, name: str, what: str) -> list[Any]:
    """The items of any ordered container; what is a thing of its own, or has no order, is refused."""
    alone = isinstance(items, (*FILES, Mapping, Set)) or any(hasattr(items, a) for a in ("convert", "_fields", "read"))
    scalar = getattr(items, "ndim", 1) == 0
    if alone or scalar or hasattr(items, "iterrows") or not isinstance(items, Iterable):
        raise InputError(f"{name} must be a list of {what}, got {_short(items)}")
    return [item.as_py() if hasattr(item, "as_py") else item for item in items]


def listed(items: Any, name: str, what: str = "pictures") -> list[Any]:
    """Any container of pictures as a list.

    Args:
        items: A list, a tuple, a stack of pixels (n, h, w, 3), a tensor (n, 3, h, w), an array of paths, a column of a table, a generator.
        name: How a message calls it.
        what: What the items are.

    Raises:
        ValueError: It is one picture and no container, has no order, or an item is missing.

    >>> listed(np.array(["a.png", "b.png"]), "references") == ["a.png", "b.png"]
    True
    """
    kind, axes = str(getattr(getattr(items, "dtype", None), "kind", "")), getattr(items, "ndim", 4)
    numbers = hasattr(items, "detach") or kind in ("b", "u", "i", "f")
    if numbers and axes < 4 and not (axes == 1 and len(items) == 0):
        raise InputError(f"{name} must be a list of {what}, got {_short(items)}; put a single picture into a list")
    found = _one_by_one(items, name, what)
    for number, item in enumerate(found):
        if _is_missing(item):
            raise InputError(f"{name}[{number}] must be one of {what}, got {item!r}")
    return found


def listed_references(references: Any, count: int, name: str = "references") -> list[list[Any]]:
    """The references of every picture as a list of lists.

    Args:
        references: One container of pictures for each picture, in any container; see `listed`.
        count: How many pictures there are.
        name: How a message calls them.

    Raises:
        ValueError: Not one container for each picture, or one of them is not a container of pictures.
    """
    outer = _one_by_one(references, name, "lists, one for each picture")
    if len(outer) != count:
        raise InputError(f"{name} must have one entry per picture ({count}), got {len(outer)}")
    spent: list[
        tuple[Iterator[Any], list[Any]]
    ] = []  # a generator that stands for several pictures can be walked through once
    rows: list[list[Any]] = []
    for number, given in enumerate(outer):
        if number and given is outer[number - 1]:
            rows.append(rows[-1])
            continue
        known = next((row for iterator, row in spent if iterator is given), None)
        row = listed(given, f"{name}[{number}]") if known is None else known
        if known is None and isinstance(given, Iterator):
            spent.append((given, row))
        rows.append(row)
    return rows


def listed_batch(images: Any, prompts: Any, references: Any) -> tuple[Sequence[Any], list[str], list[list[Any]]]:
    """A batch as trainers hand it over: pictures (tensors and arrays stay whole), prompts and references, equally many.

    Raises:
        ValueError: The lengths differ, prompts are one string, or references are no lists of pictures.
    """
    whole = getattr(images, "ndim", 0) == 4 or isinstance(images, (list, tuple))
    pictures: Sequence[Any] = images if whole else _one_by_one(images, "images", "pictures")
    texts = _one_by_one(prompts, "prompts", "strings, one for each picture")
    outer = _one_by_one(references, "references", "lists, one for each picture")
    if not len(pictures) == len(texts) == len(outer):
        raise InputError(
            f"prompts and references must have one entry per picture ({len(pictures)}), got {len(texts)} and {len(outer)}"
        )
    for number, prompt in enumerate(texts):
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{number}] must be a string, got {_short(prompt)}")
    return pictures, texts, listed_references(outer, len(pictures))


def _digest(content: Any) -> bytes:
    import hashlib

    return hashlib.blake2b(content, digest_size=16).digest()


def content_key(picture: Any) -> Hashable | None:
    """What two pictures share exactly if they are the same picture; None where content cannot be compared.

    A file counts by its bytes, not by its name or date. A PIL picture counts by its pixels as they are seen: palette, transparency and EXIF
    orientation tell pictures with equal bytes apart. Arrays and tensors count by their values. An object's address never counts.

    >>> content_key(np.zeros((2, 2, 3))) == content_key(np.zeros((2, 2, 3)))
    True
    """
    if isinstance(picture, Mapping):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return "file", _digest(picture)
    if isinstance(picture, (str, os.PathLike)):
        try:
            require_file(picture)
            return "file", _digest(Path(picture).read_bytes())
        except (OSError, ValueError):
            return None  # whoever opens it says what is wrong
    if hasattr(picture, "read"):
        return None  # an open file: reading it here would move it, and its "detach" is no tensor's
    if hasattr(picture, "convert") and hasattr(picture, "tobytes"):
        try:
            seen = _digest(to_rgb(picture).tobytes())
        except ValueError:
            return None
        raw = b"" if picture.mode == "RGB" else _digest(picture.tobytes())
        return "pil", picture.mode, picture.size, raw, seen
    if hasattr(picture, "detach"):
        try:
            tensor = picture.detach().cpu()
            half = tensor.is_floating_point() and tensor.itemsize < 4
            values = (tensor.float() if half else tensor).contiguous().numpy()
        except (RuntimeError, TypeError):
            return None  # of the device "meta", sparse: whoever looks at it says what is wrong
        return "tensor", str(tensor.dtype), values.shape, _digest(values.tobytes())
    if hasattr(picture, "__array__") and not np.ma.is_masked(picture):
        array = np.asarray(picture)
        return None if array.dtype.hasobject else ("array", array.dtype.str, array.shape, _digest(array.tobytes()))
    return None


def row_keys(rows: Sequence[Sequence[Any]]) -> list[list[Hashable]]:
    """`content_key` of every reference of every picture; one that has none gets a plain `object`, which is like nothing else.

    Rows of a group often are the very same list, or hold the same objects at the same places: these are looked at once.
    """
    results: list[list[Hashable]] = []
    files: dict[str, Hashable] = {}
    before: Sequence[Any] = ()
    for row in rows:
        keys: list[Hashable] = []
        for place, reference in enumerate(row):
            if place < len(before) and reference is before[place]:
                keys.append(results[-1][place])
            elif isinstance(reference, (str, os.PathLike)):
                name = os.fspath(reference)
                if name not in files:
                    files[name] = content_key(reference) or object()
                keys.append(files[name])
            else:
                keys.append(content_key(reference) or object())
        results.append(keys)
        before = row
    return results
