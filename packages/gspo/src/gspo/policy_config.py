"""How a rollout becomes an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gspo.checks import is_real, one_line, require_bool, require_positive, require_real, require_whole
from gspo.objective import clip_bounds
from gspo.ratio import RatioKind


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How a rollout becomes an update.

    Attributes:
        ratio: "sequence" (GSPO), "step" (GRPO) or "guarded" (GRPO-Guard, with its step weights).
        clip_range: beta in units of the ratio, two of them (below, above), or "auto": see `auto_clip_range`.
        target_clip_fraction: What "auto" aims at, in (0, 1).
        clip_range_rate: Share of the newest measurement in "auto", in (0, 1]; see `ClipRangeTracker`.
        max_advantage: Clip advantages to plus and minus this; None leaves them.
        kl_coef: Weight of the KL to the reference policy, a mean over all samples; 0 computes none.
        num_inner_epochs: Updates per rollout.
        max_grad_norm: Gradient clipping.
        micro_batch_size: Rows per forward and backward pass; None takes all.
        drop_zero_variance: Leave samples without signal out of the passes, not only out of the mean. False keeps the batch's shape, with
            which low-precision models round (a half-precision policy off by rounding is off policy).
        reduce_gradients: Across ranks, sum the gradients here. False where DDP or FSDP averages them in backward.
        off_policy: What to do where the ratio is not 1 before the first update: "warn" (once), "raise", or "allow" (rollouts of another
            policy are meant).
        on_nonfinite: A velocity that is NaN or infinite stops the run ("raise"), or the step is skipped, on all ranks ("skip").
    """

    ratio: RatioKind = "sequence"
    clip_range: float | tuple[float, float] | Literal["auto"] = "auto"
    target_clip_fraction: float = 0.1
    clip_range_rate: float = 0.2
    max_advantage: float | None = None
    kl_coef: float = 0.0
    num_inner_epochs: int = 2
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    drop_zero_variance: bool = True
    reduce_gradients: bool = True
    off_policy: Literal["warn", "raise", "allow"] = "warn"
    on_nonfinite: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        if self.ratio not in ("sequence", "step", "guarded"):
            raise ValueError(f"ratio must be 'sequence', 'step' or 'guarded', got {one_line(self.ratio)}")
        if not isinstance(self.clip_range, str) or self.clip_range != "auto":
            try:
                clip_bounds(self.clip_range)
            except ValueError:
                raise ValueError(
                    f"clip_range must be a positive number, two of them (below, above) or 'auto', got {one_line(self.clip_range)}"
                ) from None
        require_real(self, "target_clip_fraction", "clip_range_rate", "max_advantage")
        require_bool(self, "drop_zero_variance", "reduce_gradients")
        if not 0 < self.target_clip_fraction < 1:
            raise ValueError(f"target_clip_fraction must be in (0, 1), got {self.target_clip_fraction}")
        if not 0 < self.clip_range_rate <= 1:
            raise ValueError(f"clip_range_rate must be in (0, 1], got {self.clip_range_rate}")
        if not (is_real(self.kl_coef) and self.kl_coef >= 0):
            raise ValueError(f"kl_coef must be a number that is not negative, got {one_line(self.kl_coef)}")
        require_positive(self, "max_grad_norm", "max_advantage")
        require_whole(self, 1, "num_inner_epochs", "micro_batch_size")
        if self.off_policy not in ("warn", "raise", "allow"):
            raise ValueError(f"off_policy must be 'warn', 'raise' or 'allow', got {one_line(self.off_policy)}")
        if self.on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite must be 'raise' or 'skip', got {one_line(self.on_nonfinite)}")
