"""Does a face repeat its reference: the same pose, the same crop, the same light? A reward for likeness alone invites it.

A face network sees who somebody is, whatever the pose. The surest way to a high reward is therefore to paste the reference's face. Two photos of
one person differ in pose, expression and light, and their details hardly correlate; a pasted face correlates almost perfectly, also
when it is moved, scaled, mirrored, tilted a little, or shaded.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from id_reward.errors import InputError
from id_reward.floats import finite, whole
from id_reward.identity import IdentityScorer, largest_face
from id_reward.images import as_image
from id_reward.inputs import listed, listed_references, row_keys
from id_reward.shapes import Float

SIDE = 24  # of a face's box, in cells
BASE = 3 * SIDE  # of its surroundings
SHIFT = 4  # cells that a face may be moved by, in every direction
SMOOTH = 4.0  # cells: broader changes of brightness do not count
SIZES = (0.8, 0.9, 1.0, 1.12, 1.25)  # detectors do not agree with themselves how large a face is
TILTS = (-0.15, 0.0, 0.15)  # radians


def surroundings(image: Any, box: Float[np.ndarray, " 4"]) -> Float[np.ndarray, "s s"]:
    """The details in the square of three times a face's box, gray, 72 x 72; beyond the picture its edge is continued.

    Args:
        image: Any picture, see `id_reward.images.as_array`.
        box: left, top, right, bottom in pixels.
    """
    picture = as_image(image).convert("L")
    left, top, right, bottom = (float(v) for v in box)
    side = max(right - left, bottom - top, 1.0)
    start_x, start_y = (left + right - 3 * side) / 2, (top + bottom - 3 * side) / 2
    # what of the square lies in the picture, at its place on the grid; whole cells, so that nothing is stretched
    cell = 3 * side / BASE
    first = [max(0, math.ceil(-start / cell)) for start in (start_x, start_y)]
    last = [
        min(BASE, math.floor((size - start) / cell))
        for size, start in ((picture.width, start_x), (picture.height, start_y))
    ]
    if last[0] <= first[0] or last[1] <= first[1]:
        return np.zeros((BASE, BASE))
    region = (start_x + first[0] * cell, start_y + first[1] * cell, start_x + last[0] * cell, start_y + last[1] * cell)
    inside = (max(region[0], 0), max(region[1], 0), min(region[2], picture.width), min(region[3], picture.height))
    small = picture.resize((last[0] - first[0], last[1] - first[1]), 2, box=inside)  # bilinear, with antialiasing
    whole = np.pad(np.asarray(small, np.float64), ((first[1], BASE - last[1]), (first[0], BASE - last[0])), mode="edge")
    return np.asarray(whole - _smooth(whole))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian of `SMOOTH` cells, along both axes; the edges are continued."""
    reach = round(3 * SMOOTH)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTH) ** 2)
    for _ in range(2):
        padded = np.pad(values, ((0, 0), (reach, reach)), mode="edge")
        values = (np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=1) @ (kernel / kernel.sum())).T
    return values


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows without their mean, of length 1; a row without any structure becomes 0."""
    rows = rows - rows.mean(1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    result: np.ndarray = np.where(length > 1e-3 * math.sqrt(rows.shape[1]), rows / np.maximum(length, 1e-12), 0.0)
    return result


def _sample(base: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Bilinear samples of ``base`` at these places (pixel centres at whole numbers)."""
    x, y = np.clip(columns, 0, BASE - 1.001), np.clip(rows, 0, BASE - 1.001)
    left, top = x.astype(int), y.astype(int)
    u, v = x - left, y - top
    upper = (1 - u) * base[top, left] + u * base[top, left + 1]
    lower = (1 - u) * base[top + 1, left] + u * base[top + 1, left + 1]
    result: np.ndarray = (1 - v) * upper + v * lower
    return result


def templates(base: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "n d"]:
    """The reference's face in every size and tilt, as it is and mirrored; unit rows without a mean."""
    at = (np.arange(SIDE) - (SIDE - 1) / 2) * (BASE / 3 / SIDE)
    right, down = np.meshgrid(at, at)
    centre, found = (BASE - 1) / 2, []
    for size, tilt in itertools.product(SIZES, TILTS):
        cos, sin = size * math.cos(tilt), size * math.sin(tilt)
        face = _sample(base, centre + cos * right - sin * down, centre + sin * right + cos * down)
        found += [face.ravel(), face[:, ::-1].ravel()]
    return _unit(np.array(found))


def repeated_appearance(face: Float[np.ndarray, "s s"], reference: Float[np.ndarray, "n d"]) -> float:
    """The largest correlation of a face's pixels with the reference's, over small moves, sizes, tilts and mirroring; in [-1, 1].

    ``max over templates t and places p of <t, w_p>`` with t and w_p without mean and of length 1, so that contrast does not count
    (normalised cross-correlation of the details).

    Args:
        face: `surroundings` of the face in the picture.
        reference: `templates` of the reference.
    """
    start = (BASE - SIDE) // 2 - SHIFT
    area = face[start : start + SIDE + 2 * SHIFT, start : start + SIDE + 2 * SHIFT]
    windows = np.lib.stride_tricks.sliding_window_view(area, (SIDE, SIDE)).reshape(-1, SIDE * SIDE)
    return float(np.clip((reference @ _unit(windows).T).max(), -1, 1))


@dataclass
class CopyPaste:
    """How much the matched faces of a picture repeat their references, as a scorer: 0 not at all, 1 pasted. Give it a negative weight.

    ``mean over matched pairs of clip((c - free) / (1 - free), 0, 1)``, c the `repeated_appearance`; 0 where nobody is matched, NaN where the
    identity reward is. Our choice: docs/adr/0045.

    Attributes:
        identity: Finds and matches faces. `id_reward.remembering.RememberingBackend` spares it to find them twice.
        free: Correlation up to which nothing is counted: what different photos of one person reach.
        cache_size: References kept.
    """

    identity: IdentityScorer
    free: float = 0.65
    cache_size: int = 4096
    _known: OrderedDict[Hashable, np.ndarray | None] = field(default_factory=OrderedDict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.identity, IdentityScorer):
            raise InputError(f"identity must be an IdentityScorer, got {self.identity!r}"[:300])
        if finite("free", self.free, least=-1.0) >= 1:
            raise InputError(f"free must be in [-1, 1), got {self.free}")
        whole("cache_size", self.cache_size, least=1)

    @property
    def releases_gil(self) -> bool:
        """As the identity scorer."""
        return self.identity.releases_gil

    def _templates(self, references: Sequence[Any], keys: Sequence[Hashable]) -> list[np.ndarray | None]:
        """Templates of one picture's references; None where no face is found."""
        with self._lock:
            new = [n for n, key in enumerate(keys) if key not in self._known]
            backend = self.identity.backend
            find = getattr(backend, "detect_and_embed_references", backend.detect_and_embed)
            for number, faces in zip(new, find([references[n] for n in new]) if new else ()):
                at = largest_face(faces)
                box = None if at is None else np.asarray(faces.boxes[at], np.float64)
                self._known[keys[number]] = None if box is None else templates(surroundings(references[number], box))
            found = [self._known[key] for key in keys]
            for key in keys:
                self._known.move_to_end(key)
                if not isinstance(key, tuple):  # what has no content to be known by
                    self._known.pop(key, None)
            while len(self._known) > self.cache_size:
                self._known.popitem(last=False)
        return found

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture."""
        pictures = listed(images, "images")
        rows = listed_references(references, len(pictures))
        values = []
        found = self.identity.inspect(pictures, rows)
        for picture, (score, faces), given, keys in zip(pictures, found, rows, row_keys(rows), strict=True):
            if score is None:
                values.append(np.nan)
                continue
            known, copied = self._templates(given, keys), []
            for reference, face in score.matching.pairs:
                mine = known[reference]
                if mine is not None:
                    likeness = repeated_appearance(surroundings(picture, faces.boxes[face]), mine)
                    copied.append(min(max((likeness - self.free) / (1 - self.free), 0.0), 1.0))
            values.append(float(np.mean(copied)) if copied else 0.0)
        return np.array(values)
