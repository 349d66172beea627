"""A trainer in Flow-Factory's style, where both methods go into a subclass of its ``GRPOTrainer``; run it with ``python -m``."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gspo import gaussian_log_ratio, group_advantages, surrogate_gradient
from gspo.examples.stand_ins import PointAdapter


class GSPOTrainer:
    """An adapter draws and scores, samples are objects that hold their trajectories, clip ranges are pairs around 0, as there."""

    def __init__(self, adapter: Any, optimizer: Any, training_args: Any, backward: Any = Tensor.backward) -> None:
        self.adapter, self.optimizer, self.training_args, self.backward = adapter, optimizer, training_args, backward

    def log_ratio(self, batch: list[Any], step: int) -> Tensor:
        """Of one step, (b,)."""
        latents, next_latents, old_mean = (torch.stack(x) for x in zip(*(s.steps[step] for s in batch), strict=True))
        out = self.adapter.forward(latents, next_latents, step)
        return gaussian_log_ratio(next_latents, out.mean, old_mean, out.std)

    def optimize(self, samples: list[Any]) -> None:
        """The update: batches, steps, one optimizer step per inner epoch."""
        args, steps = self.training_args, self.adapter.train_steps
        (low, high), size, most = args.clip_range, args.per_device_batch_size, args.adv_clip_range[1]
        for batch in (
            samples[i : i + size] for _ in range(args.num_inner_epochs) for i in range(0, len(samples), size)
        ):
            with torch.no_grad():
                known, gains = torch.stack([self.log_ratio(batch, t) for t in steps], 1), [s.advantage for s in batch]
            shares = surrogate_gradient(known, gains, (-low, high), max_advantage=most, reduction="sum") / len(samples)
            for share, step in zip(shares.T, steps, strict=True):
                self.backward((share * self.log_ratio(batch, step)).sum())
            if batch[-1] is samples[-1]:
                self.optimizer.step()
                self.optimizer.zero_grad()


def main(epochs: int = 60) -> list[float]:
    """Moves the point mass; returns the mean reward of each epoch."""
    args = {"clip_range": (-0.02, 0.02), "adv_clip_range": (-5, 5), "per_device_batch_size": 40, "num_inner_epochs": 2}
    adapter, rewards = PointAdapter(torch.Generator().manual_seed(0)), []
    optimizer = torch.optim.Adam(adapter.transformer.parameters(), lr=3e-3)
    trainer = GSPOTrainer(adapter, optimizer, SimpleNamespace(**args))
    for _ in range(epochs):
        samples = adapter.inference(8, 12)
        advantages = group_advantages([s.reward for s in samples], [s.prompt for s in samples])
        for s, advantage in zip(samples, advantages, strict=True):
            s.advantage = advantage
        trainer.optimize(samples)
        rewards.append(sum(s.reward for s in samples) / len(samples))
    return rewards


if __name__ == "__main__":
    print("mean reward by epoch:", *(f"{r:.2f}" for r in main()))
