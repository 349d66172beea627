"""Importance ratios between the policy being trained and the one that drew the samples.

Each takes the log-probs of both, or the log-ratio itself (`gaussian_log_ratio`) and 0.0: that is how `PolicyTrainer` calls them.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import one_line
from gspo.inputs import require_tensor
from gspo.objective import gaussian_kl

RatioKind = Literal["sequence", "step", "guarded"]
"""GSPO, GRPO, GRPO-Guard."""


def _difference(log_prob: Tensor, old_log_prob: Tensor | float) -> Tensor:
    """The log-ratio (b, t), in fp32 at least: half precision rounds what a ratio lives on."""
    require_tensor(log_prob=log_prob)
    if isinstance(old_log_prob, Tensor):
        require_tensor(old_log_prob=old_log_prob)
        if log_prob.shape != old_log_prob.shape:
            raise ValueError(
                f"log_prob and old_log_prob must both be (b, t), got {tuple(log_prob.shape)} and {tuple(old_log_prob.shape)}"
            )
    elif not isinstance(old_log_prob, int | float) or old_log_prob != 0:
        raise ValueError(
            f"old_log_prob must be (b, t), or 0.0 if log_prob is the log-ratio, got {one_line(old_log_prob)}"
        )
    if log_prob.dim() != 2:
        raise ValueError(f"log_prob must be (b, t), got {tuple(log_prob.shape)}")
    if log_prob.shape[1] == 0:
        raise ValueError("log_prob must hold at least one step, got none")
    difference = _single(log_prob) - (_single(old_log_prob) if isinstance(old_log_prob, Tensor) else 0.0)
    return difference


def _single(value: Tensor) -> Tensor:
    return value.float() if value.itemsize < 4 or not value.is_floating_point() else value


def sequence_importance_ratio(
    log_prob: Float[Tensor, "b t"], old_log_prob: Float[Tensor, "b t"] | float
) -> Float[Tensor, " b"]:
    """GSPO: ``s_i = exp(mean over t of [log pi(x_{t+1}|x_t) - log pi_old(x_{t+1}|x_t)])`` (arXiv 2507.18071, Eq. 7).

    Args:
        log_prob: Of the policy, mean over elements (`log_prob_mean`); or the log-ratio.
        old_log_prob: Of the policy that drew the samples; 0.0 beside a log-ratio.

    >>> import torch
    >>> sequence_importance_ratio(torch.zeros(2, 3), torch.zeros(2, 3)).tolist()
    [1.0, 1.0]
    """
    return _difference(log_prob, old_log_prob).mean(1).exp()


def step_importance_ratio(
    log_prob: Float[Tensor, "b t"], old_log_prob: Float[Tensor, "b t"] | float
) -> Float[Tensor, "b t"]:
    """GRPO: ``r_it = exp(log pi - log pi_old)`` per step (Flow-GRPO, arXiv 2505.05470, Eq. 5); arguments as above."""
    return _difference(log_prob, old_log_prob).exp()


def guarded_log_ratio(
    log_prob: Float[Tensor, "b t"],
    old_log_prob: Float[Tensor, "b t"] | float,
    mean: Float[Tensor, "b t ..."],
    old_mean: Float[Tensor, "b t ..."],
    std: Float[Tensor, "b t"],
) -> Float[Tensor, "b t"]:
    """GRPO-Guard (arXiv 2510.22319): the step log-ratio, re-centred and re-scaled.

    With ``d = mean - old_mean`` and a sample drawn from the old policy, the log-ratio per element has mean
    ``-|d|^2 / (2 n std^2)`` (n elements), below zero, and a spread of ``|d| / (n std)`` that differs by step. Adding the
    first and multiplying by std centres it at zero and gives every step the scale ``|d| / n``:

        l_it = std_it * [log pi - log pi_old + |mean - old_mean|^2 / (2 n std_it^2)]

    Args:
        log_prob: Of the policy, mean over elements (`log_prob_mean`); or the log-ratio.
        old_log_prob: Of the policy that drew the samples; 0.0 beside a log-ratio.
        mean: Of the policy's Gaussians.
        old_mean: Of the old policy's.
        std: Of the steps, the same for both.
    """
    log_ratio = _difference(log_prob, old_log_prob)
    require_tensor(mean=mean, old_mean=old_mean, std=std)
    if mean.shape != old_mean.shape or mean.shape[:2] != log_prob.shape or std.shape != log_prob.shape:
        raise ValueError(
            f"mean and old_mean must be (b, t, ...) and std (b, t) for log_prob {tuple(log_prob.shape)}, "
            f"got {tuple(mean.shape)}, {tuple(old_mean.shape)} and {tuple(std.shape)}"
        )
    divergence = gaussian_kl(mean.flatten(0, 1), old_mean.flatten(0, 1), std.flatten()).reshape(std.shape)
    return std * (log_ratio + divergence)


def guarded_step_importance_ratio(
    log_prob: Float[Tensor, "b t"],
    old_log_prob: Float[Tensor, "b t"] | float,
    mean: Float[Tensor, "b t ..."],
    old_mean: Float[Tensor, "b t ..."],
    std: Float[Tensor, "b t"],
) -> Float[Tensor, "b t"]:
    """GRPO-Guard: ``r_it = exp(l_it)`` of `guarded_log_ratio`, whose arguments it takes."""
    return guarded_log_ratio(log_prob, old_log_prob, mean, old_mean, std).exp()


def importance_ratio(kind: RatioKind, log_ratio: Float[Tensor, "b t"]) -> Float[Tensor, " b"] | Float[Tensor, "b t"]:
    """The ratio of that kind: (b,) for "sequence", (b, t) for "step" and "guarded" (then of a `guarded_log_ratio`)."""
    if kind not in ("sequence", "step", "guarded"):
        raise ValueError(f"ratio must be 'sequence', 'step' or 'guarded', got {one_line(kind)}")
    if kind == "sequence":
        return sequence_importance_ratio(log_ratio, 0.0)
    return step_importance_ratio(log_ratio, 0.0)


def gaussian_log_ratio(
    next_latents: Float[Tensor, "b ..."],
    mean: Float[Tensor, "b ..."],
    old_mean: Float[Tensor, "b ..."],
    std: Float[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """``log N(x; mean, std^2) - log N(x; old_mean, std^2)``, mean over elements, without the cancellation of two log-probs.

        = mean over elements of (mean - old_mean) * (2 x - mean - old_mean) / (2 std^2)      [nats per element]

    Log-probs are of the order of 1, the log-ratio of a picture of the order of 1e-6: subtracting fp32 log-probs leaves one
    digit of it, this form all of them, and exactly 0 on policy (docs/adr/0012-exact-log-ratio.md).

    Args:
        next_latents: The samples x, (b, ...).
        mean: Of the policy, same shape; may carry gradients.
        old_mean: Of the policy that drew the samples.
        std: Of the step, the same for both, (b,).

    >>> import torch
    >>> gaussian_log_ratio(torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.ones(1)).item()
    0.375
    """
    require_tensor(next_latents=next_latents, mean=mean, old_mean=old_mean, std=std)
    if not next_latents.shape == mean.shape == old_mean.shape or std.shape != mean.shape[:1]:
        raise ValueError(
            f"next_latents, mean and old_mean must share a shape (b, ...) and std be (b,), got {tuple(next_latents.shape)}, "
            f"{tuple(mean.shape)}, {tuple(old_mean.shape)} and {tuple(std.shape)}"
        )
    step = mean.float() - old_mean.float()
    away = torch.sub(next_latents.float() - old_mean.float(), step, alpha=0.5)  # half of 2 x - mean - old_mean
    return (step * away).flatten(1).mean(1) / std.square()
