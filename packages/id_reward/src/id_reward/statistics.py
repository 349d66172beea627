"""Mean and spread of a stream of values, without keeping them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from id_reward.shapes import Float


@dataclass
class RunningStatistics:
    """Updated batch by batch (Chan, Golub and LeVeque 1979: means and squared deviations of two sets combine exactly).

    >>> s = RunningStatistics()
    >>> s.update(np.array([1.0, 2.0, np.nan])); s.update(np.array([3.0]))
    >>> s.mean, s.nan
    (2.0, 1)
    """

    count: int = 0
    nan: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    seconds: float = 0.0

    def update(self, values: Float[np.ndarray, " b"], seconds: float = 0.0) -> None:
        """Adds values; what is not finite is counted as NaN and left out."""
        known = values[np.isfinite(values)]
        self.nan += len(values) - len(known)
        self.seconds += seconds
        if not len(known):
            return
        mean, total = float(known.mean()), self.count + len(known)
        apart = mean - self.mean
        self.squares += float(((known - mean) ** 2).sum()) + apart**2 * self.count * len(known) / total
        self.mean += apart * len(known) / total
        self.count = total
        self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))

    def as_dict(self) -> dict[str, float]:
        """count, nan, mean, std (of the population), min, max, seconds; NaN where nothing has come yet."""
        empty = self.count == 0
        return {
            "count": self.count,
            "nan": self.nan,
            "mean": math.nan if empty else self.mean,
            "std": math.nan if empty else math.sqrt(self.squares / self.count),
            "min": math.nan if empty else self.low,
            "max": math.nan if empty else self.high,
            "seconds": self.seconds,
        }
