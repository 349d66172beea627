"""The knobs of the optimizer that both stages have: AdamW, the learning rate's schedule, and at which noise levels stage 1 trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.checks import check_finite


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); whether its states take 32 or 8 bits is `ExecutionConfig.optimizer`.

    Attributes:
        betas: Decay of the running means of gradient and squared gradient, each in [0, 1).
        eps: Added to the root of the second.
        weight_decay: Decoupled, per step and unit of learning rate.
    """

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise UserError(f"eps must be positive, got {self.eps}")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps of a stage.

    Attributes:
        warmup_steps: Steps in which it rises to its peak; 0 starts there.
        decay: "linear" or "cosine" to zero at the last step, or "constant".
    """

    warmup_steps: int = 20
    decay: Literal["linear", "cosine", "constant"] = "linear"

    def __post_init__(self) -> None:
        check_finite(self)
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps must not be negative, got {self.warmup_steps}")


def learning_rate(config: ScheduleConfig, peak: float, index: int, num_steps: int) -> float:
    """Learning rate of step ``index`` (from 0) of ``num_steps``.

        lr = peak * min(1, (index + 1) / warmup_steps) * decay(index / num_steps)

    >>> [round(learning_rate(ScheduleConfig(warmup_steps=2), 1.0, i, 4), 3) for i in range(4)]
    [0.5, 0.75, 0.5, 0.25]
    """
    warm = min(1.0, (index + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = index / num_steps
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[config.decay]
    return peak * warm * left


@dataclass(frozen=True, kw_only=True)
class SigmaSamplingConfig:
    """At which noise levels stage 1 trains: logit-normal, then shifted (arXiv 2403.03206, sections 3.1 and 5.3.2).

    Attributes:
        mean: Of the logit; above 0 prefers noise.
        std: Of the logit.
        shift: Factor by which ``sigma / (1 - sigma)`` grows, for larger pictures; 1 changes nothing.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("std", "shift"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")


def sample_sigma(config: SigmaSamplingConfig, count: int, generator: torch.Generator) -> Float[Tensor, " b"]:
    """Noise levels in (0, 1), one per sample.

        s = sigmoid(mean + std * z),   z ~ N(0, 1);   sigma = shift * s / (1 + (shift - 1) * s)

    >>> sigma = sample_sigma(SigmaSamplingConfig(mean=2.0, std=1e-6), 2, torch.Generator().manual_seed(0))
    >>> [round(s, 3) for s in sigma.tolist()]
    [0.881, 0.881]
    """
    s = torch.sigmoid(config.mean + config.std * torch.randn(count, generator=generator))
    return config.shift * s / (1 + (config.shift - 1) * s)
