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
    ratio: Float[Tensor, " b"] | Float[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    clip_range: float,
    *,
    step_weights: Float[Tensor, " t"] | None = None,
) -> SurrogateLoss:
    """``-mean(w min(r A, clip(r, 1 - clip_range, 1 + clip_range) A))`` (PPO, arXiv 1707.06347, Eq. 7; w = 1 by default).

    Args:
        ratio: Sequence ratios (b,) or step ratios (b, t).
        advantages: One per sample; NaN marks a sample that is left out.
        clip_range: beta > 0, in units of the ratio.
        step_weights: Weights of the steps, for step ratios (GRPO-Guard, see `guard_step_weights`).

    Raises:
        ValueError: Shapes do not match or clip_range is not positive.

    >>> clipped_surrogate_loss(torch.tensor([1.5, 0.5]), torch.tensor([1.0, 1.0]), 0.2).loss.item()
    -0.8500000238418579
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    if ratio.dim() not in (1, 2) or advantages.shape != ratio.shape[:1]:
        raise ValueError(f"advantages must be (b,) for ratio {tuple(ratio.shape)}, got {tuple(advantages.shape)}")
    if step_weights is not None and (ratio.dim() != 2 or step_weights.shape != ratio.shape[1:]):
        raise ValueError(
            f"step_weights must be (t,) for step ratios (b, t), got {tuple(step_weights.shape)} for {tuple(ratio.shape)}"
        )
    keep = torch.isfinite(advantages)
    if not bool(keep.any()):
        zero = (ratio * 0).sum()
        return SurrogateLoss(zero, *[torch.zeros_like(zero.detach()) for _ in range(4)])
    ratio, gain = ratio[keep], advantages[keep].to(ratio.dtype)
    gain = gain if ratio.dim() == 1 else gain[:, None].expand_as(ratio)
    terms = torch.minimum(ratio * gain, ratio.clamp(1 - clip_range, 1 + clip_range) * gain)
    loss = -(terms if step_weights is None else terms * step_weights.to(terms)).mean()
    with torch.no_grad():
        removed = ((gain > 0) & (ratio > 1 + clip_range)) | ((gain < 0) & (ratio < 1 - clip_range))
        return SurrogateLoss(
            loss,
            removed.float().mean(),
            (ratio - 1 - ratio.log()).mean(),
            ratio.mean(),
            ratio.std(correction=0),
        )


def guard_step_weights(sigma: Float[Tensor, " t"], sigma_next: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """GRPO-Guard's gradient re-weighting (arXiv 2510.22319): ``w_t`` proportional to ``1 / (sigma_t - sigma_{t+1})``, mean 1.

    >>> guard_step_weights(torch.tensor([1.0, 0.75]), torch.tensor([0.75, 0.25])).tolist()
    [1.3333333730697632, 0.6666666865348816]
    """
    if sigma.shape != sigma_next.shape or not bool((sigma_next < sigma).all()):
        raise ValueError(f"sigma_next must be below sigma, got {sigma_next.tolist()} after {sigma.tolist()}")
    weights = 1 / (sigma - sigma_next)
    return weights / weights.mean()


def gaussian_kl(
    mean: Float[Tensor, "b ..."], reference_mean: Float[Tensor, "b ..."], std: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """KL of two Gaussians with equal std: ``mean over elements of (mean - reference_mean)^2 / (2 std^2)``.

    Args:
        mean: Of the policy, (b, ...).
        reference_mean: Of the reference policy, from the same latents.
        std: Of the whole step (with the factor sqrt(-dt)), (b,).

    Returns:
        (b,) nats per element.

    >>> gaussian_kl(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([0.5])).item()
    2.0
    """
    if mean.shape != reference_mean.shape:
        raise ValueError(
            f"reference_mean must have the shape of mean {tuple(mean.shape)}, got {tuple(reference_mean.shape)}"
        )
    if std.shape != mean.shape[:1]:
        raise ValueError(f"std must be (b,) = ({mean.shape[0]},), got {tuple(std.shape)}")
    return (mean - reference_mean).float().square().flatten(1).mean(1) / (2 * std.float().square())
