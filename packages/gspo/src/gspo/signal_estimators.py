"""How much of a gradient is signal: estimators, each a pure function of what a few batches gave.

A batch's gradient is ``g = mu + noise``: mu is what an endless batch would give. The squared length of mu, the squared length of the
noise, and what follows from both, can be told from a handful of independent batches at the same weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.checks import check_positive, is_real, one_line
from gspo.inputs import as_ids, as_numbers, require_tensor


class GradientSignal(NamedTuple):
    """Signal and noise of a batch's gradient.

    Attributes:
        squared_signal: ``|mu|^2``, unbiased; below 0 where there is next to none.
        squared_noise: ``E|g - mu|^2`` of one batch, unbiased.
        share: ``|mu|^2 / E|g|^2``, the share of a batch's squared gradient that is signal; 1 where batches agree.
        cosine: Mean cosine of two batches' gradients.
        cosine_error: Its standard error (jackknife over batches); NaN with two batches.
        samples_for_half: Samples in a batch for a cosine of .5; infinite where no signal is seen.
        samples_at_least: The same with the signal at the upper end of its 95 % interval: so many are needed even if luck was bad.
    """

    squared_signal: float
    squared_noise: float
    share: float
    cosine: float
    cosine_error: float
    samples_for_half: float
    samples_at_least: float


def samples_needed(
    squared_signal: float, squared_noise: float, samples_per_batch: float, *, cosine: float = 0.5
) -> float:
    """Samples in a batch for a wanted cosine between two batches (arXiv 1812.06162 calls the number at .5 the noise scale).

    Noise falls with the number of samples n: ``cosine(n) = |mu|^2 / (|mu|^2 + noise samples_per_batch / n)``, hence

        n = samples_per_batch * (noise / |mu|^2) * cosine / (1 - cosine)

    >>> samples_needed(1.0, 4.0, 64), samples_needed(-0.1, 4.0, 64)
    (256.0, inf)
    """
    if not 0 < cosine < 1:
        raise ValueError(f"cosine must be in (0, 1), got {cosine}")
    if squared_signal <= 0:
        return math.inf
    return samples_per_batch * max(squared_noise, 0.0) / squared_signal * cosine / (1 - cosine)


def _mean_and_error(pairs: Float[Tensor, "m m"]) -> tuple[float, float]:
    """Mean over pairs of different batches, and its standard error by leaving each batch out."""
    m = len(pairs)
    rows = (pairs - torch.diag(pairs.diagonal())).sum(1)
    total = rows.sum()
    mean = float(total / (m * (m - 1)))
    if m < 3:
        return mean, math.nan
    without = (total - 2 * rows) / ((m - 1) * (m - 2))
    return mean, math.sqrt((m - 1) / m * float((without - mean).square().sum()))


def gradient_signal(gradients: Float[Tensor, "m p"], samples_per_batch: float) -> GradientSignal:
    """Signal and noise from the gradients of m independent batches at the same weights.

        |mu|^2 = mean over pairs i != j of g_i . g_j,      E|g|^2 = mean over i of |g_i|^2,      noise = E|g|^2 - |mu|^2
        share  = |mu|^2 / E|g|^2,                          cosine = mean over pairs of g_i . g_j / (|g_i| |g_j|)

    Args:
        gradients: One flat gradient per batch, (m, p), m at least 2.
        samples_per_batch: Samples that each gradient is a mean over.

    Raises:
        ValueError: Fewer than two gradients, or not finite.

    >>> found = gradient_signal(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), 8)
    >>> found.squared_signal, found.squared_noise, found.cosine
    (0.0, 2.0, 0.0)
    """
    require_tensor(gradients=gradients)
    if gradients.dim() != 2 or len(gradients) < 2:
        raise ValueError(f"gradients must be (m, p) with m at least 2, got shape {tuple(gradients.shape)}")
    if not bool(torch.isfinite(gradients).all()):
        raise ValueError("gradients must be finite, got NaN or infinity")
    check_positive(samples_per_batch=samples_per_batch)
    wide = gradients.cpu().double()
    products = wide @ wide.T
    lengths = products.diagonal().sqrt()
    signal, signal_error = _mean_and_error(products)
    second = float(products.diagonal().mean())
    unit = lengths.clamp_min(torch.finfo(torch.float64).tiny)
    cosine, cosine_error = _mean_and_error(products / unit[:, None] / unit[None, :])
    noise = second - signal
    upper = signal + 1.96 * signal_error
    return GradientSignal(
        signal,
        noise,
        signal / second if second > 0 else 0.0,
        cosine,
        cosine_error,
        samples_needed(signal, noise, samples_per_batch),
        samples_needed(upper, noise, samples_per_batch) if math.isfinite(upper) else math.nan,
    )


def within_group_variance(rewards: Float[Tensor, " b"], group_ids: Int[Tensor, " b"]) -> float:
    """Pooled unbiased variance inside groups, ``sum (R - mean of its group)^2 / sum (size of group - 1)``; NaN is left out.

    >>> within_group_variance(torch.tensor([0.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
    1.0
    """
    rewards, group_ids = as_numbers("rewards", rewards), as_ids("group_ids", group_ids)
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards and group_ids must both be (b,), got {tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    keep = torch.isfinite(rewards)
    value = rewards[keep].cpu().double()
    _, index, sizes = torch.unique(group_ids[keep].cpu(), return_inverse=True, return_counts=True)
    freedom = int((sizes - 1).sum())
    if freedom < 1:
        raise ValueError("rewards must hold two finite ones in at least one group, got none")
    means = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, index, value) / sizes
    return float((value - means[index]).square().sum()) / freedom


class ControlledVariance(NamedTuple):
    """How much of a reward's spread the trained steps decide.

    Attributes:
        controlled: Variance inside groups whose members differ in the trained steps' noise only.
        total: Variance inside groups whose members share nothing but the prompt.
        share: controlled / total.
    """

    controlled: float
    total: float
    share: float


def controlled_variance(
    rewards: Float[Tensor, " b"],
    group_ids: Int[Tensor, " b"],
    free_rewards: Float[Tensor, " f"],
    free_group_ids: Int[Tensor, " f"],
) -> ControlledVariance:
    """The law of total variance: ``Var(R) = E Var(R | start) + Var E(R | start)``; only the first term can be trained in the window.

    Args:
        rewards: Of groups that share their start (and the steps before the window), (b,).
        group_ids: Their groups.
        free_rewards: Of groups whose members have starts of their own, (f,).
        free_group_ids: Their groups.

    >>> ids = torch.tensor([0, 0])
    >>> controlled_variance(torch.tensor([0.0, 1.0]), ids, torch.tensor([0.0, 2.0]), ids).share
    0.25
    """
    controlled = within_group_variance(rewards, group_ids)
    total = within_group_variance(free_rewards, free_group_ids)
    return ControlledVariance(controlled, total, controlled / total if total > 0 else math.nan)


class ClipActivity(NamedTuple):
    """What norm clipping does.

    Attributes:
        fraction: Share of updates whose gradient is shortened.
        median_norm: Of the gradients.
        relative_norm: median_norm / max_grad_norm; far below 1 the clip is no safeguard, far above 1 it sets the step.
    """

    fraction: float
    median_norm: float
    relative_norm: float


def clip_activity(norms: Float[Tensor, " m"], max_grad_norm: float) -> ClipActivity:
    """How often, and how far, gradients are above the norm to which they are clipped.

    >>> clip_activity(torch.tensor([0.5, 1.0, 4.0]), 2.0).relative_norm
    0.5
    """
    if norms.dim() != 1 or norms.numel() == 0:
        raise ValueError(f"norms must be (m,) with m at least 1, got shape {tuple(norms.shape)}")
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
    median = float(norms.median())
    return ClipActivity(float((norms > max_grad_norm).cpu().double().mean()), median, median / max_grad_norm)


def random_walk_length(num_updates: int, momentum: float = 0.0) -> float:
    """``E|sum of k updates|^2 / (k E|update|^2)`` if gradients were nothing but noise: 1, and more with momentum beta.

    Updates that are exponential averages of white noise correlate as beta^|i - j|, hence

        = (1 + beta) / (1 - beta) - 2 beta (1 - beta^k) / (k (1 - beta)^2)

    >>> random_walk_length(20), round(random_walk_length(2, 0.5), 6)
    (1.0, 1.5)
    """
    if num_updates < 1:
        raise ValueError(f"num_updates must be at least 1, got {num_updates}")
    if not (is_real(momentum) and 0 <= momentum < 1):
        raise ValueError(f"momentum must be in [0, 1), got {one_line(momentum)}")
    b, k = momentum, num_updates
    return (1 + b) / (1 - b) - 2 * b * (1 - b**k) / (k * (1 - b) ** 2)


def walk_ratio(updates: Float[Tensor, "k p"], momentum: float = 0.0) -> float:
    """How much straighter k updates went than a random walk with the same steps: 1 is noise, k a straight line (without momentum).

        |sum of updates|^2 / (sum of |update|^2 * random_walk_length(k, momentum))

    Args:
        updates: Differences of successive weights, (k, p), k at least 2.
        momentum: Of the optimizer (Adam's first beta).

    >>> walk_ratio(torch.tensor([[1.0, 0.0], [1.0, 0.0]])), walk_ratio(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    (2.0, 1.0)
    """
    require_tensor(updates=updates)
    if updates.dim() != 2 or len(updates) < 2:
        raise ValueError(f"updates must be (k, p) with k at least 2, got shape {tuple(updates.shape)}")
    wide = updates.cpu().double()
    path = float(wide.square().sum())
    if path == 0:
        return math.nan
    return float(wide.sum(0).square().sum()) / (path * random_walk_length(len(updates), momentum))
