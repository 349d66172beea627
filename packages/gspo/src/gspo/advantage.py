"""Group-relative advantages: a reward compared with the other rollouts of its prompt."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scale = Literal["group", "global", "none"]


class GroupStatistics(NamedTuple):
    """What was left out: groups without signal, samples without a reward, groups of one valid sample."""

    num_groups: int
    num_zero_variance: int
    num_invalid_rewards: int


def _check(rewards: Tensor, group_ids: Tensor, scale: str) -> None:
    if rewards.dim() != 1 or rewards.numel() == 0:
        raise ValueError(f"rewards must be (b,) with b at least 1, got shape {tuple(rewards.shape)}")
    if group_ids.shape != rewards.shape:
        raise ValueError(
            f"group_ids must have the shape of rewards {tuple(rewards.shape)}, got {tuple(group_ids.shape)}"
        )
    if scale not in ("group", "global", "none"):
        raise ValueError(f"scale must be 'group', 'global' or 'none', got {scale!r}")


def _gather(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, slice]:
    """All ranks' rewards and groups, and where this rank's rows are among them."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rewards, group_ids, slice(0, len(rewards))
    sizes: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, len(rewards))
    counts = [int(s or 0) for s in sizes]
    padded = torch.stack([rewards.double(), group_ids.double()], 1)
    padded = torch.cat([padded, padded.new_zeros(max(counts) - len(padded), 2)])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    start = sum(counts[: dist.get_rank()])
    return whole[:, 0].to(rewards.dtype), whole[:, 1].to(group_ids.dtype), slice(start, start + len(rewards))


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
    all rewards are equal gets advantages of 0; a NaN or infinite reward gets NaN, counts in no statistic, and
    `clipped_surrogate_loss` leaves its sample out.

    Args:
        rewards: One per sample, any unit.
        group_ids: Which group (prompt and references) a sample belongs to.
        scale: Divide by the group's own std, by the std over all samples, or not at all.
        ddof: 0 for the population's std, 1 for the sample's.
        eps: Added to the std.

    Raises:
        ValueError: Shapes do not match, or a group has only one member.
    """
    _check(rewards, group_ids, scale)
    all_rewards, all_ids, mine = _gather(rewards, group_ids)
    valid = torch.isfinite(all_rewards)
    _, index, sizes = torch.unique(all_ids, return_inverse=True, return_counts=True)
    if bool((sizes == 1).any()):
        raise ValueError("group_ids must put at least 2 samples in every group, got a group of one")
    value = torch.where(valid, all_rewards, torch.zeros_like(all_rewards)).double()
    count = torch.zeros(len(sizes), dtype=torch.float64, device=value.device).index_add_(0, index, valid.double())
    mean = torch.zeros_like(count).index_add_(0, index, value) / count.clamp_min(1)
    deviation = torch.where(valid, value - mean[index], torch.zeros_like(value))
    squares = torch.zeros_like(count).index_add_(0, index, deviation.square())
    if scale == "group":
        std = (squares / (count - ddof).clamp_min(1)).sqrt()[index] + eps
    elif scale == "global":
        overall = value[valid].std(correction=ddof) if int(valid.sum()) > ddof else value.new_zeros(())
        std = overall + eps
    else:
        std = torch.ones_like(deviation)
    advantages = torch.where(valid, deviation / std, torch.full_like(deviation, torch.nan))
    # rounding alone must not look like a signal
    flat = (squares / count.clamp_min(1)).sqrt() <= 1e-6 * (1e-6 + mean.abs())
    advantages = torch.where(flat[index] & valid, torch.zeros_like(advantages), advantages)
    return advantages[mine].to(rewards.dtype)


def multi_reward_advantages(
    rewards: dict[str, Float[Tensor, " b"]],
    weights: dict[str, float],
    group_ids: Int[Tensor, " b"],
    *,
    ddof: int = 0,
    eps: float = 1e-4,
) -> Float[Tensor, " b"]:
    """GDPO style (arXiv 2601.05242): every reward is normalised in its group, then ``A = sum_k w_k A_k``.

    A reward with a large spread cannot drown the others, as it does when the weighted sum is normalised.
    """
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(f"weights must name the rewards {sorted(rewards)}, got {sorted(weights)}")
    parts = [weights[k] * group_advantages(r, group_ids, ddof=ddof, eps=eps) for k, r in rewards.items()]
    return torch.stack(parts).sum(0)


def group_statistics(rewards: Float[Tensor, " b"], group_ids: Int[Tensor, " b"]) -> GroupStatistics:
    """Counts groups, groups without variance and invalid rewards, over all ranks."""
    _check(rewards, group_ids, "group")
    all_rewards, all_ids, _ = _gather(rewards, group_ids)
    valid: Bool[Tensor, " b"] = torch.isfinite(all_rewards)
    flat = 0
    groups = torch.unique(all_ids)
    for group in groups:
        members = all_rewards[(all_ids == group) & valid]
        flat += int(
            len(members) < 2 or bool((members - members.mean()).abs().max() <= 1e-6 * (1e-6 + members.mean().abs()))
        )
    return GroupStatistics(len(groups), flat, int((~valid).sum()))
