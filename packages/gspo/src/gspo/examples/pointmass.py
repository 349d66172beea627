"""A point mass in the plane, moved by reward: all of gspo in seconds on a CPU.

    python -m gspo.examples.pointmass --out pointmass.png

The base policy is the exact flow from noise to a blob at the origin. A small network on top of it is trained with
``reward = -distance^2`` to a target, and the blob moves there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo.loop import OnlineConfig, OnlineTrainer, StepReport
from gspo.reference import gaussian_velocity
from gspo.rollout import rollout
from gspo.sde import DanceSDE, FlowCPS, FlowSDE, Kernel
from gspo.step import PolicyConfig
from gspo.window import SlidingWindow

KERNELS: dict[str, Kernel] = {"flow_sde": FlowSDE(), "flow_cps": FlowCPS(), "dance_sde": DanceSDE()}
TARGET = (1.5, 0.5)
NUM_STEPS = 16


class PointPolicy(torch.nn.Module):
    """``velocity = exact velocity of N(0, 0.3^2) + network(x, sigma)``; the network starts at zero."""

    def __init__(self, width: int = 32, generator: torch.Generator | None = None) -> None:
        """``generator`` draws the first layers' weights."""
        super().__init__()
        layers = [torch.nn.Linear(3, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 2)]
        for layer, scale in zip(layers, (1.0, 1.0, 0.0), strict=True):
            torch.nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5, generator=generator)
            torch.nn.init.zeros_(layer.bias)
        self.network = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])

    def forward(self, latents: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        """The `gspo.rollout` signature; prompts play no part."""
        change: Tensor = self.network(torch.cat([latents, sigma[:, None]], 1))
        return gaussian_velocity(latents, sigma, 0.0, 0.3) + change


def reward(latents: Tensor, index: Tensor) -> Tensor:
    """Minus the squared distance to the target."""
    return -(latents - torch.tensor(TARGET)).square().sum(1)


@dataclass(frozen=True)
class PointMassRun:
    """What a run leaves: the steps' reports and samples of the policy before and after, (n, 2)."""

    reports: list[StepReport]
    before: Tensor
    after: Tensor


def train(
    *,
    iterations: int = 120,
    kernel: Kernel | None = None,
    policy: PolicyConfig | None = None,
    lr: float = 3e-3,
    seed: int = 0,
    progress: bool = False,
) -> PointMassRun:
    """Trains the point policy: 8 starts of groups of 12, windows of 2 of 16 steps, a tail of 4 second-order steps.

    Args:
        iterations: Rollouts, each with ``policy.num_inner_epochs`` updates.
        kernel: Of the stochastic steps; FlowSDE by default.
        policy: Ratio, clip range, epochs.
        lr: Adam's.
        seed: Of everything random.
        progress: Show a line of progress.
    """
    generator = torch.Generator().manual_seed(seed)
    model = PointPolicy(generator=generator)
    config = OnlineConfig(
        window=SlidingWindow(NUM_STEPS, size=2, interval=5),
        kernel=kernel or FlowSDE(),
        group_size=12,
        tail_steps=4,
        policy=policy or PolicyConfig(),
        seed=seed,
    )
    trainer = OnlineTrainer(list(model.parameters()), torch.optim.Adam(model.parameters(), lr=lr), config)
    sigmas = torch.linspace(1, 0, NUM_STEPS + 1)

    def sample() -> Tensor:
        noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
        return rollout(model, noise, sigmas, kernel=config.kernel, window=(0,), generator=generator).latents

    before, reports = sample(), []
    for iteration in range(iterations):
        reports.append(trainer.step(model, torch.randn(8, 2, generator=generator), sigmas, reward))
        if progress:
            summary = reports[-1].summary()
            line = f"iteration {iteration + 1:4d}/{iterations}  reward {summary['reward']:8.3f}  clip {summary['clip_fraction']:.2f}"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    return PointMassRun(reports, before, sample())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gspo.examples.pointmass", description="A point mass moved by reward."
    )
    parser.add_argument("--iterations", type=int, default=120, help="rollouts (default 120)")
    parser.add_argument("--kernel", choices=sorted(KERNELS), default="flow_sde", help="the stochastic steps")
    parser.add_argument(
        "--ratio", choices=["sequence", "step", "guarded"], default="sequence", help="the importance ratio"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", help="a picture to write (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.iterations < 1:
        parser.error(f"--iterations must be at least 1, got {options.iterations}")
    run = train(
        iterations=options.iterations,
        kernel=KERNELS[options.kernel],
        policy=PolicyConfig(ratio=options.ratio),
        seed=options.seed,
        progress=True,
    )
    index = torch.zeros(len(run.before), dtype=torch.long)
    before, after = (float(reward(samples, index).mean()) for samples in (run.before, run.after))
    print(f"mean reward of 300 samples: {before:.3f} before, {after:.3f} after")
    if options.out:
        from gspo.plot import save_point_mass

        updates = [r.update for r in run.reports]
        try:
            save_point_mass(
                options.out,
                run.before,
                run.after,
                TARGET,
                [r.summary()["reward"] for r in run.reports],
                [float(u.surrogate.clip_fraction) for u in updates],
                [u.clip_range for u in updates],
            )
        except (ImportError, OSError, ValueError) as error:
            parser.error(f"--out {options.out}: {error}")
        print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
