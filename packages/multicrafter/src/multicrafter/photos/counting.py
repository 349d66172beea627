"""How many people are on a photo, by a second means: a detector that does not miss the same ones as the first.

Somebody who is on a photo but was not found has no mask: training would teach the model to draw strangers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from id_reward.backends.faces.dlib_faces import DlibBackend

from multicrafter.photos.cnn_faces import CnnFaces
from multicrafter.photos.people import Box, body_detector, inside

if TYPE_CHECKING:
    from PIL import Image

Counter = Callable[[Sequence["Image.Image"]], list[list[Box]]]
COUNT_SIDE = 800  # pixels of the longer side: some 3 s a photo on one core, faces of 80 pixels are found
SAME = 0.3  # share of the smaller box within the other from which two boxes are one person


@lru_cache(maxsize=4)
def people_counter(name: str) -> Counter | None:
    """A function that gives boxes of people, or of their faces; None for "none".

    Args:
        name: "dlib_cnn", "dlib", "detector:PATH" or "none".

    Raises:
        ImportError: An extra is missing.
        ValueError: A model cannot be read.
    """
    kind, _, path = name.partition(":")
    if kind == "none":
        return None
    if kind == "detector":
        return body_detector(path)
    backend = (
        CnnFaces(embedder=None, threshold=0.0, side=COUNT_SIDE) if kind == "dlib_cnn" else DlibBackend(embedder=None)
    )

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
