"""The other side of the recipes: a sampler and an adapter as trainers have them, of a point mass instead of a picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gspo import FlowSDE, SDEStep, rollout
from gspo.examples.pointmass import PointPolicy, reward

SIGMAS, WINDOW = torch.linspace(1, 0, 17).tolist(), (2, 3)


def sde_step(policy: Any, latents: Tensor, index: Tensor, step: int, **given: Any) -> SDEStep:
    """One step of the window: drawn with ``generator``, or scored with ``next_latents``."""
    velocity = policy(latents, torch.full((len(latents),), SIGMAS[step]), index)
    return FlowSDE().step(latents, velocity, SIGMAS[step], SIGMAS[step + 1], sigma_max=SIGMAS[1], **given)


@torch.no_grad()
def sample(policy: Any, prompts: int, group_size: int, generator: torch.Generator) -> dict[str, Any]:
    """Final latents, and (latents, next latents, mean) of every step in the window; members of a group share their noise."""
    index, kept = torch.arange(prompts).repeat_interleave(group_size), []
    x = torch.randn(prompts, 2, generator=generator)[index]
    for step, (sigma, sigma_next) in enumerate(zip(SIGMAS[:-1], SIGMAS[1:], strict=True)):
        if step in WINDOW:
            out = sde_step(policy, x, index, step, generator=generator)
            kept.append((x, out.next_latents, out.mean))
            x = out.next_latents
        else:
            x = x + (sigma_next - sigma) * policy(x, torch.full((len(x),), sigma), index)
    return {"final": x, "index": index, "steps": kept}


class PointAdapter:
    """Draws samples as objects that hold their trajectories, and scores a step of them anew."""

    def __init__(self, generator: torch.Generator) -> None:
        """``generator`` draws weights and samples."""
        self.transformer, self.generator, self.train_steps = PointPolicy(generator=generator), generator, WINDOW

    @torch.no_grad()
    def inference(self, prompts: int, group_size: int) -> list[SimpleNamespace]:
        """Each with its latents, prompt, reward, and (latents, next latents, mean) of its steps by number."""
        drawn = rollout(
            self.transformer, torch.randn(prompts, 2, generator=self.generator), SIGMAS, kernel=FlowSDE(), window=WINDOW,
            group_size=group_size, generator=self.generator,
        )  # fmt: skip
        rewards = reward(drawn.latents, drawn.index)
        return [
            SimpleNamespace(
                latents=drawn.latents[row],
                prompt=int(drawn.index[row]),
                reward=float(rewards[row]),
                steps={s.step: (s.latents[row], s.next_latents[row], s.mean[row]) for s in drawn.trajectory},
            )
            for row in range(len(drawn.index))
        ]

    def forward(self, latents: Tensor, next_latents: Tensor, step: int) -> SDEStep:
        """The step from ``latents`` to ``next_latents`` under the transformer as it is."""
        return sde_step(self.transformer, latents, torch.zeros(len(latents)), step, next_latents=next_latents)
