"""The reward's own detector and identity embedder, behind id_reward's `FaceBackend`; independent of the reader of truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from id_reward import Faces
from id_reward.images import as_array
from safetensors.torch import load_file
from torch import Tensor

from multicrafter.world.judges.network import PICTURE_SIDE, REFERENCE_SIDE, SubjectNetwork, find, shown_at

WIDTH, DILATIONS, EMBEDDING = 48, (1, 2, 4, 1, 2), 48


def build_people() -> SubjectNetwork:
    """An untrained detector and embedder."""
    return SubjectNetwork(WIDTH, DILATIONS, EMBEDDING, 1)


def as_tensor(images: Sequence[Any] | Tensor) -> list[Tensor]:
    """Pictures of any kind as float tensors in [0, 1]: tensors and floats in [0, 1] as they are, all else by `id_reward.images.as_array`."""
    if isinstance(images, Tensor):
        return list(images)
    result = []
    for image in images:
        if isinstance(image, Tensor):
            result.append(image)
            continue
        exact = isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim == 3 and image.shape[2] == 3
        if not (exact and np.isfinite(image).all() and 0 <= image.min() <= image.max() <= 1):
            image = as_array(image) / np.float32(255)
        result.append(torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1))
    return result


class PeopleBackend:
    """Finds drawn people and embeds their identity: unit vectors, comparable by cosine."""

    def __init__(self, network: SubjectNetwork) -> None:
        """Takes a trained network."""
        self.network = network.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PeopleBackend:
        """Loads ``people.safetensors``."""
        network = build_people()
        network.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "people.safetensors").items()})
        return cls(network)

    def detect_and_embed(self, images: Sequence[Any] | Tensor) -> list[Faces]:
        """One `Faces` per scene, of any size; pictures of one size are batched."""
        return self._find(images, PICTURE_SIDE)

    def detect_and_embed_references(self, images: Sequence[Any] | Tensor) -> list[Faces]:
        """`detect_and_embed` of references, in which a person fills the picture."""
        return self._find(images, REFERENCE_SIDE)

    @torch.inference_mode()
    def _find(self, images: Sequence[Any] | Tensor, side: int) -> list[Faces]:
        pictures = as_tensor(images)
        results: list[Faces] = [Faces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, EMBEDDING)))] * len(pictures)
        for shape in {p.shape for p in pictures}:
            rows = [i for i, p in enumerate(pictures) if p.shape == shape]
            for start in range(0, len(rows), 64):
                part = rows[start : start + 64]
                shown, scale = shown_at(torch.stack([pictures[i] for i in part]), side)
                found = find(self.network(shown))
                unit = torch.nn.functional.normalize(found.features, dim=1)
                boxes = found.boxes / scale
                for position, row in enumerate(part):
                    mine = found.picture == position
                    results[row] = Faces(
                        boxes[mine].numpy(), found.scores[mine].numpy(), unit[mine].numpy().astype(np.float64)
                    )
        return results
