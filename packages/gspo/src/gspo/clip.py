"""The clip range, measured instead of guessed (docs/adr/0010-clip-range.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import check_real
from gspo.distributed import ProcessGroup, gather_rows, total
from gspo.inputs import Numbers, as_numbers, require_tensor
from gspo.objective import ClipRange


def auto_clip_range(
    ratio: Float[Tensor, " b"] | Float[Tensor, "b t"],
    target_clip_fraction: float = 0.1,
    advantages: Numbers | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> float:
    """The clip range that would clip ``target_clip_fraction`` of these entries: a quantile of their progress.

        progress = sign(A) * (ratio - 1)   (what the clip looks at: how far an entry went where its advantage pushes it)
        beta     = quantile of progress at 1 - target_clip_fraction

    Without advantages, or where that quantile is not positive, ``|ratio - 1|`` stands for the progress. Measured on the ratio
    after the first update of a rollout, beta follows the scale of the log-ratio, which differs by orders of magnitude between
    kernels, window positions and numbers of elements.

    Args:
        ratio: Off-policy ratios.
        target_clip_fraction: In (0, 1).
        advantages: One per sample; 0 and what is not finite leave a sample out.
        process_group: Ranks whose entries count, all of which must call; None is this rank alone.

    Raises:
        ValueError: No entry is finite, or there is not one advantage per sample.

    >>> round(auto_clip_range(torch.tensor([0.9, 1.0, 1.05, 1.2]), 0.25), 3)
    0.125
    >>> round(auto_clip_range(torch.tensor([0.9, 0.8, 1.1, 1.3]), 0.5, torch.tensor([1.0, -1.0, 1.0, 1.0])), 3)
    0.15
    """
    require_tensor(ratio=ratio)
    check_real("target_clip_fraction", target_clip_fraction)
    if not 0 < target_clip_fraction < 1:
        raise ValueError(f"target_clip_fraction must be in (0, 1), got {target_clip_fraction}")
    if ratio.dim() not in (1, 2):
        raise ValueError(f"ratio must be (b,) or (b, t), got {tuple(ratio.shape)}")
    away = ratio.detach().cpu().double() - 1
    away = away if away.dim() == 2 else away[:, None]
    sign = torch.zeros(len(ratio), 1, dtype=away.dtype, device=away.device)
    if advantages is not None:
        gains = as_numbers("advantages", advantages)
        if gains.shape != ratio.shape[:1]:
            raise ValueError(f"advantages must be (b,) for ratio {tuple(ratio.shape)}, got {tuple(gains.shape)}")
        sign = torch.nan_to_num(gains, posinf=0.0, neginf=0.0).sign().to(away).unsqueeze(1)
        away = away[sign[:, 0] != 0]
        sign = sign[sign[:, 0] != 0]
    pairs = torch.stack([away.abs().flatten(), (away * sign).flatten()], 1)
    away_everywhere, progress = gather_rows(pairs[torch.isfinite(pairs).all(1)], process_group)[0].unbind(1)
    if away_everywhere.numel() == 0:
        raise ValueError("ratio must hold at least one finite entry, got none")
    beta = float(torch.quantile(progress, 1 - target_clip_fraction))
    if beta <= 0:
        beta = float(torch.quantile(away_everywhere, 1 - target_clip_fraction))
    return max(beta, 1e-12)


class ClipRangeTracker:
    """Remembers a measured clip range per window start: the geometric mean of measurements, ``rate`` the newest one's share.

    The scale of the log-ratio changes with the window's place, so each start has its own number. The memory makes it a trust region:
    an update several times larger than usual is clipped, not followed.
    """

    def __init__(self, rate: float = 0.2) -> None:
        """``rate`` in (0, 1].

        Raises:
            ValueError: It is not.
        """
        check_real("rate", rate)
        if rate is None or not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        self.rate = rate
        self.ranges: dict[int, float] = {}

    def observe(self, start: int, measured: float) -> float:
        """Takes a measurement at a window start in; returns the new range.

        Raises:
            ValueError: The measurement is no positive number.

        >>> tracker = ClipRangeTracker(rate=0.5)
        >>> tracker.observe(0, 4e-4), round(tracker.observe(0, 1e-4), 7)
        (0.0004, 0.0002)
        """
        check_real("measured", measured)
        if measured is None or not measured > 0:
            raise ValueError(f"measured must be a positive clip range, got {measured}")
        before = self.ranges.get(start, measured)
        self.ranges[start] = before if before == measured else before ** (1 - self.rate) * measured**self.rate
        return self.ranges[start]

    def at(self, start: int) -> float | None:
        """The range at a window start, None before its first measurement."""
        return self.ranges.get(start)

    def state_dict(self) -> dict[str, float]:
        """One number per window start seen."""
        return {f"clip_range.{start}": value for start, value in self.ranges.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores `state_dict`; other keys are ignored."""
        found = {k.removeprefix("clip_range."): v for k, v in state.items() if k.startswith("clip_range.")}
        for start, value in found.items():
            check_real(f"state['clip_range.{start}']", value)
        if not all(start.isdecimal() and v > 0 for start, v in found.items()):
            raise ValueError(f"state must hold positive clip ranges, got {found}")
        self.ranges = {int(start): float(value) for start, value in found.items()}


class ClipPolicy(Protocol):
    """Which clip range an update uses, by where its window starts."""

    def at(self, start: int) -> ClipRange | None:
        """The range, None where it is not known yet."""
        ...

    def observe(self, start: int, ratio: Tensor, advantages: Tensor) -> None:
        """Learns from the ratios of a policy that has moved."""
        ...


@dataclass(frozen=True)
class FixedClipRange:
    """The same everywhere, always."""

    value: ClipRange

    def at(self, start: int) -> ClipRange:
        """The range."""
        return self.value

    def observe(self, start: int, ratio: Tensor, advantages: Tensor) -> None:
        """Learns nothing."""


@dataclass(frozen=True)
class MeasuredClipRange:
    """`auto_clip_range` of what was observed, remembered by a `ClipRangeTracker`."""

    target_clip_fraction: float = 0.1
    tracker: ClipRangeTracker = field(default_factory=ClipRangeTracker)
    process_group: ProcessGroup | None = None

    def at(self, start: int) -> float | None:
        """The range, None before the first measurement at this start."""
        return self.tracker.at(start)

    def observe(self, start: int, ratio: Tensor, advantages: Tensor) -> None:
        """Measures, unless no ratio has moved (on any rank)."""
        if total(float((ratio != 1).sum()), self.process_group) > 0:
            measured = auto_clip_range(ratio, self.target_clip_fraction, advantages, process_group=self.process_group)
            self.tracker.observe(start, measured)
