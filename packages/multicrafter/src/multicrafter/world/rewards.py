"""Stage 2's composite reward in the tiny world: text, aesthetics, Multi-ID. The reader of truth has no part in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from id_reward import CompositeReward, IdentityScorer, Scorer
from id_reward.alignment import CONVENTIONS, Convention, cosine_similarity
from jaxtyping import Float

from multicrafter import UserError
from multicrafter.models.checks import check_finite
from multicrafter.world import judges
from multicrafter.world.judges.aesthetics import aesthetics_scorer
from multicrafter.world.judges.clip import ClipScorer
from multicrafter.world.judges.people import PeopleBackend


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the parts, and what a reference without a face, or a face without a reference, costs.

    Attributes:
        text: Weight of the CLIP alignment, in [0, 1].
        aesthetics: Weight of the closed form, in [0, 1].
        multi_id: Weight of the matched cosine, in [-1, 1].
        missing_penalty, extra_penalty: See `id_reward.multi_id_alignment_reward`.
        convention: How faces and references are compared: one of id_reward's, or "mean", the mean cosine of all pairs, which assigns nobody
            and is here to be gamed.
    """

    text: float = 1.0
    aesthetics: float = 0.5
    multi_id: float = 2.0
    missing_penalty: float = 0.0
    extra_penalty: float = 0.5
    convention: Convention | Literal["mean"] = "multicrafter"

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("text", "aesthetics", "multi_id", "missing_penalty", "extra_penalty"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.convention not in (*CONVENTIONS, "mean"):
            raise UserError(f"convention must be one of {', '.join((*CONVENTIONS, 'mean'))}, got {self.convention!r}")
        if self.text + self.aesthetics + self.multi_id == 0:
            raise UserError("text, aesthetics and multi_id must not all be 0")


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


def tiny_reward(config: RewardConfig | None = None, *, folder: Path | None = None) -> CompositeReward:
    """The reward from the judges in ``folder`` (the shipped ones by default)."""
    config, folder = config or RewardConfig(), folder or judges.shipped()
    identity = IdentityScorer(
        PeopleBackend.from_pretrained(folder),
        missing_penalty=config.missing_penalty,
        extra_penalty=config.extra_penalty,
        convention="multicrafter" if config.convention == "mean" else config.convention,
    )
    parts: dict[str, tuple[Scorer, float]] = {
        "text": (ClipScorer.from_pretrained(folder / "clip"), config.text),
        "aesthetics": (aesthetics_scorer, config.aesthetics),
        "multi_id": (MeanIdentity(identity) if config.convention == "mean" else identity, config.multi_id),
    }
    return CompositeReward({name: part for name, part in parts.items() if part[1] > 0})
