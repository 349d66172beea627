"""Subject masks at token resolution, and normalisations of attention maps."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalization = Literal["max", "minmax", "share", "sum", "none"]


def token_masks(masks: Float[Tensor, "b s H W"], grid: tuple[int, int]) -> Float[Tensor, "b s n"]:
    """Share of each token's area that a subject covers: area pooling to ``grid`` (rows, columns), rows first.

    Any picture size works, also where the grid does not divide it.

    >>> token_masks(torch.ones(1, 1, 4, 6), (2, 3)).tolist()
    [[[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]
    """
    if masks.dim() != 4 or min(grid) < 1:
        raise ValueError(f"masks must be (b, s, H, W) and grid positive, got {tuple(masks.shape)} and {grid}")
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError("masks must lie in [0, 1], got values outside or NaN")
    return torch.nn.functional.adaptive_avg_pool2d(masks.float(), grid).flatten(2)


def normalize_maps(
    maps: Float[Tensor, "b s n"], mode: Normalization = "max", *, eps: float = 1e-8
) -> Float[Tensor, "b s n"]:
    """Brings maps to [0, 1].

    "max": ``m / max_j m``; "minmax": ``(m - min) / (max - min)``; "share": ``m_i / sum over subjects of m``, so that the subjects
    compete for every token; "sum": ``m / sum_j m``; "none": unchanged.
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
