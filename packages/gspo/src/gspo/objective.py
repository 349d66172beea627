"""The clipped surrogate objective and the KL to a reference policy."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import is_real, one_line
from gspo.inputs import Numbers, as_numbers, require_tensor

ClipRange = float | tuple[float, float]
"""How far a ratio may go from 1: the same both ways, or (below, above)."""

Reduction = Literal["mean", "sum", "none"]


class SurrogateLoss(NamedTuple):
    """A loss and what to watch beside it (only ``loss`` carries a gradient).

    Attributes:
        loss: ``-mean(min(ratio * A, clip(ratio) * A))``, a scalar; with reduction "none" in the ratio's shape.
        clip_fraction: Share of entries whose gradient the clip removes.
        approx_kl: ``mean(ratio - 1 - log ratio)``, an estimate of KL(old || new) that is never negative (k3).
        ratio_mean: Mean ratio; 1 on policy.
        ratio_std: Spread of the ratio; 0 on policy.
    """

    loss: Float[Tensor, "..."]
    clip_fraction: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]
    ratio_mean: Float[Tensor, ""]
    ratio_std: Float[Tensor, ""]


def clip_bounds(clip_range: ClipRange) -> tuple[float, float]:
    """The smallest and largest ratio that are not clipped.

    Raises:
        ValueError: It is no positive number, nor two.

    >>> clip_bounds(0.25), clip_bounds((0.25, 0.5))
    ((0.75, 1.25), (0.75, 1.5))
    """
    pair = tuple(clip_range) if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
    found = [float(x) for x in pair if is_real(x) and x > 0]
    if len(pair) != 2 or len(found) != 2:
        raise ValueError(f"clip_range must be a positive number or two (below, above), got {one_line(clip_range)}")
    return 1 - found[0], 1 + found[1]


def clipped_surrogate_loss(
    ratio: Float[Tensor, " b"] | Float[Tensor, "b t"],
    advantages: Numbers,
    clip_range: ClipRange,
    *,
    step_weights: Float[Tensor, " t"] | None = None,
    sample_weights: Numbers | None = None,
    max_advantage: float | None = None,
    reduction: Reduction = "mean",
) -> SurrogateLoss:
    """``-mean(w min(r A, clip(r, 1 - low, 1 + high) A))`` (PPO, arXiv 1707.06347, Eq. 7; w = 1 by default).

    Args:
        ratio: Sequence ratios (b,) or step ratios (b, t), in fp32 or fp64.
        advantages: One per sample; NaN marks a sample that is left out. 0 is a sample like others.
        clip_range: In units of the ratio; one number, or (low, high).
        step_weights: Weights of the steps, for step ratios (GRPO-Guard, see `guard_step_weights`).
        sample_weights: Weights of the samples, (b,), such as the importance of a rollout that another policy drew; the mean stays one
            over samples, not over weights.
        max_advantage: Advantages are clipped to [-max_advantage, max_advantage].
        reduction: "mean" and "sum" over samples (and steps) that are not left out, or "none": then the loss has the ratio's shape, 0
            where a sample is left out.

    Raises:
        ValueError: Shapes do not match, clip_range is not positive, or the ratio is in half precision, which rounds it to 1.

    >>> clipped_surrogate_loss(torch.tensor([1.5, 0.5]), torch.tensor([1.0, 1.0]), 0.2).loss.item()
    -0.8500000238418579
    >>> clipped_surrogate_loss(torch.tensor([1.5, 0.5]), [1, -1], (0.2, 0.25), reduction="none").loss.tolist()
    [-1.25, 0.800000011920929]
    """
    low, high = clip_bounds(clip_range)
    gains, weights = _check(ratio, advantages, step_weights, sample_weights, max_advantage, reduction)
    keep = torch.isfinite(gains)
    if not bool(keep.any()):
        zero = ratio[keep].sum() + (torch.zeros_like(ratio) if reduction == "none" else 0.0)
        return SurrogateLoss(zero, *[torch.zeros((), device=ratio.device, dtype=ratio.dtype) for _ in range(4)])
    kept, gain = ratio[keep], gains[keep]
    gain = gain if ratio.dim() == 1 else gain[:, None].expand_as(kept)
    terms = torch.minimum(kept * gain, kept.clamp(low, high) * gain)
    terms = terms if step_weights is None else terms * step_weights.to(terms)
    if weights is not None:
        terms = terms * (weights[keep] if ratio.dim() == 1 else weights[keep, None])
    if reduction == "none":
        loss = torch.zeros_like(ratio)
        loss[keep] = -terms
    else:
        loss = -(terms.mean() if reduction == "mean" else terms.sum())
    with torch.no_grad():
        removed = ((gain > 0) & (kept > high)) | ((gain < 0) & (kept < low))
        return SurrogateLoss(
            loss, removed.float().mean(), (kept - 1 - kept.log()).mean(), kept.mean(), kept.std(correction=0)
        )


def _check(
    ratio: Tensor,
    advantages: Numbers,
    step_weights: Tensor | None,
    sample_weights: Numbers | None,
    max_advantage: float | None,
    reduction: str,
) -> tuple[Tensor, Tensor | None]:
    """Advantages and sample weights as tensors like the ratio, or one sentence."""
    require_tensor(ratio=ratio)
    if ratio.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"ratio must be float32 or float64 (half precision rounds it to 1), got {ratio.dtype}")
    gains = as_numbers("advantages", advantages).to(ratio)
    if ratio.dim() not in (1, 2) or gains.shape != ratio.shape[:1]:
        raise ValueError(f"advantages must be (b,) for ratio {tuple(ratio.shape)}, got {tuple(gains.shape)}")
    if step_weights is not None:
        require_tensor(step_weights=step_weights)
        if ratio.dim() != 2 or step_weights.shape != ratio.shape[1:] or not _are_weights(step_weights):
            raise ValueError(
                f"step_weights must be (t,) for step ratios (b, t), finite and not negative, "
                f"got {one_line(step_weights)} for {tuple(ratio.shape)}"
            )
    weights = None if sample_weights is None else as_numbers("sample_weights", sample_weights).to(ratio)
    if weights is not None and (weights.shape != gains.shape or not _are_weights(weights)):
        raise ValueError(
            f"sample_weights must be (b,) = {tuple(gains.shape)}, finite and not negative, got {one_line(weights)}"
        )
    if max_advantage is not None:
        if not (is_real(max_advantage) and max_advantage > 0):
            raise ValueError(f"max_advantage must be positive or None, got {one_line(max_advantage)}")
        most = float(max_advantage)
        gains = torch.where(torch.isfinite(gains), gains.clamp(-most, most), gains)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {one_line(reduction)}")
    return gains, weights


def _are_weights(values: Tensor) -> bool:
    return bool((torch.isfinite(values) & (values >= 0)).all())


def guard_step_weights(sigma: Float[Tensor, " t"], sigma_next: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """GRPO-Guard's gradient re-weighting (arXiv 2510.22319): ``w_t`` proportional to ``1 / (sigma_t - sigma_{t+1})``, mean 1.

    >>> guard_step_weights(torch.tensor([1.0, 0.75]), torch.tensor([0.75, 0.25])).tolist()
    [1.3333333730697632, 0.6666666865348816]
    """
    require_tensor(sigma=sigma, sigma_next=sigma_next)
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
    require_tensor(mean=mean, reference_mean=reference_mean, std=std)
    if mean.shape != reference_mean.shape:
        raise ValueError(
            f"reference_mean must have the shape of mean {tuple(mean.shape)}, got {tuple(reference_mean.shape)}"
        )
    if std.shape != mean.shape[:1]:
        raise ValueError(f"std must be (b,) = ({mean.shape[0]},), got {tuple(std.shape)}")
    return (mean.float() - reference_mean.float()).square().flatten(1).mean(1) / (2 * std.float().square())
