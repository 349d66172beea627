"""From dlib's raw descriptors to unit vectors that cosine compares well."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from id_reward.shapes import Float

MEAN_FILE = Path(__file__).with_name("dlib_mean_face.json")


@cache
def mean_face() -> Float[np.ndarray, " d"]:
    """The mean descriptor over people, as `scripts/measure_mean_face.py` measured it."""
    mean = np.array(json.loads(MEAN_FILE.read_text())["mean"], np.float64)
    mean.setflags(write=False)
    return mean


def center(descriptors: Float[np.ndarray, "f d"]) -> Float[np.ndarray, "f d"]:
    """``(e - mean) / |e - mean|``: raw dlib descriptors are meant for L2; the common part they share hides who is who from a cosine.

    Our choice: docs/adr/0040.
    """
    shifted = descriptors - mean_face()
    unit: np.ndarray = shifted / np.maximum(np.linalg.norm(shifted, axis=1, keepdims=True), 1e-12)
    return unit
