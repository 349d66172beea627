"""The clipped surrogate objective and the KL to a reference policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class SurrogateLoss(NamedTuple):
    """A loss and what to watch beside it (all scalars; only ``loss`` carries a gradient).

    Attributes:
        loss: ``-mean(min(ratio * A, clip(ratio) * A))``.
        clip_fraction: Share of entries whose gradient the clip removes.
        approx_kl: ``mean(ratio - 1 - log ratio)``, an estimate of KL(old || new) that is never negative (k3).
        ratio_mean: Mean ratio; 1 on policy.
        ratio_std: Spread of the ratio; 0 on policy.
    """

    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]
    ratio_mean: Float[Tensor, ""]
    ratio_std: Float[Tensor, ""]


def clipped_surrogate_loss(
    ratio: Float[Tensor, " b"] | Float[Tensor, "b t"], advantages: Float[Tensor, " b"], clip_range: float
) -> SurrogateLoss:
    """``-mean(min(r A, clip(r, 1 - clip_range, 1 + clip_range) A))`` (PPO, arXiv 1707.06347, Eq. 7).

    Args:
        ratio: Sequence ratios (b,) or step ratios (b, t).
        advantages: One per sample; NaN marks a sample that is left out.
        clip_range: beta > 0, in units of the ratio.

    Raises:
        ValueError: Shapes do not match or clip_range is not positive.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    if ratio.dim() not in (1, 2) or advantages.shape != ratio.shape[:1]:
        raise ValueError(f"advantages must be (b,) for ratio {tuple(ratio.shape)}, got {tuple(advantages.shape)}")
    keep = torch.isfinite(advantages)
    if not bool(keep.any()):
        zero = (ratio * 0).sum()
        return SurrogateLoss(zero, *[torch.zeros_like(zero.detach()) for _ in range(4)])
    ratio, gain = ratio[keep], advantages[keep].to(ratio.dtype)
    gain = gain if ratio.dim() == 1 else gain[:, None].expand_as(ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * gain, clipped * gain).mean()
    with torch.no_grad():
        removed = ((gain > 0) & (ratio > 1 + clip_range)) | ((gain < 0) & (ratio < 1 - clip_range))
        return SurrogateLoss(
            loss,
            removed.float().mean(),
            (ratio - 1 - ratio.log()).mean(),
            ratio.mean(),
            ratio.std(correction=0),
        )


def gaussian_kl(
    mean: Float[Tensor, "b ..."], reference_mean: Float[Tensor, "b ..."], std: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """KL of two Gaussians with equal std, ``mean over elements of (mean - reference_mean)^2 / (2 std^2)``, (b,) nats per element."""
    if mean.shape != reference_mean.shape:
        raise ValueError(
            f"reference_mean must have the shape of mean {tuple(mean.shape)}, got {tuple(reference_mean.shape)}"
        )
    if std.shape != mean.shape[:1]:
        raise ValueError(f"std must be (b,) = ({mean.shape[0]},), got {tuple(std.shape)}")
    return (mean - reference_mean).float().square().flatten(1).mean(1) / (2 * std.float().square())
