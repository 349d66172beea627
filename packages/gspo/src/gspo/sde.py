"""One stochastic step of a flow model, and the exact Gaussian log density of its outcome.

sigma runs from 1 (noise) to 0 (data), ``dt = sigma_next - sigma < 0`` and ``velocity = noise - data``. Every kernel draws
``next = mean + std * z`` with a standard normal z and returns, in fp32 whatever the input's dtype,

    log_prob_mean = mean over elements of  -(next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2     [nats per element]
    log_prob_sum  = the same, summed                                                                  [nats]

These are full log densities for every kernel; code bases that drop the constants or the variance (Flow-CPS, Dance-GRPO)
differ from them by a constant, respectively by the factor 1 / (2 std^2): see `gspo.reference`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

LOG_TWO_PI = math.log(2 * math.pi)


class SDEStep(NamedTuple):
    """Outcome of one step.

    Attributes:
        next_latents: The drawn (or given) sample, (b, ...) in the input's dtype.
        mean: Mean of the Gaussian, (b, ...) fp32.
        std: Standard deviation of the whole step, (b,) fp32; 0 for the ODE.
        log_prob_mean: Log density, mean over elements, (b,) fp32 nats per element; None for the ODE.
        log_prob_sum: Log density, summed over elements, (b,) fp32 nats; None for the ODE.
    """

    next_latents: Float[Tensor, "b ..."]
    mean: Float[Tensor, "b ..."]
    std: Float[Tensor, " b"]
    log_prob_mean: Float[Tensor, " b"] | None
    log_prob_sum: Float[Tensor, " b"] | None


class Kernel(Protocol):
    """What a rollout needs of a kernel."""

    def step(
        self,
        latents: Float[Tensor, "b ..."],
        velocity: Float[Tensor, "b ..."],
        sigma: float | Float[Tensor, " b"],
        sigma_next: float | Float[Tensor, " b"],
        *,
        next_latents: Float[Tensor, "b ..."] | None = None,
        generator: torch.Generator | None = None,
        sigma_max: float | None = None,
    ) -> SDEStep:
        """Draws the next latents, or scores the given ones."""
        ...


def gaussian_log_prob(
    value: Float[Tensor, "b ..."], mean: Float[Tensor, "b ..."], std: Float[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Log density of N(mean, std^2 I) at ``value``: mean over elements and sum, both (b,) fp32."""
    spread = std.reshape(-1, *[1] * (value.dim() - 1))
    squares = ((value.float() - mean) / spread).square().flatten(1)
    log_prob_mean = -0.5 * squares.mean(1) - std.log() - 0.5 * LOG_TWO_PI
    return log_prob_mean, log_prob_mean * squares.shape[1]


def _per_row(name: str, value: float | Tensor, latents: Tensor) -> Tensor:
    row = torch.as_tensor(value, dtype=torch.float32, device=latents.device)
    if row.dim() > 1 or (row.dim() == 1 and row.shape[0] not in (1, latents.shape[0])):
        raise ValueError(
            f"{name} must be a number or have one entry per row ({latents.shape[0]}), got shape {tuple(row.shape)}"
        )
    return row.expand(latents.shape[0])


def _check(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> None:
    if latents.shape != velocity.shape:
        raise ValueError(f"velocity must have the shape of latents {tuple(latents.shape)}, got {tuple(velocity.shape)}")
    if latents.dim() < 2:
        raise ValueError(f"latents must have a batch axis and at least one more, got shape {tuple(latents.shape)}")
    if not bool((sigma_next < sigma).all()):
        raise ValueError(f"sigma_next must be below sigma, got {sigma_next.tolist()} after {sigma.tolist()}")
    if not bool(((sigma <= 1) & (sigma_next >= 0)).all()):
        raise ValueError(f"sigma and sigma_next must lie in [0, 1], got {sigma.tolist()} and {sigma_next.tolist()}")
    if not bool(torch.isfinite(velocity).all()):
        raise ValueError("velocity must be finite, got NaN or infinity")


def _finish(
    latents: Tensor, mean: Tensor, std: Tensor, next_latents: Tensor | None, generator: torch.Generator | None
) -> SDEStep:
    if next_latents is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=torch.float32)
        next_latents = (mean.detach() + std.reshape(-1, *[1] * (mean.dim() - 1)) * noise).to(latents.dtype)
    elif next_latents.shape != mean.shape:
        raise ValueError(
            f"next_latents must have the shape of latents {tuple(mean.shape)}, got {tuple(next_latents.shape)}"
        )
    return SDEStep(next_latents, mean, std, *gaussian_log_prob(next_latents, mean, std))


def _require_noise(sigma_next: Tensor) -> None:
    if not bool((sigma_next > 0).all()):
        raise ValueError(
            f"sigma_next must be positive in a stochastic step (the last step's density explodes), got {sigma_next.tolist()}"
        )


class _Stochastic(ABC):
    """Checks, fp32 and log densities around a kernel's `moments`."""

    @abstractmethod
    def moments(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None
    ) -> tuple[Tensor, Tensor]:
        """Mean (b, ...) and standard deviation (b,) of the step, all in fp32."""

    def step(
        self,
        latents: Float[Tensor, "b ..."],
        velocity: Float[Tensor, "b ..."],
        sigma: float | Float[Tensor, " b"],
        sigma_next: float | Float[Tensor, " b"],
        *,
        next_latents: Float[Tensor, "b ..."] | None = None,
        generator: torch.Generator | None = None,
        sigma_max: float | None = None,
    ) -> SDEStep:
        """Draws the next latents, or scores ``next_latents`` if given.

        Args:
            latents: Current latents, (b, ...).
            velocity: Predicted velocity (noise - data), same shape.
            sigma: Current noise level, a number or (b,), in (0, 1].
            sigma_next: Next noise level, below sigma and above 0.
            next_latents: A stored sample to score instead of drawing one.
            generator: Source of randomness for the draw.
            sigma_max: Stands for sigma where sigma == 1 (FlowSDE only).

        Raises:
            ValueError: Shapes differ, sigmas do not decrease or leave (0, 1], or the velocity is not finite.
        """
        s, s_next = _per_row("sigma", sigma, latents), _per_row("sigma_next", sigma_next, latents)
        _check(latents, velocity, s, s_next)
        _require_noise(s_next)
        mean, std = self.moments(latents.float(), velocity.float(), s, s_next, sigma_max)
        return _finish(latents, mean, std, next_latents, generator)


def _wide(row: Tensor, like: Tensor) -> Tensor:
    return row.reshape(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class FlowSDE(_Stochastic):
    """Flow-GRPO's SDE (arXiv 2505.05470, Eq. 9).

        s    = noise_level * sqrt(sigma / (1 - sigma))
        mean = x * (1 + s^2 dt / (2 sigma)) + v * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
        std  = s * sqrt(-dt)

    Where sigma == 1 the denominator 1 - sigma uses ``sigma_max`` (the reference takes the schedule's second sigma);
    without it, sigma_next.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if not self.noise_level > 0:
            raise ValueError(f"noise_level must be positive, got {self.noise_level}")

    def moments(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the step."""
        top = sigma_next if sigma_max is None else torch.full_like(sigma, sigma_max)
        safe = torch.where(sigma >= 1, top, sigma)
        dt = sigma_next - sigma
        s = self.noise_level * (sigma / (1 - safe)).sqrt()
        half = s.square() / (2 * sigma)
        mean = x * _wide(1 + half * dt, x) + v * _wide((1 + half * (1 - sigma)) * dt, x)
        return mean, s * (-dt).sqrt()


@dataclass(frozen=True)
class FlowCPS(_Stochastic):
    """Coefficient-preserving sampling (Flow-CPS, arXiv 2509.05952): the outcome holds exactly sigma_next of noise.

    std  = sigma_next * sin(noise_level * pi / 2)
    mean = (1 - sigma_next) * (x - sigma v) + sqrt(sigma_next^2 - std^2) * (x + (1 - sigma) v)
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"noise_level must be in (0, 1], got {self.noise_level}")

    def moments(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the step."""
        angle = self.noise_level * math.pi / 2
        std, kept = sigma_next * math.sin(angle), sigma_next * math.cos(angle)
        data, noise = x - _wide(sigma, x) * v, x + _wide(1 - sigma, x) * v
        return _wide(1 - sigma_next, x) * data + _wide(kept, x) * noise, std


@dataclass(frozen=True)
class DanceSDE(_Stochastic):
    """Dance-GRPO's SDE with constant noise (arXiv 2505.07818; MixGRPO uses it too).

    std  = eta * sqrt(-dt)
    mean = x + v dt + eta^2 / 2 * ((x - (1 - sigma) (x - sigma v)) / sigma^2) * dt
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"eta must be positive, got {self.eta}")

    def moments(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the step."""
        dt, s = _wide(sigma_next - sigma, x), _wide(sigma, x)
        score_like = (x - (1 - s) * (x - s * v)) / s.square()
        mean = x + v * dt + 0.5 * self.eta**2 * score_like * dt
        return mean, self.eta * (sigma - sigma_next).sqrt()


@dataclass(frozen=True)
class FlowODE:
    """The probability-flow ODE, ``next = x + v dt``: no noise, no log density."""

    def step(
        self,
        latents: Float[Tensor, "b ..."],
        velocity: Float[Tensor, "b ..."],
        sigma: float | Float[Tensor, " b"],
        sigma_next: float | Float[Tensor, " b"],
        *,
        next_latents: Float[Tensor, "b ..."] | None = None,
        generator: torch.Generator | None = None,
        sigma_max: float | None = None,
    ) -> SDEStep:
        """One Euler step; a given ``next_latents`` is returned as it is."""
        s, s_next = _per_row("sigma", sigma, latents), _per_row("sigma_next", sigma_next, latents)
        _check(latents, velocity, s, s_next)
        mean = latents.float() + _wide(s_next - s, latents) * velocity.float()
        drawn = mean.to(latents.dtype) if next_latents is None else next_latents
        return SDEStep(drawn, mean, torch.zeros_like(s), None, None)
