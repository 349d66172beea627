"""Stored samples under the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.ratio import RatioKind, gaussian_log_ratio, guarded_log_ratio
from gspo.rollout import Hook, Rollout, VelocityFunction, WindowStep
from gspo.sde import Kernel


class Rescored(NamedTuple):
    """The window's steps under the current policy.

    Attributes:
        log_prob_mean: Log densities of the stored samples, (b, t), nats per element.
        mean: Of the Gaussians, (b, t, ...).
        std: Of the steps, (b, t).
        log_ratio: To the old policy, (b, t), nats per element, without cancellation (`gaussian_log_ratio`).
        old_mean: Of the old policy's Gaussians, (b, t, ...).
    """

    log_prob_mean: Float[Tensor, "b t"]
    mean: Float[Tensor, "b t ..."]
    std: Float[Tensor, "b t"]
    log_ratio: Float[Tensor, "b t"]
    old_mean: Float[Tensor, "b t ..."]


def rescore(
    velocity_fn: VelocityFunction,
    rollout: Rollout,
    kernel: Kernel | None = None,
    *,
    steps: Sequence[int] | None = None,
    rows: Int[Tensor, " r"] | None = None,
    replay: Hook | None = None,
) -> Rescored:
    """Scores the stored samples with the current policy, by the code path that drew them.

    Args:
        velocity_fn: The current policy.
        rollout: Stored trajectory.
        kernel: The kernel that drew it; by default the rollout says so.
        steps: Positions in the window to score; all by default.
        rows: Rows of the rollout to score; all by default, then as they were drawn, without copies.
        replay: Called with the position in the window and the rows; the velocity is computed inside the context manager it returns
            (an MoE policy replays its routing there).

    Raises:
        ValueError: The kernel is another than the rollout's, or the rollout does not say which it was.
    """
    kernel = kernel_of(rollout, kernel)
    positions = range(len(rollout.trajectory)) if steps is None else steps
    scored = [_step(velocity_fn, rollout, kernel, position, rows, replay) for position in positions]
    if len(scored) == 1:
        return Rescored(*(part.unsqueeze(1) for part in scored[0]))
    return Rescored(*(torch.stack(parts, 1) for parts in zip(*scored, strict=True)))


def _step(
    velocity_fn: VelocityFunction,
    rollout: Rollout,
    kernel: Kernel,
    position: int,
    rows: Tensor | None,
    replay: Hook | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Rescored` of one step, without its axis."""
    kept, device = rollout.trajectory[position], rollout.latents.device
    chosen = None if rows is None else rows.to(kept.latents.device)
    tensors = (kept.latents, kept.next_latents, kept.mean)
    x, x_next, old_mean = ((t if chosen is None else t[chosen]).to(device) for t in tensors)
    index = rollout.index if rows is None else rollout.index[rows]
    everything = torch.arange(len(x), device=device) if rows is None else rows
    with replay(position, everything) if replay else nullcontext():
        velocity = velocity_fn(x, torch.full((len(x),), kept.sigma, device=device), index)
    out = kernel.step(x, velocity, kept.sigma, kept.sigma_next, next_latents=x_next, sigma_max=rollout.sigma_max)
    return out.log_prob_mean, out.mean, out.std, gaussian_log_ratio(x_next, out.mean, old_mean, out.std), old_mean


def kernel_of(rollout: Rollout, kernel: Kernel | None) -> Kernel:
    """The kernel to score a rollout with: the given one if it can have drawn it, the rollout's own by default.

    Raises:
        ValueError: It gives a step another std than the rollout has, or there is none.
    """
    if kernel is None or kernel is rollout.kernel:
        if rollout.kernel is None:
            raise ValueError("kernel must be given for a rollout that does not hold the kernel that drew it, got None")
        return rollout.kernel
    for kept in rollout.trajectory:
        _check_std(kernel, rollout, kept)
    return kernel


def _check_std(kernel: Kernel, rollout: Rollout, kept: WindowStep) -> None:
    x = kept.latents[:1]
    out = kernel.step(x, x, kept.sigma, kept.sigma_next, next_latents=x, sigma_max=rollout.sigma_max)
    there, here = float(kept.std[0]), float(out.std[0])
    if not abs(here - there) <= 1e-5 * there:
        raise ValueError(
            f"kernel must be the one that drew the rollout (std {there:.6g} at step {kept.step}), "
            f"got {kernel} whose std there is {here:.6g}"
        )


def loss_log_ratio(kind: RatioKind, scored: Rescored) -> Float[Tensor, "b t"]:
    """The log-ratios that enter the loss: GRPO-Guard's are re-centred and re-scaled."""
    if kind != "guarded":
        return scored.log_ratio
    return guarded_log_ratio(scored.log_ratio, 0.0, scored.mean, scored.old_mean, scored.std)
