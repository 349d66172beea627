"""Run by torchrun (see test_gspo_objective_ranks.py): each rank updates on its part of the same samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from gspo import (
    AdvantageWeightedMatching,
    DecaySchedule,
    DiffusionNFT,
    NoiseLevels,
    ObjectiveConfig,
    ObjectiveTrainer,
    RewardGradientConfig,
    RewardGradientTrainer,
    finished_samples,
    whiten,
)  # fmt: skip
from gspo.forward import forward_points

SPLIT = [5, 7]
LEVELS = NoiseLevels(count=2)
OBJECTIVES = {
    "nft": DiffusionNFT(levels=LEVELS, schedule=DecaySchedule(rate=0.3)),
    "awm": AdvantageWeightedMatching(levels=LEVELS, clip_range=0.01),
}


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve samples and advantages, one of them missing."""
    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(12, generator=g)
    advantages[9] = torch.nan
    return torch.randn(12, 3, generator=g), advantages


@dataclass
class Part:
    """The whole batch's points, of which this rank has some rows: what one process would draw."""

    objective: object
    rows: torch.Tensor

    def __getattr__(self, name: str) -> object:
        return getattr(self.objective, name)

    def points(self, rollout, generator):  # type: ignore[no-untyped-def]
        data, _ = samples()
        whole = finished_samples(data, torch.arange(12))
        return [p.rows(self.rows, data.device) for p in forward_points(whole, LEVELS, generator)]


def run(name: str, rows: torch.Tensor, group, wrapped: bool, first_missing: bool = False) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Three updates of two epochs on some of the rows."""
    layer = torch.nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 0.3
    data, advantages = samples()
    model = torch.nn.parallel.DistributedDataParallel(layer) if wrapped else layer
    config = ObjectiveConfig(
        num_inner_epochs=2, max_grad_norm=1e9, reduce_gradients=not wrapped, drop_silent_rows=not wrapped
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    objective = Part(OBJECTIVES[name], rows)
    trainer = ObjectiveTrainer(list(layer.parameters()), optimizer, objective, config, process_group=group)
    if first_missing:
        advantages[:5] = torch.nan
    part = finished_samples(data[rows], rows)
    for _ in range(3):
        statistics = trainer.update(lambda x, s, i: model(x) * (1 + s[:, None]), part, advantages[rows])
    average = trainer.average.values[0] if trainer.average else layer.weight.detach()
    return {
        "weight": layer.weight.detach().clone(),
        "old policy": average.clone(),
        "num_samples": torch.tensor(statistics.num_samples),
        "norm": torch.tensor(statistics.grad_norm),
    }


def ascend(rows: torch.Tensor, group) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Direct reward gradients on some of the rows."""
    weight = torch.nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 0.3)
    data, advantages = samples()
    trainer = RewardGradientTrainer(
        [weight], torch.optim.SGD([weight], lr=0.1), RewardGradientConfig(method="refl"), process_group=group
    )
    reward = lambda x, i: x.sum(1) * torch.where(torch.isnan(advantages[i]), torch.nan, 1.0)  # noqa: E731
    for _ in range(3):
        statistics = trainer.step(lambda x, s, i: x @ weight, data[rows], torch.linspace(1, 0, 5), reward, index=rows)
    return {"weight": weight.detach().clone(), "num_samples": torch.tensor(statistics.num_samples)}


def main() -> None:
    """Every scenario, on every rank."""
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    group = dist.group.WORLD
    rows = torch.arange(12).split(SPLIT)[rank]
    for name in OBJECTIVES:
        for kind, wrapped, missing in (("own", False, False), ("ddp", True, False), ("one rank without", False, True)):
            for key, value in run(name, rows, group, wrapped, missing).items():
                results[f"{kind}/{name}/{key}"] = value
    for key, value in ascend(rows, group).items():
        results[f"ascend/{key}"] = value
    results["white"] = whiten(samples()[1][rows], process_group=group)
    results["alone"] = whiten(samples()[1][rows])
    torch.save(results, f"{sys.argv[1]}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
