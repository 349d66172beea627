"""The Multi-ID Alignment Reward as a scorer: references are embedded once, faces of a batch together."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from id_reward.alignment import (
    Convention,
    IdentityScore,
    check_options,
    cosine_similarity,
    multi_id_alignment_reward,
    off_pair_similarity,
)
from id_reward.errors import InputError
from id_reward.floats import as_floats, whole
from id_reward.images import file_name
from id_reward.inputs import content_key, listed, listed_references, row_keys
from id_reward.protocols import FaceBackend, Faces
from id_reward.shapes import Float

reference_key = content_key
SeveralFaces = Literal["largest", "error"]
NoFace = Literal["nan", "error", "whole"]


def _as_arrays(faces: Faces) -> Faces:
    """Faces in float64, whatever a backend gives them in."""
    return Faces(*map(as_floats, faces))


def largest_face(faces: Faces) -> int | None:
    """Which face has the largest box; None if there is none."""
    if not len(faces.boxes):
        return None
    boxes = as_floats(faces.boxes)
    return int((boxes[:, 2:] - boxes[:, :2]).prod(1).argmax())


def largest(faces: Faces) -> Float[np.ndarray, " d"]:
    """Embedding of the largest face; NaN if there is none."""
    at = largest_face(faces)
    return np.full(faces.embeddings.shape[-1] or 1, np.nan) if at is None else np.asarray(faces.embeddings[at])


def describe(reference: Any, number: int) -> str:
    """How a message names a reference: its file, or its place."""
    if isinstance(reference, Mapping):
        reference = reference.get("path")
    name = reference if isinstance(reference, (str, Path)) else getattr(reference, "filename", None)
    return file_name(name) if name else f"reference {number}"


@dataclass
class IdentityScorer:
    """The Multi-ID Alignment Reward as a scorer; a reference is embedded once, not once per picture.

    References may be paths, PIL pictures, arrays or tensors, in any container (`id_reward.inputs`); equal content is recognised, whatever
    the object or the name of the file. Thread-safe.

    Attributes:
        backend: Finds and embeds faces (or objects).
        missing_penalty, extra_penalty, convention, min_similarity, off_pair_penalty: See `multi_id_alignment_reward`.
        cache_size: Reference embeddings kept; the one unused for longest goes.
        several_faces: A reference with several faces: take the "largest" and warn once, or raise an "error" that names it.
        no_face: A reference without a face: NaN embedding, hence a NaN reward, with one warning that names it ("nan"); an "error" that
            names it; or embed the "whole" picture (a backend with ``embed_whole``, for objects). A backend with
            ``detect_and_embed_references`` looks at references more closely than at pictures before it says that there is none.
    """

    backend: FaceBackend
    missing_penalty: float = 0.0
    extra_penalty: float = 0.0
    convention: Convention = "multicrafter"
    cache_size: int = 4096
    min_similarity: float = 0.0
    several_faces: SeveralFaces = "largest"
    no_face: NoFace = "nan"
    off_pair_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.backend, FaceBackend) or isinstance(self.backend, type):
            shown = repr(self.backend)[:200]
            raise InputError(f"backend must be an object with detect_and_embed, see id_reward.backends, got {shown}")
        check_options(
            convention=self.convention,
            missing_penalty=self.missing_penalty,
            extra_penalty=self.extra_penalty,
            off_pair_penalty=self.off_pair_penalty,
            min_similarity=self.min_similarity,
        )
        whole("cache_size", self.cache_size, least=1)
        if self.several_faces not in ("largest", "error"):
            raise InputError(f"several_faces must be 'largest' or 'error', got {self.several_faces!r}")
        if self.no_face not in ("nan", "error", "whole"):
            raise InputError(f"no_face must be 'nan', 'error' or 'whole', got {self.no_face!r}")
        if self.no_face == "whole" and not hasattr(self.backend, "embed_whole"):
            raise InputError("no_face='whole' needs a backend with embed_whole, such as ObjectBackend")
        self._cache: dict[Hashable, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def releases_gil(self) -> bool:
        """Whether the backend spends its time outside the interpreter, so that other scorers can run beside it."""
        return bool(getattr(self.backend, "releases_gil", False))

    def to(self, device: Any) -> IdentityScorer:
        """Moves the backend to a device, where it can be moved; cached embeddings stay valid."""
        if hasattr(self.backend, "to"):
            self.backend.to(device)
        return self

    def _embed(self, reference: Any, faces: Faces, number: int) -> np.ndarray:
        """The one embedding of a reference."""
        count = len(faces.boxes)
        if count > 1:
            message = f"{describe(reference, number)} must show one face, got {count}"
            if self.several_faces == "error":
                raise InputError(message)
            warnings.warn(f"{message}; the largest is taken", stacklevel=4)
        if count == 0 and self.no_face == "error":
            raise InputError(f"{describe(reference, number)} must show a face, but none was found")
        if count == 0 and self.no_face == "whole":
            return as_floats(self.backend.embed_whole([reference])[0])  # type: ignore[attr-defined]
        if count == 0:
            warnings.warn(
                f"{describe(reference, number)} must show a face, but none was found: every picture that it is a reference of gets NaN",
                stacklevel=4,
            )
        return largest(faces)

    def embed_references(self, references: Sequence[Any]) -> Float[np.ndarray, "r d"]:
        """Embedding of the (largest) face of every reference; NaN rows where none is found.

        Args:
            references: The references of one picture, in any container.

        Raises:
            ValueError: No container of pictures, or a reference shows no face or several, and the options say "error".
        """
        row = listed(references, "references")
        (keys,) = row_keys([row])
        return self._stack(keys, self._look([row], [keys]))

    def _look(self, rows: Sequence[Sequence[Any]], keys: Sequence[Sequence[Hashable]]) -> dict[Hashable, np.ndarray]:
        """Embeddings of all these references by key; those not met before go to the backend together."""
        flat = [(key, r, n) for row, mine in zip(rows, keys) for n, (r, key) in enumerate(zip(row, mine), 1)]
        with self._lock:
            known = {key: self._cache[key] for key, _, _ in flat if key in self._cache}
            todo: dict[Hashable, tuple[Any, int]] = {}
            for key, reference, number in flat:
                if key not in known:
                    todo.setdefault(key, (reference, number))
            if todo:
                find = getattr(self.backend, "detect_and_embed_references", self.backend.detect_and_embed)
                found = find([reference for reference, _ in todo.values()])
                for (key, (reference, number)), faces in zip(todo.items(), map(_as_arrays, found), strict=True):
                    known[key] = self._embed(reference, faces, number)
            for key in dict.fromkeys(key for key, _, _ in flat):  # the latest come last
                self._cache.pop(key, None)
                if isinstance(key, tuple):  # what has no content to be known by is looked at every time
                    self._cache[key] = known[key]
            for key in list(self._cache)[: max(len(self._cache) - self.cache_size, 0)]:
                del self._cache[key]
        return known

    @staticmethod
    def _stack(keys: Sequence[Hashable], known: dict[Hashable, np.ndarray]) -> np.ndarray:
        """One row for each reference; a missing face may not know how wide embeddings are."""
        found = [known[key] for key in keys]
        width = max((len(row) for row in found), default=1)
        rows = [row if len(row) == width else np.full(width, np.nan) for row in found]
        return np.stack(rows) if rows else np.zeros((0, width))

    def score(self, images: Sequence[Any], references: Sequence[Sequence[Any]]) -> list[IdentityScore | None]:
        """The whole score of every picture: reward, per reference, matching; None where it cannot be scored.

        That is where there is no reference, a reference shows no face, or an embedding is not finite.
        """
        return [score for score, _ in self.inspect(images, references)]

    def inspect(
        self, images: Sequence[Any], references: Sequence[Sequence[Any]]
    ) -> list[tuple[IdentityScore | None, Faces]]:
        """`score`, with the faces found in every picture beside it."""
        images = listed(images, "images")
        known = self._embed_all(listed_references(references, len(images)))
        alone = [number for number, rows in enumerate(known) if rows is None]
        if alone:
            warnings.warn(
                f"{len(alone)} of {len(images)} pictures have no references, picture {alone[0]} for one: their reward is NaN",
                stacklevel=4,
            )
        results: list[tuple[IdentityScore | None, Faces]] = []
        for faces, rows in zip(map(_as_arrays, self.backend.detect_and_embed(images)), known, strict=True):
            finite = rows is not None and np.isfinite(rows).all() and np.isfinite(faces.embeddings).all()
            if not finite or rows is None:
                results.append((None, faces))
                continue
            score = multi_id_alignment_reward(
                rows,
                faces.embeddings,
                missing_penalty=self.missing_penalty,
                extra_penalty=self.extra_penalty,
                convention=self.convention,
                min_similarity=self.min_similarity,
                off_pair_penalty=self.off_pair_penalty,
            )
            results.append((score, faces))
        return results

    def _embed_all(self, rows: Sequence[Sequence[Any]]) -> list[np.ndarray | None]:
        """References of every picture; None where there are none."""
        keys = row_keys(rows)
        known = self._look(rows, keys)
        return [self._stack(mine, known) if mine else None for mine in keys]

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """Reward per picture; NaN where it cannot be scored, see `score`."""
        return np.array([np.nan if score is None else score.reward for score in self.score(images, references)])


@dataclass(frozen=True)
class OffPairSimilarity:
    """`off_pair_similarity` as a scorer of its own: a part to log, or with a negative weight to take away.

    It finds the faces anew: where the same scorer gives the identity reward, its ``off_pair_penalty`` costs nothing beside it.
    """

    identity: IdentityScorer

    @property
    def releases_gil(self) -> bool:
        """As the identity scorer."""
        return self.identity.releases_gil

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture, 0 where no face is found; NaN where the identity reward is."""
        pictures = listed(images, "images")
        rows = listed_references(references, len(pictures))
        values = []
        for (score, faces), given in zip(self.identity.inspect(pictures, rows), rows, strict=True):
            if score is None:
                values.append(np.nan)
                continue
            known = self.identity.embed_references(given)
            cosine = cosine_similarity(known, faces.embeddings).reshape(len(known), -1)
            values.append(off_pair_similarity(cosine, score.matching, cosine_similarity(known, known)))
        return np.array(values)
