"""Advantage-weighted matching: the loss of pretraining, weighted by the advantage (arXiv 2509.25050)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import is_real, one_line, require_kind, require_real
from gspo.forward import ForwardPoint, NoiseLevels, Weighting, forward_points, level_weight
from gspo.points import RowLosses, check_velocities, mean_of_rest, reduce_rows
from gspo.rollout import Rollout


def matching_log_ratio(
    velocity: Float[Tensor, "b ..."],
    old_velocity: Float[Tensor, "b ..."],
    target: Float[Tensor, "b ..."],
    like: Tensor,
    *,
    sigma: Float[Tensor, " b"] | None = None,
    weighting: Weighting = "none",
) -> Tensor:
    """What stands for a log-ratio where there is no likelihood: the matching loss of the old policy minus that of the policy.

        l = w |v_old - target|^2 - w |v - target|^2 = w mean((v_old - v) (v + v_old - 2 target))     (without cancellation)

    Args:
        velocity: Of the policy, (b, ...), with gradients.
        old_velocity: Of the policy that drew the samples; no gradient goes there.
        target: ``noise - data``.
        like: A tensor of the wanted shape, (b,) or (b, n) for one per token.
        sigma: Noise levels, (b,).
        weighting: w, see `gspo.forward.level_weight`.
    """
    new, old = velocity.float(), old_velocity.detach().float()
    return level_weight(sigma, weighting, like) * mean_of_rest((old - new) * (new + old - 2 * target.float()), like)


def awm_loss(
    velocity: Float[Tensor, "b ..."],
    old_velocity: Float[Tensor, "b ..."],
    target: Float[Tensor, "b ..."],
    advantages: Float[Tensor, " b"] | Float[Tensor, "b n"],
    *,
    clip_range: float | None = None,
    sigma: Float[Tensor, " b"] | None = None,
    weighting: Weighting = "none",
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Advantage-weighted matching (AWM, arXiv 2509.25050): a policy gradient with the matching loss for the log-likelihood.

        ratio = exp(l),  l of `matching_log_ratio`
        loss = -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A),     or -ratio A without a clip range

    At v = v_old the gradient is that of ``A w |v - target|^2``: good samples are learnt, bad ones unlearnt.

    Args:
        velocity: Of the policy, (b, ...), with gradients.
        old_velocity: Of the policy that drew the samples; pass ``velocity.detach()`` on policy.
        target: ``noise - data``.
        advantages: (b,), or (b, n) with one per token of latents (b, n, ...); NaN leaves a row out.
        clip_range: In units of the ratio; None clips nothing.
        sigma: Noise levels, (b,).
        weighting: w, see `gspo.forward.level_weight`; "none" is the loss of pretraining.
        reduction: "mean" over what has an advantage, or "none" for the advantages' shape.

    Raises:
        ValueError: Shapes do not match, clip_range is not positive, or sigma is missing.

    >>> v = torch.tensor([[1.0]], requires_grad=True)
    >>> awm_loss(v, v.detach(), torch.tensor([[3.0]]), torch.tensor([2.0])).backward()
    >>> v.grad.item()  # 2 A (v - target)
    -8.0
    """
    check_velocities(advantages, "advantages", velocity, old_velocity=old_velocity, target=target)
    if clip_range is not None and not (is_real(clip_range) and clip_range > 0):
        raise ValueError(f"clip_range must be positive or None, got {one_line(clip_range)}")
    gain = torch.nan_to_num(advantages.detach().float())
    ratio = matching_log_ratio(velocity, old_velocity, target, gain, sigma=sigma, weighting=weighting).exp()
    terms = ratio * gain
    if clip_range is not None:
        terms = torch.minimum(terms, ratio.clamp(1 - float(clip_range), 1 + float(clip_range)) * gain)
    return reduce_rows(-terms, advantages, reduction)


@dataclass(frozen=True, kw_only=True)
class AdvantageWeightedMatching:
    """`awm_loss` as an objective of `ObjectiveTrainer`, on policy: the old policy is the one before the update.

    Attributes:
        clip_range: See `awm_loss`; it acts from the second inner epoch on.
        old_coef: Weight of ``|v - v_old|^2``, which holds the policy near the old one; 0 computes none.
        weighting: See `awm_loss`.
        levels: Noise levels to train at.
    """

    clip_range: float | None = None
    old_coef: float = 0.0
    weighting: Weighting = "none"
    levels: NoiseLevels = field(default_factory=NoiseLevels)

    def __post_init__(self) -> None:
        require_real(self, "clip_range", "old_coef")
        require_kind(self, levels=NoiseLevels)
        if self.clip_range is not None and not self.clip_range > 0:
            raise ValueError(f"clip_range must be positive or None, got {self.clip_range}")
        if not self.old_coef >= 0:
            raise ValueError(f"old_coef must not be negative, got {self.old_coef}")
        if self.weighting not in ("none", "sigma", "sigma_squared"):
            raise ValueError(f"weighting must be 'none', 'sigma' or 'sigma_squared', got {one_line(self.weighting)}")

    @property
    def needs_trajectory(self) -> bool:
        """Any solver may draw."""
        return False

    @property
    def silent_without_advantage(self) -> bool:
        """Yes, unless it is held near the old policy."""
        return self.old_coef == 0

    def points(self, rollout: Rollout, generator: torch.Generator | None) -> Sequence[ForwardPoint]:
        """The final samples at several noise levels."""
        return forward_points(rollout, self.levels, generator)

    def loss(self, velocity: Tensor, old_velocity: Tensor, point: ForwardPoint, advantages: Tensor) -> RowLosses:
        """`awm_loss`, and the distance to the old policy."""
        losses = awm_loss(
            velocity,
            old_velocity,
            point.target,
            advantages,
            clip_range=self.clip_range,
            sigma=point.sigma,
            weighting=self.weighting,
            reduction="none",
        )
        squares = (velocity.float() - old_velocity.float()).square()
        drift = squares.detach().flatten(1).mean(1)
        if self.old_coef:
            losses = losses + self.old_coef * reduce_rows(mean_of_rest(squares, advantages), advantages, "none")
        return RowLosses(losses, {"drift": drift})

    def decay(self, iteration: int) -> float:
        """On policy."""
        return 0.0
