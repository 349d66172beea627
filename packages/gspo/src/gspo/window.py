"""Which denoising steps are stochastic and trained: a window that slides over the schedule (MixGRPO, arXiv 2507.21802)."""

from __future__ import annotations

import hashlib
import math
import numbers
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from gspo.checks import check_seed, one_line, require_real, require_whole

MAX_STEPS = 100_000
Strategy = Literal["progressive", "random", "exp_decay", "fixed"]


@dataclass(frozen=True)
class SlidingWindow:
    """A window of ``size`` consecutive steps, moved by ``stride`` every ``interval`` iterations.

    The window is a function of these integers and the iteration alone: every rank sees the same one, and a checkpoint needs no
    more state than the iteration. It is never empty, never shorter than ``size``, and never holds the last step, whose density
    explodes (MixGRPO's shrinks at the end and is empty for one interval before it rolls back; wherever that one is full, ours is
    equal to it).

    Strategies: "progressive" slides from the noisy end and starts over; "random" draws a start per interval, uniformly;
    "exp_decay" slides like "progressive" but stays at start l for

        tau(l) = ceil(interval * exp(-decay_rate * max(0, l - decay_from)))    (MixGRPO, section 3.3)

    "fixed" never moves: it stays where the reward's spread is under its control (`gspo.diagnose`), usually at the first steps.

    Attributes:
        num_steps: Denoising steps of the rollout, >= 2.
        size: Steps in the window, in [1, num_steps - 1].
        stride: Steps the window moves.
        interval: Iterations between moves (tau).
        strategy: See above.
        seed: Seed of the "random" strategy.
        decay_rate: k of "exp_decay", per step.
        decay_from: Start from which "exp_decay" decays; None is half of num_steps (13 of 25 in MixGRPO).
        start: First step of the "fixed" window, in [0, num_steps - 1 - size]; 0 with the other strategies.
    """

    num_steps: int
    size: int = 2
    stride: int = 1
    interval: int = 50
    strategy: Strategy = "progressive"
    seed: int = 0
    decay_rate: float = 0.1
    decay_from: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        require_whole(self, 1, "num_steps", "size", "stride", "interval")
        require_whole(self, 0, "start")
        require_whole(self, -MAX_STEPS, "decay_from")
        require_real(self, "decay_rate")
        check_seed(self.seed)
        if not 2 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps must be at least 2 and at most {MAX_STEPS}, got {self.num_steps}")
        if not 1 <= self.size <= self.num_steps - 1:
            raise ValueError(f"size must be in [1, num_steps - 1 = {self.num_steps - 1}], got {self.size}")
        if self.strategy not in ("progressive", "random", "exp_decay", "fixed"):
            raise ValueError(
                f"strategy must be 'progressive', 'random', 'exp_decay' or 'fixed', got {one_line(self.strategy)}"
            )
        last = self.num_steps - 1 - self.size if self.strategy == "fixed" else 0
        if not 0 <= self.start <= last:
            raise ValueError(f"start must be in [0, {last}] for strategy {self.strategy!r}, got {self.start}")
        if not self.decay_rate >= 0:
            raise ValueError(f"decay_rate must not be negative, got {self.decay_rate}")

    @property
    def starts(self) -> tuple[int, ...]:
        """First steps of the windows of one sweep; the last window always reaches step num_steps - 2.

        >>> SlidingWindow(6, size=2, stride=2).starts
        (0, 2, 3)
        """
        if self.strategy == "fixed":
            return (self.start,)
        last = self.num_steps - 1 - self.size
        regular = list(range(0, last + 1, self.stride))
        return tuple(regular if regular[-1] == last else [*regular, last])

    @property
    def stays(self) -> tuple[int, ...]:
        """Iterations at each of `starts` in a sweep.

        >>> SlidingWindow(8, interval=4, strategy="exp_decay", decay_rate=1.0, decay_from=3).stays
        (4, 4, 4, 4, 2, 1)
        """
        if self.strategy != "exp_decay":
            return (self.interval,) * len(self.starts)
        begin = self.num_steps // 2 if self.decay_from is None else self.decay_from
        return tuple(math.ceil(self.interval * math.exp(-self.decay_rate * max(0, s - begin))) for s in self.starts)

    def at(self, iteration: int) -> tuple[int, ...]:
        """Steps of the window at ``iteration`` (0-based), ``size`` of them, in [0, num_steps - 2].

        >>> SlidingWindow(16).at(0), SlidingWindow(16).at(50), SlidingWindow(16).at(50 * 14)
        ((0, 1), (1, 2), (0, 1))
        """
        if not isinstance(iteration, numbers.Integral) or iteration < 0:
            raise ValueError(f"iteration must be a whole number and not negative, got {one_line(iteration)}")
        start = self.starts[self._position(iteration)]
        return tuple(range(start, start + self.size))

    def _position(self, iteration: int) -> int:
        number = len(self.starts)
        if self.strategy == "random":
            digest = hashlib.sha256(f"{self.seed}:{iteration // self.interval}".encode()).digest()
            return int.from_bytes(digest[:8], "big") * number >> 64
        ends = list(accumulate(self.stays))
        return bisect_right(ends, iteration % ends[-1])
