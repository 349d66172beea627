"""Pictures that somebody gives, of whatever kind, as upright RGB, and masks as coverage: the one place where the pipeline opens them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from id_reward.images import MAX_PIXELS, as_array, require_file
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from multicrafter import UserError


def is_picture(given: Any) -> bool:
    """Whether this is one picture, rather than a sequence of them: a path, a PIL picture, or an array of pixels.

    >>> is_picture("a.png"), is_picture(["a.png"]), is_picture(np.zeros((4, 4, 3))), is_picture(np.zeros((2, 4, 4, 3)))
    (True, False, True, False)
    """
    if isinstance(given, (str, Path, bytes)) or hasattr(given, "convert"):
        return True
    if isinstance(given, Mapping):  # as data sets keep them
        return "bytes" in given or "path" in given
    shape = getattr(given, "shape", None)
    return shape is not None and getattr(given, "ndim", len(shape)) in (2, 3) and not _holds_objects(given)


def _holds_objects(given: Any) -> bool:
    return getattr(getattr(given, "dtype", None), "kind", "f") in ("O", "U", "S", "T")


def open_picture(given: Any, *, name: str = "reference") -> Image.Image:
    """A path, PIL picture, array or tensor as the upright RGB picture that the command line would open, too.

    Raises:
        ValueError: It is none of these, or cannot be read.
    """
    try:
        return Image.fromarray(as_array(given))
    except ValueError as error:
        text = str(error)
        raise UserError(text if isinstance(given, (str, Path)) else f"{name}: {text}") from error
    except (TypeError, OSError) as error:
        raise UserError(f"{name} must be a picture, got {type(given).__name__}: {error}") from error


def shared(pictures: Sequence[Image.Image], counts: Sequence[int] | None = None) -> tuple[int, int] | None:
    """Two subjects that were given the same picture, counted from 0, or None.

    Args:
        pictures: Of all subjects, one after the other.
        counts: How many neighbouring pictures show each subject; None is one each.

    >>> red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    >>> shared([red, blue, red]), shared([red, red, blue], [2, 1])
    ((0, 2), None)
    """
    owners = [subject for subject, count in enumerate(counts or [1] * len(pictures)) for _ in range(count)]
    seen: dict[tuple[tuple[int, int], bytes], int] = {}
    for owner, picture in zip(owners, pictures, strict=True):
        first = seen.setdefault((picture.size, picture.tobytes()), owner)
        if first != owner:
            return first, owner
    return None


def lists_of(given: Any, count: int, *, name: str) -> list[list[Any]]:
    """What is given per prompt: one list for all of ``count`` prompts, or a list of lists; a single picture is a list of one.

    Raises:
        ValueError: Pictures and lists are mixed, a list is empty, or there are not ``count`` lists.
    """
    if is_picture(given):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, (Mapping, Set)):
        raise UserError(f"{name} must be pictures, or one list of pictures per prompt, got {type(given).__name__}")
    items: list[Any] = list(given)
    nested = [not is_picture(x) and isinstance(x, Iterable) for x in items]
    if any(nested) and not all(nested):
        raise UserError(f"{name} must be pictures, or one list of pictures per prompt, got both")
    lists = [list(x) for x in items] if items and all(nested) else [items] * count
    if len(lists) != count:
        raise UserError(f"{name} must hold one list per prompt ({count}), got {len(lists)}")
    if not all(lists):
        raise UserError(f"{name} must hold at least one picture, got none")
    return lists


def coverage(mask: Any) -> Float[Tensor, "H W"]:
    """A mask in [0, 1]: black and white of any depth, 0 and 1 as much as 0 and 255, palettes, booleans, floats in [0, 1].

    Raises:
        ValueError: It is no (H, W), not finite, negative, empty, partly transparent, or its numbers have no known scale.
    """
    values = _mask_values(mask)
    if np.ma.is_masked(values):
        raise UserError("masks must have all their numbers, got a masked array")
    if values.ndim == 3 and values.shape[-1] == 4 and values[..., 3].min() < values[..., 3].max():
        raise UserError("masks must be opaque, black and white, got numbers with an alpha that differs")
    if values.ndim == 3 and values.shape[-1] in (1, 3, 4):
        values = values[..., : min(3, values.shape[-1])].mean(-1)
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"masks must be pictures or (H, W), got {tuple(values.shape)}")
    if not np.isfinite(values).all() or values.min() < 0:
        raise UserError("masks must be finite and in [0, 1], got NaN, infinity or a negative number")
    top = float(values.max())
    if top > 1:
        scale = 255 if top <= 255 else 65535
        if top < 0.9 * scale and len(np.unique(values)) <= 16:
            raise UserError(
                f"masks must be white, 1, 255 or 65535, where a subject is, got numbers up to {top:g}: a map of labels says (map == label)"
            )
        if top > scale or (values.dtype.kind == "f" and not np.array_equal(values, np.round(values))):
            raise UserError(f"masks must be in [0, 1], 0..255 or 0..65535, got up to {top:g}")
        values = values / scale
    return torch.from_numpy(np.array(values, np.float32))


def _opened(path: str | Path) -> Image.Image:
    """The one picture of a file."""
    try:
        require_file(path)
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UserError(
                    f"mask {path} must have at most {MAX_PIXELS:,} pixels, got {opened.width} x {opened.height}"
                )
            if getattr(opened, "n_frames", 1) > 1:
                raise UserError(f"mask {path} must be one picture, got several in one file")
            opened.load()
            return opened
    except UserError:
        raise
    except Exception as error:  # Pillow raises what it likes
        raise UserError(f"mask {path} must be a readable picture, got {type(error).__name__}: {error}") from error


def _mask_values(mask: Any) -> np.ndarray:
    if isinstance(mask, (str, Path)):
        mask = _opened(mask)
    if isinstance(mask, Image.Image):
        mask = ImageOps.exif_transpose(mask)
        clear = mask.mode in ("RGBA", "LA", "PA") or "transparency" in mask.info
        if clear and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
            raise UserError("masks must be opaque, black and white, got a picture with transparency")
        if mask.mode.startswith("I") or mask.mode == "F":
            return np.asarray(mask)
        return np.asarray(mask.convert("L"))
    if isinstance(mask, Tensor) and mask.is_meta:
        raise UserError("masks must hold numbers, got a tensor of the device meta")
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().float() if mask.is_floating_point() else mask.detach().cpu()
    values = mask if isinstance(mask, np.ma.MaskedArray) else np.asarray(mask)
    if values.dtype == bool:
        return values.astype(np.float32)
    if values.dtype.kind not in "uif":
        raise UserError(f"masks must be pictures or numbers (H, W), got {type(mask).__name__}")
    return values
