"""Passes of a policy over one rollout: log-ratios without gradients, and the gradient, one denoising step at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.objective import gaussian_kl
from gspo.ratio import RatioKind
from gspo.rollout import Hook, Rollout, VelocityFunction
from gspo.score import Rescored, loss_log_ratio, rescore

Reference = Callable[[], AbstractContextManager[object]]
"""Makes a context manager inside which ``velocity_fn`` is the reference policy."""

Slope = Callable[[Tensor, slice, slice], Tensor]
"""``(log-ratios, rows, steps) -> dL/d log-ratio`` of these rows and steps, (r, t) both, in fp64 on the CPU."""


@dataclass(frozen=True)
class Passes:
    """The rows of a rollout that an update is made of, in micro-batches.

    Attributes:
        velocity_fn: The policy.
        rollout: What the old policy drew.
        rows: Which of its rows, (r,).
        ratio: What the loss is made of.
        micro_batch_size: Rows at a time; None takes all.
        replay: See `rescore`.
        reference: The reference policy, for a KL.
        kl_coef: Weight of the KL to it; 0 computes none.
        kl_entries: Samples times steps, over all ranks: the KL is a mean over these.
        scale: Of every loss, before its backward.
        backward: What is called with each loss.
    """

    velocity_fn: VelocityFunction
    rollout: Rollout
    rows: Tensor
    ratio: RatioKind
    micro_batch_size: int | None
    replay: Hook | None
    reference: Reference | None
    kl_coef: float
    kl_entries: int
    scale: float
    backward: Callable[[Tensor], object]

    @property
    def num_steps(self) -> int:
        """Of the window."""
        return len(self.rollout.trajectory)

    def nothing(self) -> Float[Tensor, "r t"]:
        """Log-ratios of a policy that has not moved: 0. In fp64 on the CPU, as all of them: a few numbers, and not every device has fp64."""
        return torch.zeros(len(self.rows), self.num_steps, dtype=torch.float64)

    def parts(self) -> list[slice]:
        """Micro-batches, as slices of ``rows``."""
        size = self.micro_batch_size or max(len(self.rows), 1)
        return [slice(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size)]

    def score(self, step: int, part: slice, replay: Hook | None) -> Rescored:
        """One step of one micro-batch."""
        rows = self.rows[part]
        whole = len(rows) == len(self.rollout.latents)  # as drawn: no copies
        return rescore(self.velocity_fn, self.rollout, steps=[step], rows=None if whole else rows, replay=replay)

    @torch.no_grad()
    def log_ratios(self) -> Float[Tensor, "r t"]:
        """A pass without gradients; fp64 on the CPU."""
        found = self.nothing()
        for step in range(self.num_steps):
            for part in self.parts():
                scored = self.score(step, part, self.replay)
                found[part, step] = loss_log_ratio(self.ratio, scored)[:, 0].cpu().double()
        return found

    def accumulate(self, slope: Slope) -> tuple[Float[Tensor, "r t"], float]:
        """A pass with gradients: accumulates ``sum slope * d log-ratio + kl_coef * d KL``.

        Returns:
            The log-ratios it met, fp64 on the CPU, and this rank's share of the KL.
        """
        found, divergence = self.nothing(), 0.0
        for step in range(self.num_steps):
            for part in self.parts():
                found[part, step], kl = self._accumulate_part(slope, step, part)
                divergence += kl
        return found, divergence

    def _accumulate_part(self, slope: Slope, step: int, part: slice) -> tuple[Tensor, float]:
        """Forward and backward of one step of one micro-batch; nothing of its graph is left when it returns."""
        scored = self.score(step, part, self.replay)
        log_ratio = loss_log_ratio(self.ratio, scored)
        met = log_ratio.detach().cpu().double()
        loss = (log_ratio * slope(met, part, slice(step, step + 1)).to(log_ratio)).sum()
        kl = torch.zeros(())
        if self.reference is not None and self.kl_coef:
            with torch.no_grad(), self.reference():
                fixed = self.score(step, part, None).mean
            kl = gaussian_kl(scored.mean[:, 0], fixed[:, 0], scored.std[:, 0]).sum() / self.kl_entries
            loss = loss + self.kl_coef * kl
        self.backward(loss * self.scale)
        return met[:, 0], float(kl.detach())
