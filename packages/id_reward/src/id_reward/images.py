"""One opener for every picture: whatever it is kept in, it comes out upright, opaque, RGB, 8 bits a channel (extra ``image``).

A network must see the same picture whether it came as a path, as a PIL picture, as an array or as a tensor, on the command line or in Python.
So every scorer, backend and drawing of this package looks through `as_array` or `as_image`, and other packages may do the same.

| what comes | what it becomes |
|---|---|
| EXIF orientation | applied |
| alpha, palette with transparency | laid over ``background``, mid gray by default |
| 1 bit, palette, gray, CMYK, YCbCr, HSV, LAB | converted to RGB |
| 16 bits | 65535 is white, however dark the picture is |
| 32-bit integers, which state no range | up to 255: 8-bit levels, with a warning; up to 65535: 16 bits; else refused |
| floats | in [0, 1], or levels from 0 to 255; anything else is refused, and so is NaN |
| animation, several pages | the first frame of a file, with a warning |
| colour profile | not applied: every file is read as sRGB, as pipelines of diffusers do |
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from id_reward.errors import InputError
from id_reward.shapes import Float, UInt8

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000
GROUND = (128, 128, 128)  # mid gray: what is transparent is neither light nor dark
HALF_LEVEL = 0.5 / 255
BAND = 1 << 20  # pixels that are worked on at a time, so that a picture needs little memory beside its own
KINDS = "a path, a PIL picture, an array (h, w, 3) or a tensor (3, h, w)"


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ImportError('reading pictures needs Pillow: pip install "id-reward[image]"') from None
    return PIL


def _bands(height: int, width: int) -> Iterator[slice]:
    """Rows in pieces of about `BAND` pixels."""
    step = max(1, BAND // max(width, 1))
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def _float_scale(pieces: Iterable[Float[np.ndarray, "*shape"]]) -> float:
    """What makes levels of floats: 255 for values in [0, 1], 1 for levels from 0 to 255; see `float_levels`."""
    low, high, between, above = math.inf, -math.inf, 0, 0
    for values in pieces:
        if not np.isfinite(values).all():
            raise InputError("a picture must be finite, got NaN or infinity")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        between += int(((values > HALF_LEVEL) & (values < 1)).sum())
        above += int((values > 1).sum())
    if low >= -HALF_LEVEL and high <= 1 + HALF_LEVEL:
        return 255.0
    if low >= -0.5 and 2 <= high <= 255.5 and above > between:
        return 1.0
    raise InputError(
        f"a picture of floats must lie in [0, 1], or hold levels from 0 to 255, got values from {low:.4g} to {high:.4g}"
    )


def _scaled(values: Float[np.ndarray, "*shape"], scale: float) -> UInt8[np.ndarray, "*shape"]:
    return np.asarray(np.clip((values * scale).round(), 0, 255), np.uint8)


def float_levels(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Floats as 8-bit levels: ``round(255 v)`` for values in [0, 1], ``round(v)`` for values from 0 to 255.

    Beyond these ranges at most half a level is rounded away. The second reading needs more values above 1 than between 0 and 1, so that a
    picture in [0, 1] with a few pixels far outside is not taken for a black one.

    Raises:
        ValueError: NaN, infinity, or values in neither range.

    >>> float_levels(np.array([0.0, 0.5, 1.0])).tolist(), float_levels(np.array([0.0, 254.6])).tolist()
    ([0, 128, 255], [0, 255])
    """
    pieces = list(_bands(len(values), values[0].size))
    scale = _float_scale(values[rows] for rows in pieces)
    levels = np.empty(values.shape, np.uint8)
    for rows in pieces:
        levels[rows] = _scaled(values[rows], scale)
    return levels


def _eight_bits(low: int, high: int, *, sixteen_bits: bool) -> bool:
    """Whether gray of 16 or 32 bits holds 8-bit levels: never where 65535 is known to be white."""
    if low < 0 or high > 65535:
        raise InputError(
            f"a picture of 32-bit integers must hold values from 0 to 65535, got {low} to {high}; save it in 8 or 16 bits"
        )
    if sixteen_bits or high > 255:
        return False
    if high:
        warnings.warn(
            f"a picture of 32-bit integers states no range: its values, at most {high}, are taken for 8-bit levels",
            stacklevel=2,
        )
    return True


def _from_sixteen(values: np.ndarray) -> UInt8[np.ndarray, "*shape"]:
    """65535 is white, however dark the picture is."""
    return np.asarray((values.astype(np.uint32) + 128) // 257, np.uint8)


def _over(
    colours: UInt8[np.ndarray, "h w 3"], alpha: UInt8[np.ndarray, "h w 1"], background: tuple[int, int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """``round((alpha c + (255 - alpha) background) / 255)``; every sum is below 2^16."""
    a = alpha.astype(np.uint16)
    mixed: np.ndarray = (a * colours + (255 - a) * np.array(background, np.uint16) + 127) // 255
    return mixed.astype(np.uint8)


def _gray_levels(picture: Any, pieces: Sequence[Any], *, deep: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What makes 8-bit levels of the values of a picture with one channel of more than 8 bits."""
    if picture.mode == "F":
        scale = _float_scale(np.asarray(piece()) for piece in pieces)
        return lambda values: _scaled(values, scale)
    # Pillow knows no extrema of the rarer kinds of 16 bits
    low = min(int(np.asarray(piece()).min()) for piece in pieces)
    high = max(int(np.asarray(piece()).max()) for piece in pieces)
    return (lambda v: v.astype(np.uint8)) if _eight_bits(low, high, sixteen_bits=deep) else _from_sixteen


def _pil_array(picture: Any, background: tuple[int, int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """A loaded PIL picture as an upright, opaque RGB array."""
    deep = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    clear = picture.info.get("transparency")
    upright = _pillow().ImageOps.exif_transpose(picture)
    if 0 in upright.size:
        raise InputError(f"a picture must have pixels, got {upright.size[0]} x {upright.size[1]}")
    width, height = upright.size
    bands = list(_bands(height, width))
    pieces = [partial(upright.crop, (0, rows.start, width, rows.stop)) for rows in bands]
    gray = upright.mode.startswith("I") or upright.mode == "F"
    levels = _gray_levels(upright, pieces, deep=deep) if gray else None
    palette = getattr(upright.palette, "mode", "") if upright.mode == "P" else ""
    through = upright.mode in ("RGBA", "LA", "La", "PA", "RGBa") or clear is not None or palette.endswith("A")
    result = np.empty((height, width, 3), np.uint8)
    for rows, piece in zip(bands, pieces, strict=True):
        part = piece()
        if levels is not None:
            values = np.asarray(part)
            colours = np.repeat(levels(values)[..., None], 3, axis=2)
            result[rows] = (
                colours if clear is None else _over(colours, np.where(values != clear, 255, 0)[..., None], background)
            )
        elif through:
            # gray with its alpha multiplied in: Pillow knows one way out
            layer = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
            ground = _pillow().Image.new("RGB", part.size, background)
            ground.paste(layer.convert("RGB"), mask=layer.getchannel("A"))  # the formula of `_over`
            result[rows] = np.asarray(ground)
        else:
            result[rows] = np.asarray(part.convert("RGB"))
    return result


def to_rgb(picture: Image.Image, *, background: tuple[int, int, int] = GROUND) -> Image.Image:
    """An upright, opaque RGB copy of a PIL picture; the module says what becomes of every kind.

    Raises:
        ValueError: The file behind it is damaged, or its values cannot be read as a picture.
    """
    pil = _pillow()
    try:
        picture.load()
        result: Image.Image = pil.Image.fromarray(_pil_array(picture, background))
    except InputError:
        raise
    except Exception as error:  # Pillow raises what it likes on damaged files and impossible properties
        name = getattr(picture, "filename", "") or "the picture"
        raise InputError(f"{name} must be a readable picture, got: {type(error).__name__}: {_line(error)}") from error
    return result


def _line(error: Exception) -> str:
    """The first line of a message, cut to a readable length."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def file_name(source: Any) -> str:
    """What a message calls a file: its path, quoted where it could not be read in a sentence."""
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the picture")
    text = path if isinstance(path, str) else repr(path)
    return text if text.strip() and text.isprintable() else repr(text)


def require_file(source: str | os.PathLike[str]) -> None:
    """Refuses what is there and is no file: a pipe or a device would be read for ever.

    Raises:
        ValueError: It is a pipe, a socket or a device.
    """
    try:
        kind = os.stat(source).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise InputError(f"{file_name(source)} must be a file, got a pipe or a device")


def count_pixels(data: bytes) -> int:
    """Width times height as the header of a file in memory says; 0 where it cannot be read, which whoever opens it will say."""
    pil = _pillow()
    try:
        with pil.Image.open(io.BytesIO(data)) as picture:
            return int(picture.width * picture.height)
    except Exception:  # Pillow raises what it likes
        return 0


def _several(picture: Any) -> bool:
    """Whether a file holds more pictures than one; phones keep a second, smaller view of the same photo in MPO files."""
    return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))


def is_animation(data: bytes) -> bool:
    """Whether a file in memory holds several pictures, of which `open_image` takes the first; False where it cannot be read."""
    try:
        with _pillow().Image.open(io.BytesIO(data)) as picture:
            return _several(picture)
    except ImportError:
        raise
    except Exception:  # Pillow raises what it likes
        return False


def open_image(
    source: str | os.PathLike[str] | bytes | Any,
    *,
    background: tuple[int, int, int] = GROUND,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Opens a file as upright, opaque RGB; the module says what becomes of every kind of picture.

    Nothing is decoded before the size in the header has been checked.

    Args:
        source: A path, the bytes of a file, or a file that is open for reading.
        background: What is seen where the picture is transparent.
        max_pixels: Width times height up to which a picture is decoded.

    Raises:
        ValueError: The file is missing, not a picture, truncated, or larger than ``max_pixels``.
        ImportError: Pillow is missing.
    """
    pil = _pillow()
    file = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    name = file_name(source)
    if isinstance(source, (str, os.PathLike)):
        require_file(source)
    try:
        with pil.Image.open(file) as picture:
            if picture.width * picture.height > max_pixels:
                raise InputError(
                    f"{name} must have at most {max_pixels:,} pixels, got {picture.width} x {picture.height}"
                )
            if _several(picture):
                warnings.warn(f"{name} holds several pictures: the first is taken", stacklevel=2)
            picture.load()
            result: Image.Image = pil.Image.fromarray(_pil_array(picture, background))
            return result
    except FileNotFoundError:
        raise InputError(f"{name} must be a picture, but there is no such file") from None
    except pil.Image.DecompressionBombError as error:
        raise InputError(f"{name} must have at most {max_pixels:,} pixels, got: {error}") from None
    except Exception as error:
        if isinstance(error, ValueError) and str(name) in str(error):
            raise
        folder = isinstance(source, (str, os.PathLike)) and os.path.isdir(source)
        said = _line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {_line(error)}"
        reason = "it is a folder" if folder else said
        raise InputError(f"{name} must be a readable picture, got: {reason}") from error


def _values(image: Any) -> np.ndarray:
    """The pixels of an array or tensor, channels last; a tensor's channels come first unless only the last axis can be theirs."""
    if not hasattr(image, "detach"):
        if np.ma.is_masked(image):
            raise InputError("a picture must have all its pixels, got a masked array; .filled(level) fills it")
        try:
            return np.asarray(image)
        except Exception as error:  # a list of unequal things, or an object with an __array__ of its own mind
            raise InputError(f"a picture must be {KINDS}, got {_about(image)}") from error
    try:
        tensor = image.detach().cpu()
        values: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (RuntimeError, TypeError) as error:  # of the device "meta", sparse, or no tensor at all
        raise InputError(f"a picture must be {KINDS}, got {_about(image)} without readable values") from error
    return values.transpose(1, 2, 0) if values.ndim == 3 and values.shape[0] in (1, 3, 4) else values


def _array_levels(values: np.ndarray) -> UInt8[np.ndarray, "h w c"]:
    """Any dtype that says what white is, as 8-bit levels."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # in any byte order
        return _from_sixteen(values)
    if np.issubdtype(values.dtype, np.floating):
        return float_levels(values.astype(np.float32) if values.dtype == np.float16 else values)
    raise InputError(
        f"a picture must hold bool, uint8, uint16 or floats, got {values.dtype}; .astype('uint8') keeps levels from 0 to 255"
    )


def as_array(image: Any, *, background: tuple[int, int, int] = GROUND) -> UInt8[np.ndarray, "h w 3"]:
    """Any picture as an RGB array; the module says what becomes of every kind.

    Args:
        image: A path; the bytes of a file; ``{"bytes": ..., "path": ...}`` as data sets keep pictures; a PIL picture; an array (h, w) or
            (h, w, c), or a tensor (c, h, w) on any device, with c = 1, 3 or 4 channels (an array also 2: gray and alpha). Arrays and
            tensors hold bool, uint8, uint16 or floats.
        background: What is seen where the picture is transparent.

    Raises:
        ValueError: It is none of these, or its values cannot be read as a picture.
    """
    if isinstance(image, Mapping):
        if image.get("bytes") is None and image.get("path") is None:
            raise InputError(f"a picture in a dictionary must have 'bytes' or 'path', got {', '.join(map(str, image))}")
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(image, "read"):
        return np.asarray(open_image(image, background=background))
    if hasattr(image, "convert") and hasattr(image, "mode"):
        return np.asarray(to_rgb(image, background=background))
    values = _values(image)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 2, 3, 4) or 0 in values.shape or values.dtype == object:
        raise InputError(f"a picture must be {KINDS}, got {_about(image)}")
    channels = values.shape[-1]
    if channels not in (2, 4):
        levels = _array_levels(values)
        return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))
    colours, alpha = _array_levels(values[..., :-1]), _array_levels(values[..., -1:])
    return _over(np.broadcast_to(colours, (*colours.shape[:2], 3)), alpha, background)


def as_image(image: Any, *, background: tuple[int, int, int] = GROUND) -> Image.Image:
    """`as_array` as a PIL picture.

    Raises:
        ValueError: See `as_array`.
    """
    result: Image.Image = _pillow().Image.fromarray(as_array(image, background=background))
    return result


def _about(image: Any) -> str:
    """What came instead of a picture, with a hint where the mistake is a common one."""
    shape = getattr(image, "shape", None)
    if shape is None:
        return f"{type(image).__name__} {image!r}"[:120]
    text = f"{type(image).__name__} of shape {tuple(shape)}"
    if len(shape) == 4:
        return f"{text}, which is a batch: give its pictures one by one"
    if len(shape) == 3 and shape[0] in (1, 3, 4) and not hasattr(image, "detach"):
        return f"{text}, whose channels come first: .transpose(1, 2, 0) puts them last"
    return text
