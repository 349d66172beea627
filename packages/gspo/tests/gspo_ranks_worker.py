"""Run by torchrun (see test_gspo_ranks.py): each rank updates on its part of one rollout; rank 0 writes what came out."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from gspo import (
    FlowSDE,
    OnlineConfig,
    OnlineTrainer,
    PolicyConfig,
    PolicyTrainer,
    RobustReward,
    SlidingWindow,
    auto_clip_range,
    group_advantages,
    group_statistics,
    multi_reward_advantages,
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


def run(rank: int, sizes: list[int], wrapped: bool) -> dict[str, torch.Tensor]:
    """Three inner epochs with a measured clip range on this rank's rows."""
    layer, drawn, rewards, ids = build()
    if len(sizes) == 2 and sizes[0] == 4:
        ids = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
        rewards[:4] = 1.0
    rows = torch.arange(12).split(sizes)[rank]
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


def local_by_default(rank: int) -> torch.Tensor:
    """Pure functions with the same ids on both ranks: nothing is mixed, and one rank alone may call them."""
    rewards, ids = torch.tensor([0.0, 1.0]) + 100 * rank, torch.tensor([0, 0])
    found = [
        group_advantages(rewards, ids, eps=0.0),
        multi_reward_advantages({"a": rewards}, {"a": 1.0}, ids, eps=0.0),
        torch.tensor(group_statistics(rewards, ids)).float(),
        torch.tensor([auto_clip_range(torch.tensor([1.1, 1.2]) + rank, 0.5)]),
    ]
    if rank == 0:  # would wait for the other one for ever
        group_advantages([1.0, 2.0], [5, 5])
        group_statistics([1.0, 2.0], [5, 5])
        local = PolicyConfig(), torch.nn.Parameter(torch.eye(3))
        drawn = rollout(
            lambda x, s, i: x @ local[1],
            torch.ones(1, 3),
            torch.linspace(1, 0, 5),
            kernel=FlowSDE(),
            window=(0,),
            group_size=3,
        )
        trainer = PolicyTrainer([local[1]], torch.optim.SGD([local[1]], lr=0.1), local[0], process_group=None)
        assert trainer.update(lambda x, s, i: x @ local[1], drawn, [1.0, 0.0, -1.0]).num_samples == 3
    return torch.cat(found)


def split(prompts: int, breaks: str = "") -> dict[str, torch.Tensor]:
    """Three steps on one batch that the ranks share; ``breaks`` names what goes wrong on the last rank only."""
    layer, *_ = build()
    rank = dist.get_rank() if dist.is_initialized() else 0
    last = rank == (dist.get_world_size() if dist.is_initialized() else 1) - 1
    options = PolicyConfig(on_nonfinite="skip", micro_batch_size=3, max_advantage=1.2)
    config = OnlineConfig(
        window=SlidingWindow(8), group_size=4, split_batch=True, policy=options, tail_steps=3, micro_batch_size=4,
        reward_weights={"a": 1.0, "b": 0.5},
    )  # fmt: skip
    trainer = OnlineTrainer(list(layer.parameters()), torch.optim.Adam(layer.parameters(), lr=0.02), config)
    now = {"step": 0}

    def policy(x, s, i):  # type: ignore[no-untyped-def]
        velocity = layer(x) * (1 + 0.1 * i[:, None])
        return velocity * torch.nan if breaks == "velocity" and last and now["step"] == 1 else velocity

    def judge(x):  # type: ignore[no-untyped-def]
        if breaks == "reward" and last and now["step"] == 1:
            raise ConnectionError("no judge here")
        return {"a": x[:, 0], "b": [None if v < 0 else float(v) for v in x[:, 1]]}

    robust, metrics = RobustReward(judge, retries=1, wait_s=0.0), {}
    for step in range(3):
        now["step"] = step
        noise = torch.randn(prompts, 3, generator=torch.Generator().manual_seed(step))
        report = trainer.step(policy, noise, torch.linspace(1, 0, 9), lambda x, i: robust(x))
        metrics |= {f"{step}.{k}": torch.tensor(v) for k, v in report.summary().items()}
    return {"weight": layer.weight.detach().clone(), "generator": trainer.generator.get_state(), **metrics}


def disagree(rank: int) -> torch.Tensor:
    """Ranks that were given different noise for one batch."""
    layer, *_ = build()
    config = OnlineConfig(window=SlidingWindow(8), group_size=4, split_batch=True)
    trainer = OnlineTrainer(list(layer.parameters()), torch.optim.SGD(layer.parameters(), lr=0.1), config)
    try:
        trainer.step(lambda x, s, i: layer(x), torch.randn(2, 3) + rank, torch.linspace(1, 0, 9), lambda x, i: x[:, 0])
    except ValueError as error:
        return torch.tensor("noise must be the same on all ranks" in str(error))
    return torch.tensor(False)


SPLIT_BATCHES = {
    "whole groups": (4, ""),
    "cut groups": (3, ""),
    "one broken": (4, "velocity"),
    "one judge": (4, "reward"),
}


def main() -> None:
    """Every scenario, on every rank."""
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    for name, sizes in SPLITS.items():
        for wrapped in (False, True) if name == "uneven" else (False,):
            for key, value in run(rank, sizes, wrapped).items():
                results[f"{name}/{'ddp' if wrapped else 'own'}/{key}"] = value
    results["step"] = step_of_each_rank(rank)
    results["local"] = local_by_default(rank)
    results["disagree"] = disagree(rank)
    for name, (prompts, breaks) in SPLIT_BATCHES.items():
        results |= {f"{name}/{k}": v for k, v in split(prompts, breaks).items()}
    torch.save(results, f"{sys.argv[1]}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
