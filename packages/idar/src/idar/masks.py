"""Subject masks at token resolution, and normalisations of attention maps."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Normalization = Literal["max", "minmax", "share", "sum", "none"]
Fit = Literal["stretch", "pad", "crop"]


def token_masks(
    masks: Float[Tensor, "b s H W"] | Bool[Tensor, "b s H W"],
    grid: tuple[int, int],
    *,
    fit: Fit = "stretch",
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Float[Tensor, "b s n"]:
    """Share of each token's area that a subject covers: exact area pooling to ``grid`` (rows, columns), rows first.

        out_rc = sum_yx A_ry M_yx B_cx,   A_ry = |[y, y+1) intersected with token row r| / |token row r|, B likewise

    Any picture size works, also where the grid does not divide it.

    Args:
        masks: Masks of s subjects in [0, 1], at the picture's resolution; they may overlap.
        grid: Token rows and columns of the model's canvas.
        fit: How the picture came onto the canvas where their aspect ratios differ: "stretch" scaled each side on its own, "pad" scaled it
            to fit and centred it (the rest belongs to nobody), "crop" scaled it to cover and cut what stands out.
        padding: Pixels (left, top, right, bottom) that were added to the picture before that, at the masks' resolution.

    Returns:
        (b, s, rows * columns) in fp32.

    Raises:
        ValueError: Masks are not 4-D or leave [0, 1], the grid or the padding is not positive, or fit is unknown.

    >>> token_masks(torch.ones(1, 1, 4, 6), (2, 3)).tolist()
    [[[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]
    >>> token_masks(torch.ones(1, 1, 2, 4), (4, 4), fit="pad").unflatten(2, (4, 4))[0, 0, :, 0].tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    if masks.dim() != 4 or min(masks.shape[2:]) < 1 or min(grid) < 1:
        raise ValueError(f"masks must be (b, s, H, W) and grid positive, got {tuple(masks.shape)} and {grid}")
    masks = masks.float()
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError("masks must lie in [0, 1], got values outside or NaN")
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding must be four numbers (left, top, right, bottom) of at least 0, got {padding}")
    left, top, right, bottom = padding
    height, width = masks.shape[2] + top + bottom, masks.shape[3] + left + right
    scale_y, scale_x = height / grid[0], width / grid[1]  # pixels per token
    if fit == "pad":
        scale_y = scale_x = max(scale_y, scale_x)
    elif fit == "crop":
        scale_y = scale_x = min(scale_y, scale_x)
    elif fit != "stretch":
        raise ValueError(f"fit must be 'stretch', 'pad' or 'crop', got {fit!r}")
    rows = _overlaps(masks.shape[2], grid[0], scale_y, (height - grid[0] * scale_y) / 2 - top).to(masks.device)
    columns = _overlaps(masks.shape[3], grid[1], scale_x, (width - grid[1] * scale_x) / 2 - left).to(masks.device)
    return torch.einsum("ry,bsyx,cx->bsrc", rows, masks, columns).flatten(2).clamp_(0, 1)


def _overlaps(pixels: int, tokens: int, scale: float, start: float) -> Float[Tensor, "tokens pixels"]:
    """Share of token ``[start + t * scale, start + (t + 1) * scale)`` that pixel ``[p, p + 1)`` fills."""
    edges = start + scale * torch.arange(tokens + 1, dtype=torch.float64)
    position = torch.arange(pixels, dtype=torch.float64)
    stop = torch.minimum(edges[1:, None], position + 1)
    begin = torch.maximum(edges[:-1, None], position)
    return ((stop - begin).clamp_(min=0) / scale).float()


def normalize_maps(
    maps: Float[Tensor, "b s n"], mode: Normalization = "max", *, eps: float = 1e-8
) -> Float[Tensor, "b s n"]:
    """Brings maps to [0, 1].

    "max": ``m / max_j m``; "minmax": ``(m - min) / (max - min)``; "share": ``m_i / sum over subjects of m``, so that the subjects
    compete for every token; "sum": ``m / sum_j m``; "none": unchanged. A map that is zero (constant, for "minmax") becomes zero.

    Raises:
        ValueError: The mode is unknown.

    >>> normalize_maps(torch.tensor([[[1.0, 4.0]], ]), "max").tolist()
    [[[0.25, 1.0]]]
    """
    if mode == "max":
        return maps / maps.amax(-1, keepdim=True).clamp_min(eps)
    if mode == "minmax":
        low = maps.amin(-1, keepdim=True)
        return (maps - low) / (maps.amax(-1, keepdim=True) - low).clamp_min(eps)
    if mode == "share":
        return maps / maps.sum(1, keepdim=True).clamp_min(eps)
    if mode == "sum":
        return maps / maps.sum(-1, keepdim=True).clamp_min(eps)
    if mode == "none":
        return maps
    raise ValueError(f"mode must be 'max', 'minmax', 'share', 'sum' or 'none', got {mode!r}")
