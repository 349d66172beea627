"""Faces by insightface (extra ``insightface``): SCRFD detector, ArcFace embeddings, in ONNX.

The code of insightface is MIT; the published weights (buffalo_l and the like) are for non-commercial research only, so nothing is
downloaded unless you say so: `LICENSE_NOTICE`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from id_reward.errors import InputError
from id_reward.floats import finite, whole
from id_reward.images import as_array
from id_reward.protocols import Faces
from id_reward.shapes import Float

EXTRA = 'the insightface backend needs insightface and onnxruntime: pip install "id-reward[insightface]"'
LICENSE_NOTICE = "insightface's published weights are for non-commercial research only"
TASKS = ("detection", "recognition")
Aligned = tuple[np.ndarray, np.ndarray, list[np.ndarray]]  # boxes (f, 4), scores (f,), aligned faces


def _face_analysis() -> Any:
    try:
        importlib.import_module("onnxruntime")
        from insightface.app import FaceAnalysis
    except ImportError:
        raise ImportError(EXTRA) from None
    return FaceAnalysis


def find_pack(model: str | Path, root: str | Path) -> Path | None:
    """The folder of .onnx files: ``model`` itself, ``root/models/model``, or a folder of that name inside it (how some archives unpack)."""
    name = Path(model).name
    places = [Path(model).expanduser()]
    if str(model) == name:
        places.append(Path(root).expanduser() / "models" / name)
    for place in places:
        for folder in (place, place / name):
            if folder.is_dir() and any(folder.glob("*.onnx")):
                return folder
    return None


def download_pack(model: str, root: str | Path) -> Path:
    """Lets insightface fetch a pack; what a failed attempt leaves behind is removed.

    Raises:
        ValueError: It cannot be fetched.
    """
    from insightface.utils import ensure_available

    folder = Path(root).expanduser() / "models"
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ensure_available("models", model, root=str(root))
        found = find_pack(model, root)
        if found is None:
            raise InputError("the archive holds no .onnx files")
    except Exception as error:
        for left in set(folder.iterdir()) - before if folder.is_dir() else set():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # not there, or not empty
                empty.rmdir()
        raise InputError(_missing(model, root) + f" (downloading it failed: {type(error).__name__})") from error
    return found


def _missing(model: str | Path, root: str | Path) -> str:
    place = Path(root).expanduser() / "models" / Path(model).name
    return (
        f"model must be an insightface pack or a folder of its .onnx files, but {model} is not there; unpack {Path(model).name}.zip from "
        f"https://github.com/deepinsight/insightface/releases into {place} ({LICENSE_NOTICE})"
    )


class InsightFaceBackend:
    """Finds faces by SCRFD and embeds them by ArcFace; unit vectors, comparable by cosine.

    Only detection and recognition run, while `FaceAnalysis` runs five models by default. Detection runs picture by picture, in threads (its
    graph takes one picture); all faces of the batch are embedded together. Faces are aligned by insightface's own five points; pictures are
    turned to BGR for it. ``same_person`` is customary for ArcFace and was not measured here: the weights cannot be had offline.

    Args:
        model: Name of a pack below ``root/models``, or a folder of .onnx files.
        root: insightface's folder.
        threshold: Detector score from which a face counts.
        reference_threshold: The same for a reference in which nothing reaches ``threshold``; its best box is taken then.
        det_size: Sizes (width, height) at which faces are looked for; None: insightface's own, 128 (faces that fill the picture) and 640.
        providers: onnxruntime providers, for example ["CUDAExecutionProvider"]; None: insightface's choice.
        batch_size: Faces embedded at a time.
        workers: Threads of the detection; by default one per core.
        download: Whether insightface may fetch a missing pack. Mind the licence of the weights.

    Raises:
        ImportError: insightface or onnxruntime is missing.
        ValueError: The pack is not there, or does not hold a detector with five points and a recognition model.
    """

    name = "insightface"
    releases_gil = True
    same_person = 0.4

    def __init__(
        self,
        *,
        model: str | Path = "buffalo_l",
        root: str | Path = "~/.insightface",
        threshold: float = 0.5,
        reference_threshold: float = 0.3,
        det_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        providers: Sequence[Any] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        download: bool = False,
    ) -> None:
        """Loads both models."""
        batch_size = whole("batch_size", batch_size, least=1)
        threshold, reference_threshold = (
            finite("threshold", threshold),
            finite("reference_threshold", reference_threshold),
        )
        if not (0 < threshold < 1 and 0 < reference_threshold < 1):
            raise InputError(
                f"threshold and reference_threshold must be between 0 and 1, got {threshold} and {reference_threshold}"
            )
        face_analysis = _face_analysis()
        folder = find_pack(model, root)
        if folder is None:
            if not download:
                raise InputError(_missing(model, root))
            folder = download_pack(str(model), root)
        try:
            application = face_analysis(name=str(folder), allowed_modules=list(TASKS), providers=providers)
        except Exception as error:
            raise InputError(
                f"model must be a folder with a detection and a recognition .onnx, but {folder} is not: {type(error).__name__} {error}".strip()
            ) from error
        application.prepare(0, det_thresh=threshold, det_size=det_size)
        self.detector, self.recognizer = application.det_model, application.models.get("recognition")
        if self.recognizer is None or not self.detector.use_kps:
            raise InputError(
                f"model must hold a detector with five points and a recognition model, {folder} has {', '.join(sorted(application.models))}"
            )
        self.batch_size, self.workers = batch_size, workers or os.cpu_count() or 1
        self.threshold, self.reference_threshold = threshold, reference_threshold
        fixed = self.recognizer.input_shape[0]
        if isinstance(fixed, int) and fixed > 0:  # a graph exported for a fixed number of faces
            self.batch_size = fixed
        self.dim = int(self.recognizer.output_shape[-1])

    def align(self, image: Any, *, threshold: float | None = None) -> Aligned:
        """Boxes (f, 4), scores (f,) and aligned BGR faces of one picture, best score first."""
        from insightface.utils import face_align

        picture = np.ascontiguousarray(as_array(image)[..., ::-1])
        if min(picture.shape[:2]) < 16:
            return np.zeros((0, 4)), np.zeros(0), []
        found, points = self.detector.detect(picture, det_thresh=self.threshold if threshold is None else threshold)
        side = self.recognizer.input_size[0]
        chips = [face_align.norm_crop(picture, landmark=p, image_size=side) for p in (points if len(found) else ())]
        return found[:, :4].astype(np.float64), found[:, 4].astype(np.float64), chips

    def embed(self, chips: Sequence[np.ndarray]) -> Float[np.ndarray, "f d"]:
        """Unit embeddings of aligned BGR faces."""
        parts = []
        for start in range(0, len(chips), self.batch_size):
            part = list(chips[start : start + self.batch_size])
            padding = self.batch_size - len(part) if isinstance(self.recognizer.input_shape[0], int) else 0
            features = self.recognizer.get_feat(part + [part[-1]] * padding)
            parts.append(np.asarray(features, np.float64).reshape(len(part) + padding, -1)[: len(part)])
        if not parts:
            return np.zeros((0, self.dim))
        raw = np.concatenate(parts)
        unit: np.ndarray = raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12)
        return unit

    def align_reference(self, image: Any) -> Aligned:
        """`align`; where nothing is found, the one box that looks most like a face, if it reaches ``reference_threshold``."""
        found = self.align(image)
        if len(found[1]) or self.reference_threshold >= self.threshold:
            return found
        boxes, scores, chips = self.align(image, threshold=self.reference_threshold)
        return boxes[:1], scores[:1], chips[:1]

    def _find(self, images: Sequence[Any], align: Callable[[Any], Aligned]) -> list[Faces]:
        """Faces are found picture by picture, in threads, and embedded together."""
        with ThreadPoolExecutor(min(self.workers, max(len(images), 1))) as pool:
            aligned = list(pool.map(align, images))
        embeddings = self.embed([chip for _, _, chips in aligned for chip in chips])
        counts = [len(chips) for _, _, chips in aligned]
        parts = np.split(embeddings, np.cumsum(counts)[:-1]) if counts else []
        return [Faces(boxes, scores, part) for (boxes, scores, _), part in zip(aligned, parts, strict=True)]

    def detect_and_embed(self, images: Sequence[Any]) -> list[Faces]:
        """One `Faces` per picture."""
        return self._find(images, self.align)

    def detect_and_embed_references(self, images: Sequence[Any]) -> list[Faces]:
        """`detect_and_embed`, with ``reference_threshold`` where no face reaches ``threshold``."""
        return self._find(images, self.align_reference)
