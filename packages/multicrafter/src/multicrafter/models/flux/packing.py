"""Token layout of FLUX with in-context references (the UNO layout, arXiv 2504.02160, section 3).

Image stream: ``[image | reference_1 | ... | reference_s]``; in the joint attention text comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]


def pack_latents(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """Folds every 2x2 patch of latents into one token, (b, c, h, w) -> (b, h/2 * w/2, 4c), rows first.

    >>> pack_latents(torch.zeros(1, 8, 16, 16)).shape
    torch.Size([1, 64, 32])
    """
    b, c, h, w = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents must have even height and width, got {h}x{w}")
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack_latents(tokens: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b c h w"]:
    """Inverse of `pack_latents` for a token grid (rows, columns)."""
    rows, columns = grid
    b, n, d = tokens.shape
    if n != rows * columns:
        raise ValueError(f"tokens must hold {rows}x{columns} = {rows * columns} patches, got {n}")
    return (
        tokens.reshape(b, rows, columns, d // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(b, d // 4, 2 * rows, 2 * columns)
    )


def grid_ids(grid: Grid, offset: Grid = (0, 0)) -> Float[Tensor, "n 3"]:
    """Position ids (0, row, column) of a token grid that starts at ``offset``."""
    rows, columns = grid
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None] + offset[0]
    ids[..., 2] = torch.arange(columns)[None, :] + offset[1]
    return ids.reshape(-1, 3)


def diagonal_ids(image: Grid, references: Sequence[Grid] = ()) -> Float[Tensor, "n 3"]:
    """Position ids of image and references: reference i starts diagonally after everything before it.

    offset_i = (rows_image + sum_{j<i} rows_j, columns_image + sum_{j<i} columns_j)   (UNO, mode "d")

    >>> diagonal_ids((8, 8), [(4, 4), (4, 4)])[[0, 64, 80]].tolist()
    [[0.0, 0.0, 0.0], [0.0, 8.0, 8.0], [0.0, 12.0, 12.0]]
    """
    parts, offset = [grid_ids(image)], image
    for grid in references:
        parts.append(grid_ids(grid, offset))
        offset = (offset[0] + grid[0], offset[1] + grid[1])
    return torch.cat(parts)


def reference_spans(num_text: int, image: Grid, references: Sequence[Grid]) -> list[tuple[int, int]]:
    """(start, stop) of each reference in the joint sequence ``[text | image | references]``."""
    start, spans = num_text + image[0] * image[1], []
    for rows, columns in references:
        spans.append((start, start + rows * columns))
        start += rows * columns
    return spans
