"""What statistics over several ranks need of torch.distributed; with the group None (this rank alone) every function is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gspo.checks import one_line

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:  # a torch without it: one rank
    ProcessGroup = Any


def resolve(process_group: ProcessGroup | Literal["world"] | None) -> ProcessGroup | None:
    """The group of all ranks for "world" where torch.distributed is initialised (None where it is not); any other as it is."""
    if process_group != "world":
        return process_group
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def world_size(group: ProcessGroup | None) -> int:
    """Number of ranks in the group; 1 for None.

    Raises:
        ValueError: It is a name; only trainers take "world".
    """
    if isinstance(group, str):
        raise ValueError(f"process_group must be a group of torch.distributed or None, got {one_line(group)}")
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: ProcessGroup | None) -> int:
    """This process's place in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def _carried(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The tensor where the backend can send it from: NCCL takes CUDA tensors only."""
    return tensor.cuda() if dist.get_backend(group) == "nccl" else tensor


def gather_rows(rows: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, slice]:
    """All ranks' rows, in the order of the ranks, and where this rank's are among them. Ranks may have different numbers of rows."""
    if group is None or world_size(group) == 1:
        return rows, slice(0, len(rows))
    local, rows = rows, _carried(rows, group)
    mine = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(mine) for _ in range(world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    counts = [int(s) for s in sizes]
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    start = sum(counts[: rank_in(group)])
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(local.device)
    return whole, slice(start, start + len(rows))


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's ``value`` (plain Python), in the order of ranks."""
    if group is None or world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def total(value: float, group: ProcessGroup | None = None) -> float:
    """The sum of one number over the group."""
    if group is None or world_size(group) == 1:
        return value
    tensor = _carried(torch.tensor([value], dtype=torch.float64), group)
    dist.all_reduce(tensor, group=group)
    return float(tensor)


def largest(value: float, group: ProcessGroup | None = None) -> float:
    """The largest of one number over the group."""
    if group is None or world_size(group) == 1:
        return value
    tensor = _carried(torch.tensor([value], dtype=torch.float64), group)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return float(tensor)


def sum_gradients(parameters: Sequence[torch.nn.Parameter], group: ProcessGroup | None = None) -> None:
    """Adds up the gradients over the group, in place; a parameter without one counts as 0."""
    if group is None or world_size(group) == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
