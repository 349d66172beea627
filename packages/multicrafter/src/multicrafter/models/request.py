"""What a call of the pipeline was given: texts, seeds, references and masks as lists and tensors. Whatever is wrong with it is said here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np
import torch
from idar import owner_masks, token_masks
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.binding import BindingConfig, Mode
from multicrafter.models.checks import whole
from multicrafter.models.flux.packing import Grid
from multicrafter.models.pictures import coverage, is_picture, lists_of, open_picture

Picture = Any
"""A path, a PIL picture, an array (h, w, 3) or a tensor (3, h, w); see `multicrafter.models.pictures.open_picture`."""
References = Sequence[Picture]
Shown = TypeVar("Shown")


def to_tensor(picture: Picture, size: int) -> Float[Tensor, "3 size size"]:
    """A picture of any kind as a square in [0, 1]: upright, scaled to fit, the rest grey."""
    square = ImageOps.pad(open_picture(picture), (size, size), method=Image.Resampling.LANCZOS, color=(128, 128, 128))
    return torch.from_numpy(np.asarray(square, np.float32) / 255).permute(2, 0, 1)


def own_shape(width: int, height: int, square: Grid, step: int = 1) -> Grid:
    """Rows and columns, multiples of ``step``, of about as many tokens as ``square`` has, for a picture of this width and height.

    A line of pixels gets a line of as many tokens, and is cut.

    >>> own_shape(400, 400, (20, 20)), own_shape(400, 200, (20, 20)), own_shape(300, 100, (20, 20), 2), own_shape(1, 9000, (4, 4))
    ((20, 20), (14, 28), (12, 34), (16, 1))
    """
    tokens = square[0] * square[1]
    longest = tokens / step**2
    aspect = min(max(width / height, 1 / longest), longest)
    rows, columns = math.sqrt(tokens / aspect) / step, math.sqrt(tokens * aspect) / step
    return step * max(1, round(rows)), step * max(1, round(columns))


def to_shape(picture: Picture, size: tuple[int, int]) -> Float[Tensor, "3 h w"]:
    """A picture of any kind at (height, width) in [0, 1]: upright, scaled to cover, what is over cut off on both sides alike."""
    whole_picture = ImageOps.fit(open_picture(picture), (size[1], size[0]), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(whole_picture, np.float32) / 255).permute(2, 0, 1)


def to_image(picture: Float[Tensor, "3 h w"]) -> Image.Image:
    """A tensor in [0, 1] as a picture."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def text_list(name: str, given: str | Sequence[str]) -> list[str]:
    """One text, or several, as a list; all of them can be written in UTF-8."""
    if not isinstance(given, (str, Iterable)) or isinstance(given, (Mapping, Set)):
        raise UserError(f"{name} must be a text, or one text per picture, got {type(given).__name__}")
    texts = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(t, str) for t in texts):
        kind = next(type(t).__name__ for t in texts if not isinstance(t, str))
        raise UserError(f"{name} must be a text, or one text per picture, got {kind}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} must be a text that UTF-8 can hold, got {text[:80]!r}") from error
    return [str(t) for t in texts]


def seed_list(seed: Any, count: int) -> list[int]:
    """One seed per prompt; the range is torch's."""
    given = [seed] * count if np.ndim(seed) == 0 else list(seed)
    seeds = [whole("seed", s) for s in given]
    if len(seeds) != count:
        raise UserError(f"seed must be one number or one per prompt ({count}), got {len(seeds)}")
    if any(not -(2**63) <= s < 2**64 for s in seeds):
        raise UserError(f"seed must fit into 64 bits, got {max(seeds, key=abs)}")
    return seeds


def reference_lists(prompts: list[str], references: References | Sequence[References]) -> list[list[Image.Image]]:
    """One list of references per prompt, opened."""
    lists = lists_of(references, len(prompts), name="references")
    known: dict[int, list[Image.Image]] = {}
    for row in lists:  # the same list may stand for all prompts
        if id(row) not in known:
            known[id(row)] = [open_picture(p, name=f"reference {i}") for i, p in enumerate(row)]
    return [known[id(row)] for row in lists]


def first_of_each(counts: Sequence[int] | None, lists: list[list[Shown]]) -> list[list[Shown]]:
    """The first reference of every subject of every prompt."""
    if counts is None:
        return lists
    if not isinstance(counts, Iterable):
        raise UserError(f"references_per_subject must be a list, one number a subject, got {counts!r}")
    counts = [whole("references_per_subject", n, least=1) for n in counts]
    if any(sum(counts) != len(row) for row in lists):
        raise UserError(
            f"references_per_subject must add up to the references of every prompt, {[len(row) for row in lists]}, got {counts}"
        )
    first = [sum(counts[:i]) for i in range(len(counts))]
    return [[row[i] for i in first] for row in lists]


def binding_config(separation: Mode | BindingConfig) -> BindingConfig:
    """A mode with its default numbers.

    Raises:
        ValueError: There is no such mode.
    """
    return separation if isinstance(separation, BindingConfig) else BindingConfig.chosen(separation)


def mask_lists(masks: Any, lists: Sequence[Sequence[Any]], grid: Grid) -> list[Tensor]:
    """Owners (s, n) of the tokens for every prompt."""
    if masks is None:
        raise UserError("masks must be given for separation 'masks', got none")
    if not is_picture(masks) and not isinstance(masks, Iterable):
        raise UserError(f"masks must be pictures, one per reference, got {type(masks).__name__}")
    if not is_picture(masks) or getattr(masks, "ndim", 0) == 3:  # a stack (s, H, W) is a list of masks
        masks = list(masks)
    rows = lists_of(masks, len(lists), name="masks")
    if [len(row) for row in rows] != [len(row) for row in lists]:
        raise UserError(
            "masks must be one per reference (one per subject, with references_per_subject), "
            f"{[len(r) for r in lists]}, got {[len(r) for r in rows]} masks"
        )
    return [owner_masks(torch.stack([_on_grid(coverage(m), grid) for m in row])[None])[0] for row in rows]


def _on_grid(mask: Float[Tensor, "H W"], grid: Grid) -> Float[Tensor, " n"]:
    """Coverage of the tokens; a mask of other proportions would say other places."""
    high, wide = mask.shape
    if not 0.97 < (wide * grid[0]) / (high * grid[1]) < 1.03:
        raise UserError(
            f"masks must have the proportions of the picture, {grid[0]} to {grid[1]} (height to width), got {high} x {wide} pixels"
        )
    return token_masks(mask[None, None], grid)[0, 0]
