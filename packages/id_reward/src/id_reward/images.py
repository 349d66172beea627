"""Reading pictures from a user's disk: safe, upright, RGB (extra ``image``)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000


def open_image(
    path: str | Path, *, background: tuple[int, int, int] = (128, 128, 128), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Opens a picture as upright RGB.

    EXIF orientation is applied, alpha laid over ``background``, 16 bit scaled, CMYK converted; of an animation the first frame.

    Raises:
        ValueError: The file is missing, not a picture, truncated, or larger than ``max_pixels``.
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError('reading pictures needs Pillow: pip install "id-reward[image]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                if picture.width * picture.height > max_pixels:
                    raise ValueError(
                        f"{path} must have at most {max_pixels:,} pixels, got {picture.width} x {picture.height}"
                    )
                picture.load()
                upright = ImageOps.exif_transpose(picture)
                if upright.mode.startswith("I") or upright.mode == "F":
                    values = np.asarray(upright, np.float64)
                    scale = 255 / 65535 if values.max() > 255 else 1.0
                    upright = Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8))
                if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
                    rgba = upright.convert("RGBA")
                    upright = Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba)
                return upright.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path} must be a picture, but there is no such file") from None
    except ValueError:
        raise
    except Exception as error:
        reason = "it is a folder" if Path(path).is_dir() else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} must be a readable picture, got: {reason}") from None
