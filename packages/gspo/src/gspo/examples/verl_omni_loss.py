"""GSPO's loss with verl-omni's signature and metric names.

``python -m gspo.examples.verl_omni_loss`` moves a point.
There: ``register_diffusion_loss("gspo")`` on a ``DiffusionLossFn`` that calls it. Rows that hold one step, log-probs (b,), have the step
ratios that verl-omni computes; rows that hold all steps of a trajectory, (b, t), have GSPO's ratio of the sequence.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gspo import FlowSDE, clipped_surrogate_loss, group_advantages, rescore, rollout, sequence_importance_ratio
from gspo.examples.pointmass import PointPolicy, reward
from gspo.examples.stand_ins import SIGMAS, WINDOW


def compute_loss(
    *, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, config: Any, rollout_is_weights: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Log-probs in nats per element; advantages and weights of the rollout's correction (b,)."""
    options, log_ratio = config.diffusion_loss, log_prob.float() - old_log_prob.float()
    ratio = (
        log_ratio.exp() if log_prob.dim() == 1 else sequence_importance_ratio(log_prob.float(), old_log_prob.float())
    )
    weights = None if rollout_is_weights is None else rollout_is_weights.detach()
    surrogate = clipped_surrogate_loss(
        ratio, advantages, options.clip_ratio, sample_weights=weights, max_advantage=options.adv_clip_max
    )
    above, below = (ratio - 1 > options.clip_ratio).float().mean(), (1 - ratio > options.clip_ratio).float().mean()
    metrics = {"ppo_kl": -log_ratio.mean(), "ratio_mean": ratio.mean(), "ratio_std": ratio.std()}
    metrics |= {"pg_clipfrac": above + below, "pg_clipfrac_higher": above, "pg_clipfrac_lower": below}
    return surrogate.loss, {f"actor/{name}": float(value.detach()) for name, value in metrics.items()}


def main(epochs: int = 60) -> list[float]:
    """Moves the point mass; returns the mean reward of each epoch."""
    config = SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=0.02, adv_clip_max=5.0))
    generator, rewards = torch.Generator().manual_seed(0), []
    policy = PointPolicy(generator=generator)
    optimizer, options = torch.optim.Adam(policy.parameters(), lr=3e-3), {"group_size": 12, "generator": generator}
    for _ in range(epochs):
        noise = torch.randn(8, 2, generator=generator)
        drawn = rollout(policy, noise, SIGMAS, kernel=FlowSDE(), window=WINDOW, **options)  # type: ignore[arg-type]
        values = reward(drawn.latents, drawn.index)
        batch: Any = {"old_log_prob": drawn.log_prob_mean, "advantages": group_advantages(values, drawn.index)}
        for _ in range(2):
            optimizer.zero_grad()
            loss, _ = compute_loss(log_prob=rescore(policy, drawn).log_prob_mean, config=config, **batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        rewards.append(float(values.mean()))
    return rewards


if __name__ == "__main__":
    print("mean reward by epoch:", *(f"{r:.2f}" for r in main()))
