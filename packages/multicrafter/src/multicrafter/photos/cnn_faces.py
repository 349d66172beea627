"""Faces by dlib's convolutional detector, for photos on which people look aside."""

from __future__ import annotations

from typing import Any

import numpy as np
from id_reward.backends.faces.dlib_faces import DlibBackend
from id_reward.backends.faces.dlib_weights import model_folder


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
        except ImportError as error:
            raise ImportError('the detector dlib_cnn needs dlib: pip install "id-reward[dlib]"') from error
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
