"""Losses between attention maps and subject masks."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idar.masks import Normalization, normalize_maps, one_line, require_tensor

LossKind = Literal["dice", "soft_iou", "cross_entropy", "share_cross_entropy", "token_cross_entropy", "balanced"]


class IDARLoss(NamedTuple):
    """``loss``: scalar, mean over the batch of the sum over subjects; ``per_subject``: (b, s), 0 where absent; ``present``: (b, s)."""

    loss: Float[Tensor, ""]
    per_subject: Float[Tensor, "b s"]
    present: Bool[Tensor, "b s"]


def check_masks(maps: Tensor, masks: Tensor) -> None:
    """Raises ValueError unless maps and masks are both (b, s, n), maps floating, finite and at least 0, and masks in [0, 1]."""
    require_tensor(maps=maps, masks=masks)
    if not maps.is_floating_point():
        raise ValueError(f"maps must be floating, as attention is, got {maps.dtype}")
    if maps.dim() == masks.dim() == 3 and maps.shape[1] != masks.shape[1]:
        raise ValueError(f"masks must be of as many subjects as maps, got {masks.shape[1]} and {maps.shape[1]}")
    if maps.dim() != 3 or maps.shape != masks.shape:
        raise ValueError(f"maps and masks must both be (b, s, n), got {tuple(maps.shape)} and {tuple(masks.shape)}")
    if not bool(torch.isfinite(maps.detach()).all()):
        raise ValueError("maps must be finite, got NaN or infinity (are the queries finite?)")
    if not bool((maps.detach() >= 0).all()):
        raise ValueError(f"maps must be at least 0, as attention is, got {float(maps.min()):g}")
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError("masks must lie in [0, 1], got values outside or NaN")


def dice(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], eps: float) -> Float[Tensor, "b s"]:
    """``1 - (2 sum_j m M + eps) / (sum_j m + sum_j M + eps)`` (MultiCrafter, arXiv 2509.21953, section 3.2; V-Net, 1606.04797)."""
    return 1 - (2 * (maps * masks).sum(-1) + eps) / (maps.sum(-1) + masks.sum(-1) + eps)


def soft_iou(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], eps: float) -> Float[Tensor, "b s"]:
    """``1 - (sum_j m M + eps) / (sum_j m + M - m M + eps)``."""
    both = (maps * masks).sum(-1)
    return 1 - (both + eps) / (maps.sum(-1) + masks.sum(-1) - both + eps)


def cross_entropy(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], eps: float) -> Float[Tensor, "b s"]:
    """``-log of the share of the map's mass inside the mask``; maps are first divided by their sum."""
    inside = (maps * masks).sum(-1) / maps.sum(-1).clamp_min(eps)
    return -(inside + eps).log()


def share_cross_entropy(
    maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], eps: float
) -> Float[Tensor, "b s"]:
    """``-mean over tokens of the subject of log(m_i / sum_k m_k)``: inside its mask a token should listen to its own reference.

    Tokens count by their coverage. Made for maps of "image_to_reference"; with one subject it is 0.
    """
    share = normalize_maps(maps, "share", eps=eps)
    return -(masks * (share + eps).log()).sum(-1) / masks.sum(-1).clamp_min(eps)


def token_cross_entropy(
    maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], eps: float
) -> Float[Tensor, "b s"]:
    """``-mean over tokens of the subject of log(m_i)``: inside its mask a token should listen to its own reference, and to nothing else.

    Made for maps of "image_to_reference", where text and picture compete with the references; stronger than `share_cross_entropy`,
    which says nothing about how much a token listens to references at all.
    """
    return -(masks * (maps + eps).log()).sum(-1) / masks.sum(-1).clamp_min(eps)


def balanced(maps: Float[Tensor, "b s n"], masks: Float[Tensor, "b s n"], eps: float) -> Float[Tensor, "b s"]:
    """``mean of m outside the mask - mean of m inside`` (localization loss of FastComposer, arXiv 2305.10431), in [-max m, max m]."""

    def mean(weight: Tensor) -> Tensor:
        return (maps * weight).sum(-1) / weight.sum(-1).clamp_min(eps)

    return mean(1 - masks) - mean(masks)


_LOSSES = {
    "dice": dice,
    "soft_iou": soft_iou,
    "cross_entropy": cross_entropy,
    "share_cross_entropy": share_cross_entropy,
    "token_cross_entropy": token_cross_entropy,
    "balanced": balanced,
}


def idar_loss(
    maps: Float[Tensor, "b s n"],
    masks: Float[Tensor, "b s n"],
    *,
    kind: LossKind = "share_cross_entropy",
    normalization: Normalization = "none",
    weight: Float[Tensor, " b"] | None = None,
    eps: float = 1e-6,
) -> IDARLoss:
    """Attention loss of subjects against their masks; overlapping masks are allowed.

    A subject whose mask is empty (absent from the target) is left out. The default is the form that made pictures better in this
    project's studies (docs/adr/0020), on maps of "image_to_reference"; the paper's own form, which did not, is ``kind="dice"`` and
    ``normalization="max"`` on maps of "reference_to_image".

    Args:
        maps: From `capture_attention` or `subject_attention`, averaged over blocks.
        masks: From `token_masks`, in [0, 1].
        kind: "share_cross_entropy" or "token_cross_entropy" of image_to_reference; "dice" (the paper), "soft_iou", "cross_entropy" of
            the map, "balanced" (FastComposer) of either direction.
        normalization: Applied to the maps before the loss (`normalize_maps`).
        weight: One factor of at least 0 per sample, such as `sigma_weight`.
        eps: Smoothing, in [0, 1].

    Raises:
        ValueError: Shapes or numbers of subjects differ, kind is unknown, maps are not floating, finite and at least 0, masks leave [0, 1],
            or every mask is empty.

    >>> takes = torch.tensor([[[0.3, 0.1], [0.1, 0.3]]])
    >>> round(idar_loss(takes, torch.eye(2)[None]).loss.item(), 4)  # each token listens to its own subject by 3/4: 2 log(4/3)
    0.5754
    """
    check_masks(maps, masks)
    maps = maps.float() if maps.itemsize < 4 else maps  # half precision rounds a token's share of a map away
    if not isinstance(eps, numbers.Real) or isinstance(eps, bool) or not 0 <= eps <= 1:
        raise ValueError(f"eps must be a number in [0, 1], got {one_line(eps)}")
    if weight is not None:
        require_tensor(weight=weight)
        if weight.shape != maps.shape[:1] or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError(f"weight must be one factor of at least 0 per sample ({len(maps)}), got {weight.tolist()}")
    if not isinstance(kind, str) or kind not in _LOSSES:
        raise ValueError(f"kind must be one of {tuple(_LOSSES)}, got {one_line(kind)}")
    if kind in ("share_cross_entropy", "token_cross_entropy") and normalization == "none":
        _warn_of_the_other_direction(maps, kind)
    present = masks.sum(-1) > 0
    if not bool(present.any()):
        raise ValueError("masks must cover something for at least one subject, got only empty masks")
    values = _LOSSES[kind](normalize_maps(maps, normalization), masks.to(maps.dtype), eps)
    values = torch.where(present, values, torch.zeros_like(values))
    total = values.sum(1) if weight is None else values.sum(1) * weight
    return IDARLoss(total.mean(), values.detach(), present)


def _warn_of_the_other_direction(maps: Tensor, kind: str) -> None:
    """Maps of "reference_to_image" each sum to one over the picture: what a token's shares of them say has no meaning."""
    if not bool(((maps.detach().sum(-1) - 1).abs() > 1e-3).any()):
        warnings.warn(
            f'kind="{kind}" is made for maps of direction "image_to_reference", got maps that each sum to 1 as those of '
            '"reference_to_image" do; capture the other direction, or say kind="dice" and normalization="max"',
            stacklevel=3,
        )


def sigma_weight(sigma: Float[Tensor, " b"], *, sigma_max: float = 1.0, power: float = 0.0) -> Float[Tensor, " b"]:
    """Weight of a sample by its noise level: ``(1 - sigma)^power where sigma <= sigma_max, else 0`` (docs/adr/0023).

    Near sigma = 1 the place of a subject is not decided yet, so a map cannot be right about it.

    Args:
        sigma: Noise levels in [0, 1]: 0 data, 1 noise.
        sigma_max: Noisier samples get no weight; in (0, 1].
        power: How fast the weight falls with noise; 0 is constant, 1 the share of signal.

    Raises:
        ValueError: A number is out of range.

    >>> sigma_weight(torch.tensor([0.0, 0.5, 0.9]), sigma_max=0.8, power=1.0).tolist()
    [1.0, 0.5, 0.0]
    """
    require_tensor(sigma=sigma)
    numeric = all(isinstance(n, numbers.Real) and not isinstance(n, bool) for n in (sigma_max, power))
    if not numeric or not 0 < sigma_max <= 1 or not 0 <= power < math.inf:
        raise ValueError(f"sigma_max must be in (0, 1] and power at least 0, got {one_line((sigma_max, power))}")
    if not bool(((sigma >= 0) & (sigma <= 1)).all()):
        raise ValueError("sigma must lie in [0, 1], got values outside or NaN")
    return torch.where(sigma <= sigma_max, (1 - sigma) ** float(power), torch.zeros_like(sigma))
