"""Draw, reward, advantages, update: one step with an `ObjectiveTrainer`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.advantage import GroupStatistics, Scale, group_advantages, group_statistics, multi_reward_advantages, nan_sum
from gspo.checks import one_line
from gspo.distributed import total
from gspo.draw import Solver, draw
from gspo.finite import FiniteVelocity
from gspo.gdpo import whiten
from gspo.inputs import Ids, as_ids, require_tensor
from gspo.loop import RewardFunction, as_rewards
from gspo.objective_trainer import ObjectiveStatistics, ObjectiveTrainer, Reference
from gspo.reward import TotalsAndParts
from gspo.rollout import Rollout, VelocityFunction


class ObjectiveReport(NamedTuple):
    """What one step did.

    Attributes:
        rewards: (b,); with several rewards their weighted sum.
        parts: Every reward by name (empty if there is only one).
        advantages: (b,).
        groups: Groups, zero-variance groups and invalid rewards.
        update: What the update did.
        rollout: The samples.
    """

    rewards: Float[Tensor, " b"]
    parts: dict[str, Tensor]
    advantages: Float[Tensor, " b"]
    groups: GroupStatistics
    update: ObjectiveStatistics
    rollout: Rollout

    def summary(self) -> dict[str, float]:
        """Scalars to log."""
        finite = self.rewards[torch.isfinite(self.rewards)]
        return {
            "reward": float(finite.mean()) if len(finite) else float("nan"),
            **{f"reward_{name}": float(part.nanmean()) for name, part in self.parts.items()},
            "loss": self.update.loss,
            **self.update.metrics,
            "grad_norm": self.update.grad_norm,
            "zero_variance_groups": float(self.groups.num_zero_variance),
            "invalid_rewards": float(self.groups.num_invalid_rewards),
            "function_evaluations": float(self.rollout.num_function_evaluations + self.update.num_function_evaluations),
            **self.update.signal,
        }


def reward_advantages(
    values: Tensor | Mapping[str, Tensor],
    group_ids: Int[Tensor, " b"],
    weights: Mapping[str, float],
    scale: Scale,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Rewards, their parts by name, and their advantages: several rewards are normalised one by one, then weighted (GDPO).

    Raises:
        ValueError: weights do not name the rewards.
    """
    if isinstance(values, Tensor):
        return values, {}, group_advantages(values, group_ids, scale=scale)
    parts, used = dict(values), dict(weights) or dict.fromkeys(values, 1.0)
    advantages = multi_reward_advantages(parts, used, group_ids, scale=scale)
    counted = [
        used[name] * part for name, part in parts.items() if used[name] != 0
    ]  # as the advantages do: what is missing plays no part
    return nan_sum(counted), parts, advantages


def objective_step(
    trainer: ObjectiveTrainer,
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, " t"],
    reward_fn: RewardFunction,
    *,
    group_size: int = 8,
    solver: Solver = "dpm_solver_2m",
    micro_batch_size: int | None = None,
    advantage_scale: Scale = "group",
    reward_weights: Mapping[str, float] | None = None,
    whiten_batch: bool = False,
    group_ids: Ids | None = None,
    reference: Reference | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
) -> ObjectiveReport:
    """One step with an objective that needs no trajectory: the old policy draws, the samples are rewarded, the policy is updated.

    Args:
        trainer: Holds parameters, optimizer, objective and old policy.
        velocity_fn: The policy, see `gspo.rollout`.
        noise: One start per sample, see `draw`.
        sigmas: Schedule of the solver.
        reward_fn: Called with final latents and the prompt of each; see `gspo.loop.RewardFunction`. A NaN leaves its sample out.
        group_size: Members per prompt, at least 2; 1 where ``group_ids`` say which rows form a group.
        solver: See `draw`, as is micro_batch_size.
        micro_batch_size: Rows per call of the policy while drawing; the update's is the trainer's.
        advantage_scale: See `gspo.group_advantages`.
        reward_weights: By name, for rewards that come as a dict; None is 1 each.
        whiten_batch: `gspo.gdpo.whiten` the advantages.
        group_ids: Group of each prompt, where several prompts form one.
        reference: See `ObjectiveTrainer.update`.
        on_nonfinite: A velocity that is NaN or infinite while samples are drawn stops the run ("raise"), or the step is skipped, on all
            ranks ("skip").

    Raises:
        ValueError: Sizes do not fit, or see the functions it calls.
    """
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise ValueError(f"group_size must be a whole number of at least 2, got {one_line(group_size)}")
    if group_size < 2 and group_ids is None:
        raise ValueError(f"group_size must be at least 2 (a group of one has no advantage), got {group_size}")
    if trainer.objective.needs_trajectory:
        raise ValueError(
            f"trainer must have an objective without a trajectory, got {type(trainer.objective).__name__}: "
            "draw with gspo.rollout and call trainer.update"
        )
    require_tensor(noise=noise)
    finite = FiniteVelocity(velocity_fn) if on_nonfinite == "skip" else None
    with trainer.old_policy():
        drawn = draw(
            finite or velocity_fn,
            noise,
            sigmas,
            group_size=group_size,
            solver=solver,
            micro_batch_size=micro_batch_size,
        )
    with torch.no_grad():
        values = reward_fn(drawn.latents, drawn.index)
    count, device = len(drawn.index), drawn.index.device
    found: Tensor | dict[str, Tensor]
    if isinstance(values, Mapping):
        found = {name: as_rewards(part, count, device, name) for name, part in values.items()}
    else:
        found = as_rewards(values.totals if isinstance(values, TotalsAndParts) else values, count, device)
    ids = drawn.index
    if group_ids is not None:
        given, prompts = as_ids("group_ids", group_ids).to(device), count // group_size
        if given.shape != (prompts,):
            raise ValueError(f"group_ids must have one entry per prompt ({prompts}), got {tuple(given.shape)}")
        ids = given[drawn.index]
    rewards, parts, advantages = reward_advantages(found, ids, reward_weights or {}, advantage_scale)
    if whiten_batch:
        advantages = whiten(advantages, process_group=trainer.ranks)
    groups = group_statistics(rewards, ids)
    if finite is not None and total(float(finite.num_broken), trainer.ranks) > 0:
        update = ObjectiveStatistics(0.0, {}, math.nan, True, 0, 0, trainer.signal.summary())
    else:
        update = trainer.update(velocity_fn, drawn, advantages, reference=reference)
    return ObjectiveReport(rewards, parts, advantages, groups, update, drawn)
