"""What `ObjectiveTrainer` and `RewardGradientTrainer` add to the forward and backward passes of the model alone (the named baseline).

Twice: with a model, whose passes differ by a percent or two from one time to the next, and with one of as many parameters whose passes
cost next to nothing, so that the difference is what the trainer does itself.

    python packages/gspo/benchmarks/bench_gspo_objectives.py --out benchmarks/results/gspo_objectives_overhead.json

Processor time, not the clock's, so that a busy machine does not matter much; both take turns within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gspo import (
    AdvantageWeightedMatching,
    DecaySchedule,
    DiffusionNFT,
    FlowDPPO,
    FlowSDE,
    ObjectiveConfig,
    ObjectiveTrainer,
    RewardGradientConfig,
    RewardGradientTrainer,
    draft_samples,
    finished_samples,
    rollout,
)  # fmt: skip
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from gspo_circumstances import circumstances

ROWS, TOKENS, CHANNELS, WIDTH = 32, 64, 16, 128


class Model(nn.Module):
    """Four layers of attention over 64 tokens of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(CHANNELS + 1, WIDTH), nn.Linear(WIDTH, CHANNELS)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, latents: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        level = sigma[:, None, None].expand(-1, TOKENS, 1).to(latents)
        return self.outside(self.body(self.inside(torch.cat([latents, level], 2))))


class _Free(torch.autograd.Function):
    """Velocity without any work; in the backward pass every parameter gets a gradient that lies ready."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = [torch.full_like(p, 1e-3) for p in parameters] if ctx.needs_input_grad[1] else []
        return latents.clone()

    @staticmethod
    def backward(ctx: Any, *outgoing: Tensor) -> tuple[Tensor, ...]:
        return (outgoing[0], *ctx.gradients)


class FreeModel(nn.Module):
    """As many parameters as `Model`, and no passes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in Model().parameters())

    def forward(self, latents: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        return _Free.apply(latents, *self.kept)  # type: ignore[no-any-return]


Works = tuple[Callable[[], object], Callable[[], object]]


def compare(real: Works, free: Works, rounds: int) -> dict[str, object]:
    """Median and quartiles of the ratio of processor times, and what an update takes beyond the passes of a model that costs nothing."""
    pairs, own = [], []
    for number in range(rounds + 1):
        seconds = []
        for work in (*real, *free):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        if number:  # the first round warms up
            pairs.append((seconds[0], seconds[1]))
            own.append(seconds[3] - seconds[2])
    ratios = sorted(b / a for a, b in pairs)
    return {
        "bare_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "own_ms": 1e3 * statistics.median(own),
        "own_quartiles_ms": [1e3 * sorted(own)[len(own) // 4], 1e3 * sorted(own)[(3 * len(own)) // 4]],
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "rounds": rounds,
    }


def cases(model: nn.Module) -> dict[str, Works]:
    """Passes alone, and the same passes as an update."""
    trained = list(model.parameters())
    weight, sigma = torch.randn(ROWS, TOKENS, CHANNELS), torch.rand(ROWS)
    index, advantages = torch.zeros(ROWS, dtype=torch.long), torch.randn(ROWS)
    done = finished_samples(weight, index)
    drawn = rollout(model, weight, torch.linspace(1, 0, 5), kernel=FlowSDE(), window=(0, 1))

    def passes(with_gradient: int, without: int = 0) -> Callable[[], object]:
        def work() -> None:
            with torch.no_grad():
                for _ in range(without):
                    model(weight, sigma, index)
            for _ in range(with_gradient):
                (model(weight, sigma, index) * weight).sum().backward()
            for parameter in trained:
                parameter.grad = None

        return work

    def still() -> torch.optim.Optimizer:
        return torch.optim.SGD(trained, lr=0.0)

    def update(
        objective: object, samples: object, *, moved: bool = False, walk_window: int = 0
    ) -> Callable[[], object]:
        config = ObjectiveConfig(walk_window=walk_window)
        trainer = ObjectiveTrainer(trained, still(), objective, config)  # type: ignore[arg-type]

        def work() -> None:
            if moved:  # an old policy that is not the policy
                trainer.iteration = 1
                if trainer.average is not None:
                    trainer.average.values[0].add_(1e-3)
            trainer.update(model, samples, advantages)  # type: ignore[arg-type]

        return work

    follows = DiffusionNFT(schedule=DecaySchedule(rate=1.0, cap=1.0))
    gradients = RewardGradientTrainer(trained, still(), RewardGradientConfig(last_steps=1))
    sigmas = torch.linspace(1, 0, 3)

    def ascend() -> None:
        x = draft_samples(model, weight, sigmas, index, last_steps=1)
        (-x.square().mean((1, 2))).mean().backward()
        for parameter in trained:
            parameter.grad = None

    reward = lambda x, i: -x.square().mean((1, 2))  # noqa: E731
    return {
        "AWM, two noise levels": (passes(2), update(AdvantageWeightedMatching(), done)),
        "AWM, with the walk ratio logged": (passes(2), update(AdvantageWeightedMatching(), done, walk_window=8)),
        "DiffusionNFT on policy, two noise levels": (passes(2), update(DiffusionNFT(), done)),
        "DiffusionNFT with an old policy, two noise levels": (passes(2, 2), update(follows, done, moved=True)),
        "divergence mask, window of two": (passes(2), update(FlowDPPO(kernel=FlowSDE()), drawn)),
        "DRaFT-1, two steps": (ascend, lambda: gradients.step(model, weight, sigmas, reward, index=index)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, free = [], cases(FreeModel())
    for what, works in cases(Model()).items():
        rows.append({"what": what, **compare(works, free[what], options.rounds)})
        print(rows[-1], flush=True)
    parameters = sum(p.numel() for p in Model().parameters())
    out = {"circumstances": circumstances(), "parameters": parameters, "rows": rows}
    options.out.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
