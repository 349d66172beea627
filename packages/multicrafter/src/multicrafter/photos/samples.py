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
    reference_size: int


class Sample(NamedTuple):
    """One record: image (3, h, w), masks (m, h, w), references (m, 3, r, r) in [0, 1]."""

    image: Float[Tensor, "3 h w"]
    masks: Float[Tensor, "m h w"]
    references: Float[Tensor, "m 3 r r"]
    caption: str
    identities: list[str]
    key: str


def read_sample(store: Store, record: Record, subjects: Sequence[dict[str, Any]], bucket: Size, draw: Draw) -> Sample:
    """Reads one record at a bucket's size: covered, cut so that the subjects stay inside where they can; one reference a subject, drawn."""
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
    references = []
    for subject in chosen:
        reference = subject["references"][int(random.integers(len(subject["references"])))]
        crop = store.open(reference["image"], box=reference.get("strip_box"), side=draw.reference_size)
        references.append(
            np.asarray(crop.resize((draw.reference_size,) * 2, Image.Resampling.BICUBIC, reducing_gap=2.0))
        )
    return Sample(
        _tensor(np.asarray(image)[None])[0],
        torch.from_numpy(masks.astype(np.float32)),
        _tensor(np.stack(references)),
        record["caption"],
        [s["identity"] for s in chosen],
        record["key"],
    )


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
