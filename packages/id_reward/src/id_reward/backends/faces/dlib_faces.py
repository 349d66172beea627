"""Faces by dlib (extra ``dlib``): HOG detector, five landmarks, ResNet-34 embeddings. Works with no download: the weights are a package.

Code: Boost licence. Weights: PyPI ``face-recognition-models``, CC0.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from id_reward.backends.faces.center import center
from id_reward.backends.faces.dlib_weights import EXTRA, model_folder
from id_reward.errors import InputError
from id_reward.floats import finite, whole
from id_reward.images import as_array
from id_reward.protocols import Faces
from id_reward.shapes import Float, UInt8

Embedder = Literal["auto", "dlib", "torch"]
Describe = Callable[[np.ndarray], np.ndarray]
CHIP = 150  # side of an aligned face, the network's input
DIM = 128


def _dlib() -> Any:
    try:
        import dlib
    except ImportError:
        raise ImportError(EXTRA) from None
    return dlib


def _describer(embedder: str | None, path: Path) -> Describe | None:
    """The function that gives raw descriptors (f, 128) of aligned faces."""
    if embedder is None:
        return None
    if embedder == "dlib":
        network = _dlib().face_recognition_model_v1(str(path))
        return lambda chips: np.array(
            network.compute_face_descriptor([*map(np.ascontiguousarray, chips)]), np.float64
        ).reshape(-1, DIM)
    import torch

    from id_reward.backends.faces.dlib_network import load_network

    module = load_network(path)

    def describe(chips: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tensor = torch.from_numpy(chips).permute(0, 3, 1, 2).float() / 255
            result: np.ndarray = torch.cat([module(part) for part in torch.split(tensor, 32)]).double().numpy()
        return result

    return describe


def _frame(rect: Any, angle: float) -> tuple[float, float, float, float]:
    """Centre and side, between the centres of the outermost pixels."""
    x, y = (rect.left() + rect.right()) / 2, (rect.top() + rect.bottom()) / 2
    return x, y, rect.right() - rect.left(), angle


class AlignedFaces(NamedTuple):
    """What is known of the faces before they are embedded.

    boxes (f, 4) in pixels; scores (f,) in [0, 1]; chips (f, 150, 150, 3): upright faces, eyes and nose at fixed places; frames (f, 4):
    where the chips lie in the picture: centre x, centre y and side in pixels, angle in radians (counter-clockwise).
    """

    boxes: Float[np.ndarray, "f 4"]
    scores: Float[np.ndarray, " f"]
    chips: UInt8[np.ndarray, "f h w 3"]
    frames: Float[np.ndarray, "f 4"]


class DlibBackend:
    """Finds faces by dlib's HOG detector and embeds them by its ResNet-34; unit vectors, comparable by cosine.

    Detection runs on a copy whose long side is ``side`` pixels (faces of some 80/side of it are found), in threads: dlib releases the
    GIL there. Landmarks and the aligned face are taken from the original. Boxes are (left, top, right, bottom) in original pixels.

    Embeddings: raw dlib descriptors share a large common part (different people have cosine .82), so the mean face is subtracted before
    normalisation (docs/adr/0040). On the photos of `scripts/fetch_photos.py` the same person then has .79 to .94, different people at
    most .47; ``same_person`` is the threshold between.

    Args:
        side: Long side in pixels at which faces are looked for.
        threshold: Detector score from which a box counts; 0.3 finds six of six faces in the group photo and none on a cat.
        reference_threshold: The same for a reference in which nothing reaches ``threshold``; its best box is taken then. 0 is dlib's own.
        workers: Threads; by default one per core.
        embedder: What runs the network: "dlib"; "torch", with the same weights, some four times faster, equal up to rounding (needs torch);
            "auto": torch where it is installed; None: nothing (`align` only).
    """

    name = "dlib"
    dim = DIM
    releases_gil = True
    same_person = 0.65

    def __init__(
        self,
        *,
        side: int = 1024,
        threshold: float = 0.3,
        reference_threshold: float = 0.0,
        workers: int | None = None,
        embedder: Embedder | None = "auto",
    ) -> None:
        """Loads landmark predictor and network.

        Raises:
            ImportError: dlib or face-recognition-models is missing.
        """
        side = whole("side", side, least=80)
        if workers is not None:
            workers = whole("workers", workers, least=1)
        threshold = finite("threshold", threshold)
        reference_threshold = finite("reference_threshold", reference_threshold)
        if embedder not in ("auto", "dlib", "torch", None):
            raise InputError(f"embedder must be 'auto', 'dlib', 'torch' or None, got {embedder!r}")
        self._dlib, folder = _dlib(), model_folder()
        self.side, self.workers = side, workers or os.cpu_count() or 1
        self.threshold, self.reference_threshold = threshold, reference_threshold
        self._predictor = self._dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        if embedder == "auto":
            embedder = "torch" if importlib.util.find_spec("torch") else "dlib"
        self.embedder = embedder
        self._describe = _describer(embedder, folder / "dlib_face_recognition_resnet_model_v1.dat")
        self._local = threading.local()

    def _detector(self) -> Any:
        """One detector per thread: it keeps the picture it works on."""
        if not hasattr(self._local, "detector"):
            self._local.detector = self._dlib.get_frontal_face_detector()
        return self._local.detector

    def align(self, image: Any, *, threshold: float | None = None) -> AlignedFaces:
        """Boxes, scores and aligned faces of one picture (anything `id_reward.images.as_array` takes), best score first."""
        threshold = self.threshold if threshold is None else threshold
        picture = as_array(image)
        height, width = picture.shape[:2]
        scale = self.side / max(height, width)
        if min(height, width) * scale < 16:  # nothing to see in a line of pixels
            return AlignedFaces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, CHIP, CHIP, 3), np.uint8), np.zeros((0, 4)))
        small = self._dlib.resize_image(picture, rows=round(height * scale), cols=round(width * scale))
        found, scores, _ = self._detector().run(small, 0, threshold)
        boxes = np.array([[b.left(), b.top(), b.right() + 1, b.bottom() + 1] for b in found], np.float64).reshape(-1, 4)
        boxes /= scale
        details = []
        for left, top, right, bottom in boxes.round().astype(int):
            shape = self._predictor(picture, self._dlib.rectangle(left, top, right - 1, bottom - 1))
            details.append(self._dlib.get_face_chip_details(shape, CHIP, 0.25))
        chips = self._dlib.extract_image_chips(picture, details) if len(details) else []
        frames = [_frame(d.rect, d.angle) for d in details]
        return AlignedFaces(
            boxes.clip(0, [width, height, width, height]),
            1 / (1 + np.exp(-np.asarray(scores, np.float64))),
            np.stack(chips) if len(chips) else np.zeros((0, CHIP, CHIP, 3), np.uint8),
            np.array(frames, np.float64).reshape(-1, 4),
        )

    def align_reference(self, image: Any) -> AlignedFaces:
        """`align`; where nothing is found, the one box that looks most like a face, if it reaches ``reference_threshold``."""
        found = self.align(image)
        if len(found.scores) or self.reference_threshold >= self.threshold:
            return found
        return AlignedFaces(*(part[:1] for part in self.align(image, threshold=self.reference_threshold)))

    def align_all(self, images: Sequence[Any], *, references: bool = False) -> list[AlignedFaces]:
        """`align`, or `align_reference`, of every picture, in threads."""
        with ThreadPoolExecutor(min(self.workers, max(len(images), 1))) as pool:
            return list(pool.map(self.align_reference if references else self.align, images))

    def describe(self, chips: UInt8[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "f d"]:
        """Raw dlib descriptors of aligned RGB faces of 150 x 150 pixels, to be compared by L2 (same person below .6)."""
        if self._describe is None:
            raise InputError("embedder must be 'dlib' or 'torch' to embed faces, got None")
        return self._describe(chips) if len(chips) else np.zeros((0, DIM))

    def embed(self, chips: UInt8[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "f d"]:
        """Unit embeddings of aligned RGB faces of 150 x 150 pixels, comparable by cosine."""
        return center(self.describe(chips))

    def _embed_aligned(self, aligned: list[AlignedFaces]) -> list[Faces]:
        """All faces of the batch are embedded together."""
        counts = [len(found.scores) for found in aligned]
        embeddings = (
            self.embed(np.concatenate([found.chips for found in aligned])) if sum(counts) else np.zeros((0, DIM))
        )
        parts = np.split(embeddings, np.cumsum(counts)[:-1]) if counts else []
        return [Faces(found.boxes, found.scores, part) for found, part in zip(aligned, parts, strict=True)]

    def detect_and_embed(self, images: Sequence[Any]) -> list[Faces]:
        """One `Faces` per picture; detection in threads."""
        return self._embed_aligned(self.align_all(images))

    def detect_and_embed_references(self, images: Sequence[Any]) -> list[Faces]:
        """`detect_and_embed`, with ``reference_threshold`` where no face reaches ``threshold``."""
        return self._embed_aligned(self.align_all(images, references=True))
