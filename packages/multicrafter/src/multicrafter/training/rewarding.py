"""What stage 2 maximises."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from gspo import RobustReward, Scores
from id_reward import CompositeReward, Scorer
from jaxtyping import Float

from multicrafter.photos.people import face_backend
from multicrafter.world.judges.aesthetics import aesthetics_scorer
from multicrafter.world.rewards import PHOTO_FREE, RewardConfig, composite


class Reward(Protocol):
    """What stage 2 maximises, such as `id_reward.CompositeReward`. It may raise: `gspo.RobustReward` is around it."""

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]) -> Any:
        """``totals`` (b,) and ``parts``: name -> (b,)."""
        ...


def photo_reward(
    config: RewardConfig | None = None,
    *,
    faces: str = "dlib",
    text: Scorer | None = None,
    aesthetics: Scorer | None = None,
) -> CompositeReward:
    """The reward of `multicrafter.world.rewards.RewardConfig` for photos, to be given to `run_align`.

    Args:
        config: Weights.
        faces: Who finds faces, see `multicrafter.photos.people.face_backend`.
        text: Scorer of the prompt, such as ``id_reward.backends.text.ClipScorer``; needed unless ``config.text`` is 0.
        aesthetics: Scorer of the picture; the closed form by default.

    Raises:
        ValueError: No such backend, or a weight without a scorer.
        ImportError: The backend's extra is missing.
    """
    config = config or RewardConfig()
    return composite(
        config, face_backend(faces), text=text, aesthetics=aesthetics or aesthetics_scorer, free=PHOTO_FREE
    )


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
    """Until 0.3: `gspo.RobustReward`, which stage 2 uses."""
    warnings.warn(
        "multicrafter.training.rewarding.score_pictures is now gspo.RobustReward; the old name leaves with multicrafter 0.3",
        DeprecationWarning,
        stacklevel=2,
    )

    def score(*columns: Sequence[Any]) -> Scores:
        found = reward(*columns)
        return Scores(found.totals, found.parts)

    robust = RobustReward(score, retries=retries, wait_s=wait_s)
    found = robust(pictures, prompts, references)
    assert isinstance(found, Scores)
    parts = {name: np.asarray(values, np.float64) for name, values in found.parts.items()}
    return Scored(np.asarray(found.totals, np.float64), parts, robust.num_failed, robust.last_error)
