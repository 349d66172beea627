"""Stored samples under the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.objective import gaussian_kl
from gspo.ratio import gaussian_log_ratio
from gspo.rollout import Hook, Rollout, VelocityFunction
from gspo.sde import Kernel

RatioKind = Literal["sequence", "step", "guarded"]


class Rescored(NamedTuple):
    """The window's steps under the current policy.

    Attributes:
        log_prob_mean: Log densities of the stored samples, (b, t), nats per element.
        mean: Of the Gaussians, (b, t, ...).
        std: Of the steps, (b, t).
        log_ratio: To the old policy, (b, t), nats per element, without cancellation (`gaussian_log_ratio`).
    """

    log_prob_mean: Float[Tensor, "b t"]
    mean: Float[Tensor, "b t ..."]
    std: Float[Tensor, "b t"]
    log_ratio: Float[Tensor, "b t"]


class StepScore(NamedTuple):
    """One step of `Rescored`, with the old policy's mean beside it."""

    log_prob_mean: Tensor
    mean: Tensor
    std: Tensor
    log_ratio: Tensor
    old_mean: Tensor


def score_step(
    velocity_fn: VelocityFunction,
    rollout: Rollout,
    kernel: Kernel,
    position: int,
    rows: Tensor | None,
    replay: Hook | None,
) -> StepScore:
    """Scores the stored samples of one step: all rows as they were drawn (None, no copies), or the given ones."""
    kept, device = rollout.trajectory[position], rollout.latents.device
    tensors = (kept.latents, kept.next_latents, kept.mean)
    chosen = None if rows is None else rows.to(kept.latents.device)
    x, x_next, old_mean = ((t if chosen is None else t[chosen]).to(device) for t in tensors)
    index = rollout.index if rows is None else rollout.index[rows]
    everything = torch.arange(len(x), device=device) if rows is None else rows
    with replay(position, everything) if replay else nullcontext():
        velocity = velocity_fn(x, torch.full((len(x),), kept.sigma, device=device), index)
    out = kernel.step(x, velocity, kept.sigma, kept.sigma_next, next_latents=x_next, sigma_max=rollout.sigma_max)
    assert out.log_prob_mean is not None
    log_ratio = gaussian_log_ratio(x_next, out.mean, old_mean, out.std)
    return StepScore(out.log_prob_mean, out.mean, out.std, log_ratio, old_mean)


def rescore(
    velocity_fn: VelocityFunction,
    rollout: Rollout,
    kernel: Kernel,
    *,
    steps: Sequence[int] | None = None,
    rows: Int[Tensor, " r"] | None = None,
    replay: Hook | None = None,
) -> Rescored:
    """Scores the stored samples with the current policy, by the code path that drew them.

    Args:
        velocity_fn: The current policy.
        rollout: Stored trajectory.
        kernel: The kernel that drew it.
        steps: Positions in the window to score; all by default.
        rows: Rows of the rollout to score; all by default.
        replay: Called with the position in the window and the rows; the velocity is computed inside the context manager it returns
            (an MoE policy replays its routing there).
    """
    positions = range(len(rollout.trajectory)) if steps is None else steps
    scored = [score_step(velocity_fn, rollout, kernel, p, rows, replay)[:4] for p in positions]
    return Rescored(*(torch.stack(parts, 1) for parts in zip(*scored, strict=True)))


def own_log_ratio(kind: RatioKind, score: StepScore) -> Tensor:
    """The step's log-ratio, for GRPO-Guard re-centred by the KL to the old policy and scaled by std."""
    if kind != "guarded":
        return score.log_ratio
    return score.std * (score.log_ratio + gaussian_kl(score.mean, score.old_mean, score.std))
