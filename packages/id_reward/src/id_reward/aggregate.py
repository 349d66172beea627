"""Several scorers as one reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from id_reward.alignment import Convention, multi_id_alignment_reward
from id_reward.protocols import FaceBackend, Faces, Scorer

NanPolicy = Literal["propagate", "zero", "raise"]


class CompositeScore(NamedTuple):
    """totals (b,) and each part's raw values (b,) by name."""

    totals: Float[np.ndarray, " b"]
    parts: dict[str, Float[np.ndarray, " b"]]


class CompositeReward:
    """``total = sum over parts of weight * (value - shift) / scale``.

    Args:
        parts: name -> (scorer, weight).
        normalization: name -> (shift, scale); (0, 1) where absent.
        nan_policy: What a NaN of one part does: make the total NaN ("propagate": the trainer leaves the sample out), count as 0, or raise.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Scorer, float]],
        *,
        normalization: Mapping[str, tuple[float, float]] | None = None,
        nan_policy: NanPolicy = "propagate",
    ) -> None:
        """Validates names, weights and policy."""
        if not parts:
            raise ValueError("parts must hold at least one scorer, got none")
        if nan_policy not in ("propagate", "zero", "raise"):
            raise ValueError(f"nan_policy must be 'propagate', 'zero' or 'raise', got {nan_policy!r}")
        self.parts, self.nan_policy = dict(parts), nan_policy
        self.normalization = dict(normalization or {})
        unknown = self.normalization.keys() - self.parts.keys()
        if unknown:
            raise ValueError(f"normalization must name parts {sorted(self.parts)}, got {sorted(unknown)}")
        if any(scale <= 0 for _, scale in self.normalization.values()):
            raise ValueError(f"normalization must have positive scales, got {self.normalization}")

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> CompositeScore:
        """Scores a batch.

        Raises:
            ValueError: Lengths differ, a scorer returns another number of values, or a NaN under "raise".
        """
        count = len(images)
        if len(prompts) != count or len(references) != count:
            raise ValueError(
                f"prompts and references must have one entry per picture ({count}), got {len(prompts)} and {len(references)}"
            )
        totals, raw = np.zeros(count), {}
        for name, (scorer, weight) in self.parts.items():
            values = np.asarray(scorer(images, prompts, references), np.float64)
            if values.shape != (count,):
                raise ValueError(f"{name} must return {count} values, got shape {values.shape}")
            if self.nan_policy == "raise" and np.isnan(values).any():
                raise ValueError(
                    f"{name} must return numbers, got NaN for {int(np.isnan(values).sum())} of {count} pictures"
                )
            shift, scale = self.normalization.get(name, (0.0, 1.0))
            part = weight * (values - shift) / scale
            totals += np.where(np.isnan(part), 0.0, part) if self.nan_policy == "zero" else part
            raw[name] = values
        return CompositeScore(totals, raw)

    @staticmethod
    def statistics(score: CompositeScore) -> dict[str, dict[str, float]]:
        """Mean, spread and NaN count of every part."""
        return {
            name: {"mean": float(np.nanmean(v)), "std": float(np.nanstd(v)), "nan": int(np.isnan(v).sum())}
            for name, v in {**score.parts, "total": score.totals}.items()
        }


@dataclass
class IdentityScorer:
    """The Multi-ID Alignment Reward as a scorer; references are embedded once, not once per picture.

    Attributes:
        backend: Finds and embeds faces.
        missing_penalty, extra_penalty, convention: See `multi_id_alignment_reward`.
        cache_size: Reference embeddings kept, by the identity of the reference object.
    """

    backend: FaceBackend
    missing_penalty: float = 0.0
    extra_penalty: float = 0.0
    convention: Convention = "multicrafter"
    cache_size: int = 4096

    def __post_init__(self) -> None:
        self._cache: dict[int, tuple[Any, np.ndarray]] = {}

    def embed_references(self, references: Sequence[Any]) -> Float[np.ndarray, "r d"]:
        """Embedding of the largest face of every reference; NaN rows where none is found."""
        todo = [r for r in {id(r): r for r in references}.values() if id(r) not in self._cache]
        if todo:
            for reference, faces in zip(todo, self.backend.detect_and_embed(todo), strict=True):
                if len(self._cache) >= self.cache_size:
                    self._cache.pop(next(iter(self._cache)))
                self._cache[id(reference)] = (reference, largest(faces))
        return np.stack([self._cache[id(r)][1] for r in references])

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """Reward per picture; NaN where a reference shows no face or there is none."""
        rewards = np.full(len(images), np.nan)
        for row, (faces, given) in enumerate(zip(self.backend.detect_and_embed(images), references, strict=True)):
            if not len(given):
                continue
            known = self.embed_references(given)
            if np.isfinite(known).all():
                rewards[row] = multi_id_alignment_reward(
                    known,
                    faces.embeddings,
                    missing_penalty=self.missing_penalty,
                    extra_penalty=self.extra_penalty,
                    convention=self.convention,
                ).reward
        return rewards


def largest(faces: Faces) -> np.ndarray:
    """Embedding of the largest face; NaN if there is none."""
    if not len(faces.boxes):
        return np.full(faces.embeddings.shape[-1] or 1, np.nan)
    sides = faces.boxes[:, 2:] - faces.boxes[:, :2]
    return np.asarray(faces.embeddings[int(sides.prod(1).argmax())])
