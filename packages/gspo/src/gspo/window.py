"""Which denoising steps are stochastic and trained: a window that slides over the schedule (MixGRPO, arXiv 2507.21802)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["progressive", "random", "exp_decay"]


@dataclass(frozen=True)
class SlidingWindow:
    """A window of ``size`` consecutive steps, moved by ``stride`` every ``interval`` iterations.

    The window is a function of the iteration alone, so every rank sees the same one and a checkpoint needs no more state
    than the iteration. It is never empty and never holds the last step, whose density explodes.

    Strategies: "progressive" slides from the noisy end and starts over; "random" draws a start per interval uniformly;
    "exp_decay" stays ``exp(-start / last)``-proportionally longer at the noisy end: starts are visited in order, each for
    a share of the sweep proportional to that weight (MixGRPO's exponential decay, made exact and periodic).

    Attributes:
        num_steps: Denoising steps of the rollout.
        size: Steps in the window, in [1, num_steps - 1].
        stride: Steps the window moves.
        interval: Iterations between moves (tau).
        strategy: See above.
        seed: Seed of the "random" strategy.
    """

    num_steps: int
    size: int = 2
    stride: int = 1
    interval: int = 50
    strategy: Strategy = "progressive"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {self.num_steps}")
        if not 1 <= self.size <= self.num_steps - 1:
            raise ValueError(f"size must be in [1, num_steps - 1 = {self.num_steps - 1}], got {self.size}")
        for name in ("stride", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.strategy not in ("progressive", "random", "exp_decay"):
            raise ValueError(f"strategy must be 'progressive', 'random' or 'exp_decay', got {self.strategy!r}")

    @property
    def starts(self) -> tuple[int, ...]:
        """First steps of the windows of one sweep; the last window always reaches step num_steps - 2.

        >>> SlidingWindow(6, size=2, stride=2).starts
        (0, 2, 3)
        """
        last = self.num_steps - 1 - self.size
        regular = list(range(0, last + 1, self.stride))
        return tuple(regular if regular[-1] == last else [*regular, last])

    def at(self, iteration: int) -> tuple[int, ...]:
        """Steps of the window at ``iteration`` (0-based).

        >>> SlidingWindow(16).at(0), SlidingWindow(16).at(50), SlidingWindow(16).at(50 * 14)
        ((0, 1), (1, 2), (0, 1))
        """
        if iteration < 0:
            raise ValueError(f"iteration must not be negative, got {iteration}")
        start = self.starts[self._position(iteration)]
        return tuple(range(start, start + self.size))

    def _position(self, iteration: int) -> int:
        number = len(self.starts)
        move = iteration // self.interval
        if self.strategy == "progressive":
            return move % number
        if self.strategy == "random":
            digest = hashlib.sha256(f"{self.seed}:{move}".encode()).digest()
            return int.from_bytes(digest[:8], "big") * number >> 64
        weights = [math.exp(-start / max(self.starts[-1], 1)) for start in self.starts]
        scale = number * self.interval / sum(weights)
        spent, within = 0.0, iteration % (number * self.interval)
        for index, weight in enumerate(weights):
            spent += weight * scale
            if within < round(spent):
                return index
        return number - 1
