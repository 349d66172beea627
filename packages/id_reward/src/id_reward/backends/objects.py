"""Objects (extra ``objects``): Florence-2 finds them, SAM 2 cuts them out, DINOv2 embeds them; then the same matching as for faces.

All three load from folders in transformers' format (or from the hub, if you say so).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from id_reward.backends.loading import load, transformers_module
from id_reward.errors import InputError
from id_reward.images import as_array, as_image
from id_reward.protocols import Faces
from id_reward.shapes import Bool, Float, UInt8

try:
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch import nn
except ImportError:
    raise ImportError('the objects backend needs torch and Pillow: pip install "id-reward[objects]"') from None


class Located(NamedTuple):
    """boxes (n, 4): left, top, right, bottom in pixels; labels: what Florence-2 calls them."""

    boxes: Float[np.ndarray, "n 4"]
    labels: tuple[str, ...]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def tidy(
    boxes: Float[np.ndarray, "n 4"], width: int, height: int, *, min_share: float, max_overlap: float
) -> list[int]:
    """Which boxes to keep: those that cover at least ``min_share`` of the picture and overlap no kept larger one by more than ``max_overlap``.

    Generated boxes come without scores and repeat themselves, so the larger of two alike is kept.
    """
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None)
    area = sides.prod(1)
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -area[i]):
        if area[i] <= 0 or area[i] < min_share * width * height:
            continue
        low = np.maximum(boxes[kept, :2], boxes[i, :2])
        high = np.minimum(boxes[kept, 2:], boxes[i, 2:])
        both = np.clip(high - low, 0, None).prod(1)
        if not kept or (both / (area[kept] + area[i] - both)).max() <= max_overlap:
            kept.append(i)
    return sorted(kept)


class FlorenceLocator:
    """Boxes by Florence-2 (arXiv 2311.06242), for whatever is there, or for phrases."""

    def __init__(self, model: Any, processor: Any, *, batch_size: int = 8, max_new_tokens: int = 512) -> None:
        """Takes a `Florence2ForConditionalGeneration` and its processor."""
        self.model, self.processor = model.eval(), processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def generate(self, images: Sequence[Any], queries: Sequence[str]) -> list[str]:
        """Florence-2's answers, tags included."""
        texts: list[str] = []
        for rows in _batches(range(len(images)), self.batch_size):
            inputs = self.processor(
                images=[images[i] for i in rows], text=[queries[i] for i in rows], return_tensors="pt", padding=True
            ).to(self.model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, num_beams=3, do_sample=False)
            texts += self.processor.batch_decode(tokens, skip_special_tokens=False)
        return texts

    def locate(self, images: Sequence[Any], phrases: Sequence[Sequence[str]] | None = None) -> list[Located]:
        """Boxes in every picture: of everything ("<OD>"), or of each of its phrases ("<OPEN_VOCABULARY_DETECTION>")."""
        pictures = [as_image(image) for image in images]
        if phrases is None:
            task, owners = "<OD>", list(range(len(pictures)))
            queries = [task] * len(pictures)
        else:
            task = "<OPEN_VOCABULARY_DETECTION>"
            owners = [row for row, given in enumerate(phrases) for _ in given]
            queries = [task + phrase for given in phrases for phrase in given]
        boxes: list[list[Any]] = [[] for _ in pictures]
        labels: list[list[str]] = [[] for _ in pictures]
        for row, text in zip(owners, self.generate([pictures[i] for i in owners], queries), strict=True):
            found = self.processor.post_process_generation(text=text, task=task, image_size=pictures[row].size)[task]
            boxes[row] += found["bboxes"]
            labels[row] += found.get("labels", found.get("bboxes_labels"))
        return [
            Located(np.array(b, np.float64).reshape(-1, 4), tuple(names))
            for b, names in zip(boxes, labels, strict=True)
        ]


class SamMasker:
    """Masks of boxes by SAM 2 (arXiv 2408.00714)."""

    def __init__(self, model: Any, processor: Any, *, batch_size: int = 4) -> None:
        """Takes a `Sam2Model` and its processor."""
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size

    def masks(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], boxes: Sequence[Float[np.ndarray, "_ 4"]]
    ) -> list[Bool[np.ndarray, "_ _ _"]]:
        """One (n, h, w) per picture; pictures with equally many boxes go together."""
        results = [np.zeros((0, *image.shape[:2]), bool) for image in images]
        for count in {len(b) for b in boxes} - {0}:
            same = [row for row, b in enumerate(boxes) if len(b) == count]
            for rows in _batches(same, self.batch_size):
                inputs = self.processor(
                    images=[Image.fromarray(images[i]) for i in rows],
                    input_boxes=[boxes[i].tolist() for i in rows],
                    return_tensors="pt",
                )
                sizes = inputs["original_sizes"]
                inputs = inputs.to(self.model.device)
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
                with torch.inference_mode():
                    found = self.model(**inputs, multimask_output=False)
                masks = self.processor.post_process_masks(found.pred_masks.float().cpu(), sizes)
                for row, mask in zip(rows, masks, strict=True):
                    results[row] = mask.numpy().reshape(count, *images[row].shape[:2]).astype(bool)
        return results


class DinoEmbedder:
    """Unit embeddings of whole pictures by DINOv2 (arXiv 2304.07193): its class token after the last normalisation."""

    def __init__(self, model: Any, processor: Any, *, batch_size: int = 32) -> None:
        """Takes a `Dinov2Model` and its image processor."""
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str = "cpu", batch_size: int = 32, local_files_only: bool = True
    ) -> DinoEmbedder:
        """Loads a DINO or DINOv2 folder: safetensors, else the tensors of a .bin."""
        hf, options = transformers_module("objects"), {"local_files_only": local_files_only}
        model = load(hf.AutoModel, folder, "dino", weights_only=True, **options).to(device)
        return cls(model, load(hf.AutoImageProcessor, folder, "dino", **options), batch_size=batch_size)

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(self.model.config.hidden_size)

    @property
    def background(self) -> UInt8[np.ndarray, " 3"]:
        """The colour that becomes 0 in the network."""
        return np.round(255 * np.array(self.processor.image_mean)).astype(np.uint8)

    def to(self, device: Any) -> DinoEmbedder:
        """Moves the model."""
        self.model.to(device)
        return self

    def embed(self, images: Sequence[Any]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of whole pictures."""
        parts = []
        for some in _batches(images, self.batch_size):
            inputs = self.processor(images=[as_image(image) for image in some], return_tensors="pt")
            with torch.inference_mode():
                found = self.model(pixel_values=inputs["pixel_values"].to(self.model.device, self.model.dtype))
                parts.append(F.normalize(found.last_hidden_state[:, 0].cpu().double(), dim=1).numpy())
        return np.concatenate(parts) if parts else np.zeros((0, self.dim))


def cut_out(
    image: UInt8[np.ndarray, "h w 3"],
    box: Float[np.ndarray, " 4"],
    mask: Bool[np.ndarray, "h w"] | None,
    background: UInt8[np.ndarray, " 3"],
) -> UInt8[np.ndarray, "s s 3"]:
    """The object on a plain square: what is outside its mask is ``background``, and so is the padding, so nothing is stretched or cropped."""
    height, width = image.shape[:2]
    left, top = np.clip(np.floor(box[:2]).astype(int), 0, [width - 1, height - 1])
    right, bottom = np.clip(np.ceil(box[2:]).astype(int), [left + 1, top + 1], [width, height])
    piece = image[top:bottom, left:right]
    if mask is not None and mask[top:bottom, left:right].any():  # an empty mask says nothing: keep the box
        piece = np.where(mask[top:bottom, left:right, None], piece, background)
    side = max(piece.shape[:2])
    square = np.broadcast_to(background, (side, side, 3)).copy()
    y, x = (side - piece.shape[0]) // 2, (side - piece.shape[1]) // 2
    square[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
    return square


class ObjectBackend:
    """Objects behind the face protocol: `detect_and_embed` gives one `Faces` per picture (scores are 1: Florence-2 gives none).

    Args:
        locator: Finds boxes.
        embedder: Embeds what was found.
        masker: Cuts out; None: the box as it is.
        min_share: Share of the picture's area below which a box is dropped.
        max_overlap: Intersection over union above which the smaller of two boxes is dropped.
        max_objects: At most so many per picture, the largest.
    """

    releases_gil = True

    def __init__(
        self,
        locator: FlorenceLocator,
        embedder: DinoEmbedder,
        masker: SamMasker | None = None,
        *,
        min_share: float = 0.002,
        max_overlap: float = 0.8,
        max_objects: int = 16,
    ) -> None:
        """Puts the parts together."""
        if not 0 <= min_share < 1 or not 0 < max_overlap <= 1 or max_objects < 1:
            raise InputError(
                "min_share must be in [0, 1), max_overlap in (0, 1] and max_objects at least 1, "
                f"got {min_share}, {max_overlap} and {max_objects}"
            )
        self.locator, self.embedder, self.masker = locator, embedder, masker
        self.min_share, self.max_overlap, self.max_objects = min_share, max_overlap, max_objects

    @classmethod
    def from_pretrained(
        cls,
        florence: str | Path,
        dino: str | Path,
        sam: str | Path | None = None,
        *,
        device: str = "cpu",
        local_files_only: bool = True,
        **options: Any,
    ) -> ObjectBackend:
        """Loads the models, for example florence-community/Florence-2-base, facebook/dinov2-base, facebook/sam2.1-hiera-small.

        Raises:
            ValueError: A folder is missing or cannot be read.
            ImportError: transformers is missing.
        """
        hf, local = transformers_module("objects"), {"local_files_only": local_files_only}

        def model(kind: Any, folder: str | Path, what: str) -> nn.Module:
            result: nn.Module = load(kind, folder, what, use_safetensors=True, **local).to(device)
            return result

        locator = FlorenceLocator(
            model(hf.Florence2ForConditionalGeneration, florence, "florence"),
            load(hf.Florence2Processor, florence, "florence", **local),
        )
        masker = (
            SamMasker(model(hf.Sam2Model, sam, "sam"), load(hf.Sam2Processor, sam, "sam", **local)) if sam else None
        )
        embedder = DinoEmbedder.from_pretrained(dino, device=device, local_files_only=local_files_only)
        return cls(locator, embedder, masker, **options)

    def to(self, device: Any) -> ObjectBackend:
        """Moves all models."""
        for part in (self.locator, self.embedder, self.masker):
            if part is not None:
                part.model.to(device)
        return self

    def detect_and_embed(self, images: Sequence[Any], phrases: Sequence[Sequence[str]] | None = None) -> list[Faces]:
        """One `Faces` per picture; a picture in which nothing is found gives empty arrays.

        Args:
            images: Anything `id_reward.images.as_array` takes.
            phrases: What to look for in each picture; None: everything.
        """
        pictures = [as_array(image) for image in images]
        if phrases is not None and len(phrases) != len(pictures):
            raise InputError(f"phrases must have one entry per picture ({len(pictures)}), got {len(phrases)}")
        boxes = []
        for picture, found in zip(pictures, self.locator.locate(pictures, phrases), strict=True):
            height, width = picture.shape[:2]
            inside = found.boxes.clip(0, [width, height, width, height])
            kept = tidy(inside, width, height, min_share=self.min_share, max_overlap=self.max_overlap)
            area = (inside[:, 2:] - inside[:, :2]).prod(1)
            boxes.append(inside[sorted(sorted(kept, key=lambda i: -area[i])[: self.max_objects])])
        masks = self.masker.masks(pictures, boxes) if self.masker else [None] * len(pictures)
        background = self.embedder.background
        pieces = [
            cut_out(picture, box, None if mask is None else mask[row], background)
            for picture, mine, mask in zip(pictures, boxes, masks, strict=True)
            for row, box in enumerate(mine)
        ]
        embeddings = self.embedder.embed(pieces)
        counts = np.cumsum([len(mine) for mine in boxes])
        parts = np.split(embeddings, counts[:-1]) if len(counts) else []
        return [Faces(mine, np.ones(len(mine)), part) for mine, part in zip(boxes, parts, strict=True)]

    def embed_whole(self, images: Sequence[Any]) -> Float[np.ndarray, "b d"]:
        """Embeddings of whole pictures: for references that show the object alone."""
        background = self.embedder.background
        whole = [as_array(image) for image in images]
        return self.embedder.embed(
            [cut_out(w, np.array([0.0, 0.0, w.shape[1], w.shape[0]]), None, background) for w in whole]
        )
