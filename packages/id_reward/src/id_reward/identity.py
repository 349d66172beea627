"""The Multi-ID Alignment Reward as a scorer: references are embedded once, faces of a batch together."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from id_reward.alignment import CONVENTIONS, Convention, IdentityScore, multi_id_alignment_reward
from id_reward.protocols import FaceBackend, Faces

SeveralFaces = Literal["largest", "error"]
NoFace = Literal["nan", "error", "whole"]


def reference_key(reference: Any) -> Hashable:
    """What says that two references are the same picture: a file's path and date, an array's or picture's content.

    Objects of other kinds are told apart by identity only.
    """
    if isinstance(reference, (str, Path)):
        try:
            state = os.stat(reference)
        except OSError:
            return str(reference)  # whoever opens it says what is wrong
        return (os.path.abspath(reference), state.st_mtime_ns, state.st_size)
    if hasattr(reference, "detach"):  # a tensor
        tensor = reference.detach().cpu()
        reference = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if hasattr(reference, "tobytes"):  # an array or a PIL picture
        about = (
            getattr(reference, "shape", None),
            getattr(reference, "size", None),
            str(getattr(reference, "dtype", "")),
        )
        mode = getattr(reference, "mode", "")
        return (about, mode, hashlib.blake2b(reference.tobytes(), digest_size=16).digest())
    return id(reference)


def largest(faces: Faces) -> Float[np.ndarray, " d"]:
    """Embedding of the largest face; NaN if there is none."""
    if not len(faces.boxes):
        return np.full(faces.embeddings.shape[-1] or 1, np.nan)
    sides = faces.boxes[:, 2:] - faces.boxes[:, :2]
    return np.asarray(faces.embeddings[int(sides.prod(1).argmax())])


def describe(reference: Any, number: int) -> str:
    """How a message names a reference: its file, or its place."""
    name = reference if isinstance(reference, (str, Path)) else getattr(reference, "filename", None)
    return str(name) if name else f"reference {number}"


@dataclass
class IdentityScorer:
    """The Multi-ID Alignment Reward as a scorer; a reference is embedded once, not once per picture.

    References may be paths, PIL pictures, arrays or tensors; equal content is recognised, whatever the object. Thread-safe.

    Attributes:
        backend: Finds and embeds faces (or objects).
        missing_penalty, extra_penalty, convention, min_similarity: See `multi_id_alignment_reward`.
        cache_size: Reference embeddings kept; the one unused for longest goes.
        several_faces: A reference with several faces: take the "largest" and warn once, or raise an "error" that names it.
        no_face: A reference without a face: NaN embedding, hence a NaN reward ("nan"); an "error" that names it; or embed the "whole"
            picture (a backend with ``embed_whole``, for objects).
    """

    backend: FaceBackend
    missing_penalty: float = 0.0
    extra_penalty: float = 0.0
    convention: Convention = "multicrafter"
    cache_size: int = 4096
    min_similarity: float = 0.0
    several_faces: SeveralFaces = "largest"
    no_face: NoFace = "nan"

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {self.convention!r}")
        if self.cache_size < 1:
            raise ValueError(f"cache_size must be at least 1, got {self.cache_size}")
        if self.several_faces not in ("largest", "error"):
            raise ValueError(f"several_faces must be 'largest' or 'error', got {self.several_faces!r}")
        if self.no_face not in ("nan", "error", "whole"):
            raise ValueError(f"no_face must be 'nan', 'error' or 'whole', got {self.no_face!r}")
        if self.no_face == "whole" and not hasattr(self.backend, "embed_whole"):
            raise ValueError("no_face='whole' needs a backend with embed_whole, such as ObjectBackend")
        self._cache: dict[Hashable, tuple[Any, np.ndarray]] = {}
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
                raise ValueError(message)
            warnings.warn(f"{message}; the largest is taken", stacklevel=4)
        if count == 0 and self.no_face == "error":
            raise ValueError(f"{describe(reference, number)} must show a face, but none was found")
        if count == 0 and self.no_face == "whole":
            return np.asarray(self.backend.embed_whole([reference])[0])  # type: ignore[attr-defined]
        return largest(faces)

    def embed_references(self, references: Sequence[Any]) -> Float[np.ndarray, "r d"]:
        """Embedding of the (largest) face of every reference; NaN rows where none is found.

        Raises:
            ValueError: A reference shows no face or several, and the options say "error".
        """
        with self._lock:
            keys = [reference_key(reference) for reference in references]
            todo: dict[Hashable, tuple[Any, int]] = {}
            for number, (key, reference) in enumerate(zip(keys, references, strict=True), 1):
                if key not in self._cache:
                    todo.setdefault(key, (reference, number))
            known = {key: self._cache[key] for key in keys if key in self._cache}
            if todo:
                found = self.backend.detect_and_embed([reference for reference, _ in todo.values()])
                for (key, (reference, number)), faces in zip(todo.items(), found, strict=True):
                    keep = reference if isinstance(key, int) else None  # while an object lives, its id is its own
                    known[key] = (keep, self._embed(reference, faces, number))
            for key in dict.fromkeys(keys):  # the latest come last
                self._cache.pop(key, None)
                self._cache[key] = known[key]
            for key in list(self._cache)[: max(len(self._cache) - self.cache_size, 0)]:
                del self._cache[key]
        rows = [known[key][1] for key in keys]
        width = max((len(row) for row in rows), default=1)
        return np.stack([row if len(row) == width else np.full(width, np.nan) for row in rows])

    def score(self, images: Sequence[Any], references: Sequence[Sequence[Any]]) -> list[IdentityScore | None]:
        """The whole score of every picture: reward, per reference, matching; None where it cannot be scored.

        That is where there is no reference, a reference shows no face, or an embedding is not finite.
        """
        return [score for score, _ in self.inspect(images, references)]

    def inspect(
        self, images: Sequence[Any], references: Sequence[Sequence[Any]]
    ) -> list[tuple[IdentityScore | None, Faces]]:
        """`score`, with the faces found in every picture beside it."""
        if len(images) != len(references):
            raise ValueError(f"references must have one entry per picture ({len(images)}), got {len(references)}")
        known = self._embed_all(references)
        results: list[tuple[IdentityScore | None, Faces]] = []
        for faces, rows in zip(self.backend.detect_and_embed(images), known, strict=True):
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
            )
            results.append((score, faces))
        return results

    def _embed_all(self, references: Sequence[Sequence[Any]]) -> list[np.ndarray | None]:
        """References of every picture; pictures of a group often share the very same list, which is then looked at once."""
        groups: dict[tuple[int, ...], Sequence[Any]] = {}
        names = []
        for given in references:
            name = tuple(id(reference) for reference in given)
            groups.setdefault(name, given)
            names.append(name)
        flat = [reference for given in groups.values() for reference in given]
        rows = self.embed_references(flat) if flat else np.zeros((0, 1))
        embedded: dict[tuple[int, ...], np.ndarray | None] = {}
        start = 0
        for name, given in groups.items():
            embedded[name] = rows[start : start + len(given)] if len(given) else None
            start += len(given)
        return [embedded[name] for name in names]

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """Reward per picture; NaN where it cannot be scored, see `score`."""
        return np.array([np.nan if score is None else score.reward for score in self.score(images, references)])
