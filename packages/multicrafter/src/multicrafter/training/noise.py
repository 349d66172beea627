"""The same noise for a sample on whatever rank and device it lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gspo import SDEStep
from gspo.sde import Kernel
from torch import Tensor


@dataclass(frozen=True)
class SlicedNoise:
    """A kernel that draws the noise of all ``count`` samples on the CPU and uses this rank's ``rows``.

    So every rank's generator moves on alike, and samples do not depend on how they are spread.

    Attributes:
        kernel: Does the step.
        rows: This rank's samples among all, (b,).
        count: Samples over all ranks.
    """

    kernel: Kernel
    rows: Tensor
    count: int

    def step(
        self,
        latents: Tensor,
        velocity: Tensor,
        sigma: float | Tensor,
        sigma_next: float | Tensor,
        *,
        next_latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        sigma_max: float | None = None,
    ) -> SDEStep:
        """See `gspo.FlowSDE.step`."""
        levels: dict[str, Any] = {"sigma_max": sigma_max}
        if next_latents is None:
            noise = torch.randn(self.count, *latents.shape[1:], generator=generator)[self.rows].to(latents.device)
            # scored at any point, a step still tells its mean and std
            step = self.kernel.step(latents, velocity, sigma, sigma_next, next_latents=latents, **levels)
            std = step.std.reshape(-1, *[1] * (latents.dim() - 1))
            next_latents = (step.mean.detach() + std * noise).to(latents.dtype)
        return self.kernel.step(latents, velocity, sigma, sigma_next, next_latents=next_latents, **levels)
