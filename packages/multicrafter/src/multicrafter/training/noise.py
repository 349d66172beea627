"""Until 0.3: what `gspo.shared_noise` does now."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from gspo import SDEStep
from gspo.sde import Kernel
from torch import Tensor


@dataclass(frozen=True)
class SlicedNoise:
    """A kernel that draws the noise of all ``count`` samples on the CPU and uses this rank's ``rows``."""

    kernel: Kernel
    rows: Tensor
    count: int

    def __post_init__(self) -> None:
        warnings.warn(
            "multicrafter.training.noise.SlicedNoise is now gspo.shared_noise; the old name leaves with multicrafter 0.3",
            DeprecationWarning,
            stacklevel=3,
        )

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
        given: dict[str, Any] = {"next_latents": next_latents, "sigma_max": sigma_max}
        if next_latents is None:
            given["noise"] = torch.randn(self.count, *latents.shape[1:], generator=generator)[self.rows].to(
                latents.device
            )
        return self.kernel.step(latents, velocity, sigma, sigma_next, **given)
