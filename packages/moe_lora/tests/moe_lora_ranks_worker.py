"""Two processes: DDP and fully_shard against one process. Run by test_moe_lora_ranks.py with torchrun; writes what it found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from moe_lora import MoELoRA, MoELoRAConfig, inject
from safetensors.torch import save_file
from torch import nn


def build() -> tuple[nn.Module, MoELoRA]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)]
    net = nn.Sequential(*blocks).requires_grad_(False)
    handle = inject(net, MoELoRAConfig(rank=4, alpha=8.0, top_k=2), [r"\d"])
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.5)
    return net, handle


def batch(rank: int | None) -> torch.Tensor:
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1))
    return x if rank is None else x[4 * rank : 4 * rank + 4]


def two_steps(net: nn.Module, handle: MoELoRA, x: torch.Tensor, coef: float) -> None:
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x).square().mean() + coef * handle.aux_loss()).backward()
        optimizer.step()


def sharding_lacks() -> str | None:
    """Why `fully_shard` cannot run on this machine's CPU, None if it can."""
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no fully_shard"
    if not hasattr(torch.cpu.current_stream(), "record_event"):
        return f"fully_shard of torch {torch.__version__} needs an accelerator"
    return None


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # the router losses are each rank's own, so the comparison with one process leaves them out; the second run has them
    for name, coef in (("ddp", 0.0), ("ddp_aux", 1.0)):
        net, handle = build()
        wrapped = nn.parallel.DistributedDataParallel(net)
        two_steps(wrapped, handle, batch(rank), coef)
        handle.save(out / name)
        save_file(handle.state_dict(), out / f"{name}.{rank}.safetensors")

    if sharding_lacks() is None:
        shard(out, rank)
    (out / f"done.{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


def shard(out: Path, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    net, handle = build()
    for block in net:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    two_steps(net, handle, batch(rank), 0.0)
    handle.save(out / "fsdp")
    # back into a sharded model of other weights
    other, fresh = build()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    for block in other:
        fully_shard(block, mesh=mesh)
    fresh.load(out / "fsdp")
    save_file(fresh.state_dict(), out / f"reloaded.{rank}.safetensors")
    save_file({"out": other(batch(0)).detach(), "want": net(batch(0)).detach()}, out / f"outputs.{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
