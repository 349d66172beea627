"""A velocity that is never NaN: what is not finite is replaced and counted, so that all ranks can skip the step together."""

from __future__ import annotations

import torch
from torch import Tensor

from gspo.rollout import VelocityFunction


class FiniteVelocity:
    """``velocity_fn`` with 0 where it is NaN or infinite.

    A rank that raised alone would leave the others waiting. It draws on instead, and whoever uses it looks at ``num_broken`` (over all
    ranks) before it believes the samples.

    Attributes:
        num_broken: Calls so far whose velocity was not finite.

    >>> velocity = FiniteVelocity(lambda x, sigma, index: x / 0)
    >>> velocity(torch.ones(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.long)).tolist(), velocity.num_broken
    ([[0.0, 0.0]], 1)
    """

    def __init__(self, velocity_fn: VelocityFunction) -> None:
        """Wraps a policy."""
        self.velocity_fn, self.num_broken = velocity_fn, 0

    def __call__(self, latents: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        """See `gspo.rollout.VelocityFunction`."""
        velocity = self.velocity_fn(latents, sigma, index)
        finite = torch.isfinite(velocity)
        if bool(finite.all()):
            return velocity
        self.num_broken += 1
        return torch.where(finite, velocity, torch.zeros_like(velocity))
