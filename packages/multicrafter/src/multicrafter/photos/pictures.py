"""Opening photos, their fingerprints, and finding those that are one photo."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from id_reward.images import open_image
from jaxtyping import Float, Int, UInt64

if TYPE_CHECKING:
    from PIL import Image

HEIF = (".heic", ".heif")


@lru_cache(maxsize=1)
def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImportError('HEIC photos need pillow-heif: pip install "multicrafter[heic]"') from error
    pillow_heif.register_heif_opener()


def open_photo(path: str | Path) -> Image.Image:
    """An upright RGB picture of a photo on disk, HEIC included (extra ``heic``).

    Raises:
        ValueError: The file is no readable picture.
        ImportError: It is HEIC, and pillow-heif is missing.
    """
    if Path(path).suffix.lower() in HEIF:
        _register_heif()
    return open_image(path)


def open_planes(source: str | Path | bytes) -> Image.Image:
    """A mask picture of a dataset as it is stored: one bit a subject, so no colours, no orientation.

    Raises:
        OSError: It is no readable picture.
    """
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as planes:
        planes.load()
        return planes.copy()


def content_hash(path: Path) -> str:
    """SHA-256 of the bytes, 32 hexadecimal digits of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def grey(picture: Image.Image, side: int) -> Float[np.ndarray, "side side"]:
    """Luma in [0, 1], squeezed to a square."""
    from PIL import Image

    # `reducing_gap` makes the large downscale in two steps: five times faster, equal to a grey level
    small = picture.convert("L").resize((side, side), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(small, np.float64) / 255


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits that say for each of the 8x8 lowest DCT frequencies of a 32x32 picture whether it is above their median.

    Equal pictures have equal hashes, resized or recompressed ones differ in a few bits, others in about 32 (Zauner, 2010, "DCT hash").
    """
    from scipy.fft import dctn

    low = dctn(grey(picture, 32), norm="ortho")[:8, :8]
    bits = low > np.median(low.flatten()[1:])  # the mean brightness would dominate
    return int(np.packbits(bits.flatten()).view(">u8")[0])


def near_duplicates(hashes: UInt64[np.ndarray, " n"], distance: int) -> Int[np.ndarray, " n"]:
    """For each hash the first index (in order) whose hash differs in at most ``distance`` bits and that is no duplicate itself; its own if none.

    Two hashes within d bits agree exactly on at least one of d + 1 parts of them, so only photos that share a part are compared.
    Slow twin: `reference.near_duplicates`.
    """
    hashes = np.asarray(hashes, np.uint64)
    owner = np.arange(len(hashes))
    if distance < 0:
        return owner
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    candidates: list[dict[int, list[int]]] = []
    parts = [
        (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1 if high - low < 64 else 0xFFFFFFFFFFFFFFFF)
        for low, high in zip(edges[:-1], edges[1:])
    ]
    candidates = [{} for _ in parts]
    columns = [part.tolist() for part in parts]
    for index in range(len(hashes)):
        near = [j for table, column in zip(candidates, columns) for j in table.get(column[index], ())]
        if near:
            rows = np.unique(near)
            close = rows[np.bitwise_count(hashes[rows] ^ hashes[index]) <= distance]
            if len(close):
                owner[index] = close[0]
                continue
        for table, column in zip(candidates, columns):
            table.setdefault(column[index], []).append(index)
    return owner


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    """JPEG bytes without any metadata: no place, no time, no camera."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pack_masks(masks: Sequence[np.ndarray]) -> bytes:
    """PNG bytes of up to eight boolean masks (h, w): bit i of a pixel says whether it belongs to subject i."""
    from PIL import Image

    if not 1 <= len(masks) <= 8:
        raise ValueError(f"masks must hold 1 to 8 masks, got {len(masks)}")
    planes = np.zeros(masks[0].shape, np.uint8)
    for bit, mask in enumerate(masks):
        planes |= np.asarray(mask, bool).astype(np.uint8) << bit
    buffer = io.BytesIO()
    Image.fromarray(planes).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def unpack_masks(planes: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `pack_masks`: planes (h, w) of bytes -> booleans (count, h, w).

    >>> unpack_masks(np.array([[3, 1]], np.uint8), 2).tolist()
    [[[True, True]], [[True, False]]]
    """
    bits = np.arange(count, dtype=np.uint8)[:, None, None]
    return (np.asarray(planes, np.uint8)[None] >> bits & 1).astype(bool)
