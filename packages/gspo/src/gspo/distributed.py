"""What statistics over all ranks need of torch.distributed; without an initialised process group every function is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _carried(tensor: Tensor) -> Tensor:
    """The tensor where the backend can send it from: NCCL takes CUDA tensors only."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """All ranks' rows, in the order of the ranks, and where this rank's are among them. Ranks may have different numbers of rows."""
    if world_size() == 1:
        return rows, slice(0, len(rows))
    local, rows = rows, _carried(rows)
    mine = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(mine) for _ in range(world_size())]
    dist.all_gather(sizes, mine)
    counts = [int(s) for s in sizes]
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    start = sum(counts[: dist.get_rank()])
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(local.device)
    return whole, slice(start, start + len(rows))


def total(value: float) -> float:
    """The sum of one number over all ranks."""
    if world_size() == 1:
        return value
    tensor = _carried(torch.tensor([value], dtype=torch.float64))
    dist.all_reduce(tensor)
    return float(tensor)


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Adds up the gradients over all ranks, in place; a parameter without one counts as 0."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
