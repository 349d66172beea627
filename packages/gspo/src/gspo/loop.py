"""Rollout, reward, advantages, update: one step of online policy optimization, and a small trainer around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.advantage import GroupStatistics, Scale, group_advantages, group_statistics, multi_reward_advantages
from gspo.distributed import gather_rows
from gspo.rollout import Hook, Rollout, VelocityFunction, rollout
from gspo.sde import FlowSDE, Kernel
from gspo.step import PolicyConfig, PolicyTrainer, Reference, UpdateStatistics
from gspo.window import SlidingWindow

Rewards = Tensor | Sequence[float | None] | Mapping[str, Tensor | Sequence[float | None]]
RewardFunction = Callable[[Tensor, Tensor], Rewards]
"""``(final latents (b, ...), index (b,)) -> rewards (b,)``, or several of them by name; None or NaN where there is none."""


class StepReport(NamedTuple):
    """What one step did.

    Attributes:
        iteration: Its number, 0-based.
        window: Stochastic steps.
        rewards: (b,); with several rewards their weighted sum.
        parts: Every reward by name (empty if there is only one).
        advantages: (b,).
        groups: Groups, zero-variance groups and invalid rewards, over all ranks.
        update: What the update did.
        rollout: Samples and trajectory.
    """

    iteration: int
    window: tuple[int, ...]
    rewards: Float[Tensor, " b"]
    parts: dict[str, Tensor]
    advantages: Float[Tensor, " b"]
    groups: GroupStatistics
    update: UpdateStatistics
    rollout: Rollout

    def summary(self) -> dict[str, float]:
        """Scalars to log."""
        finite = self.rewards[torch.isfinite(self.rewards)]
        mean = float(finite.mean()) if len(finite) else float("nan")
        return {
            "reward": mean,
            **{f"reward_{name}": float(part.nanmean()) for name, part in self.parts.items()},
            "clip_fraction": float(self.update.surrogate.clip_fraction),
            "clip_range": self.update.clip_range,
            "approx_kl": float(self.update.surrogate.approx_kl),
            "ratio_mean": float(self.update.surrogate.ratio_mean),
            "ratio_std": float(self.update.surrogate.ratio_std),
            "kl": self.update.kl,
            "grad_norm": self.update.grad_norm,
            "zero_variance_groups": float(self.groups.num_zero_variance),
            "invalid_rewards": float(self.groups.num_invalid_rewards),
            "function_evaluations": float(self.rollout.num_function_evaluations),
        }


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Everything of an online run but the policy, its optimizer and the reward.

    Attributes:
        window: Schedule of the stochastic steps; its num_steps is the rollout's.
        kernel: Of the stochastic steps.
        group_size: Members per prompt, >= 2.
        tail_steps: Second-order steps after the window, or None for the remaining Euler steps.
        share_prefix: Take the steps before the window once per group.
        micro_batch_size: Rows of a rollout per call of the policy, None for all; ``policy.micro_batch_size`` is the update's.
        offload: Keep trajectories in CPU memory.
        advantage_scale: See `group_advantages`.
        reward_weights: By name, for rewards that come as a dict: each is normalised in its group (GDPO), then weighted. Empty: 1 each.
        policy: Ratio, clip range, epochs.
        seed: Of the rollouts' noise.
    """

    window: SlidingWindow
    kernel: Kernel = field(default_factory=FlowSDE)
    group_size: int = 8
    tail_steps: int | None = None
    share_prefix: bool = True
    micro_batch_size: int | None = None
    offload: bool = False
    advantage_scale: Scale = "group"
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 (a group of one has no advantage), got {self.group_size}")
        for name in ("tail_steps", "micro_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {getattr(self, name)}")
        if self.advantage_scale not in ("group", "global", "none"):
            raise ValueError(f"advantage_scale must be 'group', 'global' or 'none', got {self.advantage_scale!r}")


def as_rewards(values: Tensor | Sequence[float | None], count: int, device: torch.device, name: str = "") -> Tensor:
    """Rewards as (count,) fp32; None becomes NaN.

    Raises:
        ValueError: There are not ``count`` numbers.
    """
    what = f"reward_fn must return {count} numbers, one per sample" + (f", for {name!r}" if name else "")
    if isinstance(values, Tensor):
        if values.shape != (count,):
            raise ValueError(f"{what}, got a tensor of shape {tuple(values.shape)}")
        return values.detach().to(device, torch.float32)
    try:
        numbers = [float("nan") if v is None else float(v) for v in values]
    except TypeError:
        raise ValueError(f"{what}, got {type(values).__name__}") from None
    if len(numbers) != count:
        raise ValueError(f"{what}, got {len(numbers)}")
    return torch.tensor(numbers, device=device)


def _advantages(values: Rewards, ids: Tensor, config: OnlineConfig) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Rewards, their parts and their advantages."""
    count, device, scale = len(ids), ids.device, config.advantage_scale
    if not isinstance(values, Mapping):
        rewards = as_rewards(values, count, device)
        return rewards, {}, group_advantages(rewards, ids, scale=scale)
    parts = {name: as_rewards(part, count, device, name) for name, part in values.items()}
    weights = dict(config.reward_weights) or dict.fromkeys(parts, 1.0)
    advantages = multi_reward_advantages(parts, weights, ids, scale=scale)
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum(0), parts, advantages


def policy_step(
    trainer: PolicyTrainer,
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "p ..."],
    sigmas: Float[Tensor, " t"],
    reward_fn: RewardFunction,
    config: OnlineConfig,
    *,
    iteration: int = 0,
    generator: torch.Generator | None = None,
    group_ids: Int[Tensor, " p"] | None = None,
    reference: Reference | None = None,
    record: Hook | None = None,
    replay: Hook | None = None,
) -> StepReport:
    """One step: draw groups, reward them, update the policy.

    Args:
        trainer: Holds parameters, optimizer and clip range.
        velocity_fn: The policy, see `rollout`.
        noise: One start per prompt.
        sigmas: Schedule, ``config.window.num_steps + 1`` levels.
        reward_fn: Called with final latents and the prompt of each; see `RewardFunction`. A NaN leaves its sample out.
        config: See `OnlineConfig`.
        iteration: Where the window stands.
        generator: Of the rollout's noise.
        group_ids: Group of each prompt, if groups span ranks (or rows); by default every row of every rank is its own group.
        reference: See `PolicyTrainer.update`, as is replay.
        record: See `rollout`.
        replay: See `PolicyTrainer.update`.

    Raises:
        ValueError: Sizes do not fit, or see the functions it calls.
    """
    if len(sigmas) != config.window.num_steps + 1:
        raise ValueError(
            f"sigmas must have window.num_steps + 1 = {config.window.num_steps + 1} entries, got {len(sigmas)}"
        )
    window = config.window.at(iteration)
    drawn = rollout(
        velocity_fn,
        noise,
        sigmas,
        kernel=config.kernel,
        window=window,
        group_size=config.group_size,
        share_prefix=config.share_prefix,
        generator=generator,
        offload=config.offload,
        tail_steps=config.tail_steps,
        micro_batch_size=config.micro_batch_size,
        record=record,
    )
    with torch.no_grad():
        values = reward_fn(drawn.latents, drawn.index)
    if group_ids is None:
        group_ids = torch.arange(len(noise), device=drawn.index.device)
        group_ids = group_ids + gather_rows(group_ids)[1].start
    rewards, parts, advantages = _advantages(values, group_ids.to(drawn.index.device)[drawn.index], config)
    groups = group_statistics(rewards, group_ids[drawn.index])
    update = trainer.update(velocity_fn, drawn, advantages, config.kernel, reference=reference, replay=replay)
    return StepReport(iteration, window, rewards, parts, advantages, groups, update, drawn)


class OnlineTrainer:
    """A small trainer: `policy_step` with a counter, a generator and a state that resumes exactly.

    The policy stays the caller's: any callable with parameters. See ``gspo.examples.pointmass``.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: OnlineConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draws the rollouts' noise from a generator on ``device``."""
        self.config, self.iteration = config, 0
        self.trainer = PolicyTrainer(parameters, optimizer, config.policy)
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def step(
        self,
        velocity_fn: VelocityFunction,
        noise: Float[Tensor, "p ..."],
        sigmas: Float[Tensor, " t"],
        reward_fn: RewardFunction,
        *,
        group_ids: Int[Tensor, " p"] | None = None,
        reference: Reference | None = None,
        record: Hook | None = None,
        replay: Hook | None = None,
    ) -> StepReport:
        """One `policy_step`, at the trainer's iteration."""
        report = policy_step(
            self.trainer,
            velocity_fn,
            noise,
            sigmas,
            reward_fn,
            self.config,
            iteration=self.iteration,
            generator=self.generator,
            group_ids=group_ids,
            reference=reference,
            record=record,
            replay=replay,
        )
        self.iteration += 1
        return report

    def state_dict(self) -> dict[str, Tensor]:
        """Iteration, generator and clip ranges as tensors (for safetensors); parameters and optimizer are the caller's."""
        ranges = {f"policy.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.trainer.state_dict().items()}
        return {"iteration": torch.tensor(self.iteration), "generator": self.generator.get_state(), **ranges}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self.iteration = int(state["iteration"])
        self.generator.set_state(state["generator"].cpu())
        self.trainer.load_state_dict(
            {k.removeprefix("policy."): float(v) for k, v in state.items() if k.startswith("policy.")}
        )
