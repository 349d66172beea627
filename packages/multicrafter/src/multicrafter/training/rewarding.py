"""What stage 2 maximises."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from gspo import RobustReward, Scores
from id_reward import CompositeReward, IdentityScorer, Scorer
from jaxtyping import Float

from multicrafter import UserError
from multicrafter.models.checks import check_finite
from multicrafter.models.finding import Finder
from multicrafter.photos.people import face_backend, people_finder
from multicrafter.world.judges.aesthetics import aesthetics_scorer
from multicrafter.world.rewards import PHOTO_FREE, RewardConfig, composite


@dataclass(frozen=True, kw_only=True)
class ScorersConfig:
    """Which models look at pictures where stage 2 takes photos; drawn scenes have judges of their own.

    Attributes:
        faces: Who finds faces and says who they are, see `multicrafter.photos.people.face_backend`; also where subjects are in drafts.
        clip: Folder of a CLIP that scores the prompt, or "tiny" (of the drawn world); needed unless ``reward.text`` is 0.
        aesthetics: "closed_form", "hps:PATH", or "none", which needs ``reward.aesthetics`` 0.
        watch: As ``faces``: whose judgement is not trained on, for ``watch``. None is nobody.
    """

    faces: str = "dlib"
    clip: str | None = None
    aesthetics: str = "closed_form"
    watch: str | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        kind, _, path = self.aesthetics.partition(":")
        if kind not in ("closed_form", "hps", "none") or (kind == "hps") != bool(path):
            raise UserError(f"aesthetics must be closed_form, hps:PATH or none, got {self.aesthetics!r}")
        if self.watch is not None and self.watch == self.faces:
            raise UserError(f"watch must be another one than faces, whose judgement is trained on, got {self.watch!r}")


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


class PhotoJudges(NamedTuple):
    """What stage 2 asks of photos: the reward, where subjects are in a draft, and who is not trained on."""

    reward: CompositeReward
    finder: Finder
    watcher: Scorer | None


def photo_judges(reward: RewardConfig, scorers: ScorersConfig) -> PhotoJudges:
    """The models that a configuration names, on the CPU.

    Raises:
        ValueError: A part of the reward has a weight and no model, or a model cannot be read.
        ImportError: An extra is missing.
    """
    text = aesthetics = None
    if reward.text:
        if scorers.clip is None:
            raise UserError(
                f"scorers.clip must be the folder of a CLIP where reward.text is not 0, got none and {reward.text}"
            )
        text = clip_scorer(scorers.clip)
    kind, _, path = scorers.aesthetics.partition(":")
    if kind == "none" and reward.aesthetics:
        raise UserError(
            f"scorers.aesthetics must not be none where reward.aesthetics is not 0, got {reward.aesthetics}"
        )
    if kind == "hps" and reward.aesthetics:
        from id_reward.backends.aesthetics import HPSv2Scorer

        aesthetics = HPSv2Scorer.from_pretrained(path)
    return PhotoJudges(
        photo_reward(reward, faces=scorers.faces, text=text, aesthetics=aesthetics), people_finder(scorers.faces),
        None if scorers.watch is None else IdentityScorer(face_backend(scorers.watch)),
    )  # fmt: skip


def clip_scorer(name: str) -> Scorer:
    """``tiny``, or a CLIP of transformers by id_reward."""
    if name == "tiny":
        from multicrafter.world import judges
        from multicrafter.world.judges.clip import ClipScorer as TinyScorer

        return TinyScorer.from_pretrained(judges.shipped() / "clip")
    from id_reward.backends.text import ClipScorer, TransformersClip

    return ClipScorer(TransformersClip.from_pretrained(name))


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
