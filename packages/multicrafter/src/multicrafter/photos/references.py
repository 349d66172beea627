"""Reference crops: around a face, without the neighbours' faces; altered ones where there is no other photo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from multicrafter.photos.people import Box

if TYPE_CHECKING:
    from PIL import Image

MIN_SCALE = 1.2  # a crop never gets closer to the face than this


def crop_box(face: Box, others: Sequence[Box], width: int, height: int, *, scale: float) -> tuple[int, int, int, int]:
    """A square around a face, ``scale`` times its longer side, a little lower than the face, moved inside the photo.

    It shrinks, down to 1.2 times the face, until no other face lies in it: a reference shows one person.
    """
    left, top, right, bottom = face
    longer, shorter = max(right - left, bottom - top), min(width, height)
    for factor in np.linspace(scale, MIN_SCALE, 12) if scale > MIN_SCALE else [scale]:
        side = min(factor * longer, shorter)
        x = float(np.clip((left + right) / 2 - side / 2, 0, width - side))
        y = float(np.clip((top + bottom) / 2 - 0.45 * side, 0, height - side))
        box = (x, y, x + side, y + side)
        if not any(_overlap(box, other) for other in others):
            break
    return (round(box[0]), round(box[1]), max(round(box[2]), round(box[0]) + 1), max(round(box[3]), round(box[1]) + 1))


def _overlap(box: Sequence[float], face: Sequence[float]) -> bool:
    w = min(box[2], face[2]) - max(box[0], face[0])
    h = min(box[3], face[3]) - max(box[1], face[1])
    return bool(w > 0.1 * (face[2] - face[0]) and h > 0.1 * (face[3] - face[1]))


def crop(photo: Image.Image, face: Box, others: Sequence[Box], *, scale: float, size: int) -> Image.Image:
    """The reference of a face: `crop_box`, at most ``size`` pixels a side."""
    from PIL import Image

    picture = photo.crop(crop_box(face, others, photo.width, photo.height, scale=scale))
    if max(picture.size) > size:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return picture


def augment(picture: Image.Image, *, seed: int) -> Image.Image:
    """Another look at the same crop: mirrored or not, turned by up to 8 degrees, nearer, other light and colour; the same for the same seed."""
    from PIL import Image, ImageEnhance, ImageOps

    random = np.random.default_rng(seed)
    size = picture.size
    if random.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(float(random.uniform(-8, 8)), Image.Resampling.BICUBIC)
    zoom = float(random.uniform(0.72, 0.86))  # 8 degrees leave black corners outside of this
    side = (size[0] * zoom, size[1] * zoom)
    left, top = (size[0] - side[0]) * random.uniform(0.35, 0.65), (size[1] - side[1]) * random.uniform(0.35, 0.65)
    picture = picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side[0], top + side[1]))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(float(random.uniform(0.8, 1.2)))
    return picture


def pixelate(photo: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The photo with heads (face boxes half as large again) in blocks: six across, too few to know a face by."""
    from PIL import Image

    if not boxes:
        return photo
    photo = photo.copy()
    for left, top, right, bottom in boxes:
        w, h = (right - left) / 4, (bottom - top) / 4
        area = (
            max(0, int(left - w)), max(0, int(top - 2 * h)), min(photo.width, int(right + w) + 1), min(photo.height, int(bottom + h) + 1),
        )  # fmt: skip
        if area[2] <= area[0] or area[3] <= area[1]:
            continue
        head = photo.crop(area)
        photo.paste(head.resize((6, 6), Image.Resampling.BOX).resize(head.size, Image.Resampling.NEAREST), area)
    return photo
