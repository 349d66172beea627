"""What the tests of the trainer of objectives share: a policy whose gradient can be written in one graph."""

from __future__ import annotations

from typing import Any

import torch
from gspo import NoiseLevels, ObjectiveConfig, ObjectiveTrainer, finished_samples, group_advantages
from gspo.forward import ForwardPoint, forward_points

NAN = float("nan")
LEVELS = NoiseLevels(count=3)


class Case:
    """A linear policy, finished samples, advantages with a NaN, a 0 and a flat group."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 3, generator=g) * 0.3)
        self.rollout = finished_samples(torch.randn(12, 3, generator=g), torch.arange(4).repeat_interleave(3))
        rewards = self.rollout.latents.sum(1).clone()
        rewards[3:6] = 0.5
        self.advantages = group_advantages(rewards, self.rollout.index)
        self.advantages[7], self.advantages[8] = NAN, 0.0
        self.points = forward_points(self.rollout, LEVELS, torch.Generator().manual_seed(5))

    def policy(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x @ self.weight * (1 + sigma[:, None])

    def trainer(self, objective: Any, lr: float = 0.0, **options: Any) -> ObjectiveTrainer:
        config = ObjectiveConfig(**{"max_grad_norm": 1e9, "seed": 5, **options})
        return ObjectiveTrainer([self.weight], torch.optim.SGD([self.weight], lr=lr), objective, config)

    def slow_gradient(self, objective: Any, old_weight: torch.Tensor | None = None) -> torch.Tensor:
        """One graph over all points and all samples with an advantage."""
        kept = torch.isfinite(self.advantages).nonzero()[:, 0]
        total = torch.zeros(())
        for point in self.points:
            x, sigma = point.latents[kept], point.sigma[kept]
            velocity = self.policy(x, sigma, kept)
            old = velocity.detach() if old_weight is None else x @ old_weight * (1 + sigma[:, None])
            part = ForwardPoint(x, sigma, point.target[kept])
            total = total + objective.loss(velocity, old, part, self.advantages[kept]).loss.mean() / len(self.points)
        return torch.autograd.grad(total, self.weight)[0]
