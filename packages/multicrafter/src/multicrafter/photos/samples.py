"""One record at a bucket's size: which part of the picture, which references."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from multicrafter.photos.pictures import unpack_masks
from multicrafter.photos.store import Store
from multicrafter.photos.write import Record

Size = tuple[int, int]


class Draw(NamedTuple):
    """What a sample's randomness and shapes depend on, beside its key."""

    seed: int
    epoch: int
    max_references: int
    reference: Size
    references_per_subject: int = 1


class Sample(NamedTuple):
    """One record: image (3, h, w), masks (m, h, w), references (r, 3, rh, rw) in [0, 1], those of the first subject before the second's."""

    image: Float[Tensor, "3 h w"]
    masks: Float[Tensor, "m h w"]
    references: Float[Tensor, "r 3 rh rw"]
    caption: str
    identities: list[str]
    key: str


def read_sample(store: Store, record: Record, subjects: Sequence[dict[str, Any]], bucket: Size, draw: Draw) -> Sample:
    """Reads one record at a bucket's size: covered, cut so that the subjects stay inside where they can; references of each, drawn."""
    digest = hashlib.sha256(f"{draw.seed}/{draw.epoch}/{record['key']}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    chosen = [subjects[i] for i in random.permutation(len(subjects))[: draw.max_references]]
    height, width = bucket
    box = cover(record["width"], record["height"], bucket, [s["face_box"] for s in chosen], random)
    picture = store.open(record["image"], side=max(height, width))
    x, y = picture.width / record["width"], picture.height / record["height"]  # a JPEG may come decoded smaller
    part = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    image = picture.resize((width, height), Image.Resampling.BICUBIC, box=part, reducing_gap=2.0)
    planes = np.asarray(store.planes(record["masks"]).resize((width, height), Image.Resampling.NEAREST, box=box))
    masks = unpack_masks(planes, 8)[[s["mask_bit"] for s in chosen]]
    references = [
        reference_at(store, subject["references"][index], draw.reference)
        for subject in chosen
        for index in _drawn(len(subject["references"]), draw.references_per_subject, random)
    ]
    return Sample(
        _tensor(np.asarray(image)[None])[0],
        torch.from_numpy(masks.astype(np.float32)),
        _tensor(np.stack(references)),
        record["caption"],
        [s["identity"] for s in chosen],
        record["key"],
    )


def _drawn(available: int, count: int, random: np.random.Generator) -> list[int]:
    """``count`` different ones."""
    return [int(random.integers(available))] if count == 1 else random.permutation(available)[:count].tolist()


def reference_at(store: Store, reference: dict[str, Any], size: Size) -> np.ndarray:
    """A reference at a size: the middle of it, whose proportions these are; what is off by a pixel only is taken whole."""
    crop = store.open(reference["image"], box=reference.get("strip_box"), side=max(size))
    width, height = min(crop.width, crop.height * size[1] / size[0]), min(crop.height, crop.width * size[0] / size[1])
    box = None
    if max(crop.width - width, crop.height - height) > 1:
        left, top = (crop.width - width) / 2, (crop.height - height) / 2
        box = (left, top, left + width, top + height)
    return np.asarray(crop.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def cover(
    width: int, height: int, bucket: Size, faces: Sequence[Sequence[float]], random: np.random.Generator
) -> tuple[float, float, float, float]:
    """The largest part of a picture with the bucket's aspect, drawn from where all faces are inside, else around their middle."""
    aspect = bucket[1] / bucket[0]
    w, h = (width, width / aspect) if width / height < aspect else (height * aspect, height)
    left = _start(width, w, [f[0] for f in faces], [f[2] for f in faces], random)
    top = _start(height, h, [f[1] for f in faces], [f[3] for f in faces], random)
    return (left, top, min(left + w, float(width)), min(top + h, float(height)))


def _start(
    whole: float, part: float, lows: Sequence[float], highs: Sequence[float], random: np.random.Generator
) -> float:
    first, last = max(0.0, max(highs, default=0.0) - part), min(whole - part, min(lows, default=whole))
    draw = float(random.random())
    if first <= last:
        return first + draw * (last - first)
    return float(np.clip((min(lows) + max(highs) - part) / 2, 0.0, max(0.0, whole - part)))
