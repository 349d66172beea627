"""Rewards as reward functions return them, and reward functions that may fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.advantage import Scale, check_weights, group_advantages, multi_reward_advantages, nan_sum
from gspo.checks import check_real
from gspo.distributed import ProcessGroup, gather_objects
from gspo.inputs import Numbers, as_numbers

logger = logging.getLogger("gspo")
CPU = torch.device("cpu")


@runtime_checkable
class TotalsAndParts(Protocol):
    """What a composite reward returns (`Scores`, or ``id_reward.CompositeReward``'s): what is trained, and what it consists of."""

    @property
    def totals(self) -> Any:
        """(b,)."""
        ...

    @property
    def parts(self) -> Mapping[str, Any]:
        """By name, (b,) each; only reported."""
        ...


@dataclass(frozen=True)
class Scores:
    """Totals that are trained, with parts that are only reported.

    Attributes:
        totals: (b,).
        parts: By name, (b,) each.
    """

    totals: Numbers
    parts: Mapping[str, Numbers] = field(default_factory=dict)


Rewards = Numbers | Mapping[str, Any] | TotalsAndParts
"""One number per sample; or several by name, each normalised and weighted; or totals with parts. None or NaN where there is none."""

RewardFunction = Callable[[Tensor, Tensor], Rewards]
"""``(final latents (b, ...), index (b,)) -> rewards (b,)``."""


def as_rewards(values: Numbers, count: int, device: torch.device, name: str = "") -> Float[Tensor, " b"]:
    """Rewards as (count,) floating numbers; None becomes NaN.

    Raises:
        ValueError: There are not ``count`` numbers.
    """
    what = f"reward_fn must return {count} numbers, one per sample" + (f", for {name!r}" if name else "")
    try:
        numbers = as_numbers("rewards", values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if numbers.shape != (count,):
        raise ValueError(f"{what}, got shape {tuple(numbers.shape)}")
    if numbers.dtype != torch.float64 or device.type == "mps":
        numbers = numbers.float()
    return numbers.to(device)


class RewardTable:
    """What a reward function returned for one rank's samples, read and named alike on all ranks.

    Attributes:
        totals: (b,), what is trained or, for rewards by name, their weighted sum.
        parts: By name.
        by_name: Whether the parts are what is trained.
    """

    def __init__(
        self,
        values: Rewards,
        count: int,
        device: torch.device,
        weights: Mapping[str, float],
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Reads them.

        Args:
            values: What the reward function returned.
            count: Samples of this rank.
            device: Where tensors go.
            weights: Of rewards by name; empty is 1 each.
            process_group: Ranks that read theirs at the same time. A part that one of them lacks (its calls failed) is missing there.

        Raises:
            ValueError: There are not ``count`` numbers, or weights name other rewards.
        """
        self.by_name, nothing = isinstance(values, Mapping), torch.full((count,), torch.nan, device=device)
        found: Mapping[str, Any] = {}
        if isinstance(values, Mapping):
            found = values
        elif isinstance(values, TotalsAndParts):
            found, values = values.parts, values.totals
        self.parts = {str(name): as_rewards(part, count, device, str(name)) for name, part in found.items()}
        everyone = gather_objects((self.by_name, list(self.parts)), process_group)
        self.by_name = any(by_name for by_name, _ in everyone)
        for name in dict.fromkeys(name for _, names in everyone for name in names):
            self.parts.setdefault(name, nothing)
        self.weights = dict(weights) or dict.fromkeys(self.parts, 1.0)
        if self.by_name:
            check_weights(self.parts, self.weights)
            counted = [self.weights[name] * part for name, part in self.parts.items() if self.weights[name] != 0]
            self.totals = nan_sum(counted)
        else:
            assert not isinstance(values, Mapping)
            self.totals = as_rewards(values, count, device)  # type: ignore[arg-type]

    def advantages(
        self,
        group_ids: Int[Tensor, " b"],
        *,
        scale: Scale = "group",
        ddof: int = 0,
        normalize_first: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> Float[Tensor, " b"]:
        """`multi_reward_advantages` of rewards by name (if they are to be normalised first), `group_advantages` of totals."""
        if self.by_name and normalize_first:
            return multi_reward_advantages(
                self.parts, self.weights, group_ids, scale=scale, ddof=ddof, process_group=process_group
            )
        return group_advantages(self.totals, group_ids, scale=scale, ddof=ddof, process_group=process_group)


class RobustReward:
    """A reward that may fail: tried again, then sample by sample, and what fails then has no reward (NaN).

    A rollout is worth more than a judge's bad moment, and a rank that raised alone would leave the others waiting.

    Attributes:
        num_failed: Samples so far that could not be scored.
        last_error: What was raised last, in words.

    >>> score = RobustReward(lambda numbers: [1 / n for n in numbers], retries=0)
    >>> score([1, 0, 4]).tolist(), score.num_failed, score.last_error
    ([1.0, nan, 0.25], 1, 'ZeroDivisionError: division by zero')
    """

    def __init__(
        self,
        score: Callable[..., Rewards],
        *,
        retries: int = 2,
        wait_s: float = 1.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Wraps a scorer.

        Args:
            score: Called with columns (pictures, prompts, ...), each with one entry per sample; returns `Rewards`.
            retries: More attempts on the whole batch before it is scored sample by sample.
            wait_s: Seconds before the first retry, doubled with each (a reward may be a service).
            sleep: What waits.

        Raises:
            ValueError: A number is negative.
        """
        check_real("wait_s", wait_s, least=0.0)
        if not isinstance(retries, int) or isinstance(retries, bool) or not 0 <= retries <= 100 or wait_s is None:
            raise ValueError(
                f"retries must be a whole number from 0 to 100 and wait_s not negative, got {retries} and {wait_s}"
            )
        self.score, self.retries, self.wait_s, self.sleep = score, retries, wait_s, sleep
        self.num_failed = 0
        self.last_error: str | None = None

    def __call__(self, *columns: Sequence[Any] | Tensor) -> Rewards:
        """Rewards in the form that ``score`` returns them."""
        for attempt in range(1 + self.retries):
            try:
                return self.score(*columns)
            except Exception as raised:  # whatever a judge raises
                self._note(raised)
                logger.warning(
                    "the reward raised %s (attempt %d of %d)", self.last_error, attempt + 1, 1 + self.retries
                )
                if attempt < self.retries:
                    self.sleep(self.wait_s * 2**attempt)
        return self._one_by_one(columns)

    def _note(self, raised: Exception) -> None:
        self.last_error = f"{type(raised).__name__}: {raised}"

    def _one_by_one(self, columns: tuple[Sequence[Any] | Tensor, ...]) -> Rewards:
        if not columns:
            raise ValueError("a reward must be called with at least one column, got none")
        count = len(columns[0])
        totals: list[float] = [float("nan")] * count
        parts: dict[str, list[float]] = {}
        with_totals = by_name = False
        for row in range(count):
            try:
                scored = self.score(*(column[row : row + 1] for column in columns))
            except Exception as raised:
                self._note(raised)
                self.num_failed += 1
                continue
            by_name = by_name or isinstance(scored, Mapping)
            found: Mapping[str, Any] = scored if isinstance(scored, Mapping) else {}
            if isinstance(scored, TotalsAndParts):
                with_totals, found, scored = True, scored.parts, scored.totals
            for name, values in found.items():
                parts.setdefault(name, [float("nan")] * count)[row] = float(as_rewards(values, 1, CPU, str(name))[0])
            if not isinstance(scored, Mapping):
                totals[row] = float(as_rewards(scored, 1, CPU)[0])
        if by_name:
            return parts
        return Scores(totals, parts) if with_totals else torch.tensor(totals)
