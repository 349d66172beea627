"""Faces and the bodies under them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from id_reward import FaceBackend, match
from id_reward.backends.loading import load
from jaxtyping import Float

from multicrafter import UserError, user_input

if TYPE_CHECKING:
    from PIL import Image

    from multicrafter.models.finding import IdentityFinder

Box = tuple[float, float, float, float]


@lru_cache(maxsize=4)
def face_backend(name: str) -> FaceBackend:
    """``tiny`` (the people of the drawn world), ``dlib_cnn`` (`cnn_faces.CnnFaces`) or a name of `id_reward.get_face_backend`.

    Raises:
        ValueError: No backend has this name.
        ImportError: Its extra is missing.
    """
    if name == "tiny":
        from multicrafter.world import judges
        from multicrafter.world.judges.people import PeopleBackend

        return PeopleBackend.from_pretrained(judges.shipped())
    if name == "dlib_cnn":
        from multicrafter.photos.cnn_faces import CnnFaces

        return CnnFaces()
    from id_reward import get_face_backend

    with user_input(f"faces {name}"):
        return get_face_backend(name)  # type: ignore[arg-type]


FACE_OF_A_PERSON = (1.5, 0.8, 1.5, 5.0)
"""How far a standing person reaches beyond the face: to the left, top, right and bottom, in faces."""


def people_finder(name: str) -> IdentityFinder:
    """Finds the people of a draft by the faces of `face_backend`; those of the drawn world are boxed whole."""
    from multicrafter.models.finding import IdentityFinder

    return IdentityFinder(backend=face_backend(name), grow=(0.0,) * 4 if name == "tiny" else FACE_OF_A_PERSON)


THRESHOLDS = {"tiny": 0.8}
"""Cosine from which two faces are one person, by backend, where the backend does not say so itself (``same_person``).

tiny: all of 300 people found again, 1 in 900 of different pairs (who share most attributes) taken for one."""


def identity_threshold(name: str) -> float:
    """The cosine from which two faces are one person: the backend's ``same_person``, `THRESHOLDS`, or .5."""
    if name in THRESHOLDS:
        return THRESHOLDS[name]
    return float(getattr(face_backend(name), "same_person", 0.5))


def shrink(picture: Image.Image, side: int) -> tuple[Image.Image, float]:
    """The picture with a longer side of at most ``side``, and what to multiply its pixels by to get back."""
    from PIL import Image

    longer = max(picture.size)
    if longer <= side:
        return picture, 1.0
    size = tuple(max(1, round(s * side / longer)) for s in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0), longer / side  # type: ignore[arg-type]


def body_box(face: Sequence[float], width: int, height: int) -> Box:
    """Where a standing body is, from its face: three faces wide, from half a face above to six below; cut at the photo's edge."""
    left, top, right, bottom = face
    w, h = right - left, bottom - top
    centre = (left + right) / 2
    box = (centre - 1.5 * w, top - 0.5 * h, centre + 1.5 * w, bottom + 6 * h)
    return clip(box, width, height)


def clip(box: Sequence[float], width: int, height: int) -> Box:
    """The part of a box that lies on the photo."""
    return (max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3]))


def inside(inner: Sequence[float], outer: Sequence[float]) -> float:
    """Share of a box's area that lies within another, in [0, 1].

    >>> inside((0, 0, 2, 2), (1, 0, 5, 5))
    0.5
    """
    w = min(inner[2], outer[2]) - max(inner[0], outer[0])
    h = min(inner[3], outer[3]) - max(inner[1], outer[1])
    area = (inner[2] - inner[0]) * (inner[3] - inner[1])
    return float(w * h / area) if w > 0 and h > 0 and area > 0 else 0.0


def assign_bodies(faces: Sequence[Box], bodies: Sequence[Box], width: int, height: int) -> list[Box]:
    """A body for every face: the detected ones one-to-one, each at least half over its face, by the best total; else `body_box`.

    The score of a pair is the face's share inside the body, less how far the body's shape is from the guessed one (1 - IoU, a tenth of it).
    """
    guessed = [body_box(face, width, height) for face in faces]
    if not faces or not bodies:
        return guessed
    score = np.array(
        [
            [inside(f, b) - 0.1 * (1 - _iou(g, b)) if inside(f, b) >= 0.5 else 0.0 for b in bodies]
            for f, g in zip(faces, guessed)
        ]
    )
    for i, j in match(score).pairs:
        if score[i, j] > 0:
            guessed[i] = bodies[j]
    return guessed


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    common = inside(a, b) * (a[2] - a[0]) * (a[3] - a[1])
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / total if total > 0 else 0.0


class BodyDetector:
    """People by any object detector of transformers (DETR, RT-DETR, YOLOS, ...) with a ``person`` label, from a local folder."""

    def __init__(self, folder: str, threshold: float = 0.5) -> None:
        """Loads model and image processor."""
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.model = load(AutoModelForObjectDetection, folder, "people detector").eval()
        self.processor = load(AutoImageProcessor, folder, "people detector")
        self.threshold = threshold
        self.labels = {int(i) for i, name in self.model.config.id2label.items() if name.lower() == "person"}
        if not self.labels:
            raise UserError(
                f"people detector {folder} must have a label 'person', got {sorted(self.model.config.id2label.values())[:10]}"
            )

    def __call__(self, pictures: Sequence[Image.Image]) -> list[list[Box]]:
        """Boxes of the people on each picture, in pixels."""
        import torch

        with torch.inference_mode():
            inputs = self.processor(images=list(pictures), return_tensors="pt")
            sizes = [(p.height, p.width) for p in pictures]
            found = self.processor.post_process_object_detection(
                self.model(**inputs), threshold=self.threshold, target_sizes=sizes
            )
        return [
            [tuple(b) for b, label in zip(f["boxes"].tolist(), f["labels"].tolist()) if label in self.labels]
            for f in found
        ]


@lru_cache(maxsize=2)
def body_detector(folder: str) -> BodyDetector:
    """The detector, loaded once a process."""
    return BodyDetector(folder)


class Face(NamedTuple):
    """A face of a photo: its number there, box and body in pixels of the upright photo, score and unit embedding."""

    number: int
    box: Box
    body: Box
    score: float
    embedding: Float[np.ndarray, " d"]


def encode_array(values: Float[np.ndarray, " d"]) -> str:
    """A vector as text, in half the digits of JSON: float32, base64."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def decode_array(text: str) -> Float[np.ndarray, " d"]:
    """The inverse of `encode_array`."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def read_faces(result: dict[str, Any]) -> list[Face]:
    """The faces in a result of `stages.Detect`."""
    return [
        Face(i, tuple(f["box"]), tuple(f["body"]), f["score"], decode_array(f["embedding"]))
        for i, f in enumerate(result["faces"])
    ]
