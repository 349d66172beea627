"""One policy update from a rollout, and a small trainer around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.objective import SurrogateLoss, clipped_surrogate_loss, gaussian_kl
from gspo.ratio import guarded_step_importance_ratio, sequence_importance_ratio, step_importance_ratio
from gspo.rollout import Rollout, VelocityFunction
from gspo.sde import Kernel

RatioKind = Literal["sequence", "step", "guarded"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How a rollout becomes an update.

    Attributes:
        ratio: "sequence" (GSPO), "step" (GRPO) or "guarded" (GRPO-Guard).
        clip_range: beta in units of the ratio, or "auto": see `auto_clip_range`.
        target_clip_fraction: What "auto" aims at.
        kl_coef: Weight of the KL to the reference policy; 0 computes none.
        num_inner_epochs: Updates per rollout.
        max_grad_norm: Gradient clipping.
    """

    ratio: RatioKind = "sequence"
    clip_range: float | Literal["auto"] = "auto"
    target_clip_fraction: float = 0.1
    kl_coef: float = 0.0
    num_inner_epochs: int = 2
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.ratio not in ("sequence", "step", "guarded"):
            raise ValueError(f"ratio must be 'sequence', 'step' or 'guarded', got {self.ratio!r}")
        if self.clip_range != "auto" and not (isinstance(self.clip_range, float) and self.clip_range > 0):
            raise ValueError(f"clip_range must be a positive number or 'auto', got {self.clip_range!r}")
        if not 0 < self.target_clip_fraction < 1:
            raise ValueError(f"target_clip_fraction must be in (0, 1), got {self.target_clip_fraction}")
        if self.kl_coef < 0 or self.num_inner_epochs < 1 or self.max_grad_norm <= 0:
            raise ValueError(
                f"kl_coef must not be negative, num_inner_epochs and max_grad_norm must be positive, got {self}"
            )


class Rescored(NamedTuple):
    """The window's steps under the current policy: log_prob_mean (b, t), mean (b, t, ...), std (b, t)."""

    log_prob_mean: Float[Tensor, "b t"]
    mean: Float[Tensor, "b t ..."]
    std: Float[Tensor, "b t"]


def rescore(
    velocity_fn: VelocityFunction,
    rollout: Rollout,
    kernel: Kernel,
    *,
    steps: Sequence[int] | None = None,
    replay: Callable[[int], AbstractContextManager[object]] | None = None,
) -> Rescored:
    """Scores the stored samples with the current policy, by the code path that drew them.

    Args:
        velocity_fn: The current policy.
        rollout: Stored trajectory.
        kernel: The kernel that drew it.
        steps: Positions in the window to score; all by default.
        replay: Called with the position in the window; the velocity is computed inside the context manager it returns (an MoE
            policy replays its routing there).
    """
    scored = []
    for position in range(len(rollout.trajectory)) if steps is None else steps:
        kept = rollout.trajectory[position]
        x = kept.latents.to(rollout.latents.device)
        with replay(position) if replay else nullcontext():
            velocity = velocity_fn(x, torch.full((len(x),), kept.sigma, device=x.device), rollout.index)
        out = kernel.step(
            x,
            velocity,
            kept.sigma,
            kept.sigma_next,
            next_latents=kept.next_latents.to(x.device),
            sigma_max=rollout.sigma_max,
        )
        assert out.log_prob_mean is not None
        scored.append((out.log_prob_mean, out.mean, out.std))
    return Rescored(*(torch.stack(parts, 1) for parts in zip(*scored, strict=True)))


def importance_ratio(kind: RatioKind, new: Rescored, old: Rescored) -> Tensor:
    """The ratio of the chosen kind: (b,) for "sequence", (b, t) else."""
    if kind == "sequence":
        return sequence_importance_ratio(new.log_prob_mean, old.log_prob_mean)
    if kind == "step":
        return step_importance_ratio(new.log_prob_mean, old.log_prob_mean)
    return guarded_step_importance_ratio(new.log_prob_mean, old.log_prob_mean, new.mean, old.mean, old.std)


def old_scores(rollout: Rollout) -> Rescored:
    """The stored scores of the policy that drew the rollout."""
    device = rollout.latents.device
    return Rescored(
        rollout.log_prob_mean.to(device),
        torch.stack([s.mean for s in rollout.trajectory], 1).to(device),
        torch.stack([s.std for s in rollout.trajectory], 1).to(device),
    )


def auto_clip_range(ratio: Tensor, target_clip_fraction: float = 0.1) -> float:
    """The clip range at which ``target_clip_fraction`` of the entries lie outside: that quantile of ``|ratio - 1|``.

    Measured on the ratio after the first update of a rollout, it follows the scale of the log-ratio, which differs by orders of
    magnitude between kernels, window positions and numbers of elements (docs/adr/0010-clip-range.md).

    >>> round(auto_clip_range(torch.tensor([0.9, 1.0, 1.05, 1.2]), 0.25), 3)
    0.125
    """
    spread = (ratio.detach().float() - 1).abs().flatten()
    spread = spread[torch.isfinite(spread)]
    if spread.numel() == 0:
        raise ValueError("ratio must hold at least one finite entry, got none")
    return max(float(torch.quantile(spread, 1 - target_clip_fraction)), 1e-8)


class UpdateStatistics(NamedTuple):
    """What an update did: the last epoch's surrogate, the KL to the reference, the gradient's norm, the clip range used."""

    surrogate: SurrogateLoss
    kl: float
    grad_norm: float
    clip_range: float
    skipped: bool


class PolicyTrainer:
    """Updates a policy from rollouts; thin: the formulas are in `gspo.ratio` and `gspo.objective`.

    The gradient is accumulated over the window one step at a time, so memory does not grow with the window. For the sequence
    ratio that needs two passes: one without gradients for the ratio, one with, in which each step contributes its share,
    since ``d s_i = s_i * mean over t of d log pi_t``.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, config: PolicyConfig
    ) -> None:
        """Keeps the parameters to clip, their optimizer and the config; `clip_range` is the measured one if "auto"."""
        self.parameters, self.optimizer, self.config = list(parameters), optimizer, config
        self.clip_range: float | None = None if config.clip_range == "auto" else config.clip_range

    def state_dict(self) -> dict[str, float]:
        """The measured clip range (0 where there is none yet)."""
        return {"clip_range": self.clip_range or 0.0}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores `state_dict`."""
        self.clip_range = state["clip_range"] or None

    def update(
        self,
        velocity_fn: VelocityFunction,
        rollout: Rollout,
        advantages: Float[Tensor, " b"],
        kernel: Kernel,
        *,
        reference: Callable[[], AbstractContextManager[object]] | None = None,
        replay: Callable[[int], AbstractContextManager[object]] | None = None,
    ) -> UpdateStatistics:
        """``num_inner_epochs`` gradient steps on one rollout.

        Args:
            velocity_fn: The policy, with gradients.
            rollout: What the old policy drew.
            advantages: (b,); NaN leaves a sample out.
            kernel: The kernel that drew the rollout.
            reference: A context manager inside which ``velocity_fn`` is the reference policy (adapters off); needed if kl_coef > 0.
            replay: See `rescore`.
        """
        if self.config.kl_coef and reference is None:
            raise ValueError(
                f"reference must be given when kl_coef is positive, got None with kl_coef {self.config.kl_coef}"
            )
        old = old_scores(rollout)
        usable = bool(((advantages != 0) & torch.isfinite(advantages)).any())
        statistics = UpdateStatistics(
            clipped_surrogate_loss(torch.ones_like(advantages), advantages, 1.0), 0.0, 0.0, self.clip_range or 0.0, True
        )
        for _ in range(self.config.num_inner_epochs if usable else 0):
            statistics = self._epoch(velocity_fn, rollout, advantages, kernel, old, reference, replay)
        return statistics

    def _epoch(
        self,
        velocity_fn: VelocityFunction,
        rollout: Rollout,
        advantages: Tensor,
        kernel: Kernel,
        old: Rescored,
        reference: Callable[[], AbstractContextManager[object]] | None,
        replay: Callable[[int], AbstractContextManager[object]] | None,
    ) -> UpdateStatistics:
        with torch.no_grad():
            new = rescore(velocity_fn, rollout, kernel, replay=replay)
            plain = importance_ratio(self.config.ratio, new, old)
        if self.config.clip_range == "auto" and self.clip_range is None and bool((plain - 1).abs().max() > 1e-7):
            self.clip_range = auto_clip_range(plain, self.config.target_clip_fraction)
        beta = self.clip_range or 1.0  # on policy nothing is clipped, whatever the range
        leaf = new.log_prob_mean.clone().requires_grad_(True)
        mean = new.mean.clone().requires_grad_(self.config.ratio == "guarded")
        surrogate = clipped_surrogate_loss(
            importance_ratio(self.config.ratio, Rescored(leaf, mean, new.std), old), advantages, beta
        )
        surrogate.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()
        total_kl, steps = 0.0, len(rollout.trajectory)
        for position in range(steps):
            scored = rescore(velocity_fn, rollout, kernel, steps=[position], replay=replay)
            assert leaf.grad is not None
            loss = (scored.log_prob_mean[:, 0] * leaf.grad[:, position]).sum()
            if mean.grad is not None:
                loss = loss + (scored.mean[:, 0] * mean.grad[:, position]).sum()
            if self.config.kl_coef and reference is not None:
                with torch.no_grad(), reference():
                    fixed = rescore(velocity_fn, rollout, kernel, steps=[position])
                kl = gaussian_kl(scored.mean[:, 0], fixed.mean[:, 0], scored.std[:, 0])[
                    torch.isfinite(advantages)
                ].mean()
                loss = loss + self.config.kl_coef * kl / steps
                total_kl += kl.item() / steps
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        return UpdateStatistics(
            SurrogateLoss(*(t.detach() for t in surrogate)), total_kl, float(norm), self.clip_range or 0.0, not finite
        )
