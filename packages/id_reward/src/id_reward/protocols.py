"""What a face backend and a scorer look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from id_reward.shapes import Float


class Faces(NamedTuple):
    """Faces (or whole subjects) found in one picture.

    boxes (f, 4): left, top, right, bottom in pixels; scores (f,) in [0, 1]; unit embeddings (f, d), comparable by cosine.
    """

    boxes: Float[np.ndarray, "f 4"]
    scores: Float[np.ndarray, " f"]
    embeddings: Float[np.ndarray, "f d"]


@runtime_checkable
class FaceBackend(Protocol):
    """Finds and embeds faces.

    A backend may also have ``detect_and_embed_references(images) -> list[Faces]``. References are photos in which a face is known to be, so
    it may find one where `detect_and_embed` is not sure enough; `IdentityScorer` asks it for references where it exists.
    """

    def detect_and_embed(self, images: Sequence[Any]) -> list[Faces]:
        """One `Faces` per picture; a picture without faces gives empty arrays."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Scores pictures: (images, prompts, references) -> (b,) float array, higher is better."""

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture; NaN marks a picture that could not be scored."""
        ...
