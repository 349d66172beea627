"""How much subjects bleed into each other, read off their attention maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from idar.loss import check_masks
from idar.masks import check_number, require_tensor


def _checked(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and masks in fp32 at least: half precision rounds sums over tokens."""
    check_masks(maps, masks)
    maps = maps if maps.dtype == torch.float64 else maps.float()
    return maps, masks.to(maps.dtype)


def leakage(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"]) -> Float[Tensor, "b s"]:
    """Attention on other subjects, as a share of the attention on any subject.

        other_i = max(0, max over k != i of M_k - M_i)
        leakage_i = sum_j m_ij other_ij / sum_j m_ij (M_ij + other_ij)

    0: none; 0.5 for two equally large subjects: the map does not tell them apart. NaN where a subject is absent or alone, or its map is 0
    on all of them.
    """
    maps, masks = _checked(maps, masks)
    count = masks.shape[1]
    results = []
    for i in range(count):
        rest = [masks[:, k] for k in range(count) if k != i]
        other = torch.stack(rest).amax(0) if rest else torch.zeros_like(masks[:, 0])
        other = (other - masks[:, i]).clamp_min(0)
        away, home = (maps[:, i] * other).sum(-1), (maps[:, i] * masks[:, i]).sum(-1)
        known = (masks[:, i].sum(-1) > 0) & (other.sum(-1) > 0) & (away + home > 0)
        results.append(torch.where(known, away / (away + home).clamp_min(1e-12), torch.full_like(away, torch.nan)))
    return torch.stack(results, 1)


def map_iou(
    maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], *, threshold: float = 0.5
) -> Float[Tensor, "b s"]:
    """Intersection over union of ``map >= threshold * its maximum`` and ``mask >= 0.5``; NaN where the mask is empty.

    Raises:
        ValueError: threshold is not in [0, 1].
    """
    maps, masks = _checked(maps, masks)
    check_number("threshold", threshold, 0, 1)
    hot, true = maps >= threshold * maps.amax(-1, keepdim=True), masks >= 0.5
    union = (hot | true).sum(-1)
    iou = (hot & true).sum(-1) / union.clamp_min(1)
    return torch.where(true.any(-1), iou, torch.full_like(iou, torch.nan))


def peak_in_mask(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"]) -> Float[Tensor, "b s"]:
    """1 where the map's maximum lies in the mask (coverage >= 0.5), else 0; NaN where the mask is empty."""
    maps, masks = _checked(maps, masks)
    hit = (masks >= 0.5).gather(-1, maps.argmax(-1, keepdim=True))[..., 0].float()
    return torch.where((masks >= 0.5).any(-1), hit, torch.full_like(hit, torch.nan))


def map_overlap(maps: Float[Tensor, "b s n"]) -> Float[Tensor, "b s"]:
    """How much of a map lies where other subjects' maps lie; needs no masks. NaN for a single subject, and where a map is 0.

        overlap_i = mean over k != i of sum_j min(p_ij, p_kj),   p_i = m_i / sum_j m_ij

    0: apart; 1: the same map. 1 minus the total variation distance, averaged over the others.

    >>> map_overlap(torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]])).tolist()
    [[0.5, 0.5]]
    """
    require_tensor(maps=maps)
    if maps.dim() != 3 or not bool((torch.isfinite(maps) & (maps >= 0)).all()):
        raise ValueError(f"maps must be (b, s, n), finite and at least 0, got {tuple(maps.shape)} or values outside")
    maps = maps if maps.dtype == torch.float64 else maps.float()
    nothing = maps.sum(-1) == 0
    p = maps / maps.sum(-1, keepdim=True).clamp_min(1e-12)
    shared = torch.minimum(p[:, :, None], p[:, None]).sum(-1)  # (b, s, s)
    own = torch.diagonal(shared, dim1=1, dim2=2)
    found = (shared.sum(-1) - own) / (maps.shape[1] - 1) if maps.shape[1] > 1 else torch.full_like(own, torch.nan)
    return found.masked_fill(nothing, torch.nan)


@dataclass(frozen=True, kw_only=True)
class AttentionProfile:
    """Metrics of every block (rows) at every noise level or step (columns), per subject; means over the batch that ignore NaN.

    Attributes:
        blocks: Names of the k blocks.
        sigmas: The t noise levels.
        values: By metric: (k, t, s); "overlap" always, "leakage", "map_iou" and "peak_in_mask" where masks were given.
    """

    blocks: tuple[str, ...]
    sigmas: tuple[float, ...]
    values: dict[str, Float[Tensor, "k t s"]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN becomes None."""
        lists = {name: torch.nan_to_num(v, nan=-1.0).tolist() for name, v in self.values.items()}
        return {"blocks": list(self.blocks), "sigmas": list(self.sigmas), **_without(lists, -1.0)}


def _without(value: Any, missing: float) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, missing) for k, v in value.items()}
    if isinstance(value, list):
        return [_without(v, missing) for v in value]
    return None if value == missing else value


def attention_profile(
    maps: Float[Tensor, "k t b s n"],
    masks: Float[Tensor, "b s n"] | None = None,
    *,
    blocks: tuple[str, ...],
    sigmas: tuple[float, ...],
) -> AttentionProfile:
    """Where in the network, and at which noise level, subjects bleed.

    Args:
        maps: Maps of k blocks (`idar.capture.stack_blocks`) at t noise levels.
        masks: From `token_masks`; without them only the overlap of the maps is known.
        blocks: Names of the blocks.
        sigmas: The noise levels.

    Raises:
        ValueError: Names and levels do not fit the maps, or see the metrics.

    >>> maps = torch.eye(2).expand(3, 4, 1, 2, 2)
    >>> attention_profile(maps, blocks=("a", "b", "c"), sigmas=(1.0, 0.7, 0.4, 0.1)).values["overlap"].shape
    torch.Size([3, 4, 2])
    """
    require_tensor(maps=maps)
    if maps.dim() != 5 or maps.shape[:2] != (len(blocks), len(sigmas)):
        raise ValueError(
            f"maps must be (k, t, b, s, n) with k = {len(blocks)} blocks and t = {len(sigmas)} sigmas, got {tuple(maps.shape)}"
        )
    metrics: dict[str, Callable[[Tensor], Tensor]] = {"overlap": map_overlap}
    if masks is not None:
        metrics |= {
            "leakage": lambda m: leakage(m, masks),
            "map_iou": lambda m: map_iou(m, masks),
            "peak_in_mask": lambda m: peak_in_mask(m, masks),
        }
    values = {
        name: torch.stack([torch.stack([metric(m).nanmean(0) for m in row]) for row in maps]).cpu()
        for name, metric in metrics.items()
    }
    return AttentionProfile(blocks=tuple(blocks), sigmas=tuple(sigmas), values=values)
