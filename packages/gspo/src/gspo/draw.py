"""Samples without a stochastic step, for objectives that need none: any solver may draw, each sample from its own noise."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import check_function, check_whole, one_line
from gspo.inputs import Ids, as_ids, as_numbers, require_floating
from gspo.rollout import Rollout, VelocityFunction
from gspo.sde import FlowODE
from gspo.solver import solve_tail

Solver = Literal["dpm_solver_2m", "euler"]


def finished_samples(latents: Float[Tensor, "b ..."], index: Ids, *, num_function_evaluations: int = 0) -> Rollout:
    """A rollout of samples that anything has drawn (a pipeline, a data set, another program).

    Args:
        latents: Final latents, (b, ...).
        index: Prompt of each, (b,), as ``velocity_fn`` takes it.
        num_function_evaluations: What they cost, for the books.

    Raises:
        ValueError: Shapes do not match, or latents are not finite.

    >>> finished_samples(torch.zeros(2, 3), torch.tensor([0, 0])).trajectory
    ()
    """
    require_floating(latents=latents)
    check_whole(0, num_function_evaluations=num_function_evaluations)
    index = as_ids("index", index).to(latents.device)
    if latents.dim() < 2 or len(latents) == 0 or index.shape != latents.shape[:1]:
        raise ValueError(
            "latents must be (b, ...) with b at least 1 and index (b,), "
            f"got {tuple(latents.shape)} and {tuple(index.shape)}"
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents must be finite, got NaN or infinity")
    return Rollout(
        latents=latents,
        trajectory=(),
        log_prob_mean=torch.zeros(len(latents), 0, device=latents.device),
        index=index,
        num_function_evaluations=num_function_evaluations,
        sigma_max=1.0,
    )


def check_levels(sigmas: Float[Tensor, " t"]) -> list[float]:
    """The schedule as floats.

    Raises:
        ValueError: It does not fall strictly from at most 1 to at least 0.
    """
    numbers = as_numbers("sigmas", sigmas)
    levels = numbers.tolist() if numbers.dim() == 1 else []
    if len(levels) < 2 or not all(b < a for a, b in zip(levels[:-1], levels[1:], strict=True)):
        raise ValueError(f"sigmas must be strictly decreasing with at least 2 entries, got {levels}")
    if levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas must lie in [0, 1], got {levels}")
    return levels


@torch.no_grad()
def draw(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, " t"],
    *,
    group_size: int = 1,
    solver: Solver = "dpm_solver_2m",
    micro_batch_size: int | None = None,
) -> Rollout:
    """One sample from every row of ``noise``, by a deterministic solver.

    Args:
        velocity_fn: See `gspo.rollout`.
        noise: One start per sample (not per prompt: without noise on the way, equal starts give equal samples), (p * group_size, ...);
            the members of prompt p are rows p * group_size onwards.
        sigmas: Noise levels from 1 to 0, strictly decreasing, one more than steps.
        group_size: Members per prompt.
        solver: "dpm_solver_2m" (second order, arXiv 2211.01095) or "euler".
        micro_batch_size: Rows per call of ``velocity_fn``; None takes all.

    Raises:
        ValueError: Sizes do not fit, sigmas do not decrease, or a velocity is not finite or has another shape than the latents.
    """
    levels = check_levels(sigmas)
    require_floating(noise=noise)
    check_function(velocity_fn=velocity_fn)
    check_whole(1, group_size=group_size)
    if micro_batch_size is not None:
        check_whole(1, micro_batch_size=micro_batch_size)
    if noise.dim() < 2 or len(noise) == 0:
        raise ValueError(f"noise must be (b, ...) with b at least 1, got shape {tuple(noise.shape)}")
    if len(noise) % group_size:
        raise ValueError(f"group_size must divide the {len(noise)} rows of noise, got {group_size}")
    if solver not in ("dpm_solver_2m", "euler"):
        raise ValueError(f"solver must be 'dpm_solver_2m' or 'euler', got {one_line(solver)}")
    size, steps = micro_batch_size or len(noise), len(levels) - 1
    index = torch.arange(len(noise) // group_size, device=noise.device).repeat_interleave(group_size)
    parts = []
    for start in range(0, len(noise), size):
        x, rows = noise[start : start + size], index[start : start + size]
        if solver == "dpm_solver_2m":
            x, _ = solve_tail(velocity_fn, x, rows, levels, steps)
        else:
            for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
                velocity = velocity_fn(x, torch.full((len(x),), sigma, device=x.device), rows)
                x = FlowODE().step(x, velocity, sigma, sigma_next).next_latents
        parts.append(x)
    return finished_samples(torch.cat(parts), index, num_function_evaluations=len(noise) * steps)
