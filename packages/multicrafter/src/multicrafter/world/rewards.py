"""Stage 2's composite reward: text, aesthetics, Multi-ID, and what copied faces cost. In the tiny world the reader of truth is no part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from id_reward import CompositeReward, FaceBackend, IdentityScorer, Scorer
from id_reward.alignment import CONVENTIONS, Convention, cosine_similarity
from id_reward.copying import CopyPaste
from id_reward.remembering import RememberingBackend
from jaxtyping import Float

from multicrafter import UserError
from multicrafter.models.checks import check_finite
from multicrafter.world import judges
from multicrafter.world.judges.aesthetics import aesthetics_scorer
from multicrafter.world.judges.clip import ClipScorer
from multicrafter.world.judges.people import PeopleBackend

DRAWN_FREE, PHOTO_FREE = 0.8, 0.65
"""Correlation of details that different pictures of one person reach: drawn people (who are alike), photos (docs/adr/0045)."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the parts, and what a reference without a face, or a face without a reference, costs.

    Attributes:
        text: Weight of the CLIP alignment, in [0, 1].
        aesthetics: Weight of the closed form, in [0, 1].
        multi_id: Weight of the matched cosine, in [-1, 1].
        missing_penalty: What a reference without a face costs, see `id_reward.multi_id_alignment_reward`.
        extra_penalty: What a face without a reference costs, see there.
        off_pair_penalty: See there: what a face costs that is like several references, such as their average. 0 asks nothing.
        copy_paste: What a face costs that repeats its reference's pose, crop and light, times `id_reward.copying.CopyPaste` in [0, 1].
        copy_paste_free: Correlation up to which that costs nothing; None is 0.8 for drawn people, who are more alike, and 0.65 for photos.
        convention: How faces and references are compared: one of id_reward's, or "mean", the mean cosine of all pairs, which assigns nobody
            and is here to be gamed.
    """

    text: float = 1.0
    aesthetics: float = 0.5
    multi_id: float = 2.0
    missing_penalty: float = 0.0
    extra_penalty: float = 0.5
    off_pair_penalty: float = 0.0
    copy_paste: float = 0.0
    copy_paste_free: float | None = None
    convention: Convention | Literal["mean"] = "multicrafter"

    def __post_init__(self) -> None:
        check_finite(self)
        for name in (
            "text",
            "aesthetics",
            "multi_id",
            "missing_penalty",
            "extra_penalty",
            "off_pair_penalty",
            "copy_paste",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.convention not in (*CONVENTIONS, "mean"):
            raise UserError(f"convention must be one of {', '.join((*CONVENTIONS, 'mean'))}, got {self.convention!r}")
        if self.off_pair_penalty and self.convention != "multicrafter":
            raise UserError(
                f"off_pair_penalty needs convention 'multicrafter', got {self.off_pair_penalty} with {self.convention!r}"
            )
        if self.copy_paste_free is not None and not -1 <= self.copy_paste_free < 1:
            raise UserError(f"copy_paste_free must be in [-1, 1), got {self.copy_paste_free}")
        if self.text + self.aesthetics + self.multi_id == 0:
            raise UserError("text, aesthetics and multi_id must not all be 0")

    @property
    def weights(self) -> dict[str, float]:
        """Of every part that counts, by name."""
        found = {
            "text": self.text,
            "aesthetics": self.aesthetics,
            "multi_id": self.multi_id,
            "copy_paste": -self.copy_paste,
        }
        return {name: weight for name, weight in found.items() if weight}


@dataclass(frozen=True)
class MeanIdentity:
    """Mean cosine of all references with all faces; 0 without a face, NaN without a reference's face."""

    scorer: IdentityScorer

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture."""
        found = self.scorer.backend.detect_and_embed(images)
        known = [self.scorer.embed_references(given) for given in references]
        return np.array(
            [
                np.nan
                if not np.isfinite(r).all()
                else cosine_similarity(r, f.embeddings).mean()
                if len(f.boxes)
                else 0.0
                for r, f in zip(known, found, strict=True)
            ]
        )


def composite(
    config: RewardConfig, backend: FaceBackend, *, text: Scorer | None, aesthetics: Scorer | None, free: float
) -> CompositeReward:
    """``text + aesthetics + multi_id - copy_paste``, each times its weight; a part of weight 0 is left out.

    Args:
        config: Weights.
        backend: Finds faces and embeds them.
        text: Scorer of the prompt; needed where its weight is not 0.
        aesthetics: Scorer of the picture; as text.
        free: For ``copy_paste_free`` where that is None.

    Raises:
        ValueError: A part has a weight and no scorer.
    """
    if config.copy_paste:
        backend = RememberingBackend(backend)  # two parts look for the same faces
    identity = IdentityScorer(
        backend,
        missing_penalty=config.missing_penalty,
        extra_penalty=config.extra_penalty,
        off_pair_penalty=config.off_pair_penalty,
        convention="multicrafter" if config.convention == "mean" else config.convention,
    )
    copied = CopyPaste(identity, free=free if config.copy_paste_free is None else config.copy_paste_free)
    parts: dict[str, tuple[Scorer | None, float]] = {
        "text": (text, config.text),
        "aesthetics": (aesthetics, config.aesthetics),
        "multi_id": (MeanIdentity(identity) if config.convention == "mean" else identity, config.multi_id),
        "copy_paste": (copied, -config.copy_paste),
    }
    chosen = {}
    for name, (scorer, weight) in parts.items():
        if weight and scorer is None:
            raise UserError(f"{name} must have weight 0 where there is no scorer for it, got {weight}")
        if weight and scorer is not None:
            chosen[name] = (scorer, weight)
    return CompositeReward(chosen)


def tiny_reward(config: RewardConfig | None = None, *, folder: Path | None = None) -> CompositeReward:
    """The reward from the judges in ``folder`` (the shipped ones by default)."""
    config, folder = config or RewardConfig(), folder or judges.shipped()
    clip = ClipScorer.from_pretrained(folder / "clip")
    return composite(
        config, PeopleBackend.from_pretrained(folder), text=clip, aesthetics=aesthetics_scorer, free=DRAWN_FREE
    )
