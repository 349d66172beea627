"""GDPO's second normalisation: the batch is whitened after the rewards have been normalised one by one (arXiv 2601.05242)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.advantage import Scale, multi_reward_advantages
from gspo.checks import check_bool, check_real
from gspo.distributed import ProcessGroup, total
from gspo.inputs import Numbers, as_numbers, floating_dtype


def whiten(
    advantages: Numbers,
    *,
    center: bool = True,
    eps: float = 1e-4,
    process_group: ProcessGroup | None = None,
) -> Float[Tensor, " b"]:
    """``(A - mean(A)) / (std(A) + eps)`` over the batch (GDPO, arXiv 2601.05242, batch-wise advantage normalisation).

    The weighted sum of k normalised rewards has a spread that grows with k and with how much they agree; whitened, the size of a step
    does not depend on either. NaN stays NaN and counts in no statistic; a batch without spread stays 0.

    Args:
        advantages: (b,).
        center: Subtract the mean. Group advantages have mean 0 already, unless samples are missing.
        eps: Added to the std (population).
        process_group: Whiten over all its ranks; None is this rank alone.

    >>> whiten(torch.tensor([3.0, -3.0, float("nan")]), eps=0.0).tolist()
    [1.0, -1.0, nan]
    """
    check_real("eps", eps, least=0.0)
    check_bool(center=center)
    if eps is None:
        raise ValueError("eps must be a finite number of at least 0, got None")
    eps = float(eps)
    given, device = floating_dtype(advantages), advantages.device if isinstance(advantages, Tensor) else None
    advantages = as_numbers("advantages", advantages)
    if advantages.dim() != 1 or advantages.numel() == 0:
        raise ValueError(f"advantages must be (b,) with b at least 1, got shape {tuple(advantages.shape)}")
    wide = advantages.cpu().double()  # not every device has float64
    keep = torch.isfinite(wide)
    value = torch.where(keep, wide, torch.zeros_like(wide))
    count = max(total(float(keep.sum()), process_group), 1.0)
    mean = total(float(value.sum()), process_group) / count if center else 0.0
    deviation = torch.where(keep, value - mean, torch.zeros_like(value))
    std = (total(float(deviation.square().sum()), process_group) / count) ** 0.5
    # rounding alone must not look like a signal
    scaled = deviation / (std + eps) if std > 1e-12 else torch.zeros_like(deviation)
    return torch.where(keep, scaled, torch.full_like(scaled, torch.nan)).to(device, given)


def gdpo_advantages(
    rewards: Mapping[str, Float[Tensor, " b"]],
    weights: Mapping[str, float],
    group_ids: Int[Tensor, " b"],
    *,
    scale: Scale = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    process_group: ProcessGroup | None = None,
) -> Float[Tensor, " b"]:
    """GDPO in full (arXiv 2601.05242): each reward normalised in its group, weighted, summed, and the batch whitened.

        A_ik = (R_ik - mean of its group) / (std + eps),      A_i = whiten(sum_k w_k A_ik)

    Args:
        rewards: By name, (b,) each.
        weights: By the same names.
        group_ids: See `gspo.group_advantages`, as are scale, ddof and eps.
        scale: See `gspo.group_advantages`.
        ddof: See `gspo.group_advantages`.
        eps: Also of `whiten`.
        process_group: See `whiten`.

    Raises:
        ValueError: Names differ or there is no reward; see `gspo.group_advantages`.

    >>> rewards = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([10.0, 30.0])}
    >>> [round(a, 2) for a in gdpo_advantages(rewards, {"a": 3.0, "b": 1.0}, torch.tensor([0, 0])).tolist()]
    [-1.0, 1.0]
    """
    summed_up = multi_reward_advantages(rewards, weights, group_ids, scale=scale, ddof=ddof, eps=eps)
    return whiten(summed_up, eps=eps, process_group=process_group)
