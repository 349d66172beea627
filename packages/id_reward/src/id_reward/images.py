"""Reading pictures from a user's disk, and pictures of every kind as arrays: safe, upright, RGB (extra ``image``)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ImportError('reading pictures needs Pillow: pip install "id-reward[image]"') from None
    return PIL


def to_rgb(picture: Image.Image, *, background: tuple[int, int, int] = (128, 128, 128)) -> Image.Image:
    """An upright RGB copy: EXIF orientation applied, alpha laid over ``background``, 16 bit scaled to 8, CMYK converted."""
    pil = _pillow()
    upright = pil.ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I") or upright.mode == "F":
        values = np.asarray(upright, np.float64)
        scale = 255 / 65535 if values.size and values.max() > 255 else 1.0
        upright = pil.Image.fromarray(np.clip(np.nan_to_num(values) * scale, 0, 255).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        upright = pil.Image.alpha_composite(pil.Image.new("RGBA", rgba.size, (*background, 255)), rgba)
    result: Image.Image = upright.convert("RGB")
    return result


def open_image(
    path: str | Path, *, background: tuple[int, int, int] = (128, 128, 128), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Opens a picture as upright RGB.

    EXIF orientation is applied, alpha laid over ``background``, 16 bit scaled, CMYK converted; of an animation the first frame.
    Nothing is decoded before the size in the header has been checked.

    Raises:
        ValueError: The file is missing, not a picture, truncated, or larger than ``max_pixels``.
        ImportError: Pillow is missing.
    """
    pil = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pil.Image.open(path) as picture:
                if picture.width * picture.height > max_pixels:
                    raise ValueError(
                        f"{path} must have at most {max_pixels:,} pixels, got {picture.width} x {picture.height}"
                    )
                picture.load()
                return to_rgb(picture, background=background)
    except FileNotFoundError:
        raise ValueError(f"{path} must be a picture, but there is no such file") from None
    except pil.Image.DecompressionBombError as error:
        raise ValueError(f"{path} must have at most {max_pixels:,} pixels, got: {error}") from None
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = "it is a folder" if Path(path).is_dir() else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} must be a readable picture, got: {reason}") from None


def as_array(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Any picture as an RGB array.

    Args:
        image: A path; a PIL picture; an array (h, w), (h, w, 3) or (h, w, 4) of uint8, or of floats in [0, 1] (an alpha channel is laid
            over gray); or a tensor (3, h, w) of floats in [0, 1] or uint8, on any device.

    Raises:
        ValueError: The shape is none of these, or a float is not finite.
    """
    if isinstance(image, (str, Path)):
        return np.asarray(open_image(image))
    if hasattr(image, "convert"):
        return np.asarray(to_rgb(image))
    if hasattr(image, "detach"):  # a torch tensor; channels first
        tensor = image.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        values = values.transpose(1, 2, 0) if values.ndim == 3 and values.shape[0] in (1, 3) else values
    else:
        values = np.asarray(image)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4) or 0 in values.shape:
        raise ValueError(
            f"a picture must be a path, a PIL picture, an array (h, w, 3) or a tensor (3, h, w), got {type(image).__name__} "
            f"of shape {np.shape(image)}"
        )
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise ValueError("a picture must be finite, got NaN or infinity")
        values = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 or float in [0, 1], got {values.dtype}")
    if values.shape[-1] == 4:
        alpha = values[..., 3:].astype(np.float32) / 255
        values = (values[..., :3] * alpha + 128 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))
