"""Flow-DPPO: a mask on the divergence of two steps instead of a clip on their ratio (arXiv 2606.11025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gspo.checks import is_real, one_line, require_kind, require_real
from gspo.credit import token_log_ratio
from gspo.inputs import require_tensor
from gspo.objective import gaussian_kl
from gspo.points import RowLosses, mean_of_rest, reduce_rows
from gspo.ratio import gaussian_log_ratio
from gspo.rollout import Rollout, WindowStep
from gspo.sde import Kernel


class WindowPoint(NamedTuple):
    """One stochastic step of a rollout, to be scored again.

    Attributes:
        step: As it was drawn.
        kernel: That drew it.
        sigma_max: What stood for sigma == 1.
    """

    step: WindowStep
    kernel: Kernel
    sigma_max: float

    @property
    def latents(self) -> Float[Tensor, "b ..."]:
        """Before the step."""
        return self.step.latents

    @property
    def levels(self) -> Float[Tensor, " b"]:
        """See `gspo.points.Point`."""
        return torch.full((len(self.latents),), self.step.sigma, device=self.latents.device)

    def rows(self, rows: Tensor, device: torch.device) -> WindowPoint:
        """See `gspo.points.Point`."""
        there = rows.to(self.latents.device)
        names = ("latents", "next_latents", "mean", "std", "log_prob_mean")
        chosen = {name: getattr(self.step, name)[there].to(device) for name in names}
        return self._replace(step=self.step._replace(**chosen))


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    """(b,) as (b, 1) beside (b, t); what has that shape already stays."""
    return rows.reshape(*rows.shape, *[1] * (like.dim() - rows.dim()))


def kl_mask(
    log_ratio: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    advantages: Tensor,
    *,
    threshold: float,
) -> Bool[Tensor, "b ..."]:
    """Which terms stay in the policy gradient (Flow-DPPO, arXiv 2606.11025, the asymmetric divergence mask).

        D = mean over elements of (mean - old_mean)^2 / (2 std^2)            [nats per element: KL of the two Gaussians]
        away = (A > 0 and log_ratio > 0) or (A < 0 and log_ratio < 0)
        keep = not (away and D > threshold)

    A ratio is one noisy sample of how far two policies are apart; for Gaussian steps D says it exactly, from means that a rollout
    holds anyway. A step that is too far is still corrected, never pushed further.

    Args:
        log_ratio: (b,) of one step, or (b, t).
        mean: Of the policy, (b, ...) or (b, t, ...).
        old_mean: Of the policy that drew the samples, same shape.
        std: Of the steps, (b,) or (b, t).
        advantages: (b,), or (b, n) with log-ratios (b, n) per token of means (b, n, ...): then D is the token's own.
        threshold: In nats per element, not negative.

    Returns:
        True for what stays, in the shape of log_ratio.

    Raises:
        ValueError: Shapes do not match or threshold is negative.

    >>> old, new, std = torch.zeros(3, 2), torch.full((3, 2), 0.1), torch.ones(3)
    >>> kl_mask(torch.tensor([0.1, -0.1, 0.1]), new, old, std, torch.tensor([1.0, 1.0, -1.0]), threshold=1e-3).tolist()
    [False, True, True]
    """
    if not (is_real(threshold) and threshold >= 0):
        raise ValueError(f"threshold must not be negative, got {one_line(threshold)}")
    require_tensor(log_ratio=log_ratio, mean=mean, old_mean=old_mean, std=std, advantages=advantages)
    shape = log_ratio.shape
    if log_ratio.dim() not in (1, 2) or mean.shape != old_mean.shape or mean.shape[: len(shape)] != shape:
        raise ValueError(
            f"mean and old_mean must be (b, ...) or (b, t, ...) for log_ratio {tuple(shape)}, "
            f"got {tuple(mean.shape)} and {tuple(old_mean.shape)}"
        )
    for name, tensor in (("std", std), ("advantages", advantages)):
        if tensor.shape not in (shape, shape[:1]):
            raise ValueError(f"{name} must be {tuple(shape[:1])} or {tuple(shape)}, got {tuple(tensor.shape)}")
    squares = mean_of_rest((mean.detach() - old_mean.detach()).float().square(), log_ratio)
    divergence = squares / _beside(2 * std.float().square(), squares)
    away = torch.nan_to_num(_beside(advantages, log_ratio)) * log_ratio.detach() > 0
    return ~(away & (divergence > float(threshold)))


def masked_surrogate_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    keep: Bool[Tensor, "b ..."],
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """``-mean(keep exp(log_ratio) A)``: the unclipped policy gradient of what `kl_mask` keeps.

    Args:
        log_ratio: (b,) or (b, t), with gradients.
        advantages: (b,), or the shape of log_ratio; NaN leaves a row out.
        keep: In the shape of log_ratio.
        reduction: "mean" over all that has an advantage (masked or not), or "none".

    >>> masked_surrogate_loss(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.tensor([True, False])).item()
    -0.5
    """
    require_tensor(log_ratio=log_ratio, advantages=advantages, keep=keep)
    if keep.dtype != torch.bool:
        raise ValueError(f"keep must be boolean, as kl_mask returns it, got {keep.dtype}")
    if keep.shape != log_ratio.shape or advantages.shape not in (log_ratio.shape, log_ratio.shape[:1]):
        raise ValueError(
            f"keep must have the shape of log_ratio {tuple(log_ratio.shape)} and advantages be (b,) or that shape, "
            f"got {tuple(keep.shape)} and {tuple(advantages.shape)}"
        )
    gain = _beside(advantages.detach(), log_ratio).expand_as(log_ratio)
    terms = torch.where(keep, log_ratio.exp() * torch.nan_to_num(gain), torch.zeros_like(log_ratio))
    return reduce_rows(-terms, gain, reduction)


@dataclass(frozen=True, kw_only=True)
class FlowDPPO:
    """`kl_mask` as an objective of `ObjectiveTrainer`: step ratios of a rollout's window, masked by their divergence.

    Attributes:
        threshold: See `kl_mask`. The paper's order of magnitude is 1e-6 to 1e-5 for pictures.
        kernel: The kernel that drew the rollout; None where the rollout says so itself.
    """

    threshold: float = 1e-5
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        require_real(self, "threshold")
        if self.kernel is not None:
            require_kind(self, kernel=Kernel)
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}")

    @property
    def needs_trajectory(self) -> bool:
        """Densities of stochastic steps."""
        return True

    @property
    def silent_without_advantage(self) -> bool:
        """The loss is proportional to the advantage."""
        return True

    def points(self, rollout: Rollout, generator: torch.Generator | None) -> Sequence[WindowPoint]:
        """The window's steps; nothing is drawn."""
        kernel = self.kernel or getattr(rollout, "kernel", None)
        if kernel is None:
            raise ValueError(
                "kernel must be given to FlowDPPO where the rollout does not say which one drew it, got None"
            )
        return [WindowPoint(step, kernel, rollout.sigma_max) for step in rollout.trajectory]

    def loss(self, velocity: Tensor, old_velocity: Tensor, point: WindowPoint, advantages: Tensor) -> RowLosses:
        """`masked_surrogate_loss` of `kl_mask`."""
        step = point.step
        out = point.kernel.step(
            step.latents,
            velocity,
            step.sigma,
            step.sigma_next,
            next_latents=step.next_latents,
            sigma_max=point.sigma_max,
        )
        ratio_of = gaussian_log_ratio if advantages.dim() == 1 else token_log_ratio
        log_ratio = ratio_of(step.next_latents, out.mean, step.mean, out.std)
        keep = kl_mask(log_ratio, out.mean, step.mean, out.std, advantages, threshold=self.threshold)
        losses = masked_surrogate_loss(log_ratio, advantages, keep, reduction="none")
        divergence = gaussian_kl(out.mean.detach(), step.mean, out.std)
        masked = 1 - keep.float().reshape(len(divergence), -1).mean(1)
        return RowLosses(losses, {"divergence": divergence, "mask_fraction": masked})

    def decay(self, iteration: int) -> float:
        """On policy."""
        return 0.0
