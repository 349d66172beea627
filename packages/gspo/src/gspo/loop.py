"""Rollout, reward, advantages, update: one step of online policy optimization, and a small trainer around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.advantage import GroupStatistics, group_statistics
from gspo.checks import check_real
from gspo.distributed import ProcessGroup, gather_rows, largest, rank_in, resolve, total, world_size
from gspo.finite import FiniteVelocity
from gspo.inputs import Ids, as_ids, require_tensor
from gspo.online_config import OnlineConfig as OnlineConfig
from gspo.reward import RewardFunction as RewardFunction
from gspo.reward import Rewards as Rewards
from gspo.reward import RewardTable
from gspo.reward import as_rewards as as_rewards
from gspo.rollout import Hook, Rollout, Sigmas, VelocityFunction, rollout
from gspo.shares import GroupShare, share_groups, shared_noise
from gspo.step import PolicyTrainer, Reference, UpdateStatistics


class StepReport(NamedTuple):
    """What one step did.

    Attributes:
        iteration: Its number, 0-based.
        window: Stochastic steps.
        rewards: (b,), this rank's; with several rewards their weighted sum.
        parts: Every reward by name (empty if there is only one).
        advantages: (b,).
        groups: Groups, groups without signal and missing rewards, over all ranks.
        update: What the update did.
        rollout: Samples and trajectory, this rank's.
        group_ids: Group of each sample, (b,).
        broken_velocities: Calls of the policy that were not finite, over all ranks (where `PolicyConfig.on_nonfinite` is "skip").
        scalars: What `summary` returns.
    """

    iteration: int
    window: tuple[int, ...]
    rewards: Float[Tensor, " b"]
    parts: dict[str, Tensor]
    advantages: Float[Tensor, " b"]
    groups: GroupStatistics
    update: UpdateStatistics
    rollout: Rollout
    group_ids: Int[Tensor, " b"]
    broken_velocities: int
    scalars: dict[str, float]

    def summary(self) -> dict[str, float]:
        """Scalars to log, over all ranks."""
        return dict(self.scalars)


@dataclass(frozen=True)
class _Draw:
    """Which starts this rank draws from, and how; a group for each, and members that begin there."""

    noise: Tensor
    index: Tensor
    group_ids: Tensor
    group_size: int
    options: dict[str, Any]


def _plan(
    noise: Tensor,
    config: OnlineConfig,
    group_ids: Ids | None,
    generator: torch.Generator | None,
    ranks: ProcessGroup | None,
) -> _Draw:
    """This rank's part of the batch."""
    members = config.group_size if config.own_noise else 1
    if len(noise) % members:
        raise ValueError(
            f"noise must have a row for each of {members} members of every group (own_noise), got {len(noise)} rows"
        )
    index, number = torch.arange(len(noise), device=noise.device), len(noise) // members
    ids = torch.arange(number, device=noise.device) if group_ids is None else as_ids("group_ids", group_ids)
    ids = ids.to(noise.device)
    if ids.shape != (number,):
        what = "one entry per group" if config.own_noise else "one entry per row of noise"
        raise ValueError(f"group_ids must have {what} ({number}), got {tuple(ids.shape)}")
    copies = 1 if config.own_noise else config.group_size
    if not config.split_batch:
        if group_ids is None:  # every row of every rank is its own group
            ids = ids + gather_rows(ids, ranks)[1].start
        return _Draw(noise, index, ids.repeat_interleave(members), copies, {})
    share = share_groups(number, config.group_size, rank=rank_in(ranks), num_ranks=world_size(ranks))
    here = torch.arange(share.prompts.start, share.prompts.stop) if members == 1 else share.rows()
    here = here.to(noise.device)
    # a generator of another device than the latents' cannot draw for the kernel; drawn there and moved, the noise does not depend on it
    elsewhere = generator is not None and generator.device.type != noise.device.type
    options: dict[str, Any] = {}
    if world_size(ranks) > 1 or elsewhere:
        options = {"step_noise": _agreed_noise(noise, share, generator, ranks)}
    copies = 1 if config.own_noise else share.num_members
    return _Draw(noise[here], index[here], ids.repeat_interleave(members)[here], copies, options)


def _agreed_noise(
    noise: Tensor, share: GroupShare, generator: torch.Generator | None, ranks: ProcessGroup | None
) -> Callable[[int], Tensor]:
    if generator is None:
        raise ValueError("generator must be given with split_batch, in the same state on all ranks, got None")
    mark = float(noise.cpu().double().sum())  # not every device has double precision
    if largest(mark, ranks) != -largest(-mark, ranks):
        raise ValueError("noise must be the same on all ranks with split_batch, got noise that differs")
    return shared_noise(generator, share, noise.shape[1:])


def policy_step(
    trainer: PolicyTrainer,
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "p ..."],
    sigmas: Sigmas,
    reward_fn: RewardFunction,
    config: OnlineConfig,
    *,
    iteration: int = 0,
    generator: torch.Generator | None = None,
    group_ids: Ids | None = None,
    reference: Reference | None = None,
    record: Hook | None = None,
    replay: Hook | None = None,
) -> StepReport:
    """One step: draw groups, reward them, update the policy.

    Args:
        trainer: Holds parameters, optimizer, clip range, and the ranks that train together.
        velocity_fn: The policy, see `rollout`; its index is the row of ``noise``.
        noise: One start per prompt, or with ``config.own_noise`` per member; with ``config.split_batch`` those of all ranks.
        sigmas: Schedule, ``config.window.num_steps + 1`` levels.
        reward_fn: Called with final latents and the prompt of each; see `RewardFunction`. A NaN leaves its sample out.
        config: See `OnlineConfig`.
        iteration: Where the window stands.
        generator: Of the rollout's noise.
        group_ids: Group of each prompt, if groups span ranks (or rows); by default every prompt is its own group.
        reference: See `PolicyTrainer.update`, as is replay.
        record: See `rollout`.
        replay: See `PolicyTrainer.update`.

    Raises:
        ValueError: Sizes do not fit, or see the functions it calls.
    """
    require_tensor(noise=noise)
    if len(sigmas) != config.window.num_steps + 1:  # type: ignore[arg-type]
        raise ValueError(
            f"sigmas must have window.num_steps + 1 = {config.window.num_steps + 1} entries, got {len(sigmas)}"  # type: ignore[arg-type]
        )
    ranks, window = trainer.ranks, config.window.at(iteration)
    plan = _plan(noise, config, group_ids, generator, ranks)
    finite = FiniteVelocity(velocity_fn) if config.policy.on_nonfinite == "skip" else None
    drawn = rollout(
        finite or velocity_fn,
        plan.noise,
        sigmas,
        kernel=config.kernel,
        window=window,
        group_size=plan.group_size,
        share_prefix=config.share_prefix,
        generator=generator,
        offload=config.offload,
        tail_steps=config.tail_steps,
        micro_batch_size=config.micro_batch_size,
        record=record,
        index=plan.index,
        **plan.options,
    )
    with torch.no_grad():
        values = reward_fn(drawn.latents, drawn.index)
    table = RewardTable(values, len(drawn.index), drawn.latents.device, config.reward_weights, ranks)
    ids = plan.group_ids.repeat_interleave(plan.group_size)
    advantages = table.advantages(
        ids,
        scale=config.advantage_scale,
        ddof=config.advantage_ddof,
        normalize_first=config.reward_aggregation == "normalize_then_sum",
        process_group=ranks,
    )
    groups = group_statistics(advantages, ids, process_group=ranks)
    broken = int(total(float(finite.num_broken), ranks)) if finite else 0
    if broken:
        update = UpdateStatistics.none(trainer.clip_range)
    else:
        update = trainer.update(velocity_fn, drawn, advantages, group_ids=ids, reference=reference, replay=replay)
    scalars = _scalars(table, ids, groups, update, drawn, broken, ranks)
    return StepReport(
        iteration, window, table.totals, table.parts, advantages, groups, update, drawn, ids, broken, scalars
    )


def _scalars(
    table: RewardTable,
    ids: Tensor,
    groups: GroupStatistics,
    update: UpdateStatistics,
    drawn: Rollout,
    broken: int,
    ranks: ProcessGroup | None,
) -> dict[str, float]:
    """What is worth logging, over all ranks."""
    columns = [table.totals, *table.parts.values()]
    values = gather_rows(torch.stack([c.cpu().double() for c in columns], 1), ranks)[0]
    everyone = gather_rows(ids.cpu(), ranks)[0]
    values = torch.where(torch.isfinite(values), values, torch.full_like(values, torch.nan))
    spreads = torch.stack([_std(values[everyone == group, 0]) for group in torch.unique(everyone)])
    surrogate = update.surrogate
    return {
        "reward": float(values[:, 0].nanmean()),
        "reward_spread": float(spreads.nanmean()),
        **{f"reward_{name}": float(values[:, 1 + i].nanmean()) for i, name in enumerate(table.parts)},
        "clip_fraction": float(surrogate.clip_fraction),
        "clip_range": update.clip_range,
        "approx_kl": float(surrogate.approx_kl),
        "ratio_mean": float(surrogate.ratio_mean),
        "ratio_std": float(surrogate.ratio_std),
        "initial_log_ratio": update.initial_log_ratio,
        "kl": update.kl,
        "grad_norm": update.grad_norm,
        "zero_variance_groups": float(groups.num_zero_variance),
        "invalid_rewards": float(groups.num_invalid_rewards),
        "function_evaluations": total(float(drawn.num_function_evaluations), ranks),
        "skipped": float(update.skipped),
        "broken_velocities": float(broken),
    }


def _std(values: Tensor) -> Tensor:
    """Of the sample, over what is finite; NaN for less than two."""
    values = values[torch.isfinite(values)]
    return values.std() if len(values) > 1 else values.new_tensor(torch.nan)


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
        process_group: ProcessGroup | Literal["world"] | None = "world",
        backward: Callable[[Tensor], object] | None = None,
        clip_grad_norm: Callable[[Sequence[torch.nn.Parameter], float], Any] | None = None,
    ) -> None:
        """Draws the rollouts' noise from a generator on ``device``: the same on all ranks with ``split_batch``, each rank's own else.

        Args:
            parameters: See `PolicyTrainer`, as are optimizer, process_group, backward and clip_grad_norm.
            optimizer: See there.
            config: See `OnlineConfig`.
            device: Of the generator.
            process_group: See there.
            backward: See there.
            clip_grad_norm: See there.
        """
        self.config, self.iteration = config, 0
        self.trainer = PolicyTrainer(
            parameters, optimizer, config.policy, process_group=process_group, backward=backward, clip_grad_norm=clip_grad_norm
        )  # fmt: skip
        own = 0 if config.split_batch else rank_in(resolve(process_group))
        self.generator = torch.Generator(device).manual_seed(config.seed + 1_000_003 * own)

    def step(
        self,
        velocity_fn: VelocityFunction,
        noise: Float[Tensor, "p ..."],
        sigmas: Sigmas,
        reward_fn: RewardFunction,
        *,
        group_ids: Ids | None = None,
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
        """Restores `state_dict`.

        Raises:
            ValueError: It is no state of an `OnlineTrainer`; nothing has changed then.
        """
        if not isinstance(state, Mapping) or not {"iteration", "generator"} <= state.keys():
            raise ValueError(
                f"state must hold 'iteration' and 'generator' as state_dict() writes it, got {sorted(state, key=str)}"
            )
        require_tensor(**{"state['generator']": state["generator"]})
        iteration, before = float(state["iteration"]), self.generator.get_state()
        if not (iteration >= 0 and iteration == int(iteration)):
            raise ValueError(f"state must hold an iteration from 0 on, got {iteration:g}")
        ranges = {k.removeprefix("policy."): float(v) for k, v in state.items() if k.startswith("policy.")}
        for name, value in ranges.items():
            check_real(f"state['policy.{name}']", value)
        try:
            self.generator.set_state(state["generator"].cpu())
            self.trainer.load_state_dict(ranges)
        except (RuntimeError, TypeError, ValueError) as error:
            self.generator.set_state(before)
            raise ValueError(f"state must be one of this kind of generator and clip range: {error}") from error
        self.iteration = int(iteration)
