"""A loop in flow_grpo's style, on accelerate: one backward per denoising step.

``python -m gspo.examples.flow_grpo_style`` moves a point.
The ratio of a sequence needs all its steps, and such a loop holds the graph of one. So a pass without gradients finds the log-ratios,
`surrogate_gradient` says how much each counts, and every step adds its share.
"""

from typing import Any

import torch
from torch import Tensor

from gspo import gaussian_log_ratio, group_advantages, surrogate_gradient
from gspo.examples.pointmass import PointPolicy, reward
from gspo.examples.stand_ins import WINDOW, sample, sde_step


def update(accelerator: Any, policy: Any, optimizer: Any, samples: dict[str, Any], clip_range: float) -> None:
    """One inner epoch; the accelerator accumulates over the window's steps, and its backward divides by their number."""

    def log_ratio(position: int) -> Tensor:
        latents, next_latents, old_mean = samples["steps"][position]
        out = sde_step(policy, latents, samples["index"], WINDOW[position], next_latents=next_latents)
        return gaussian_log_ratio(next_latents, out.mean, old_mean, out.std)

    with torch.no_grad():
        known = torch.stack([log_ratio(position) for position in range(len(WINDOW))], 1)
    shares = surrogate_gradient(known, samples["advantages"], clip_range)
    for position in range(len(WINDOW)):
        with accelerator.accumulate(policy):
            accelerator.backward(len(WINDOW) * (shares[:, position] * log_ratio(position)).sum())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(policy.parameters(), 1e3)
            optimizer.step()
            optimizer.zero_grad()


def main(epochs: int = 60) -> list[float]:
    """Moves the point mass; returns the mean reward of each epoch."""
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError('this recipe needs accelerate: pip install "gspo[accelerate]"') from None
    accelerator = Accelerator(gradient_accumulation_steps=len(WINDOW), cpu=True)
    generator, rewards = torch.Generator().manual_seed(0), []
    policy = PointPolicy(generator=generator)
    policy, optimizer = accelerator.prepare(policy, torch.optim.Adam(policy.parameters(), lr=3e-3))
    for _ in range(epochs):
        samples = sample(policy, 8, 12, generator)
        values = reward(samples["final"], samples["index"])
        samples["advantages"] = group_advantages(values, samples["index"])
        for _ in range(2):
            update(accelerator, policy, optimizer, samples, clip_range=0.02)
        rewards.append(float(values.mean()))
    return rewards


if __name__ == "__main__":
    print("mean reward by epoch:", *(f"{r:.2f}" for r in main()))
