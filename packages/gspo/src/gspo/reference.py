"""Slow twins: plain Python loops over numbers, and the conventions of other code bases."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_velocity(
    x: Float[Tensor, "b ..."], sigma: float | Float[Tensor, " b"], mean: float, std: float
) -> Float[Tensor, "b ..."]:
    """The exact velocity of the flow to Gaussian data N(mean, std^2): ``E[noise - data | x]``.

        E[data | x] = mean + (1 - sigma) std^2 / ((1 - sigma)^2 std^2 + sigma^2) * (x - (1 - sigma) mean)
        velocity    = (x - E[data | x]) / sigma

    Args:
        x: Latents at sigma.
        sigma: In (0, 1], a number or (b,).
        mean: Of the data.
        std: Of the data.
    """
    s = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))
    gain = (1 - s) * std**2 / ((1 - s).square() * std**2 + s.square())
    return (x - mean - gain * (x - (1 - s) * mean)) / s


def flow_sde_step(
    x: float, v: float, sigma: float, sigma_next: float, noise_level: float, sigma_max: float
) -> tuple[float, float]:
    """Mean and std of Flow-GRPO's step for one element."""
    dt = sigma_next - sigma
    near, top = -dt / 4, sigma
    if sigma == 1:
        top = sigma_max
    elif 1 - sigma < near:
        top = min(sigma_max, sigma) if 1 - sigma_max >= near else sigma_next
    s = noise_level * math.sqrt(sigma / (1 - top))
    mean = x * (1 + s * s * dt / (2 * sigma)) + v * (1 + s * s * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * math.sqrt(-dt)


def flow_cps_step(x: float, v: float, sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float]:
    """Mean and std of Flow-CPS's step for one element."""
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    data, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * data + math.sqrt(sigma_next**2 - std**2) * noise, std


def dance_sde_step(x: float, v: float, sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Mean and std of Dance-GRPO's step for one element."""
    dt = sigma_next - sigma
    data = x - sigma * v
    return x + v * dt + 0.5 * eta**2 * ((x - (1 - sigma) * data) / sigma**2) * dt, eta * math.sqrt(-dt)


def log_prob(value: list[float], mean: list[float], std: float) -> float:
    """Gaussian log density, mean over elements."""
    terms = [
        -((a - b) ** 2) / (2 * std * std) - math.log(std) - 0.5 * math.log(2 * math.pi)
        for a, b in zip(value, mean, strict=True)
    ]
    return sum(terms) / len(terms)


def flow_cps_reference_log_prob(next_latents: Tensor, mean: Tensor) -> Tensor:
    """Flow-CPS's own "log-prob": ``-mean((next - mean)^2)``: ours times 2 std^2, without constants."""
    return -(next_latents - mean).square().flatten(1).mean(1)


def dance_reference_log_prob(next_latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Dance-GRPO's "log-prob": ours without ``-log std - log(2 pi) / 2``."""
    return -(next_latents - mean).square().flatten(1).mean(1) / (2 * std.square())


def group_advantages(rewards: list[float], group_ids: list[int], ddof: int = 0, eps: float = 1e-4) -> list[float]:
    """Advantages by loops."""
    result = []
    for reward, group in zip(rewards, group_ids, strict=True):
        members = [r for r, g in zip(rewards, group_ids, strict=True) if g == group]
        mean = sum(members) / len(members)
        std = math.sqrt(sum((m - mean) ** 2 for m in members) / (len(members) - ddof))
        result.append((reward - mean) / (std + eps))
    return result


def update_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    scale: Tensor,
    shift: Tensor,
    sequence: bool,
) -> Tensor:
    """The surrogate of all samples and steps in one graph: what `PolicyTrainer` accumulates a step at a time.

    ``scale`` and ``shift`` are GRPO-Guard's std and re-centring, 1 and 0 else. Returns the loss.
    """
    log_ratio = scale * (log_prob - old_log_prob + shift)
    ratio = log_ratio.mean(1, keepdim=True).exp() if sequence else log_ratio.exp()
    gain = advantages[:, None]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip_range, 1 + clip_range) * gain).mean()


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """GSPO's loss by loops over samples."""
    total = torch.zeros(())
    for i in range(len(advantages)):
        ratio = torch.exp((log_prob[i] - old_log_prob[i]).mean())
        clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
        total = total + torch.min(ratio * advantages[i], clipped * advantages[i])
    return -total / len(advantages)
