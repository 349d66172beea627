"""What an update learns from: which rows of a rollout carry a signal, and what each weighs in a mean over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.advantage import group_has_signal
from gspo.distributed import ProcessGroup, total, world_size
from gspo.finite import FiniteVelocity
from gspo.inputs import Ids, Numbers, as_ids, as_numbers
from gspo.objective import guard_step_weights
from gspo.passes import Passes, Reference
from gspo.policy_config import PolicyConfig
from gspo.rollout import Hook, Rollout, VelocityFunction
from gspo.score import kernel_of
from gspo.sde import Kernel


@dataclass(frozen=True)
class UpdateBatch:
    """One rollout as an update sees it.

    Attributes:
        passes: Over its rows.
        advantages: One per row, NaN for a row that is not in the surrogate's mean. On the CPU, as the weights below.
        sample_weights: One per row, or None.
        step_weights: GRPO-Guard's, or None.
        count: Samples of the surrogate's mean, over all ranks.
        num_scored: Samples with an advantage, of groups without a signal too, over all ranks.
        broken: Counts velocities that were not finite, or None where these raise.
    """

    passes: Passes
    advantages: Float[Tensor, " r"]
    sample_weights: Float[Tensor, " r"] | None
    step_weights: Float[Tensor, " t"] | None
    count: int
    num_scored: int
    broken: FiniteVelocity | None

    @property
    def start(self) -> int:
        """Where the window starts."""
        return self.passes.rollout.trajectory[0].step


def one_per_row(name: str, values: Numbers, rollout: Rollout) -> Tensor:
    """``values`` as a tensor on the CPU.

    Raises:
        ValueError: There is not one per row.
    """
    found = as_numbers(name, values)
    if found.shape != rollout.index.shape:
        raise ValueError(f"{name} must be (b,) = {tuple(rollout.index.shape)} as the rollout, got {tuple(found.shape)}")
    return found.cpu()


def make_batch(
    velocity_fn: VelocityFunction,
    rollout: Rollout,
    advantages: Numbers,
    kernel: Kernel | None,
    config: PolicyConfig,
    *,
    ranks: ProcessGroup | None,
    group_ids: Ids | None,
    sample_weights: Numbers | None,
    reference: Reference | None,
    replay: Hook | None,
    backward: Callable[[Tensor], object],
) -> UpdateBatch:
    """Checks what `gspo.PolicyTrainer.update` was given, and counts. Its arguments and errors are described there."""
    if config.kl_coef and reference is None:
        raise ValueError(f"reference must be given when kl_coef is positive, got None with kl_coef {config.kl_coef}")
    gains = one_per_row("advantages", advantages, rollout)
    weights = None if sample_weights is None else one_per_row("sample_weights", sample_weights, rollout)
    ids = rollout.index if group_ids is None else as_ids("group_ids", group_ids)
    if ids.shape != gains.shape:
        raise ValueError(f"group_ids must be (b,) = {tuple(gains.shape)} as the rollout, got {tuple(ids.shape)}")
    rollout = replace(rollout, kernel=kernel_of(rollout, kernel))
    there = torch.isfinite(gains)
    # the rollout's own index numbers the groups of this rank
    signal = there & group_has_signal(gains, ids, process_group=None if group_ids is None else ranks)
    drop = config.drop_zero_variance and replay is None and not config.kl_coef
    rows = (signal if drop else torch.ones_like(signal)).nonzero()[:, 0]
    step_weights = None
    if config.ratio == "guarded":
        sigmas = torch.tensor([[s.sigma, s.sigma_next] for s in rollout.trajectory])
        step_weights = guard_step_weights(sigmas[:, 0], sigmas[:, 1])
    broken = FiniteVelocity(velocity_fn) if config.on_nonfinite == "skip" else None
    passes = Passes(
        velocity_fn=broken or velocity_fn,
        rollout=rollout,
        rows=rows.to(rollout.index.device),
        ratio=config.ratio,
        micro_batch_size=config.micro_batch_size,
        replay=replay,
        reference=reference,
        kl_coef=config.kl_coef,
        kl_entries=int(total(float(len(gains)), ranks)) * len(rollout.trajectory),
        # DDP and FSDP average over ranks what is here a sum
        scale=1.0 if config.reduce_gradients else float(world_size(ranks)),
        backward=backward,
    )
    return UpdateBatch(
        passes,
        torch.where(signal, gains, torch.full_like(gains, torch.nan))[rows],
        None if weights is None else weights[rows],
        step_weights,
        int(total(float(signal.sum()), ranks)),
        int(total(float(there.sum()), ranks)),
        broken,
    )
