"""Importance ratios between the policy being trained and the one that drew the samples."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from gspo.sde import wide


def _check(log_prob: Tensor, old_log_prob: Tensor) -> None:
    if log_prob.dim() != 2 or log_prob.shape != old_log_prob.shape:
        raise ValueError(
            f"log_prob and old_log_prob must both be (b, t), got {tuple(log_prob.shape)} and {tuple(old_log_prob.shape)}"
        )
    if log_prob.shape[1] == 0:
        raise ValueError("log_prob must hold at least one step, got none")


def sequence_importance_ratio(
    log_prob: Float[Tensor, "b t"], old_log_prob: Float[Tensor, "b t"]
) -> Float[Tensor, " b"]:
    """GSPO: ``s_i = exp(mean over t of [log pi(x_{t+1}|x_t) - log pi_old(x_{t+1}|x_t)])`` (arXiv 2507.18071, Eq. 7).

    >>> import torch
    >>> sequence_importance_ratio(torch.zeros(2, 3), torch.zeros(2, 3)).tolist()
    [1.0, 1.0]
    """
    _check(log_prob, old_log_prob)
    return (log_prob - old_log_prob).mean(1).exp()


def step_importance_ratio(log_prob: Float[Tensor, "b t"], old_log_prob: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """GRPO: ``r_it = exp(log pi - log pi_old)`` per step (Flow-GRPO, arXiv 2505.05470, Eq. 5)."""
    _check(log_prob, old_log_prob)
    return (log_prob - old_log_prob).exp()


def guarded_step_importance_ratio(
    log_prob: Float[Tensor, "b t"],
    old_log_prob: Float[Tensor, "b t"],
    mean: Float[Tensor, "b t ..."],
    old_mean: Float[Tensor, "b t ..."],
    std: Float[Tensor, "b t"],
) -> Float[Tensor, "b t"]:
    """GRPO-Guard (arXiv 2510.22319): the step log-ratio, re-centred and re-scaled.

    With ``d = mean - old_mean`` and a sample drawn from the old policy, the log-ratio per element has mean
    ``-|d|^2 / (2 n std^2)`` (n elements), below zero, and a spread of ``|d| / (n std)`` that differs by step. Adding the
    first and multiplying by std centres it at zero and gives every step the scale ``|d| / n``:

        r_it = exp(std_it * [log pi - log pi_old + |mean - old_mean|^2 / (2 n std_it^2)])

    log_prob must be the mean over elements (`log_prob_mean`).
    """
    _check(log_prob, old_log_prob)
    if mean.shape != old_mean.shape or mean.shape[:2] != log_prob.shape or std.shape != log_prob.shape:
        raise ValueError(
            f"mean and old_mean must be (b, t, ...) and std (b, t) for log_prob {tuple(log_prob.shape)}, "
            f"got {tuple(mean.shape)}, {tuple(old_mean.shape)} and {tuple(std.shape)}"
        )
    shift = (mean - old_mean).square().flatten(2).mean(2) / (2 * std.square())
    return (std * (log_prob - old_log_prob + shift)).exp()


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
    if not next_latents.shape == mean.shape == old_mean.shape or std.shape != mean.shape[:1]:
        raise ValueError(
            f"next_latents, mean and old_mean must share a shape (b, ...) and std be (b,), got {tuple(next_latents.shape)}, "
            f"{tuple(mean.shape)}, {tuple(old_mean.shape)} and {tuple(std.shape)}"
        )
    step = mean.float() - old_mean.float()
    twice = 2 * (next_latents.float() - old_mean.float()) - step
    return (step * twice / wide(2 * std.square(), step)).flatten(1).mean(1)
