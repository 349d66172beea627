"""One stochastic step of a flow model, and the exact Gaussian log density of its outcome.

sigma runs from 1 (noise) to 0 (data), ``dt = sigma_next - sigma < 0`` and ``velocity = noise - data``. In every kernel the mean
is linear in latents and velocity, so a kernel is three numbers a step, its `coefficients` (a, b, std), and all share

    mean = a * latents + b * velocity,      next = mean + std * z,   z standard normal
    log_prob_mean = -mean over elements of (next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2     [nats per element]
    log_prob_sum  = the same, summed over elements                                                   [nats]

in fp32 whatever the input's dtype. These are full log densities for every kernel. Code bases that drop terms differ: Dance-GRPO
leaves out ``-log std - log(2 pi) / 2`` (a constant), Flow-CPS also the factor ``1 / (2 std^2)`` (so its clip ranges are in other
units): see `gspo.reference`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import check_real, require_real
from gspo.inputs import as_numbers, require_floating, require_tensor

LOG_TWO_PI = math.log(2 * math.pi)

Coefficients = tuple[Tensor, Tensor, Tensor]


class SDEStep(NamedTuple):
    """Outcome of one step.

    Attributes:
        next_latents: The drawn (or given) sample, (b, ...) in the input's dtype.
        mean: Mean of the Gaussian, (b, ...) fp32.
        std: Standard deviation of the whole step, (b,) fp32.
        log_prob_mean: Log density, mean over elements, (b,) fp32 nats per element.
        log_prob_sum: Log density, summed over elements, (b,) fp32 nats.
    """

    next_latents: Float[Tensor, "b ..."]
    mean: Float[Tensor, "b ..."]
    std: Float[Tensor, " b"]
    log_prob_mean: Float[Tensor, " b"]
    log_prob_sum: Float[Tensor, " b"]


class ODEStep(NamedTuple):
    """Outcome of a step without noise, which has no density.

    Attributes:
        next_latents: The next (or given) latents, (b, ...) in the input's dtype.
        mean: The same in fp32.
        std: 0, (b,) fp32.
        log_prob_mean: None.
        log_prob_sum: None.
    """

    next_latents: Float[Tensor, "b ..."]
    mean: Float[Tensor, "b ..."]
    std: Float[Tensor, " b"]
    log_prob_mean: None = None
    log_prob_sum: None = None


@runtime_checkable
class Kernel(Protocol):
    """What a rollout needs of a stochastic kernel. One that also takes ``noise=`` can be given a rollout's ``step_noise``."""

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


def wide(row: Float[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """One number per row, shaped to multiply ``like``."""
    return row.reshape(-1, *[1] * (like.dim() - 1))


def gaussian_log_prob(
    value: Float[Tensor, "b ..."], mean: Float[Tensor, "b ..."], std: Float[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Log density of N(mean, std^2 I) at ``value``: mean over elements and sum, both (b,) fp32.

    >>> mean, total = gaussian_log_prob(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1))
    >>> round(mean.item(), 4), round(total.item(), 4)
    (-0.9189, -2.7568)
    """
    require_tensor(value=value, mean=mean, std=std)
    if value.shape != mean.shape or std.shape != mean.shape[:1]:
        raise ValueError(
            f"value and mean must share a shape (b, ...) and std be (b,), got {tuple(value.shape)}, {tuple(mean.shape)} and {tuple(std.shape)}"
        )
    squares = torch.nn.functional.mse_loss(value.float(), mean.float(), reduction="none").flatten(1)
    log_prob_mean = -squares.mean(1) / (2 * std.square()) - std.log() - 0.5 * LOG_TWO_PI
    return log_prob_mean, log_prob_mean * squares.shape[1]


def _levels(name: str, value: float | Tensor, latents: Tensor) -> Tensor:
    """``value`` in fp64, (1,) or (b,), on the CPU: checking a number there never waits for a device, and not every device has fp64."""
    given: Any = value if hasattr(value, "__len__") or hasattr(value, "dtype") else [value]
    row = as_numbers(name, given).cpu().double()
    if row.dim() > 1 or (row.dim() == 1 and row.shape[0] not in (1, latents.shape[0])):
        raise ValueError(
            f"{name} must be a number or have one entry per row ({latents.shape[0]}), got shape {tuple(row.shape)}"
        )
    return row.reshape(-1)


def _check_shapes(latents: Tensor, velocity: Tensor, next_latents: Tensor | None) -> None:
    require_tensor(velocity=velocity)
    if next_latents is not None:
        require_tensor(next_latents=next_latents)
    if latents.dim() < 2:
        raise ValueError(f"latents must have a batch axis and at least one more, got shape {tuple(latents.shape)}")
    for name, tensor in (("velocity", velocity), ("next_latents", next_latents)):
        if tensor is not None and tensor.shape != latents.shape:
            raise ValueError(f"{name} must have the shape of latents {tuple(latents.shape)}, got {tuple(tensor.shape)}")


def _check_levels(sigma: Tensor, sigma_next: Tensor) -> None:
    if not bool((sigma_next < sigma).all()):
        raise ValueError(f"sigma_next must be below sigma, got {sigma_next.tolist()} after {sigma.tolist()}")
    if not bool(((sigma <= 1) & (sigma_next >= 0)).all()):
        raise ValueError(f"sigma and sigma_next must lie in [0, 1], got {sigma.tolist()} and {sigma_next.tolist()}")


def _require_finite(summary: Tensor, **tensors: Tensor | None) -> None:
    """Raises for the first tensor that is not finite, and looks at them only if ``summary``, which depends on all, is not."""
    if bool(torch.isfinite(summary).all()):
        return
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    raise ValueError("the step's outcome must be finite, got an overflow of fp32 from finite latents and velocity")


class _Stochastic(ABC):
    """Checks, fp32, drawing and log densities around a kernel's `coefficients`."""

    @abstractmethod
    def coefficients(self, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None = None) -> Coefficients:
        """``(a, b, std)`` of ``next ~ N(a * latents + b * velocity, std^2)``, each with sigma's shape."""

    def _doubt(self, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> str | None:
        """What a user should be told about such a step."""
        return None

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
        noise: Float[Tensor, "b ..."] | None = None,
    ) -> SDEStep:
        """Draws the next latents, or scores ``next_latents`` if given: bit-equal log-probs either way.

        Args:
            latents: Current latents, (b, ...).
            velocity: Predicted velocity (noise - data), same shape.
            sigma: Current noise level, a number or (b,), in (0, 1].
            sigma_next: Next noise level, below sigma and above 0.
            next_latents: A stored sample to score instead of drawing one.
            generator: Source of randomness for the draw, on any device.
            sigma_max: Stands for sigma where sigma is 1, or all but 1 (FlowSDE only).
            noise: Standard normal noise to draw with, of the latents' shape, in place of the generator's.

        Raises:
            ValueError: Shapes differ, sigmas do not decrease or leave (0, 1], or an input is not finite.
        """
        require_floating(latents=latents)
        if noise is not None:
            require_tensor(noise=noise)
        _check_shapes(latents, velocity, next_latents)
        levels, levels_next = _levels("sigma", sigma, latents), _levels("sigma_next", sigma_next, latents)
        _check_levels(levels, levels_next)
        if not bool((levels_next > 0).all()):
            raise ValueError(
                "sigma_next must be positive in a stochastic step (the last step's density explodes), "
                f"got {levels_next.tolist()}"
            )
        found = self.coefficients(levels, levels_next, sigma_max)
        if doubt := self._doubt(levels, levels_next, found[2]):
            warnings.warn(doubt, stacklevel=2)
        rows = latents.shape[0]
        a, b, std = (c.to(latents.device, torch.float32).expand(rows).contiguous() for c in found)
        mean = (latents.float() * wide(a, latents)).addcmul_(velocity.float(), wide(b, latents))
        if next_latents is None:
            if noise is None:
                where = mean.device if generator is None else generator.device
                noise = torch.randn(mean.shape, generator=generator, device=where, dtype=torch.float32)
            elif noise.shape != mean.shape:
                raise ValueError(f"noise must have the shape of latents {tuple(mean.shape)}, got {tuple(noise.shape)}")
            noise = noise.to(mean)
            next_latents = torch.addcmul(mean.detach(), noise, wide(std, mean)).to(latents.dtype)
        log_probs = gaussian_log_prob(next_latents, mean, std)
        _require_finite(log_probs[0], velocity=velocity, latents=latents, next_latents=next_latents, noise=noise)
        return SDEStep(next_latents, mean, std, *log_probs)


@dataclass(frozen=True)
class FlowSDE(_Stochastic):
    """Flow-GRPO's SDE (arXiv 2505.05470, Eq. 9).

        s    = noise_level * sqrt(sigma / (1 - sigma))
        mean = x * (1 + s^2 dt / (2 sigma)) + v * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
        std  = s * sqrt(-dt)

    Where sigma == 1 the denominator 1 - sigma uses ``sigma_max`` (the reference takes the schedule's second sigma); without it,
    sigma_next. So it does where sigma is all but 1: where ``1 - sigma < (sigma - sigma_next) / 4``, as at the first step of schedulers
    that start at .999999 (UniPC) or .999 (DPM-Solver), the formula would draw a hundred times too much.

    Attributes:
        noise_level: a > 0; 0.7 in the paper.
        kind: Its name in `KERNELS`, so that a configuration written as plain data says which kernel it has.
    """

    noise_level: float = 0.7
    kind: str = field(default="flow_sde", init=False, repr=False)

    def __post_init__(self) -> None:
        require_real(self, "noise_level")
        if not self.noise_level > 0:
            raise ValueError(f"noise_level must be positive, got {self.noise_level}")

    def coefficients(self, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None = None) -> Coefficients:
        """``(a, b, std)`` of the class's equation."""
        check_real("sigma_max", sigma_max.item() if isinstance(sigma_max, Tensor) else sigma_max)
        if sigma_max is not None and not 0 < sigma_max < 1:
            raise ValueError(f"sigma_max must be in (0, 1), got {sigma_max}")
        dt = sigma_next - sigma
        s = self.noise_level * (sigma / (1 - _below_one(sigma, sigma_next, sigma_max))).sqrt()
        half = s.square() / (2 * sigma)
        return 1 + half * dt, (1 + half * (1 - sigma)) * dt, s * (-dt).sqrt()

    def _doubt(self, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> str | None:
        """A step that draws more noise than the latents hold leaves the flow: few steps, or a schedule that stays close to 1."""
        if not bool((std > 1.25 * sigma).any()):
            return None
        row = int((std / sigma).argmax())
        at, after, drawn = (float(c.expand_as(std)[row]) for c in (sigma, sigma_next, std))
        return (
            f"FlowSDE draws noise of std {drawn:.2f} from sigma {at:.4g} to {after:.4g}, more than the latents hold: take more steps, a "
            f"noise_level below {self.noise_level}, or FlowCPS"
        )


def _below_one(sigma: Tensor, sigma_next: Tensor, sigma_max: float | None) -> Tensor:
    """sigma, or what stands for it where it is 1 or, measured by the step, all but 1."""
    reach = (sigma - sigma_next) / 4
    top = sigma_next if sigma_max is None else torch.full_like(sigma, sigma_max)
    # a stand-in that is itself all but 1 helps nobody, unless sigma is 1 and the caller asks for it
    nearly = torch.where(1 - top < reach, sigma_next, torch.minimum(top, sigma))
    return torch.where(sigma >= 1, top, torch.where(1 - sigma < reach, nearly, sigma))


@dataclass(frozen=True)
class FlowCPS(_Stochastic):
    """Coefficient-preserving sampling (Flow-CPS, arXiv 2509.05952): the outcome holds exactly sigma_next of noise.

        std  = sigma_next * sin(noise_level * pi / 2)
        mean = (1 - sigma_next) * (x - sigma v) + sqrt(sigma_next^2 - std^2) * (x + (1 - sigma) v)

    Keeps the marginals inside a small window only: docs/adr/0011-flow-cps-window.md.

    Attributes:
        noise_level: In (0, 1]; at 1 all noise is fresh.
        kind: See `FlowSDE`.
    """

    noise_level: float = 0.8
    kind: str = field(default="flow_cps", init=False, repr=False)

    def __post_init__(self) -> None:
        require_real(self, "noise_level")
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"noise_level must be in (0, 1], got {self.noise_level}")

    def coefficients(self, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None = None) -> Coefficients:
        """``(a, b, std)`` of the class's equation, sorted by x and v."""
        angle = self.noise_level * math.pi / 2
        data, noise = 1 - sigma_next, sigma_next * math.cos(angle)
        return data + noise, noise * (1 - sigma) - data * sigma, sigma_next * math.sin(angle)


@dataclass(frozen=True)
class DanceSDE(_Stochastic):
    """Dance-GRPO's SDE with constant noise (arXiv 2505.07818; MixGRPO uses it too).

        std  = eta * sqrt(-dt)
        mean = x + v dt + eta^2 / 2 * ((x - (1 - sigma) (x - sigma v)) / sigma^2) * dt

    Attributes:
        eta: Noise per unit of sigma, > 0.
        kind: See `FlowSDE`.
    """

    eta: float = 0.3
    kind: str = field(default="dance_sde", init=False, repr=False)

    def __post_init__(self) -> None:
        require_real(self, "eta")
        if not self.eta > 0:
            raise ValueError(f"eta must be positive, got {self.eta}")

    def coefficients(self, sigma: Tensor, sigma_next: Tensor, sigma_max: float | None = None) -> Coefficients:
        """``(a, b, std)`` of the class's equation, sorted by x and v."""
        dt = sigma_next - sigma
        half = 0.5 * self.eta**2 / sigma
        return 1 + half * dt, (1 + half * (1 - sigma)) * dt, self.eta * (-dt).sqrt()


KERNELS: Mapping[str, type[FlowSDE | FlowCPS | DanceSDE]] = {
    "flow_sde": FlowSDE,
    "flow_cps": FlowCPS,
    "dance_sde": DanceSDE,
}
"""The stochastic kernels by their ``kind``."""


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
    ) -> ODEStep:
        """One Euler step; a given ``next_latents`` is returned as it is."""
        require_floating(latents=latents)
        levels, levels_next = _levels("sigma", sigma, latents), _levels("sigma_next", sigma_next, latents)
        _check_shapes(latents, velocity, next_latents)
        _check_levels(levels, levels_next)
        dt = (levels_next - levels).to(device=latents.device, dtype=torch.float32).expand(len(latents))
        mean = torch.addcmul(latents.float(), velocity.float(), wide(dt, latents))
        _require_finite(mean.detach().sum(), velocity=velocity, latents=latents)
        drawn = mean.to(latents.dtype) if next_latents is None else next_latents
        return ODEStep(drawn, mean, torch.zeros_like(dt))
