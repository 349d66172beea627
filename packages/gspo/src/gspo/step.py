"""One policy update from a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.clip import ClipRangeTracker, auto_clip_range
from gspo.distributed import sum_gradients, total, world_size
from gspo.objective import SurrogateLoss, clipped_surrogate_loss, gaussian_kl, guard_step_weights
from gspo.rollout import Hook, Rollout, VelocityFunction
from gspo.score import RatioKind, StepScore, own_log_ratio, score_step
from gspo.sde import Kernel

Reference = Callable[[], AbstractContextManager[object]]

ON_POLICY = 1e-6
"""Log-ratios up to here are rounding: the policy is the one that drew the samples."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How a rollout becomes an update.

    Attributes:
        ratio: "sequence" (GSPO), "step" (GRPO) or "guarded" (GRPO-Guard, with its step weights).
        clip_range: beta in units of the ratio, or "auto": see `auto_clip_range`.
        target_clip_fraction: What "auto" aims at, in (0, 1).
        clip_range_rate: Share of the newest measurement in "auto", in (0, 1]; see `ClipRangeTracker`.
        kl_coef: Weight of the KL to the reference policy; 0 computes none.
        num_inner_epochs: Updates per rollout.
        max_grad_norm: Gradient clipping.
        micro_batch_size: Rows per forward and backward pass; None takes all.
        drop_zero_variance: Leave samples without signal out of the passes, not only out of the mean. False keeps the batch's shape, with
            which low-precision models round (a half-precision policy off by rounding is off policy).
        reduce_gradients: Across ranks, sum the gradients here. False where DDP or FSDP averages them in backward.
    """

    ratio: RatioKind = "sequence"
    clip_range: float | Literal["auto"] = "auto"
    target_clip_fraction: float = 0.1
    clip_range_rate: float = 0.2
    kl_coef: float = 0.0
    num_inner_epochs: int = 2
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    drop_zero_variance: bool = True
    reduce_gradients: bool = True

    def __post_init__(self) -> None:
        if self.ratio not in ("sequence", "step", "guarded"):
            raise ValueError(f"ratio must be 'sequence', 'step' or 'guarded', got {self.ratio!r}")
        number = isinstance(self.clip_range, int | float) and not isinstance(self.clip_range, bool)
        if self.clip_range != "auto" and not (number and self.clip_range > 0):
            raise ValueError(f"clip_range must be a positive number or 'auto', got {self.clip_range!r}")
        if not 0 < self.target_clip_fraction < 1:
            raise ValueError(f"target_clip_fraction must be in (0, 1), got {self.target_clip_fraction}")
        if not 0 < self.clip_range_rate <= 1:
            raise ValueError(f"clip_range_rate must be in (0, 1], got {self.clip_range_rate}")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        for name in ("num_inner_epochs", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def _ratio(kind: RatioKind, log_ratio: Tensor) -> Tensor:
    """(b,) for "sequence", (b, t) else, of the log-ratios of `own_log_ratio`."""
    return log_ratio.mean(1).exp() if kind == "sequence" else log_ratio.exp()


class UpdateStatistics(NamedTuple):
    """What an update did, as of its last epoch (this rank's samples).

    Attributes:
        surrogate: Loss, clip fraction, approximate KL, mean and spread of the ratio.
        kl: To the reference policy, nats per element; 0 where kl_coef is.
        grad_norm: Before clipping.
        clip_range: Used; 0 while none has been needed.
        skipped: No sample carried a signal, or the gradient was not finite: no step was taken.
        num_samples: Samples the update was made of, over all ranks.
        num_function_evaluations: Rows for which the velocity was computed, all epochs.
    """

    surrogate: SurrogateLoss
    kl: float
    grad_norm: float
    clip_range: float
    skipped: bool
    num_samples: int = 0
    num_function_evaluations: int = 0


@dataclass(frozen=True)
class _Problem:
    """One rollout as an update sees it: the kept rows, in micro-batches, and their share of the mean over all ranks."""

    velocity_fn: VelocityFunction
    rollout: Rollout
    kernel: Kernel
    advantages: Tensor
    rows: Tensor
    count: int
    scale: float
    step_weights: Tensor | None
    reference: Reference | None
    replay: Hook | None
    micro_batch_size: int | None

    @property
    def num_steps(self) -> int:
        return len(self.rollout.trajectory)

    def parts(self) -> list[slice]:
        """Micro-batches, as slices of ``rows``."""
        size = self.micro_batch_size or max(len(self.rows), 1)
        return [slice(start, start + size) for start in range(0, len(self.rows), size)]

    def score(self, position: int, part: slice) -> StepScore:
        rows = self.rows[part]
        whole = len(rows) == len(self.rollout.latents)  # as drawn: no copies
        return score_step(self.velocity_fn, self.rollout, self.kernel, position, None if whole else rows, self.replay)

    def reference_mean(self, position: int, part: slice) -> Tensor:
        assert self.reference is not None
        rows = self.rows[part]
        with torch.no_grad(), self.reference():
            return score_step(self.velocity_fn, self.rollout, self.kernel, position, rows, None).mean


class PolicyTrainer:
    """Updates a policy from rollouts; thin: the formulas are in `gspo.ratio`, `gspo.objective` and `gspo.clip`.

    The gradient is accumulated over the window one step at a time (and over micro-batches), so memory does not grow with the
    window. With ``l_it`` the log-ratio of step t, the loss reaches the policy only through ``dL = sum_it (dL/dl_it) dl_it``. For
    step ratios ``dL/dl_it`` is known at its own step. For the sequence ratio it needs all steps first: on policy they are known to
    be 0 (checked, and repeated if it turns out wrong), afterwards a pass without gradients finds them.

    Across the ranks of an initialised torch.distributed the update equals that of one process with all samples.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, config: PolicyConfig
    ) -> None:
        """Keeps the parameters to clip, their optimizer and the config."""
        self.parameters, self.optimizer, self.config = list(parameters), optimizer, config
        self.tracker = ClipRangeTracker(config.clip_range_rate)
        self.clip_range: float | None = None if config.clip_range == "auto" else float(config.clip_range)

    def state_dict(self) -> dict[str, float]:
        """The last clip range (0 where there is none yet), and the measured one of each window start."""
        return {"clip_range": self.clip_range or 0.0, **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores `state_dict`."""
        self.clip_range = state["clip_range"] or None
        self.tracker.load_state_dict(state)

    def update(
        self,
        velocity_fn: VelocityFunction,
        rollout: Rollout,
        advantages: Float[Tensor, " b"],
        kernel: Kernel,
        *,
        reference: Reference | None = None,
        replay: Hook | None = None,
    ) -> UpdateStatistics:
        """``num_inner_epochs`` gradient steps on one rollout.

        Args:
            velocity_fn: The policy, with gradients.
            rollout: What the old policy drew.
            advantages: (b,); a sample with 0 (its group has no variance) or NaN (it has no reward) is dropped.
            kernel: The kernel that drew the rollout.
            reference: A context manager inside which ``velocity_fn`` is the reference policy (adapters off); needed if kl_coef > 0.
            replay: See `rescore`; with it no sample is dropped from the passes, since routing belongs to rows.

        Raises:
            ValueError: Advantages have another length than the rollout, or reference is missing.
        """
        config = self.config
        if config.kl_coef and reference is None:
            raise ValueError(
                f"reference must be given when kl_coef is positive, got None with kl_coef {config.kl_coef}"
            )
        if advantages.shape != rollout.index.shape:
            raise ValueError(
                f"advantages must be (b,) = {tuple(rollout.index.shape)} as the rollout, got {tuple(advantages.shape)}"
            )
        problem = self._problem(velocity_fn, rollout, advantages.to(rollout.latents.device), kernel, reference, replay)
        statistics = UpdateStatistics(
            clipped_surrogate_loss(torch.ones_like(advantages), advantages, 1.0), 0.0, 0.0, self.clip_range or 0.0, True
        )
        evaluations = 0
        for epoch in range(config.num_inner_epochs if problem.count else 0):
            statistics = self._epoch(problem, epoch)
            evaluations += statistics.num_function_evaluations
        return statistics._replace(num_samples=problem.count, num_function_evaluations=evaluations)

    def _problem(
        self,
        velocity_fn: VelocityFunction,
        rollout: Rollout,
        advantages: Tensor,
        kernel: Kernel,
        reference: Reference | None,
        replay: Hook | None,
    ) -> _Problem:
        """Finds the rows that carry a signal, and counts them over all ranks."""
        config, signal = self.config, torch.isfinite(advantages) & (advantages != 0)
        count = int(total(float(signal.sum())))
        drop = config.drop_zero_variance and replay is None
        rows = (signal if drop else torch.ones_like(signal)).nonzero()[:, 0]
        used = torch.where(signal, advantages, torch.full_like(advantages, torch.nan))[rows]
        weights = None
        if config.ratio == "guarded":
            sigmas = torch.tensor([[s.sigma, s.sigma_next] for s in rollout.trajectory], device=advantages.device)
            weights = guard_step_weights(sigmas[:, 0], sigmas[:, 1])
        # DDP and FSDP average over ranks what is here a sum
        scale = 1.0 if config.reduce_gradients else float(world_size())
        return _Problem(
            velocity_fn, rollout, kernel, used, rows, count, scale, weights, reference, replay, config.micro_batch_size
        )

    def _epoch(self, problem: _Problem, epoch: int) -> UpdateStatistics:
        first = epoch == 0
        config, start = self.config, problem.rollout.trajectory[0].step
        auto, sequence = config.clip_range == "auto", config.ratio == "sequence"
        beta = self.tracker.at(start) if auto else self.clip_range
        known: Tensor | None = None
        passes = 1
        if first:
            known = torch.zeros(len(problem.rows), problem.num_steps, dtype=torch.float64, device=problem.rows.device)
        elif sequence or beta is None:
            known, passes = self._log_ratios(problem), 2
        measured = False
        if beta is None and not first and known is not None:
            beta, measured = self._measure(problem, known, start), True
        self.optimizer.zero_grad()
        seen, kl = self._backward(problem, known if sequence else None, beta)
        if first and sequence and total(float((seen.abs() > ON_POLICY).sum())) > 0:  # a stale rollout after all
            if beta is None and auto:
                beta, measured = self._measure(problem, seen, start), True
            self.optimizer.zero_grad()
            seen, kl = self._backward(problem, seen, beta)
            passes = 2
        if auto and epoch == 1 and not measured:
            self._measure(problem, seen, start)  # counts from here on
        self.clip_range = beta if beta is not None else self.clip_range
        if config.reduce_gradients:
            sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        with torch.no_grad():
            surrogate = clipped_surrogate_loss(
                _ratio(config.ratio, seen), problem.advantages, beta or 1.0, step_weights=problem.step_weights
            )
        evaluated = len(problem.rows) * problem.num_steps * (passes + bool(config.kl_coef))
        return UpdateStatistics(surrogate, kl, float(norm), self.clip_range or 0.0, not finite, 0, evaluated)

    def _measure(self, problem: _Problem, log_ratio: Tensor, start: int) -> float | None:
        """Takes the clip range of these log-ratios in; None where nothing has moved."""
        if total(float((log_ratio != 0).sum())) == 0:
            return self.tracker.at(start)
        ratio = _ratio(self.config.ratio, log_ratio)
        return self.tracker.observe(start, auto_clip_range(ratio, self.config.target_clip_fraction, problem.advantages))

    @torch.no_grad()
    def _log_ratios(self, problem: _Problem) -> Tensor:
        """Log-ratios of all kept rows and steps, (r, t) fp64."""
        result = torch.zeros(len(problem.rows), problem.num_steps, dtype=torch.float64, device=problem.rows.device)
        for position in range(problem.num_steps):
            for part in problem.parts():
                result[part, position] = own_log_ratio(self.config.ratio, problem.score(position, part)).double()
        return result

    def _backward(self, problem: _Problem, known: Tensor | None, beta: float | None) -> tuple[Tensor, float]:
        """Accumulates the gradient; returns the log-ratios it saw, (r, t) fp64, and the KL to the reference.

        ``known`` are the log-ratios from which a sequence ratio's ``dL/dl`` comes; step ratios find their own on the way.
        On policy nothing is clipped, whatever the range: without one, 1 stands for it.
        """
        seen = torch.zeros(len(problem.rows), problem.num_steps, dtype=torch.float64, device=problem.rows.device)
        pull = None if known is None else self._pull(problem, known, slice(None), None, beta)
        total_kl = 0.0
        for position in range(problem.num_steps):
            for part in problem.parts():
                own = None if pull is None else pull[part, position]
                seen[part, position], kl = self._backward_part(problem, part, position, own, beta)
                total_kl += kl
        return seen, total_kl

    def _backward_part(
        self, problem: _Problem, part: slice, position: int, pull: Tensor | None, beta: float | None
    ) -> tuple[Tensor, float]:
        """Forward and backward of one step of one micro-batch; nothing of its graph is left when it returns."""
        score, kl_coef = problem.score(position, part), self.config.kl_coef
        log_ratio = own_log_ratio(self.config.ratio, score)
        seen = log_ratio.detach().double()
        if pull is None:
            pull = self._pull(problem, seen[:, None], part, position, beta)[:, 0]
        loss = (log_ratio * pull.to(log_ratio.dtype)).sum()
        kl = torch.zeros(())
        if kl_coef:
            rows = gaussian_kl(score.mean, problem.reference_mean(position, part), score.std)
            kl = rows[torch.isfinite(problem.advantages[part])].sum() / (problem.count * problem.num_steps)
            loss = loss + kl_coef * kl
        (loss * problem.scale).backward()  # type: ignore[no-untyped-call]
        return seen, float(kl.detach())

    def _pull(
        self, problem: _Problem, log_ratio: Tensor, part: slice, position: int | None, beta: float | None
    ) -> Tensor:
        """``dL/dl`` of the mean over all ranks' samples and steps, at these log-ratios (all steps, or the one at ``position``)."""
        advantages = problem.advantages[part]
        kept = int(torch.isfinite(advantages).sum())
        with torch.enable_grad():
            leaf = log_ratio.detach().requires_grad_(True)
            weights = problem.step_weights if position is None else None
            surrogate = clipped_surrogate_loss(
                _ratio(self.config.ratio, leaf), advantages, beta or 1.0, step_weights=weights
            )
            (gradient,) = torch.autograd.grad(surrogate.loss, leaf)
        if position is None:
            return gradient * kept / problem.count
        weight = 1.0 if problem.step_weights is None else float(problem.step_weights[position])
        return gradient * weight * kept / (problem.count * problem.num_steps)
