"""Several processes on torch.distributed: who am I, what is mine, and what all of us agree on.

Every rank draws the same random numbers for the whole batch and computes its own rows. So a run does not depend on the number of
ranks (up to rounding), and a checkpoint reloads into another number of them. Everything here is the identity in one process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from gspo import GroupShare, share_groups
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from multicrafter import UserError, renamed
from multicrafter.models.placing import transformer_blocks

renamed(__name__, {"whole": "unsharded"})

Parallel = Literal["ddp", "fsdp"]


class WorkerLost(ConnectionError):
    """Another process of this run died or stopped answering."""


def active() -> bool:
    """Whether torch.distributed runs with more than one process."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if active() else 0


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this process writes logs and files that all share."""
    return rank() == 0


@contextmanager
def session(*, timeout_s: float = 1800.0) -> Iterator[torch.device]:
    """Joins the processes that torchrun (or accelerate launch) started, and leaves them at the end; yields this rank's device.

    NCCL on GPUs, gloo on CPUs. Without a launcher it only yields a device.

    Raises:
        WorkerLost: A worker died; the others stop instead of waiting for it.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or torch.distributed.is_initialized():
        yield device
        return
    torch.distributed.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        with naming_lost_workers():
            yield device
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Turns the many errors that a dead peer causes into a `WorkerLost`."""
    try:
        yield
    except RuntimeError as error:
        dist = torch.distributed
        network = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
        if not (active() and (network or "gloo" in str(error).lower() or "connection" in str(error).lower())):
            raise
        reason = " ".join(str(error).split())[:160]
        raise WorkerLost(
            f"a worker process died or stopped answering (seen by rank {rank()}: {reason}); start again with --resume auto"
        ) from error


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value``, in the order of ranks."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    return gather_objects(value)[0]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on at least one rank; the same answer everywhere."""
    return bool(all_sum(torch.tensor(float(flag))) > 0)


def all_sum(value: Tensor) -> Tensor:
    """Sum over the ranks, on every rank; the input stays as it is."""
    if not active():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    total = value.detach().to(device, copy=True)
    torch.distributed.all_reduce(total)
    return total.to(value.device)


def my_slice(count: int, *, rank_: int | None = None, ranks: int | None = None) -> slice:
    """The rows of a batch of ``count`` that are this rank's: contiguous, as even as can be, the first ones longer.

    >>> [my_slice(5, rank_=r, ranks=2) for r in range(2)]
    [slice(0, 3, None), slice(3, 5, None)]
    """
    me, number = rank() if rank_ is None else rank_, world_size() if ranks is None else ranks
    if count < number:
        raise UserError(f"batch must hold at least one row per process ({number}), got {count}")
    base, extra = divmod(count, number)
    start = me * base + min(me, extra)
    return slice(start, start + base + (me < extra))


def my_groups(prompts: int, group_size: int, *, rank_: int | None = None, ranks: int | None = None) -> GroupShare:
    """Until 0.3: `gspo.share_groups`. What was ``group_size`` of a share is ``num_members``."""
    warnings.warn(
        "multicrafter.training.distributed.my_groups is now gspo.share_groups, whose shares say num_members for what was group_size; the "
        "old name leaves with multicrafter 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    me, number = rank() if rank_ is None else rank_, world_size() if ranks is None else ranks
    return share_groups(prompts, group_size, rank=me, num_ranks=number)


class Replicated(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel that answers for its module (``config``, ``dtype``, ...)."""

    def __getattr__(self, name: str) -> Any:
        """The wrapper's attribute, else the module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def distribute(model: nn.Module, how: Parallel = "ddp", *, sync_in_backward: bool = True) -> nn.Module:
    """The model as all ranks train it; call the result in place of ``model``.

    "ddp" keeps it whole on every rank and averages gradients. "fsdp" shards parameters, gradients and optimizer states
    (`fully_shard`, block by block, in place). Make the optimizer afterwards. Trained parameters start as rank 0's.

    Args:
        model: With its adapters; only what requires gradients is exchanged.
        how: See above.
        sync_in_backward: False leaves gradients of "ddp" to the caller, who adds them up once after many backward passes.
    """
    if how not in ("ddp", "fsdp"):
        raise UserError(f"parallel must be 'ddp' or 'fsdp', got {how!r}")
    if not active():
        return model
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.distributed.broadcast(parameter.data, src=0)
    if how == "ddp":
        if not sync_in_backward:
            return model
        return Replicated(model, broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (world_size(),))
    for _, block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, shard_placement_fn=_placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=_placement)
    return model


def _placement(parameter: nn.Parameter) -> Any:
    """Shards stacked experts (e, r, d) along a width, since e is often smaller than the number of ranks; all else along dim 0."""
    from torch.distributed.tensor import Shard

    if parameter.dim() == 3 and parameter.shape[0] % world_size():
        for dim in (1, 2):
            if parameter.shape[dim] % world_size() == 0:
                return Shard(dim)
    return Shard(0)


def unsharded(value: Tensor) -> Tensor:
    """A sharded tensor put together (on every rank; all must call it), any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, template: Tensor) -> Tensor:
    """A whole tensor, present on all ranks, sharded as ``template`` is; without communication."""
    if not isinstance(template, DTensor) or value.shape != template.shape:
        return value.to(template.device)
    from torch.distributed.tensor import distribute_tensor

    mesh = template.device_mesh
    return distribute_tensor(value.to(template.device), mesh, template.placements, src_data_rank=None)
