"""How much subjects bleed into each other, read off their attention maps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from idar.loss import check_masks


def leakage(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"]) -> Float[Tensor, "b s"]:
    """Attention on other subjects, as a share of the attention on any subject.

        other_i = max over k != i of M_k, cut by M_i:  max(other - M_i, 0)
        leakage_i = sum_j m_ij other_ij / sum_j m_ij (M_ij + other_ij)

    0: none; 0.5 for two equally large subjects: the map does not tell them apart. NaN where a subject is absent or alone.
    """
    check_masks(maps, masks)
    count = masks.shape[1]
    results = []
    for i in range(count):
        rest = [masks[:, k] for k in range(count) if k != i]
        other = torch.stack(rest).amax(0) if rest else torch.zeros_like(masks[:, 0])
        other = (other - masks[:, i]).clamp_min(0)
        away, home = (maps[:, i] * other).sum(-1), (maps[:, i] * masks[:, i]).sum(-1)
        known = (masks[:, i].sum(-1) > 0) & (other.sum(-1) > 0)
        results.append(torch.where(known, away / (away + home).clamp_min(1e-12), torch.full_like(away, torch.nan)))
    return torch.stack(results, 1)


def map_iou(
    maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], *, threshold: float = 0.5
) -> Float[Tensor, "b s"]:
    """Intersection over union of ``map >= threshold * its maximum`` and ``mask >= 0.5``; NaN where the mask is empty."""
    check_masks(maps, masks)
    hot, true = maps >= threshold * maps.amax(-1, keepdim=True), masks >= 0.5
    union = (hot | true).sum(-1)
    iou = (hot & true).sum(-1) / union.clamp_min(1)
    return torch.where(true.any(-1), iou, torch.full_like(iou, torch.nan))


def peak_in_mask(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"]) -> Float[Tensor, "b s"]:
    """1 where the map's maximum lies in the mask (coverage >= 0.5), else 0; NaN where the mask is empty."""
    check_masks(maps, masks)
    hit = (masks >= 0.5).gather(-1, maps.argmax(-1, keepdim=True))[..., 0].float()
    return torch.where((masks >= 0.5).any(-1), hit, torch.full_like(hit, torch.nan))
