"""Is the reward being gamed? A judge that is not trained on looks at the same pictures, and says when the two part."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.checks import check_finite


class RewardGamed(UserWarning):
    """The reward that is trained has risen, and what another judge says has fallen."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """A judge that is not trained on scores the pictures of the rollouts.

    Attributes:
        action: What happens when trained reward and watching judge part: "warn" (once), or "stop" (the run ends, and its adapter is
            saved). "none" asks no judge.
        window: Iterations whose mean is compared: so many at the start of the run, so many at its end; at least 2.
        pictures: Of each rollout that are looked at (on each process), evenly spread over its prompts.
        deviations: Standard errors by which the reward must have risen, and what is watched fallen.
    """

    action: Literal["none", "warn", "stop"] = "none"
    window: int = 10
    pictures: int = 32
    deviations: float = 2.0

    def __post_init__(self) -> None:
        check_finite(self)
        if self.window < 2:
            raise UserError(f"window must be at least 2 (a mean of one has no error), got {self.window}")
        if self.pictures < 1:
            raise UserError(f"pictures must be at least 1, got {self.pictures}")
        if self.deviations < 0:
            raise UserError(f"deviations must not be negative, got {self.deviations}")


def rise(values: Sequence[float], window: int) -> float:
    """Mean of the last ``window`` values minus that of the first, in standard errors of the difference (Welch); 0 for too few values.

        (mean(last) - mean(first)) / sqrt((var(last) + var(first)) / window)

    >>> round(rise([0.0, 2.0, 5.0, 4.0, 6.0], 2), 2)
    2.83
    """
    known = [v for v in values if math.isfinite(v)]
    if len(known) < 2 * window:
        return 0.0
    first, last = known[:window], known[-window:]
    difference = statistics.fmean(last) - statistics.fmean(first)
    error = math.sqrt((statistics.variance(last) + statistics.variance(first)) / window)
    return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0


def parted(rewards: Sequence[float], watched: Sequence[float], config: WatchConfig) -> bool:
    """Whether the reward has risen and what is watched has fallen, both by more than ``deviations``."""
    up, down = rise(rewards, config.window), rise(watched, config.window)
    return up > config.deviations and down < -config.deviations


class Watch:
    """What the two judges have said, iteration by iteration."""

    def __init__(self, config: WatchConfig) -> None:
        """Nothing yet."""
        self.config = config
        self.rewards: list[float] = []
        self.watched: list[float] = []
        self._said = False

    def observe(self, reward: float, watched: float) -> None:
        """One iteration; warns (once) where the judges part."""
        self.rewards.append(reward)
        self.watched.append(watched)
        if self.config.action == "warn" and not self._said and parted(self.rewards, self.watched, self.config):
            self._said = True
            warnings.warn(self.words(), RewardGamed, stacklevel=2)

    def words(self) -> str:
        """What has happened."""
        window = self.config.window
        first, last = (
            statistics.fmean(v for v in part if math.isfinite(v))
            for part in (self.watched[:window], self.watched[-window:])
        )
        return (
            f"the reward rises by {rise(self.rewards, window):.1f} standard errors while a judge that is not trained on falls from {first:.3f} "
            f"to {last:.3f}: the reward is being gamed"
        )

    def finished(self) -> str | None:
        """Why the run should end, if it should."""
        stop = self.config.action == "stop" and parted(self.rewards, self.watched, self.config)
        return self.words() if stop else None

    def tensors(self) -> dict[str, Tensor]:
        """State, for a checkpoint."""
        return {
            "watch.rewards": torch.tensor(self.rewards, dtype=torch.float64),
            "watch.watched": torch.tensor(self.watched, dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`; a checkpoint of before there was a watch has none."""
        self.rewards = tensors["watch.rewards"].tolist() if "watch.rewards" in tensors else []
        self.watched = tensors["watch.watched"].tolist() if "watch.watched" in tensors else []
