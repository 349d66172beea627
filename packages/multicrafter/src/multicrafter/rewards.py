"""Stage 2's composite reward in the tiny world: text, aesthetics, Multi-ID. The reader of truth has no part in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from id_reward import CompositeReward, IdentityScorer, Scorer

from multicrafter import judges
from multicrafter.judges.aesthetics import aesthetics_scorer
from multicrafter.judges.clip import ClipScorer
from multicrafter.judges.people import PeopleBackend


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the parts, and what a reference without a face, or a face without a reference, costs.

    Attributes:
        text: Weight of the CLIP alignment, in [0, 1].
        aesthetics: Weight of the closed form, in [0, 1].
        multi_id: Weight of the matched cosine, in [-1, 1].
        missing_penalty, extra_penalty: See `id_reward.multi_id_alignment_reward`.
    """

    text: float = 1.0
    aesthetics: float = 0.5
    multi_id: float = 2.0
    missing_penalty: float = 0.0
    extra_penalty: float = 0.5

    def __post_init__(self) -> None:
        for name in ("text", "aesthetics", "multi_id", "missing_penalty", "extra_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.text + self.aesthetics + self.multi_id == 0:
            raise ValueError("text, aesthetics and multi_id must not all be 0")


def tiny_reward(config: RewardConfig | None = None, *, folder: Path | None = None) -> CompositeReward:
    """The reward from the judges in ``folder`` (the shipped ones by default)."""
    config, folder = config or RewardConfig(), folder or judges.shipped()
    identity = IdentityScorer(
        PeopleBackend.from_pretrained(folder),
        missing_penalty=config.missing_penalty,
        extra_penalty=config.extra_penalty,
    )
    parts: dict[str, tuple[Scorer, float]] = {
        "text": (ClipScorer.from_pretrained(folder / "clip"), config.text),
        "aesthetics": (aesthetics_scorer, config.aesthetics),
        "multi_id": (identity, config.multi_id),
    }
    return CompositeReward({name: part for name, part in parts.items() if part[1] > 0})
