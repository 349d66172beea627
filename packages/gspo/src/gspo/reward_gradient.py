"""Direct reward gradients: where a reward is differentiable, it is followed through the sampler itself.

The upper baseline of every other method: it says how far a reward can be pushed at all, and how soon it is gamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gspo.checks import (
    check_bool,
    check_function,
    check_seed,
    is_whole,
    one_line,
    require_bool,
    require_positive,
    require_real,
    require_whole,
)
from gspo.distributed import ProcessGroup, resolve, sum_gradients, total, world_size
from gspo.draw import check_levels
from gspo.inputs import Ids, as_ids, require_floating
from gspo.rollout import VelocityFunction
from gspo.sde import wide
from gspo.signal_log import SignalLog

DifferentiableReward = Callable[[Tensor, Tensor], Tensor]
"""``(latents (b, ...), index (b,)) -> rewards (b,)``, differentiable; NaN leaves a row out."""

Method = Literal["refl", "draft"]


def euler_steps(
    velocity_fn: VelocityFunction,
    latents: Float[Tensor, "b ..."],
    levels: Sequence[float],
    index: Int[Tensor, " b"],
    *,
    recompute: bool = False,
) -> Float[Tensor, "b ..."]:
    """``x <- x + (sigma_next - sigma) v(x, sigma)`` along the levels, with whatever gradients are on.

    Args:
        velocity_fn: See `gspo.rollout`.
        latents: At the first level.
        levels: Noise levels, falling.
        index: Prompt of each row.
        recompute: Keep no activations; every step is computed once more in the backward pass (gradient checkpointing).
    """
    x = latents
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        at = torch.full((len(x),), sigma, device=x.device)
        if recompute and torch.is_grad_enabled():
            velocity = checkpoint(velocity_fn, x, at, index, use_reentrant=False)
        else:
            velocity = velocity_fn(x, at, index)
        if velocity.shape != x.shape:
            raise ValueError(
                f"velocity_fn must return the shape of latents {tuple(x.shape)}, got {tuple(velocity.shape)}"
            )
        x = x + (sigma_next - sigma) * velocity
    return x


def _check(velocity_fn: VelocityFunction, noise: Tensor, index: Ids) -> Tensor:
    """Prompts as whole numbers beside the noise; raises ValueError where something is not what it has to be."""
    check_function(velocity_fn=velocity_fn)
    require_floating(noise=noise)
    prompts = as_ids("index", index).to(noise.device)
    if noise.dim() < 2 or not len(noise) or prompts.shape != noise.shape[:1]:
        shapes = f"{tuple(noise.shape)} and {tuple(prompts.shape)}"
        raise ValueError(f"noise must be (b, ...) with b at least 1 and index (b,), got {shapes}")
    return prompts


def draft_samples(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, " t"],
    index: Int[Tensor, " b"],
    *,
    last_steps: int | None = None,
    recompute: bool = False,
) -> Float[Tensor, "b ..."]:
    """Samples through whose last steps a reward can be differentiated (DRaFT-K, arXiv 2309.17400, section 3).

    Args:
        velocity_fn: The policy.
        noise: One start per sample.
        sigmas: Schedule.
        index: Prompt of each row.
        last_steps: K, steps with gradients; None is all of them (DRaFT).
        recompute: See `euler_steps`.

    Raises:
        ValueError: last_steps is not in [1, steps], or see `gspo.draw.check_levels`.
    """
    levels = check_levels(sigmas)
    check_bool(recompute=recompute)
    steps = len(levels) - 1
    kept = steps if last_steps is None else last_steps
    if not is_whole(kept) or not 1 <= kept <= steps:
        raise ValueError(f"last_steps must be in [1, {steps}] or None, got {one_line(last_steps)}")
    index = _check(velocity_fn, noise, index)
    with torch.no_grad():
        x = euler_steps(velocity_fn, noise, levels[: steps - kept + 1], index)
    return euler_steps(velocity_fn, x, levels[steps - kept :], index, recompute=recompute)


def refl_samples(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, " t"],
    index: Int[Tensor, " b"],
    step: int,
) -> Float[Tensor, "b ..."]:
    """The clean samples that one step predicts, ``x - sigma v(x, sigma)``, with the gradient of that step (ReFL, arXiv 2304.05977).

    Args:
        velocity_fn: The policy.
        noise: One start per sample.
        sigmas: Schedule.
        index: Prompt of each row.
        step: The step that predicts; those before it are taken without gradients.

    Raises:
        ValueError: There is no such step, or see `gspo.draw.check_levels`.
    """
    levels = check_levels(sigmas)
    if not is_whole(step) or not 0 <= step < len(levels) - 1:
        raise ValueError(f"step must be in [0, {len(levels) - 2}], got {one_line(step)}")
    index = _check(velocity_fn, noise, index)
    with torch.no_grad():
        x = euler_steps(velocity_fn, noise, levels[: step + 1], index)
    sigma = torch.full((len(x),), levels[step], device=x.device)
    return x - wide(sigma, x) * velocity_fn(x, sigma, index)


@dataclass(frozen=True, kw_only=True)
class RewardGradientConfig:
    """How a differentiable reward becomes an update.

    Attributes:
        method: "draft" (through the last steps) or "refl" (one step's prediction).
        last_steps: K of DRaFT-K; None is all steps. Not for "refl".
        refl_from: "refl" draws its step from the last ``1 - refl_from`` of the schedule, in [0, 1); early steps predict blur.
        max_grad_norm: Gradient clipping.
        micro_batch_size: Rows per pass; None takes all.
        recompute: See `euler_steps`.
        reduce_gradients: Across ranks, sum the gradients here. False where DDP or FSDP averages them in backward.
        walk_window: See `gspo.SignalLog`.
        seed: Of the steps that "refl" draws; the same on all ranks.
    """

    method: Method = "draft"
    last_steps: int | None = 1
    refl_from: float = 0.5
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    recompute: bool = False
    reduce_gradients: bool = True
    walk_window: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("draft", "refl"):
            raise ValueError(f"method must be 'draft' or 'refl', got {one_line(self.method)}")
        require_whole(self, 1, "last_steps", "micro_batch_size")
        require_real(self, "refl_from")
        if not 0 <= self.refl_from < 1:
            raise ValueError(f"refl_from must be in [0, 1), got {self.refl_from}")
        require_bool(self, "recompute", "reduce_gradients")
        check_seed(self.seed)
        require_whole(self, 0, "walk_window")
        require_positive(self, "max_grad_norm")


class RewardGradientStatistics(NamedTuple):
    """What an update did.

    Attributes:
        rewards: Of this rank's samples (with "refl" of its predictions), (b,).
        grad_norm: Before clipping.
        skipped: No reward was finite, or the gradient was not: no step was taken.
        num_samples: Samples with a reward, over all ranks.
        num_function_evaluations: Rows for which the velocity was computed.
        signal: See `SignalLog.summary`.
    """

    rewards: Float[Tensor, " b"]
    grad_norm: float
    skipped: bool
    num_samples: int
    num_function_evaluations: int
    signal: dict[str, float]


class RewardGradientTrainer:
    """Gradient ascent on a differentiable reward, through the sampler."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: RewardGradientConfig | None = None,
        *,
        process_group: ProcessGroup | Literal["world"] | None = "world",
        backward: Callable[[Tensor], object] | None = None,
        clip_grad_norm: Callable[[Sequence[torch.nn.Parameter], float], Any] | None = None,
    ) -> None:
        """Keeps the trained parameters, their optimizer and the config; the rest as in `gspo.ObjectiveTrainer`."""
        self.parameters, self.optimizer = list(parameters), optimizer
        self.config, self.process_group = config or RewardGradientConfig(), process_group
        self.backward = backward or Tensor.backward
        self.clip_grad_norm = clip_grad_norm or torch.nn.utils.clip_grad_norm_
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.signal = SignalLog(
            walk_window=self.config.walk_window, momentum=float(optimizer.defaults.get("betas", (0.0,))[0])
        )
        self.iteration = 0

    @property
    def ranks(self) -> ProcessGroup | None:
        """The group that trains together, None for this process alone."""
        return resolve(self.process_group)

    def step(
        self,
        velocity_fn: VelocityFunction,
        noise: Float[Tensor, "b ..."],
        sigmas: Float[Tensor, " t"],
        reward_fn: DifferentiableReward,
        *,
        index: Int[Tensor, " b"] | None = None,
    ) -> RewardGradientStatistics:
        """One update: sample, reward, differentiate.

        Args:
            velocity_fn: The policy, with gradients.
            noise: One start per sample.
            sigmas: Schedule.
            reward_fn: See `DifferentiableReward`.
            index: Prompt of each row; by default each row is its own.

        Raises:
            ValueError: The reward has no gradient or another shape, or see `draft_samples` and `refl_samples`.
        """
        config, count = self.config, len(noise)
        if noise.dim() < 2 or count == 0:
            raise ValueError(f"noise must be (b, ...) with b at least 1, got shape {tuple(noise.shape)}")
        index = torch.arange(count, device=noise.device) if index is None else index
        steps, at = len(sigmas) - 1, 0
        if config.method == "refl":
            first = math.ceil(config.refl_from * steps) if steps > 1 else 0
            at = int(torch.randint(min(first, steps - 1), max(steps, 1), (), generator=self.generator))
        self.optimizer.zero_grad()
        size = config.micro_batch_size or count
        found = []
        for start in range(0, count, size):
            rows = slice(start, start + size)
            if config.method == "refl":
                x = refl_samples(velocity_fn, noise[rows], sigmas, index[rows], at)
            else:
                x = draft_samples(
                    velocity_fn,
                    noise[rows],
                    sigmas,
                    index[rows],
                    last_steps=config.last_steps,
                    recompute=config.recompute,
                )
            found.append(self._backward(x, reward_fn(x, index[rows])))
        rewards = torch.cat(found)
        evaluations = count * (at + 1 if config.method == "refl" else steps)
        return self._finish(rewards, evaluations)

    def _backward(self, latents: Tensor, rewards: Tensor) -> Tensor:
        """Accumulates the gradient of the sum of the finite rewards."""
        if not isinstance(rewards, Tensor) or rewards.shape != latents.shape[:1]:
            got = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(f"reward_fn must return a tensor of {len(latents)} numbers, one per sample, got {got}")
        if not rewards.requires_grad:
            raise ValueError("reward_fn must be differentiable in the latents, got rewards without a gradient")
        finite = torch.isfinite(rewards)
        if bool(finite.any()):
            scale = 1.0 if self.config.reduce_gradients else float(world_size(self.ranks))
            self.backward(-rewards[finite].sum() * scale)
        return rewards.detach()

    def _finish(self, rewards: Tensor, evaluations: int) -> RewardGradientStatistics:
        """Divides by the number of samples, clips and steps."""
        config = self.config
        count = total(float(torch.isfinite(rewards).sum()), self.ranks)
        if config.reduce_gradients:
            sum_gradients(self.parameters, self.ranks)
        for parameter in self.parameters:
            if parameter.grad is not None and count:
                parameter.grad.div_(count)
        norm = float(self.clip_grad_norm(self.parameters, config.max_grad_norm))
        skipped, signal = not (count and math.isfinite(norm)), self.signal.summary()
        if not skipped:
            signal = self.signal.observe(
                self.parameters, num_samples=int(count), grad_norm=norm, max_grad_norm=config.max_grad_norm
            )
            self.optimizer.step()
        self.iteration += 1
        return RewardGradientStatistics(rewards, norm, skipped, int(count), evaluations, signal)

    def state_dict(self) -> dict[str, Tensor]:
        """Iteration, generator and signal as tensors; parameters and optimizer are the caller's."""
        return {
            "iteration": torch.tensor(self.iteration),
            "generator": self.generator.get_state(),
            **{f"signal.{k}": v for k, v in self.signal.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self.iteration = int(state["iteration"])
        self.generator.set_state(state["generator"].cpu())
        self.signal.load_state_dict({k.removeprefix("signal."): v for k, v in state.items() if k.startswith("signal.")})
