"""The forward process: finished samples, noised to chosen levels. No likelihood and no stochastic sampler is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import one_line, require_real, require_whole
from gspo.inputs import require_tensor
from gspo.rollout import Rollout
from gspo.sde import wide

Sampling = Literal["uniform", "logit_normal"]
Weighting = Literal["none", "sigma", "sigma_squared"]


def noised(
    latents: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """``(1 - sigma) * latents + sigma * noise`` (rectified flow, arXiv 2209.03003).

    >>> noised(torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([0.25])).tolist()
    [[1.5]]
    """
    if noise.shape != latents.shape or sigma.shape != latents.shape[:1]:
        raise ValueError(
            f"noise must have the shape of latents {tuple(latents.shape)} and sigma be ({len(latents)},), "
            f"got {tuple(noise.shape)} and {tuple(sigma.shape)}"
        )
    return torch.lerp(latents, noise, wide(sigma.to(latents.dtype), latents))


class ForwardPoint(NamedTuple):
    """Finished samples, noised anew: where objectives of the forward process want the velocity.

    Attributes:
        latents: ``(1 - sigma) * data + sigma * noise``, (b, ...).
        sigma: Noise levels, (b,) in (0, 1).
        target: ``noise - data``, the velocity of the straight line through both, (b, ...).
    """

    latents: Float[Tensor, "b ..."]
    sigma: Float[Tensor, " b"]
    target: Float[Tensor, "b ..."]

    @property
    def levels(self) -> Float[Tensor, " b"]:
        """See `gspo.points.Point`."""
        return self.sigma

    def rows(self, rows: Tensor, device: torch.device) -> ForwardPoint:
        """See `gspo.points.Point`."""
        return ForwardPoint(*(tensor[rows].to(device) for tensor in self))


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """Which noise levels an objective of the forward process is trained at.

    Every sample gets ``count`` levels, one from each of ``count`` equal strata of the distribution, which covers the range better than
    independent draws and leaves their mean distribution as it is:

        u = (i + uniform) / count,    i = 0 ... count - 1
        uniform:       sigma = low + (high - low) u
        logit_normal:  sigma = low + (high - low) / (1 + exp(-(mean + std * Phi^-1(u))))      (SD3, arXiv 2403.03206, section 3.1)
        then           sigma = shift sigma / (1 + (shift - 1) sigma)                          (section 5.3.2, m/n for shift)

    Attributes:
        count: Levels per sample and update.
        sampling: "uniform" or "logit_normal".
        low: Lowest level before the shift, in [0, 1).
        high: Highest level before the shift, in (low, 1].
        mean: Of the logit; only for "logit_normal".
        std: Of the logit, positive.
        shift: Above 1 towards noise; 1 is none.
    """

    count: int = 2
    sampling: Sampling = "uniform"
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        require_whole(self, 1, "count")
        require_real(self, "low", "high", "mean", "std", "shift")
        if self.sampling not in ("uniform", "logit_normal"):
            raise ValueError(f"sampling must be 'uniform' or 'logit_normal', got {one_line(self.sampling)}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high must be 0 <= low < high <= 1, got {self.low} and {self.high}")
        for name in ("std", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def draw(self, num_samples: int, generator: torch.Generator | None = None) -> Float[Tensor, "t b"]:
        """``(count, num_samples)`` levels in (0, 1), on the generator's device.

        >>> NoiseLevels(count=4).draw(100, torch.Generator().manual_seed(0)).amax(1).lt(torch.tensor([0.26, 0.51, 0.76, 1.01])).tolist()
        [True, True, True, True]
        """
        device = torch.device("cpu") if generator is None else generator.device
        uniform = torch.rand(self.count, num_samples, generator=generator, device=device)
        u = (torch.arange(self.count, device=device)[:, None] + uniform) / self.count
        edge = 1e-4  # neither clean nor pure noise: there a velocity is not defined or not learnt
        u = u.clamp(edge, 1 - edge)
        if self.sampling == "logit_normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        sigma = self.low + (self.high - self.low) * u
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


def forward_points(rollout: Rollout, levels: NoiseLevels, generator: torch.Generator | None) -> list[ForwardPoint]:
    """The rollout's final samples at ``levels.count`` noise levels each, with fresh noise; latents in the rollout's dtype, targets in fp32."""
    data = rollout.latents.float()
    where = data.device if generator is None else generator.device
    points = []
    for sigma in levels.draw(len(data), generator).to(data.device):
        noise = torch.randn(data.shape, generator=generator, device=where).to(data.device)
        latents = noised(data, noise, sigma).to(rollout.latents.dtype)
        points.append(ForwardPoint(latents, sigma, noise - data))
    return points


def level_weight(sigma: Float[Tensor, " b"] | None, weighting: str, like: Tensor) -> Tensor:
    """How much a noise level counts: 1 ("none"), sigma, or sigma^2 ("sigma_squared": the error of the predicted clean sample).

    Since ``x - sigma v`` predicts the clean sample, ``sigma^2 |v - target|^2`` is the squared error of that prediction.

    Raises:
        ValueError: An unknown weighting, or one that needs sigma without it.
    """
    if weighting == "none":
        return torch.ones((), device=like.device)
    if weighting not in ("sigma", "sigma_squared"):
        raise ValueError(f"weighting must be one of 'none', 'sigma' and 'sigma_squared', got {one_line(weighting)}")
    if not isinstance(sigma, Tensor) or sigma.shape != like.shape[:1]:
        got = tuple(sigma.shape) if isinstance(sigma, Tensor) else one_line(sigma)
        raise ValueError(f"sigma must be ({len(like)},) for weighting {weighting!r}, got {got}")
    require_tensor(sigma=sigma)
    if not bool((sigma >= 0).all()):
        raise ValueError("sigma must hold noise levels of at least 0, got NaN or a negative one")
    level = wide(sigma.float(), like)
    return level if weighting == "sigma" else level.square()
