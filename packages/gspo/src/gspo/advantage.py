"""Group-relative advantages: a reward compared with the other rollouts of its prompt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.checks import check_real, is_real, is_whole, one_line
from gspo.distributed import ProcessGroup, gather_rows, total
from gspo.inputs import Ids, Numbers, as_ids, as_numbers, floating_dtype

Scale = Literal["group", "global", "none"]


class MissingRewards(UserWarning):
    """No sample has a reward: nothing can be learned from this batch."""


class GroupStatistics(NamedTuple):
    """What carries no signal and is left out of the update.

    Attributes:
        num_groups: Groups in all.
        num_zero_variance: Groups without two different finite rewards.
        num_invalid_rewards: Samples whose reward is missing (None, NaN or infinite).
    """

    num_groups: int
    num_zero_variance: int
    num_invalid_rewards: int


@dataclass(frozen=True)
class _Groups:
    """Per-group sums in fp64 on the CPU, over all ranks that take part; ``mine`` are this rank's rows."""

    rewards: Tensor
    valid: Bool[Tensor, " b"]
    index: Int[Tensor, " b"]
    count: Tensor
    mean: Tensor
    squares: Tensor
    flat: Tensor
    mine: slice


def _group(rewards: Numbers, group_ids: Ids, process_group: ProcessGroup | None) -> _Groups:
    values, ids = as_numbers("rewards", rewards), as_ids("group_ids", group_ids)
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"rewards must be (b,) with b at least 1, got shape {tuple(values.shape)}")
    if ids.shape != values.shape:
        raise ValueError(f"group_ids must have the shape of rewards {tuple(values.shape)}, got {tuple(ids.shape)}")
    # one message carries both: the rewards as the 64 bits that they are
    bits = values.cpu().double().view(torch.int64)
    both, mine = gather_rows(torch.stack([bits, ids.cpu()], 1), process_group)
    everyone = both[:, 0].contiguous().view(torch.float64)
    valid = torch.isfinite(everyone)
    _, index, sizes = torch.unique(both[:, 1], return_inverse=True, return_counts=True)
    if bool((sizes == 1).any()):
        raise ValueError(
            "group_ids must put at least 2 samples in every group, got a group of one"
            + ("" if process_group else " (where groups span ranks, give process_group)")
        )
    value = torch.where(valid, everyone, torch.zeros_like(everyone))
    zeros = torch.zeros(len(sizes), dtype=torch.float64)
    count = zeros.index_add(0, index, valid.double())
    mean = zeros.index_add(0, index, value) / count.clamp_min(1)
    squares = zeros.index_add(0, index, torch.where(valid, value - mean[index], torch.zeros_like(value)).square())
    if not bool(torch.isfinite(squares).all()):
        raise ValueError(f"rewards must be small enough to be squared, got {float(value.abs().max()):.4g}")
    # rounding alone must not look like a signal; whole numbers have none
    rounding = 0.0 if bool((value == value.round()).all()) else 1e-6
    flat = (squares / count.clamp_min(1)).sqrt() <= rounding * (1e-6 + mean.abs())
    return _Groups(value, valid, index, count, mean, squares, flat, mine)


def _warn_if_all_missing(anything: bool) -> None:
    if not anything:
        warnings.warn(
            "rewards must hold a finite number, got only None, NaN or infinity: nothing is learned from this batch",
            MissingRewards,
            stacklevel=3,
        )


def group_advantages(
    rewards: Numbers,
    group_ids: Ids,
    *,
    scale: Scale = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    process_group: ProcessGroup | None = None,
) -> Float[Tensor, " b"]:
    """``A_i = (R_i - mean of its group) / (std + eps)`` (GRPO, arXiv 2402.03300; Flow-GRPO takes ddof 0 and eps 1e-4).

    A group in which all rewards are equal gets advantages of 0, and `PolicyTrainer` drops it; a missing reward (None, NaN, infinite)
    gets NaN, counts in no statistic, and `clipped_surrogate_loss` leaves its sample out. `group_statistics` counts both. If all are
    missing, a `MissingRewards` warning says so.

    Args:
        rewards: One per sample, any unit: tensor, array or list, of any real dtype.
        group_ids: Which group (prompt and references) a sample belongs to, as whole numbers of 64 bits.
        scale: Divide by the group's own std ("group"), by the std of all samples ("global"), or not at all ("none", Dr. GRPO).
        ddof: 0 for the population's std, 1 for the sample's.
        eps: Added to the std, in the reward's unit.
        process_group: Ranks over which groups and statistics reach; the same id on two of them is the same group, and all of them must
            call. None, the default, is this rank alone.

    Returns:
        (b,) in the rewards' dtype if that is floating, in torch's default dtype else.

    Raises:
        ValueError: Shapes do not match, rewards are empty or no numbers, or a group has only one member.

    >>> group_advantages([1, 3, 5, 5], [0, 0, 1, 1], eps=0.0).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    if scale not in ("group", "global", "none"):
        raise ValueError(f"scale must be 'group', 'global' or 'none', got {one_line(scale)}")
    check_real("eps", eps, least=0.0)
    if eps is None or not is_whole(ddof) or ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1 and eps a number, got {one_line(ddof)} and {eps!r}")
    eps = float(eps)
    groups = _group(rewards, group_ids, process_group)
    _warn_if_all_missing(bool(groups.valid.any()))
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
    device = rewards.device if isinstance(rewards, Tensor) else None
    return advantages[groups.mine].to(floating_dtype(rewards)).to(device)


def multi_reward_advantages(
    rewards: Mapping[str, Numbers],
    weights: Mapping[str, float],
    group_ids: Ids,
    *,
    scale: Scale = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    process_group: ProcessGroup | None = None,
) -> Float[Tensor, " b"]:
    """GDPO style (arXiv 2601.05242): every reward is normalised in its group, then ``A = sum_k w_k A_k``.

    A reward with a large spread cannot drown the others, as it does when the weighted sum is normalised. MixGRPO does the same
    with ddof 1. The sum is over the rewards that a sample has: a reward function may be None where it does not apply (as in TRL). A
    sample without any gets NaN; a reward of weight 0 plays no part.

    Args:
        rewards: By name, (b,) each.
        weights: By the same names.
        group_ids: See `group_advantages`, as are scale, ddof, eps and process_group.
        scale: See `group_advantages`.
        ddof: See `group_advantages`.
        eps: See `group_advantages`.
        process_group: See `group_advantages`.

    Raises:
        ValueError: Names differ, there is no reward, or no weight that counts; see `group_advantages`.

    >>> multi_reward_advantages({"a": [0, 1, None], "b": [None, 2, 1]}, {"a": 1, "b": 1}, [0, 0, 0], eps=0.0).tolist()
    [-1.0, 2.0, -1.0]
    """
    check_weights(rewards, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingRewards)  # one function may well have nothing to say
        by_name = {
            # in the order of names, so that ranks meet in it
            name: weights[name]
            * group_advantages(rewards[name], group_ids, scale=scale, ddof=ddof, eps=eps, process_group=process_group)
            for name in sorted(rewards, key=str)
            if weights[name] != 0
        }
    parts = [by_name[name] for name in rewards if name in by_name]
    lengths = {name: len(part) for name, part in by_name.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"rewards must all have one entry per sample, got lengths {lengths}")
    advantages = nan_sum(parts)
    _warn_if_all_missing(total(float(torch.isfinite(advantages).sum()), process_group) > 0)
    return advantages


def check_weights(rewards: Mapping[str, object], weights: Mapping[str, float]) -> None:
    """Refuses weights that do not fit the rewards.

    Raises:
        ValueError: Names differ, there is no reward, or no weight is a finite number other than 0.
    """
    if not isinstance(rewards, Mapping) or not isinstance(weights, Mapping):
        raise ValueError(
            f"rewards and weights must be dictionaries by name, got {type(rewards).__name__} and {type(weights).__name__}"
        )
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(f"weights must name the rewards {sorted(rewards, key=str)}, got {sorted(weights, key=str)}")
    for name, weight in weights.items():
        if not is_real(weight.item() if isinstance(weight, Tensor) and weight.numel() == 1 else weight):
            raise ValueError(f"weights must be finite numbers, got {one_line(weight)} for {name!r}")
    if not any(weights.values()):
        raise ValueError(f"weights must be finite numbers, at least one of them not 0, got {dict(weights)}")


def nan_sum(parts: list[Tensor]) -> Tensor:
    """The sum over the parts that are finite, row by row; NaN where none is."""
    stacked = torch.stack(parts)
    there = torch.isfinite(stacked)
    summed = torch.where(there, stacked, torch.zeros_like(stacked)).sum(0)
    return torch.where(there.any(0), summed, torch.full_like(summed, torch.nan))


def group_statistics(rewards: Numbers, group_ids: Ids, *, process_group: ProcessGroup | None = None) -> GroupStatistics:
    """Counts groups, groups without variance and missing rewards, over the ranks of ``process_group`` (this one alone for None).

    >>> group_statistics([1.0, 1.0, 2.0, None, 3.0], [0, 0, 1, 1, 1])
    GroupStatistics(num_groups=2, num_zero_variance=1, num_invalid_rewards=1)
    """
    groups = _group(rewards, group_ids, process_group)
    flat = groups.flat | (groups.count < 2)
    return GroupStatistics(len(flat), int(flat.sum()), int((~groups.valid).sum()))


def group_has_signal(
    advantages: Float[Tensor, " b"], group_ids: Int[Tensor, " b"], *, process_group: ProcessGroup | None = None
) -> Bool[Tensor, " b"]:
    """Which samples belong to a group that tells its members apart: some advantage in it is neither 0 nor missing.

    >>> group_has_signal(torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])).tolist()
    [True, True, True, False, False]
    """
    values, ids = as_numbers("advantages", advantages), as_ids("group_ids", group_ids)
    if values.dim() != 1 or ids.shape != values.shape:
        raise ValueError(
            f"advantages and group_ids must both be (b,), got {tuple(values.shape)} and {tuple(ids.shape)}"
        )
    signal = torch.isfinite(values) & (values != 0)
    rows = torch.stack([signal.long().cpu(), ids.cpu()], 1)
    everyone, mine = gather_rows(rows, process_group)
    _, index = torch.unique(everyone[:, 1], return_inverse=True)
    some = torch.zeros(len(everyone), dtype=torch.int64).index_add(0, index, everyone[:, 0])
    return (some[index] > 0)[mine].to(values.device)
