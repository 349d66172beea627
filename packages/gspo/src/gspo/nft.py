"""DiffusionNFT: negative-aware fine-tuning on the forward process (arXiv 2509.16117)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import check_positive, one_line, require_kind, require_real, require_whole
from gspo.forward import ForwardPoint, NoiseLevels, forward_points, level_weight
from gspo.inputs import require_tensor
from gspo.points import RowLosses, check_velocities, mean_of_rest, reduce_rows
from gspo.rollout import Rollout
from gspo.sde import wide

NFTWeighting = Literal["none", "sigma", "sigma_squared", "self_normalized"]

SMALLEST_NORM = 1e-5


def optimality(advantages: Float[Tensor, "b ..."], *, advantage_clip: float = 5.0) -> Float[Tensor, "b ..."]:
    """``r = 1/2 + 1/2 clip(A / advantage_clip, -1, 1)``, a reward in [0, 1] (DiffusionNFT, arXiv 2509.16117, section 3).

    The paper writes ``(R - mean) / Z``; with group advantages, Z is ``advantage_clip`` standard deviations. NaN stays NaN.

    Args:
        advantages: (b,), or (b, n) with one per token.
        advantage_clip: Positive.

    >>> optimality(torch.tensor([-9.0, 0.0, 2.5]), advantage_clip=5.0).tolist()
    [0.0, 0.5, 0.75]
    """
    check_positive(advantage_clip=advantage_clip)
    require_tensor(advantages=advantages)
    return 0.5 + 0.5 * (advantages / float(advantage_clip)).clamp(-1, 1)


def nft_loss(
    velocity: Float[Tensor, "b ..."],
    old_velocity: Float[Tensor, "b ..."],
    target: Float[Tensor, "b ..."],
    reward: Float[Tensor, " b"] | Float[Tensor, "b n"],
    *,
    beta: float,
    sigma: Float[Tensor, " b"] | None = None,
    weighting: NFTWeighting = "none",
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117, section 3): a better and a worse policy share one network.

        v+ = (1 - beta) v_old + beta v,      v- = (1 + beta) v_old - beta v
        loss = r |v+ - target|^2 + (1 - r) |v- - target|^2            (|.|^2 is a mean over elements)

    At v = v_old the gradient is ``2 beta (2 r - 1) (v_old - target)``: towards the target at r = 1, none at 1/2, away from it at 0.
    At fixed r the optimum is ``v_old + (2 r - 1) (target - v_old) / beta``.

    "self_normalized" is the weighting of noise levels that the paper trains with: both squares are those of the predicted clean
    sample, divided by its mean absolute error, which is held constant, so that no noise level outweighs another:

        sigma^2 |v+ - target|^2 / stop_gradient(mean |sigma (v+ - target)|),    and the same for v-

    Args:
        velocity: v, of the policy, (b, ...), with gradients.
        old_velocity: v_old, of the policy that drew the samples; no gradient goes there.
        target: ``noise - data``.
        reward: r in [0, 1], one per row, or (b, n) with one per token of latents (b, n, ...); NaN leaves a row out. See `optimality`.
        beta: Positive. Small values take large steps: the optimum is 1 / beta times as far from v_old as the target is.
        sigma: Noise levels, (b,), for the weightings that need them.
        weighting: "none" (the theorem), "sigma", "sigma_squared" or "self_normalized".
        reduction: "mean" over what has a reward, or "none" for the reward's shape.

    Raises:
        ValueError: Shapes do not match, beta is not positive, a reward is outside [0, 1], or sigma is missing.

    >>> v, old, target = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]])
    >>> [nft_loss(v, old, target, torch.tensor([r]), beta=0.5).item() for r in (1.0, 0.5, 0.0)]
    [2.25, 4.25, 6.25]
    """
    check_velocities(reward, "reward", velocity, old_velocity=old_velocity, target=target)
    check_positive(beta=beta)
    known = torch.nan_to_num(reward.detach(), nan=0.5)
    if not bool(((known >= 0) & (known <= 1)).all()):
        raise ValueError(f"reward must be in [0, 1], got {float(known.min()):g} to {float(known.max()):g}")
    old = old_velocity.detach().float()
    step, back = float(beta) * (velocity.float() - old), old - target.float()
    plain = weighting != "self_normalized"
    weight = level_weight(sigma, weighting if plain else "sigma_squared", known)

    def squares(error: Tensor) -> Tensor:
        found = weight * mean_of_rest(error.square(), known)
        if plain:
            return found
        assert sigma is not None
        size = (sigma.float() * error.detach().abs().flatten(1).mean(1)).clamp_min(SMALLEST_NORM)
        return found / wide(size, found)

    losses = known * squares(back + step) + (1 - known) * squares(back - step)
    return reduce_rows(losses, reward, reduction)


@dataclass(frozen=True, kw_only=True)
class DecaySchedule:
    """How slowly the old policy follows: ``decay(i) = min(cap, rate * max(0, i - flat))`` (the paper's three schedules are such).

    ``old <- decay * old + (1 - decay) * policy`` after every iteration. At 0 training is on policy, near 1 the old policy hardly
    moves, which is stabler and slower.

    Attributes:
        flat: Iterations at 0.
        rate: Per iteration after that.
        cap: In [0, 1].
    """

    flat: int = 0
    rate: float = 0.001
    cap: float = 0.5

    def __post_init__(self) -> None:
        require_whole(self, 0, "flat")
        require_real(self, "rate", "cap")
        if not self.rate >= 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")
        if not 0 <= self.cap <= 1:
            raise ValueError(f"cap must be in [0, 1], got {self.cap}")

    def at(self, iteration: int) -> float:
        """The decay after this iteration.

        >>> schedule = DecaySchedule(flat=75, rate=0.0075, cap=0.999)
        >>> [round(schedule.at(i), 4) for i in (0, 75, 76, 1000)]
        [0.0, 0.0, 0.0075, 0.999]
        """
        return min(self.cap, self.rate * max(0, iteration - self.flat))


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT:
    """`nft_loss` as an objective of `ObjectiveTrainer`.

    The loss is scaled by ``advantage_clip / beta``, as the authors' code does: at the old policy its gradient is then that of the
    advantage-weighted matching loss, whatever beta is, so that learning rates carry over.

    Attributes:
        beta: See `nft_loss`.
        advantage_clip: See `optimality`.
        weighting: See `nft_loss`.
        levels: Noise levels to train at.
        schedule: How the old policy follows.
    """

    beta: float = 1.0
    advantage_clip: float = 5.0
    weighting: NFTWeighting = "self_normalized"
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    schedule: DecaySchedule = field(default_factory=DecaySchedule)

    def __post_init__(self) -> None:
        require_real(self, "beta", "advantage_clip")
        require_kind(self, levels=NoiseLevels, schedule=DecaySchedule)
        for name in ("beta", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weighting not in ("none", "sigma", "sigma_squared", "self_normalized"):
            raise ValueError(
                f"weighting must be 'none', 'sigma', 'sigma_squared' or 'self_normalized', got {one_line(self.weighting)}"
            )

    @property
    def needs_trajectory(self) -> bool:
        """Any solver may draw."""
        return False

    @property
    def silent_without_advantage(self) -> bool:
        """No: away from the old policy, r = 1/2 pulls back to it."""
        return False

    def points(self, rollout: Rollout, generator: torch.Generator | None) -> Sequence[ForwardPoint]:
        """The final samples at several noise levels."""
        return forward_points(rollout, self.levels, generator)

    def loss(self, velocity: Tensor, old_velocity: Tensor, point: ForwardPoint, advantages: Tensor) -> RowLosses:
        """`nft_loss` of `optimality`."""
        losses = nft_loss(
            velocity,
            old_velocity,
            point.target,
            optimality(advantages, advantage_clip=self.advantage_clip),
            beta=self.beta,
            sigma=point.sigma,
            weighting=self.weighting,
            reduction="none",
        )
        with torch.no_grad():
            drift = (velocity.float() - old_velocity.float()).square().flatten(1).mean(1)
            clipped = (advantages.abs() > self.advantage_clip).float().reshape(len(drift), -1).mean(1)
        return RowLosses(
            losses * (self.advantage_clip / self.beta), {"drift": drift, "advantage_clip_fraction": clipped}
        )

    def decay(self, iteration: int) -> float:
        """By the schedule."""
        return self.schedule.at(iteration)
