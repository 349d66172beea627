"""Measure the mean face that dlib's descriptors are centred by, and how well same and different people are told apart.

    python packages/id_reward/scripts/fetch_photos.py
    python packages/id_reward/scripts/measure_mean_face.py          # rewrites backends/faces/dlib_mean_face.json

One vote per known person (the photos of one man are averaged first). Beside the mean, the margins are printed twice: in sample, and
with the mean recomputed without the two photos of each pair (leave out), which is what a stranger can expect.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path

import numpy as np
from id_reward.backends.faces.center import MEAN_FILE
from id_reward.backends.faces.dlib_faces import DlibBackend

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = ("face-api/*.jpg", "face-recognition/*.jpg", "insightface/t1.jpg", "scikit-image/astronaut.png")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=ROOT / ".photos")
    parser.add_argument("--out", type=Path, default=MEAN_FILE)
    arguments = parser.parse_args()
    backend = DlibBackend()
    descriptors, photos = [], []
    for path in sorted(p for pattern in PHOTOS for p in arguments.photos.glob(pattern)):
        chips = backend.align(path).chips
        if len(chips):
            raw = backend.describe(chips)
            descriptors += list(raw)
            photos += [path.name] * len(raw)
    faces = np.array(descriptors)
    same_man = [i for i, name in enumerate(photos) if name.startswith("obama")]
    others = [i for i in range(len(faces)) if i not in same_man]
    mean = np.mean([*faces[others], faces[same_man].mean(0)], axis=0)

    for label in ("in sample", "leave out"):
        same, different = [], []
        for i, j in itertools.combinations(range(len(faces)), 2):
            if label == "leave out":
                kept = [k for k in others if photos[k] not in (photos[i], photos[j])]
                cosine = float(np.dot(*unit(faces[[i, j]] - faces[kept].mean(0))))
            else:
                cosine = float(np.dot(*unit(faces[[i, j]] - mean)))
            if i in same_man and j in same_man:
                same.append(cosine)
            elif photos[i] == photos[j]:  # certainly two people
                different.append(cosine)
        print(f"{label}: same {min(same):.3f} to {max(same):.3f}, different in one photo at most {max(different):.3f}")
    content = {
        "about": "mean of dlib_face_recognition_resnet_model_v1 descriptors; see scripts/measure_mean_face.py",
        "faces": len(faces),
        "mean": [round(float(x), 5) for x in mean],
    }
    unfinished = arguments.out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content))
    os.replace(unfinished, arguments.out)


if __name__ == "__main__":
    main()
