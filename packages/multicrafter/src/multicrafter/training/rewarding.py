"""Rewards that may fail: tried again, then picture by picture, then the picture is marked and left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

logger = logging.getLogger(__name__)


class Reward(Protocol):
    """What stage 2 maximises, such as `id_reward.CompositeReward`."""

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]) -> Any:
        """``totals`` (b,) and ``parts``: name -> (b,)."""
        ...


class Scored(NamedTuple):
    """Totals (b,) and parts, NaN for pictures that could not be scored; how many these are, and the last error."""

    totals: Float[np.ndarray, " b"]
    parts: dict[str, Float[np.ndarray, " b"]]
    failed: int
    error: str | None


def score_pictures(
    reward: Reward,
    pictures: Sequence[Any],
    prompts: Sequence[str],
    references: Sequence[Sequence[Any]],
    *,
    retries: int = 2,
    wait_s: float = 1.0,
) -> Scored:
    """Scores a batch; an exception costs a retry, and in the end only the pictures that cause it.

    Args:
        reward: Called with pictures, prompts and references.
        pictures: Of one rank.
        prompts: One per picture.
        references: One list per picture.
        retries: More attempts on the whole batch before it is scored picture by picture.
        wait_s: Seconds before the first retry, doubled with each (a reward may be a service).
    """
    error = ""
    for attempt in range(1 + retries):
        try:
            score = reward(pictures, prompts, references)
            return Scored(np.asarray(score.totals, np.float64), dict(score.parts), 0, error or None)
        except Exception as raised:  # whatever a judge raises, the rollout is worth more
            error = f"{type(raised).__name__}: {raised}"
            logger.warning(f"the reward raised {error} (attempt {attempt + 1} of {1 + retries})")
            if attempt < retries:
                time.sleep(wait_s * 2**attempt)
    totals, failed = np.full(len(pictures), np.nan), 0
    parts: dict[str, np.ndarray] = {}
    for row, (picture, prompt, given) in enumerate(zip(pictures, prompts, references, strict=True)):
        try:
            score = reward([picture], [prompt], [given])
        except Exception as raised:
            failed, error = failed + 1, f"{type(raised).__name__}: {raised}"
            continue
        totals[row] = score.totals[0]
        for name, values in score.parts.items():
            parts.setdefault(name, np.full(len(pictures), np.nan))[row] = values[0]
    return Scored(totals, parts, failed, error)
