"""Run by torchrun (see test_gspo_ranks.py): each rank updates on its part of one rollout; rank 0 writes what came out."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from gspo import (
    FlowSDE,
    OnlineConfig,
    PolicyConfig,
    PolicyTrainer,
    SlidingWindow,
    group_advantages,
    group_statistics,
    policy_step,
    rollout,
)  # fmt: skip

SPLITS = {"uneven": [5, 7], "one rank without signal": [4, 8]}


def build() -> tuple[torch.nn.Linear, object, torch.Tensor, torch.Tensor]:
    """The same policy, rollout, rewards and groups everywhere; groups span the ranks."""
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.randn(3, 3, generator=g) * 0.1
    drawn = rollout(
        lambda x, s, i: layer(x), torch.randn(4, 3, generator=g), torch.linspace(1, 0, 9), kernel=FlowSDE(), window=(2, 3),
        group_size=3, generator=g,
    )  # fmt: skip
    rewards = drawn.latents.sum(1).clone()
    rewards[9] = torch.nan
    return layer, drawn, rewards, torch.tensor([0, 0, 1, 2, 1, 0, 2, 2, 1, 0, 3, 3])


def part(drawn, rows: torch.Tensor):  # type: ignore[no-untyped-def]
    def cut(step):  # type: ignore[no-untyped-def]
        return step._replace(
            **{k: getattr(step, k)[rows] for k in ("latents", "next_latents", "mean", "std", "log_prob_mean")}
        )

    return replace(
        drawn, latents=drawn.latents[rows], trajectory=tuple(cut(s) for s in drawn.trajectory),
        log_prob_mean=drawn.log_prob_mean[rows], index=drawn.index[rows],
    )  # fmt: skip


def run(rank: int, split: list[int], wrapped: bool) -> dict[str, torch.Tensor]:
    """Three inner epochs with a measured clip range on this rank's rows."""
    layer, drawn, rewards, ids = build()
    if len(split) == 2 and split[0] == 4:
        ids = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
        rewards[:4] = 1.0
    rows = torch.arange(12).split(split)[rank]
    everyone = dist.group.WORLD if dist.is_initialized() else None
    advantages = group_advantages(rewards[rows], ids[rows], process_group=everyone)
    model = torch.nn.parallel.DistributedDataParallel(layer) if wrapped else layer
    config = PolicyConfig(num_inner_epochs=3, max_grad_norm=1e9, reduce_gradients=not wrapped, target_clip_fraction=0.3)
    trainer = PolicyTrainer(list(layer.parameters()), torch.optim.SGD(layer.parameters(), lr=0.3), config)
    statistics = trainer.update(lambda x, s, i: model(x), part(drawn, rows), advantages, group_ids=ids[rows])
    counted = group_statistics(rewards[rows], ids[rows], process_group=everyone)
    return {
        "weight": layer.weight.detach().clone(),
        "clip_range": torch.tensor(statistics.clip_range),
        "num_samples": torch.tensor(statistics.num_samples),
        "counted": torch.tensor(counted),
        "advantages": advantages,
    }


def step_of_each_rank(rank: int) -> torch.Tensor:
    """`policy_step` with the same local indices on every rank: without group_ids they are different groups."""
    layer, *_ = build()
    config = OnlineConfig(window=SlidingWindow(8), group_size=2)
    trainer = PolicyTrainer(list(layer.parameters()), torch.optim.SGD(layer.parameters(), lr=0.1), PolicyConfig())
    report = policy_step(
        trainer, lambda x, s, i: layer(x), torch.randn(2 + rank, 3, generator=torch.Generator().manual_seed(rank)),
        torch.linspace(1, 0, 9), lambda x, i: 100 * rank + x[:, 0], config, generator=torch.Generator().manual_seed(rank),
    )  # fmt: skip
    return torch.tensor([report.groups.num_groups, float(report.advantages.abs().max())])


def main() -> None:
    """Every scenario, on every rank."""
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    for name, split in SPLITS.items():
        for wrapped in (False, True) if name == "uneven" else (False,):
            for key, value in run(rank, split, wrapped).items():
                results[f"{name}/{'ddp' if wrapped else 'own'}/{key}"] = value
    results["step"] = step_of_each_rank(rank)
    torch.save(results, f"{sys.argv[1]}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
