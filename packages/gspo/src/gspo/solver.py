"""A second-order solver for the deterministic steps after the window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _lambda(sigma: float) -> float:
    """Half log signal-to-noise ratio of the flow, ``log((1 - sigma) / sigma)``."""
    return math.log((1 - sigma) / sigma)


def dpm_solver_2m_step(
    x: Tensor, data: Tensor, previous: Tensor | None, sigma: float, sigma_next: float, sigma_previous: float | None
) -> Tensor:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) with alpha = 1 - sigma.

        h = lambda(sigma_next) - lambda(sigma),  r = (lambda(sigma) - lambda(sigma_previous)) / h
        D = (1 + 1/(2r)) data - 1/(2r) previous
        x_next = sigma_next / sigma * x - (1 - sigma_next) * (exp(-h) - 1) * D

    ``data = x - sigma * velocity`` is the predicted clean sample. The first step, and a step to sigma 0, are first order.
    """
    if sigma_next == 0:
        return data
    h = _lambda(sigma_next) - _lambda(sigma)
    direction = data
    if previous is not None and sigma_previous is not None and sigma_previous < 1:
        r = (_lambda(sigma) - _lambda(sigma_previous)) / h
        direction = data + (data - previous) / (2 * r)
    return sigma_next / sigma * x - (1 - sigma_next) * math.expm1(-h) * direction


def tail_sigmas(levels: Sequence[float], num_steps: int) -> list[float]:
    """``num_steps + 1`` of the given levels' range, spread evenly over the levels' index (so a shifted schedule stays shifted)."""
    position = torch.linspace(0, len(levels) - 1, num_steps + 1).tolist()
    return [
        levels[int(p)] + (p - int(p)) * (levels[min(int(p) + 1, len(levels) - 1)] - levels[int(p)]) for p in position
    ]


def solve_tail(
    velocity_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    index: Tensor,
    levels: Sequence[float],
    num_steps: int,
) -> tuple[Tensor, int]:
    """Integrates from ``levels[0]`` to ``levels[-1]`` in ``num_steps`` second-order steps; returns the result and the calls made."""
    if num_steps < 1:
        raise ValueError(f"tail_steps must be at least 1, got {num_steps}")
    grid = tail_sigmas(levels, num_steps)
    previous: Tensor | None = None
    before: float | None = None
    for sigma, sigma_next in zip(grid[:-1], grid[1:], strict=True):
        velocity = velocity_fn(x, torch.full((len(x),), sigma, device=x.device), index).float()
        data = x.float() - sigma * velocity
        x_next = dpm_solver_2m_step(x.float(), data, previous, sigma, sigma_next, before)
        previous, before, x = data, sigma, x_next.to(x.dtype)
    return x, num_steps
