"""`diagnose`: is there anything to learn from, before an hour is spent on learning it?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.advantage import check_weights, nan_sum
from gspo.checks import one_line
from gspo.inputs import as_ids, as_numbers
from gspo.loop import OnlineConfig, RewardFunction, Rewards, as_rewards, policy_step
from gspo.objective_loop import objective_step
from gspo.objective_trainer import ObjectiveConfig, ObjectiveTrainer
from gspo.points import Objective
from gspo.reward import TotalsAndParts
from gspo.rollout import VelocityFunction, rollout
from gspo.signal_estimators import (
    ClipActivity,
    ControlledVariance,
    GradientSignal,
    clip_activity,
    controlled_variance,
    gradient_signal,
)
from gspo.signal_log import flat_gradient
from gspo.step import PolicyTrainer

Starts = Callable[[int], Tensor]
"""``number of the batch -> noise (p, ...)``: one start per prompt, fresh for every batch. It may change the prompts too."""


class BatchOutcome(NamedTuple):
    """What one batch gave; its gradient lies in the parameters.

    Attributes:
        rewards: (b,).
        group_ids: (b,).
        free_rewards: Of groups whose members share nothing but the prompt, if any were drawn.
        free_group_ids: Their groups.
    """

    rewards: Float[Tensor, " b"]
    group_ids: Int[Tensor, " b"]
    free_rewards: Float[Tensor, " f"] | None = None
    free_group_ids: Int[Tensor, " f"] | None = None


class Diagnosis(NamedTuple):
    """What several independent batches at the same weights say of a setting.

    Attributes:
        gradient: Signal, noise, cosine, samples needed.
        controlled: What of the reward's spread the trained steps control; None where nothing was drawn to compare.
        clip: What norm clipping does.
        updates_to_signal: ``noise / signal``: updates until the sum of signals is as long as the sum of noises. The policy must not
            move far within that many: this is what bounds the learning rate. Infinite where no signal is seen.
        mean_reward: Over all batches.
        samples_per_batch: Behind each gradient.
        num_batches: Gradients compared.
    """

    gradient: GradientSignal
    controlled: ControlledVariance | None
    clip: ClipActivity
    updates_to_signal: float
    mean_reward: float
    samples_per_batch: float
    num_batches: int

    def summary(self) -> dict[str, float]:
        """Scalars to log."""
        controlled = self.controlled or ControlledVariance(math.nan, math.nan, math.nan)
        return {
            "gradient_cosine": self.gradient.cosine,
            "gradient_cosine_error": self.gradient.cosine_error,
            "signal_share": self.gradient.share,
            "samples_for_half_cosine": self.gradient.samples_for_half,
            "samples_at_least": self.gradient.samples_at_least,
            "controlled_share": controlled.share,
            "controlled_spread": math.sqrt(controlled.controlled),
            "total_spread": math.sqrt(controlled.total),
            "clipped": self.clip.fraction,
            "relative_norm": self.clip.relative_norm,
            "updates_to_signal": self.updates_to_signal,
            "reward": self.mean_reward,
        }

    def report(self) -> str:
        """One line per reading, with what to look at next (docs/guides/signal.md)."""
        g = self.gradient
        lines = [
            f"{self.num_batches} batches of {self.samples_per_batch:g} samples, mean reward {self.mean_reward:.3f}",
            f"cosine of two batches' gradients   {g.cosine:6.3f} +- {g.cosine_error:.3f}",
            f"signal in the squared gradient     {g.share:6.1%}",
            f"samples for a cosine of .5         {g.samples_for_half:6.0f}   (at least {g.samples_at_least:.0f})",
            f"updates until signal passes noise  {self.updates_to_signal:6.1f}",
        ]
        if self.controlled is not None:
            c = self.controlled
            spread = f"(spread {math.sqrt(c.controlled):.3f} of {math.sqrt(c.total):.3f})"
            lines.append(f"reward variance under control      {c.share:6.1%}   {spread}")
        lines.append(
            f"gradients shortened by the clip    {self.clip.fraction:6.1%}   "
            f"(median norm {self.clip.relative_norm:.2g} of the limit)"
        )
        return "\n".join(lines)


def diagnose(
    batch: Callable[[int], BatchOutcome],
    parameters: Sequence[torch.nn.Parameter],
    *,
    num_batches: int = 8,
    max_grad_norm: float = 1.0,
) -> Diagnosis:
    """Draws independent batches at the present weights, compares their gradients, and changes nothing.

    Args:
        batch: Draws batch i, leaves its gradient in the parameters (`flat_gradient` reads it there), takes no step. `policy_batches` and
            `objective_batches` make such functions; anything that calls backward will do.
        parameters: The trained ones. Their gradients are None afterwards.
        num_batches: At least 3. The cosine's error falls like 1 / num_batches where there is no signal.
        max_grad_norm: What training clips to.

    Returns:
        See `Diagnosis`.

    Raises:
        ValueError: Fewer than 3 batches, a batch left no gradient, or weights have moved.
    """
    if not isinstance(num_batches, int) or num_batches < 3:
        raise ValueError(f"num_batches must be at least 3 (an error bar needs them), got {one_line(num_batches)}")
    if not isinstance(max_grad_norm, (int, float)) or not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, got {one_line(max_grad_norm)}")
    trained = list(parameters)
    if not trained:
        raise ValueError("parameters must hold at least one parameter, got none")
    before = [p.detach().clone() for p in trained]
    gradients, outcomes = [], []
    try:
        for number in range(num_batches):
            for parameter in trained:
                parameter.grad = None
            outcomes.append(_read(batch(number), number))
            if all(p.grad is None for p in trained):
                raise ValueError(f"batch must leave a gradient in the parameters, batch {number} left none")
            gradients.append(flat_gradient(trained).cpu())
            if not bool(torch.isfinite(gradients[-1]).all()):
                raise ValueError(f"gradients must be finite, got NaN or infinity in batch {number}")
    finally:
        for parameter in trained:
            parameter.grad = None
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, trained, strict=True)):
        raise ValueError("batch must not move the parameters (use a learning rate of 0), and they have moved")
    samples = sum(float(torch.isfinite(o.rewards).sum()) for o in outcomes) / num_batches
    found = gradient_signal(torch.stack(gradients), samples)
    return Diagnosis(
        found,
        _controlled(outcomes),
        clip_activity(torch.stack(gradients).norm(dim=1), max_grad_norm),
        found.squared_noise / found.squared_signal if found.squared_signal > 0 else math.inf,
        float(torch.cat([o.rewards[torch.isfinite(o.rewards)].cpu().double() for o in outcomes]).mean()),
        samples,
        num_batches,
    )


def _read(outcome: BatchOutcome, number: int) -> BatchOutcome:
    """What a batch gave, as tensors; rewards in any form that `group_advantages` takes.

    Raises:
        ValueError: It is no outcome, its lengths differ, or no reward in it is finite.
    """
    if not isinstance(outcome, BatchOutcome):
        raise ValueError(f"batch must return a BatchOutcome, batch {number} returned {type(outcome).__name__}")

    def both(rewards: Any, ids: Any, name: str) -> tuple[Tensor, Tensor]:
        values, groups = as_numbers(f"{name}rewards", rewards), as_ids(f"{name}group_ids", ids)
        if values.dim() != 1 or groups.shape != values.shape:
            raise ValueError(
                f"{name}rewards and {name}group_ids of batch {number} must both be (b,), got {tuple(values.shape)} and {tuple(groups.shape)}"
            )
        if not bool(torch.isfinite(values).any()):
            raise ValueError(
                f"{name}rewards of batch {number} must hold a finite number, got only None, NaN or infinity"
            )
        return values, groups

    rewards, ids = both(outcome.rewards, outcome.group_ids, "")
    if (outcome.free_rewards is None) != (outcome.free_group_ids is None):
        raise ValueError(f"free_rewards and free_group_ids must be given together, batch {number} gave one of them")
    if outcome.free_rewards is None:
        return BatchOutcome(rewards, ids)
    return BatchOutcome(rewards, ids, *both(outcome.free_rewards, outcome.free_group_ids, "free_"))


def _controlled(outcomes: Sequence[BatchOutcome]) -> ControlledVariance | None:
    """Pools the batches; groups of different batches are different groups."""

    def pooled(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        ids, start = [], 0
        for _, group_ids in pairs:
            _, local = torch.unique(group_ids, return_inverse=True)
            ids.append(local + start)
            start += int(local.max()) + 1
        return torch.cat([rewards for rewards, _ in pairs]), torch.cat(ids)

    free = [
        (o.free_rewards, o.free_group_ids)
        for o in outcomes
        if o.free_rewards is not None and o.free_group_ids is not None
    ]
    if not free:
        return None
    return controlled_variance(*pooled([(o.rewards, o.group_ids) for o in outcomes]), *pooled(free))


def _still(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that takes no step."""
    return torch.optim.SGD(list(parameters), lr=0.0)


def policy_batches(
    velocity_fn: VelocityFunction,
    parameters: Sequence[torch.nn.Parameter],
    starts: Starts,
    sigmas: Float[Tensor, " t"],
    reward_fn: RewardFunction,
    config: OnlineConfig,
    *,
    iteration: int = 0,
    free: bool = True,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Callable[[int], BatchOutcome]:
    """Batches of a ratio method, as `policy_step` would train on them at ``iteration`` (which decides where the window stands).

    Args:
        velocity_fn: The policy.
        parameters: The trained ones.
        starts: Noise of batch i, one start per prompt, or with ``config.own_noise`` per member.
        sigmas: Schedule.
        reward_fn: See `policy_step`.
        config: The run's own.
        iteration: Where the window stands.
        free: Draw as many samples again, each with a start of its own, to say what of the reward's spread the window controls.
        generator: Of the rollouts' noise and of the free starts.
        options: For `policy_step` (reference, group_ids, record, replay).
    """
    policy = replace(config.policy, num_inner_epochs=1, max_grad_norm=math.inf)
    still = replace(config, policy=policy)
    trainer = PolicyTrainer(list(parameters), _still(parameters), policy)

    def batch(number: int) -> BatchOutcome:
        noise = starts(number)
        report = policy_step(
            trainer, velocity_fn, noise, sigmas, reward_fn, still, iteration=iteration, generator=generator, **options
        )
        ids, rewards = report.group_ids, report.rewards
        if not free or config.own_noise:  # starts of their own leave nothing to compare with
            return BatchOutcome(rewards, ids)
        members = config.group_size
        drawn = rollout(
            lambda x, sigma, index: velocity_fn(x, sigma, index // members),
            _like(noise, members, generator),
            sigmas,
            kernel=config.kernel,
            window=report.window,
            generator=generator,
            tail_steps=config.tail_steps,
            micro_batch_size=config.micro_batch_size,
        )
        free_ids = drawn.index // members
        with torch.no_grad():
            values = reward_fn(drawn.latents, free_ids)
        return BatchOutcome(rewards, ids, _total(values, config.reward_weights, free_ids), free_ids)

    return batch


def _like(noise: Tensor, copies: int, generator: torch.Generator | None) -> Tensor:
    where = noise.device if generator is None else generator.device
    shape = (len(noise) * copies, *noise.shape[1:])
    return torch.randn(shape, generator=generator, device=where, dtype=torch.float32).to(noise)


def _total(values: Rewards, weights: Mapping[str, float], ids: Tensor) -> Tensor:
    """One reward per sample, several weighted."""
    count, device = len(ids), ids.device
    if not isinstance(values, Mapping):
        return as_rewards(values.totals if isinstance(values, TotalsAndParts) else values, count, device)
    parts = {name: as_rewards(part, count, device, name) for name, part in values.items()}
    used = dict(weights) or dict.fromkeys(parts, 1.0)
    check_weights(parts, used)
    return nan_sum([used[name] * part for name, part in parts.items() if used[name] != 0])


def objective_batches(
    velocity_fn: VelocityFunction,
    parameters: Sequence[torch.nn.Parameter],
    starts: Starts,
    sigmas: Float[Tensor, " t"],
    reward_fn: RewardFunction,
    objective: Objective[Any],
    *,
    group_size: int = 8,
    micro_batch_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Callable[[int], BatchOutcome]:
    """Batches of an objective of the forward process, as `objective_step` would train on them, on policy.

    Members of a group have starts of their own here, so that nothing is left that the trained steps could not control.

    Args:
        velocity_fn: The policy.
        parameters: The trained ones.
        starts: Noise of batch i, one start per sample: (p * group_size, ...).
        sigmas: Schedule of the solver.
        reward_fn: See `objective_step`.
        objective: DiffusionNFT, AdvantageWeightedMatching, or one of yours.
        group_size: Members per prompt.
        micro_batch_size: Rows per pass.
        seed: Of the points' noise.
        options: For `objective_step`.
    """
    config = ObjectiveConfig(max_grad_norm=math.inf, micro_batch_size=micro_batch_size, seed=seed)
    trainer = ObjectiveTrainer(list(parameters), _still(parameters), objective, config)

    def batch(number: int) -> BatchOutcome:
        trainer.iteration, trainer.average = 0, None
        report = objective_step(
            trainer,
            velocity_fn,
            starts(number),
            sigmas,
            reward_fn,
            group_size=group_size,
            micro_batch_size=micro_batch_size,
            **options,
        )
        return BatchOutcome(report.rewards, report.rollout.index)

    return batch
