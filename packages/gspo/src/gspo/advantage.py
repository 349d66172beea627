"""Group-relative advantages: a reward compared with the other rollouts of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.distributed import gather_rows

Scale = Literal["group", "global", "none"]


class GroupStatistics(NamedTuple):
    """What carries no signal and is left out of the update, over all ranks.

    Attributes:
        num_groups: Groups in all.
        num_zero_variance: Groups without two different finite rewards.
        num_invalid_rewards: Samples whose reward is NaN or infinite.
    """

    num_groups: int
    num_zero_variance: int
    num_invalid_rewards: int


@dataclass(frozen=True)
class _Groups:
    """Per-group sums over all ranks, in fp64; ``mine`` are this rank's rows."""

    rewards: Tensor
    valid: Bool[Tensor, " b"]
    index: Int[Tensor, " b"]
    count: Tensor
    mean: Tensor
    squares: Tensor
    flat: Tensor
    mine: slice


def _check(rewards: Tensor, group_ids: Tensor) -> None:
    if rewards.dim() != 1 or rewards.numel() == 0:
        raise ValueError(f"rewards must be (b,) with b at least 1, got shape {tuple(rewards.shape)}")
    if group_ids.shape != rewards.shape:
        raise ValueError(
            f"group_ids must have the shape of rewards {tuple(rewards.shape)}, got {tuple(group_ids.shape)}"
        )


def _group(rewards: Tensor, group_ids: Tensor) -> _Groups:
    # fp64 holds ids up to 2^53 exactly, so that one message carries both
    both, mine = gather_rows(torch.stack([rewards.double(), group_ids.double()], 1))
    everyone, ids = both.unbind(1)
    valid = torch.isfinite(everyone)
    _, index, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    if bool((sizes == 1).any()):
        raise ValueError("group_ids must put at least 2 samples in every group, got a group of one")
    value = torch.where(valid, everyone, torch.zeros_like(everyone))
    zeros = torch.zeros(len(sizes), dtype=torch.float64, device=value.device)
    count = zeros.index_add(0, index, valid.double())
    mean = zeros.index_add(0, index, value) / count.clamp_min(1)
    squares = zeros.index_add(0, index, torch.where(valid, value - mean[index], torch.zeros_like(value)).square())
    # rounding alone must not look like a signal
    flat = (squares / count.clamp_min(1)).sqrt() <= 1e-6 * (1e-6 + mean.abs())
    return _Groups(value, valid, index, count, mean, squares, flat, mine)


def group_advantages(
    rewards: Float[Tensor, " b"],
    group_ids: Int[Tensor, " b"],
    *,
    scale: Scale = "group",
    ddof: int = 0,
    eps: float = 1e-4,
) -> Float[Tensor, " b"]:
    """``A_i = (R_i - mean of its group) / (std + eps)`` (GRPO, arXiv 2402.03300; Flow-GRPO takes ddof 0 and eps 1e-4).

    Groups may be spread over the ranks of an initialised torch.distributed: statistics are over all of them. A group in which
    all rewards are equal gets advantages of 0, and `PolicyTrainer` drops it; a NaN or infinite reward gets NaN, counts in no
    statistic, and `clipped_surrogate_loss` leaves its sample out. `group_statistics` counts both.

    Args:
        rewards: One per sample, any unit.
        group_ids: Which group (prompt and references) a sample belongs to; the same id on two ranks is the same group.
        scale: Divide by the group's own std ("group"), by the std of all samples ("global"), or not at all ("none", Dr. GRPO).
        ddof: 0 for the population's std, 1 for the sample's.
        eps: Added to the std, in the reward's unit.

    Returns:
        (b,) in the rewards' dtype.

    Raises:
        ValueError: Shapes do not match, rewards are empty, or a group has only one member.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), eps=0.0).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    if scale not in ("group", "global", "none"):
        raise ValueError(f"scale must be 'group', 'global' or 'none', got {scale!r}")
    _check(rewards, group_ids)
    groups = _group(rewards, group_ids)
    deviation = groups.rewards - groups.mean[groups.index]
    if scale == "group":
        std = (groups.squares / (groups.count - ddof).clamp_min(1)).sqrt()[groups.index] + eps
    elif scale == "global":
        everyone = groups.rewards[groups.valid]
        std = (everyone.std(correction=ddof) if len(everyone) > ddof else everyone.new_zeros(())) + eps
    else:
        std = torch.ones_like(deviation)
    advantages = torch.where(groups.flat[groups.index], torch.zeros_like(deviation), deviation / std)
    advantages = torch.where(groups.valid, advantages, torch.full_like(advantages, torch.nan))
    return advantages[groups.mine].to(rewards.dtype)


def multi_reward_advantages(
    rewards: dict[str, Float[Tensor, " b"]],
    weights: dict[str, float],
    group_ids: Int[Tensor, " b"],
    *,
    scale: Scale = "group",
    ddof: int = 0,
    eps: float = 1e-4,
) -> Float[Tensor, " b"]:
    """GDPO style (arXiv 2601.05242): every reward is normalised in its group, then ``A = sum_k w_k A_k``.

    A reward with a large spread cannot drown the others, as it does when the weighted sum is normalised. MixGRPO does the same
    with ddof 1. A sample with one invalid reward gets NaN.

    Args:
        rewards: By name, (b,) each.
        weights: By the same names.
        group_ids: See `group_advantages`, as are scale, ddof and eps.
        scale: See `group_advantages`.
        ddof: See `group_advantages`.
        eps: See `group_advantages`.

    Raises:
        ValueError: Names differ or there is no reward; see `group_advantages`.
    """
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(f"weights must name the rewards {sorted(rewards)}, got {sorted(weights)}")
    parts = [weights[k] * group_advantages(r, group_ids, scale=scale, ddof=ddof, eps=eps) for k, r in rewards.items()]
    return torch.stack(parts).sum(0)


def group_statistics(rewards: Float[Tensor, " b"], group_ids: Int[Tensor, " b"]) -> GroupStatistics:
    """Counts groups, groups without variance and invalid rewards, over all ranks.

    >>> group_statistics(torch.tensor([1.0, 1.0, 2.0, float("nan"), 3.0]), torch.tensor([0, 0, 1, 1, 1]))
    GroupStatistics(num_groups=2, num_zero_variance=1, num_invalid_rewards=1)
    """
    _check(rewards, group_ids)
    groups = _group(rewards, group_ids)
    flat = groups.flat | (groups.count < 2)
    return GroupStatistics(len(flat), int(flat.sum()), int((~groups.valid).sum()))
