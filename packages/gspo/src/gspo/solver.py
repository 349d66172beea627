"""A second-order solver for the deterministic steps after the window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.inputs import require_tensor


def _lambda(sigma: float) -> float:
    """Half log signal-to-noise ratio of the flow, ``log((1 - sigma) / sigma)``."""
    return math.log((1 - sigma) / sigma)


def dpm_solver_2m_step(
    x: Float[Tensor, "b ..."],
    data: Float[Tensor, "b ..."],
    previous: Float[Tensor, "b ..."] | None,
    sigma: float,
    sigma_next: float,
    sigma_previous: float | None,
) -> Float[Tensor, "b ..."]:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) with alpha = 1 - sigma.

        h = lambda(sigma_next) - lambda(sigma),  r = (lambda(sigma) - lambda(sigma_previous)) / h
        D = (1 + 1/(2r)) data - 1/(2r) previous
        x_next = sigma_next / sigma * x - (1 - sigma_next) * (exp(-h) - 1) * D

    The first step, and a step from sigma 1 or to sigma 0, are first order.

    Args:
        x: Latents at sigma.
        data: The predicted clean sample there, ``x - sigma * velocity``.
        previous: The predicted clean sample of the step before, if there was one.
        sigma: Where x is.
        sigma_next: Where to go, below sigma.
        sigma_previous: Where ``previous`` was predicted.
    """
    if sigma_next == 0:
        return data
    if sigma >= 1:
        return x + (sigma_next - sigma) * (x - data) / sigma
    h = _lambda(sigma_next) - _lambda(sigma)
    direction = data
    if previous is not None and sigma_previous is not None and sigma_previous < 1:
        r = (_lambda(sigma) - _lambda(sigma_previous)) / h
        direction = data + (data - previous) / (2 * r)
    return sigma_next / sigma * x - (1 - sigma_next) * math.expm1(-h) * direction


def tail_sigmas(levels: Sequence[float], num_steps: int) -> list[float]:
    """``num_steps + 1`` of the given levels' range, spread evenly over the levels' index (so a shifted schedule stays shifted).

    >>> tail_sigmas([0.5, 0.25, 0.125, 0.0], 2)
    [0.5, 0.1875, 0.0]
    """
    if num_steps < 1:
        raise ValueError(f"tail_steps must be at least 1, got {num_steps}")
    position = torch.linspace(0, len(levels) - 1, num_steps + 1).tolist()
    return [
        levels[int(p)] + (p - int(p)) * (levels[min(int(p) + 1, len(levels) - 1)] - levels[int(p)]) for p in position
    ]


def solve_tail(
    velocity_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Float[Tensor, "b ..."],
    index: Int[Tensor, " b"],
    levels: Sequence[float],
    num_steps: int,
) -> tuple[Float[Tensor, "b ..."], int]:
    """Integrates from ``levels[0]`` to ``levels[-1]`` in ``num_steps`` second-order steps; returns the result and the calls made.

    Raises:
        ValueError: num_steps < 1, or the velocity is not finite or has another shape than the latents.
    """
    grid = tail_sigmas(levels, num_steps)
    previous: Tensor | None = None
    before: float | None = None
    for sigma, sigma_next in zip(grid[:-1], grid[1:], strict=True):
        velocity = velocity_fn(x, torch.full((len(x),), sigma, device=x.device), index)
        require_tensor(velocity=velocity)
        velocity = velocity.float()
        if velocity.shape != x.shape or not bool(torch.isfinite(velocity).all()):
            raise ValueError(
                f"velocity must be finite, of the shape of latents {tuple(x.shape)}, got shape {tuple(velocity.shape)}"
                + ("" if velocity.shape != x.shape else " with NaN or infinity")
            )
        data = x.float() - sigma * velocity
        x_next = dpm_solver_2m_step(x.float(), data, previous, sigma, sigma_next, before)
        previous, before, x = data, sigma, x_next.to(x.dtype)
    return x, num_steps
