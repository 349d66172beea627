"""Subject masks: boxes, a people mask split by faces, or SAM 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from id_reward.backends.loading import load
from jaxtyping import Bool, Float

from multicrafter import UserError
from multicrafter.photos.people import Box

if TYPE_CHECKING:
    from PIL import Image

Foreground = Callable[["Image.Image"], Float[np.ndarray, "h w"]]


class Masker(Protocol):
    """Finds the pixels of every person."""

    def __call__(self, picture: Image.Image, faces: Sequence[Box], bodies: Sequence[Box]) -> Bool[np.ndarray, "s h w"]:
        """One mask per person, given the boxes of face and body in pixels."""
        ...


def split_by_faces(
    foreground: Bool[np.ndarray, "h w"], faces: Sequence[Box], bodies: Sequence[Box]
) -> Bool[np.ndarray, "s h w"]:
    """Gives every foreground pixel inside a body box to one person: the one whose face is nearest, masks never overlap.

    ``distance^2 = ((x - cx) / w)^2 + (k (y - cy) / h)^2`` in units of the face's width and height, k = 1/4 below the face, where its own body
    hangs, and 3/2 above it, where somebody else begins. Our choice: docs/adr/0062.
    """
    height, width = foreground.shape
    y, x = np.mgrid[:height, :width] + 0.5
    distance = np.full((len(faces), height, width), np.inf)
    for i, (face, body) in enumerate(zip(faces, bodies, strict=True)):
        w, h = max(face[2] - face[0], 1.0), max(face[3] - face[1], 1.0)
        dx, dy = (x - (face[0] + face[2]) / 2) / w, (y - (face[1] + face[3]) / 2) / h
        within = (x >= body[0]) & (x <= body[2]) & (y >= body[1]) & (y <= body[3])
        distance[i][within] = (dx**2 + (np.where(dy > 0, 0.25, 1.5) * dy) ** 2)[within]
    nearest = distance.argmin(0)
    found: np.ndarray = (
        (nearest[None] == np.arange(len(faces))[:, None, None]) & np.isfinite(distance) & foreground[None]
    )
    return found


class BoxMasker:
    """Bodies as boxes; where boxes overlap, the nearer face decides."""

    def __call__(self, picture: Image.Image, faces: Sequence[Box], bodies: Sequence[Box]) -> Bool[np.ndarray, "s h w"]:
        """See `Masker`."""
        return split_by_faces(np.ones((picture.height, picture.width), bool), faces, bodies)


class ForegroundMasker:
    """One mask of all people, split by their faces.

    Body boxes only bound it from above the head to the photo's lower edge: the foreground knows better where somebody ends.
    """

    def __init__(self, foreground: Foreground, threshold: float = 0.5) -> None:
        """Takes a function from a picture to the probability (h, w) that a pixel shows a person."""
        self.foreground, self.threshold = foreground, threshold

    def __call__(self, picture: Image.Image, faces: Sequence[Box], bodies: Sequence[Box]) -> Bool[np.ndarray, "s h w"]:
        """See `Masker`."""
        mask = self.foreground(picture) >= self.threshold
        wide = [(b[0] - 0.25 * (b[2] - b[0]), b[1], b[2] + 0.25 * (b[2] - b[0]), float(picture.height)) for b in bodies]
        return split_by_faces(mask, faces, wide)


class SelfieForeground:
    """MediaPipe's selfie segmentation, 256x256, by LiteRT (extra ``selfie``)."""

    def __init__(self, path: str) -> None:
        """Loads a tflite file."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError('masks "selfie" need LiteRT: pip install "multicrafter[selfie]"') from error
        if not Path(path).is_file():
            raise UserError(f"masks selfie:PATH needs selfie_segmentation.tflite, but {path} is not a file")
        try:
            self.interpreter = Interpreter(model_path=str(path), num_threads=1)
            self.interpreter.allocate_tensors()
        except Exception as error:
            raise UserError(
                f"masks selfie:PATH needs a tflite model, but {path} is none ({type(error).__name__})"
            ) from error
        (self.input,), (self.output, *_) = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        shape = self.input["shape"]
        if len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"masks selfie:PATH needs a model of pictures (1, h, w, 3), but {path} takes {tuple(shape)}"
            )

    def __call__(self, picture: Image.Image) -> Float[np.ndarray, "h w"]:
        """Probability of a person at every pixel."""
        from PIL import Image

        _, h, w, _ = self.input["shape"]
        small = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR, reducing_gap=2.0), np.float32) / 255
        self.interpreter.set_tensor(self.input["index"], small[None])
        self.interpreter.invoke()
        out = np.asarray(self.interpreter.get_tensor(self.output["index"]), np.float32).reshape(h, w, -1)[..., -1]
        return np.asarray(Image.fromarray(out).resize(picture.size, Image.Resampling.BILINEAR), np.float64)


class SemanticForeground:
    """A semantic segmentation model of transformers (SegFormer, UperNet, ...) with a ``person`` label, from a local folder."""

    def __init__(self, folder: str) -> None:
        """Loads model and image processor."""
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        self.model = load(AutoModelForSemanticSegmentation, folder, "masks semantic:PATH").eval()
        self.processor = load(AutoImageProcessor, folder, "masks semantic:PATH")
        self.labels = [int(i) for i, name in self.model.config.id2label.items() if name.lower() == "person"]
        if not self.labels:
            raise UserError(f"masks semantic:PATH needs a model with a label 'person', but {folder} has none")

    def __call__(self, picture: Image.Image) -> Float[np.ndarray, "h w"]:
        """Probability of a person at every pixel."""
        import torch

        with torch.inference_mode():
            logits = self.model(**self.processor(images=picture, return_tensors="pt")).logits
            full = torch.nn.functional.interpolate(logits.float(), (picture.height, picture.width), mode="bilinear")
        return full.softmax(1)[0, self.labels].sum(0).double().numpy()


class Sam2Masker:
    """SAM 2 (transformers) prompted by body boxes, from a local folder; of its three masks the one it trusts most."""

    def __init__(self, folder: str) -> None:
        """Loads model and processor."""
        from transformers import Sam2Model, Sam2Processor

        self.model = load(Sam2Model, folder, "masks sam2:PATH").eval()
        self.processor = load(Sam2Processor, folder, "masks sam2:PATH")

    def __call__(self, picture: Image.Image, faces: Sequence[Box], bodies: Sequence[Box]) -> Bool[np.ndarray, "s h w"]:
        """See `Masker`; where masks overlap, the nearer face decides."""
        import torch

        if not faces:
            return np.zeros((0, picture.height, picture.width), bool)
        with torch.inference_mode():
            inputs = self.processor(images=picture, input_boxes=[[list(b) for b in bodies]], return_tensors="pt")
            output = self.model(**inputs, multimask_output=True)
            masks = self.processor.post_process_masks(output.pred_masks, inputs["original_sizes"])[0]
        best = output.iou_scores[0].argmax(-1)
        chosen: np.ndarray = masks[torch.arange(len(best)), best].bool().numpy()
        everywhere = [(0.0, 0.0, float(picture.width), float(picture.height))] * len(faces)
        claimed = np.stack([split_by_faces(m, faces, everywhere) for m in chosen]) if len(faces) > 1 else None
        if claimed is None:
            return chosen
        contested = chosen.sum(0) > 1
        mine = np.stack([claimed[i, i] for i in range(len(faces))])
        return np.where(contested[None], mine, chosen)


@lru_cache(maxsize=2)
def masker(name: str) -> Masker:
    """The masker behind ``boxes``, ``selfie:PATH``, ``semantic:PATH`` or ``sam2:PATH``."""
    kind, _, path = name.partition(":")
    if kind == "selfie":
        return ForegroundMasker(SelfieForeground(path))
    if kind == "semantic":
        return ForegroundMasker(SemanticForeground(path))
    if kind == "sam2":
        return Sam2Masker(path)
    return BoxMasker()
