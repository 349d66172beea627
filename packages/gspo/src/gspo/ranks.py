"""What a trainer needs of torch.distributed. Nothing talks to another rank unless a process group is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def group_size(process_group: dist.ProcessGroup | None) -> int:
    """Ranks of the group; 1 without one."""
    return 1 if process_group is None else dist.get_world_size(process_group)


def summed(values: Sequence[float], process_group: dist.ProcessGroup | None) -> list[float]:
    """Each number's sum over the ranks, in one message."""
    if process_group is None:
        return list(values)
    device = "cuda" if dist.get_backend(process_group) == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, group=process_group)
    return [float(v) for v in tensor.tolist()]


def sum_gradients(parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Adds up the gradients over the ranks, in place; a parameter without one counts as 0."""
    if process_group is None:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=process_group)
