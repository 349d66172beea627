"""What a trainer needs of torch.distributed: the identity where the group is None, this rank alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

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
    """Ranks of the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def total(value: float, group: ProcessGroup | None) -> float:
    """The sum of one number over the group."""
    if group is None:
        return value
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, group=group)
    return float(tensor)


def sum_gradients(parameters: Sequence[torch.nn.Parameter], group: ProcessGroup | None) -> None:
    """Adds up the gradients over the group, in place; a parameter without one counts as 0."""
    if group is None:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
