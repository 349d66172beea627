"""One reader of masks and one of pictures, for the command line and for Python: right for every mode, or one sentence that says why not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from idar.masks import token_masks

WHITES = (255, 65535)
MAX_PIXELS = 25_000_000  # of a mask, which is worked on in double precision
NEAR_WHITE = 0.9  # a lossy file's white is a little darker
GREY = 16 / 255  # how far the channels of a grey pixel may be apart
GREYSCALE = ("1", "L", "I", "F")


def read_mask(given: Any, name: str = "mask") -> Float[Tensor, "H W"]:
    """Where a subject is, in [0, 1], from a file, a PIL picture, an array or a tensor.

    White is the subject: the numbers may go to 1 (also as integers), 255 or 65535. A cut-out's alpha is its mask; of two colours, one of
    them black, the other one is the subject. What may be read in two ways is refused.

    Args:
        given: Path, PIL picture, or (H, W), (1, H, W), (H, W, 1), (H, W, 3 or 4) numbers.
        name: What a refusal calls it.

    Raises:
        ValueError: It cannot be read, or not in one way only.
        ImportError: diffusers is missing; the message names the pip line.
    """
    import numpy as np

    if np.ma.is_masked(given):
        raise ValueError(f"{name} must have all its numbers, got a masked array (what it hides is no mask)")
    channels = _numbers(_loaded(given, name, lambda picture: picture) if _is_picture(given) else given, name)
    if not bool(torch.isfinite(channels).all()) or bool((channels < 0).any()):
        raise ValueError(f"{name} must hold numbers from 0 on, got negative ones, NaN or infinity")
    if channels.shape[2] in (2, 4):
        colors, alpha = channels[..., :-1], channels[..., -1]
        if float(alpha.min()) != float(alpha.max()):
            shown = colors[alpha > 0]
            if _spread(shown) <= GREY * float(shown.max()) and len(_levels(shown)) == 2 and 0 in _levels(shown):
                raise ValueError(
                    f"{name} must say in one way where the subject is, got black and white with an alpha that differs"
                )
            return _unit(alpha, name)
        if float(alpha.max()) not in (1, *WHITES):
            raise ValueError(f"{name} must not be see-through everywhere, got an alpha of {float(alpha.max()):g}")
        channels = colors
    if _spread(channels) <= GREY * max(1.0, float(channels.max())):
        return _unit(channels.mean(2), name)
    colors = torch.unique(channels.flatten(0, 1), dim=0)
    if len(colors) != 2 or bool((colors[0] != 0).any()):
        raise ValueError(
            f"{name} must be black and white (one subject in each), got a picture in {len(colors)} colours"
        )
    return (channels != 0).any(2).float()


def read_masks(
    masks: Sequence[Any], grid: tuple[int, int], size: tuple[int, int] | None = None
) -> Float[Tensor, "s n"]:
    """Coverage of the tokens from one mask per subject, see `read_mask`.

    Args:
        masks: One per subject.
        grid: Token rows and columns.
        size: Height and width of the picture, whose proportions a mask must have.

    Raises:
        ValueError: A mask cannot be read, or is of other proportions.
    """
    rows = []
    for i, given in enumerate(masks):
        mask = read_mask(given, f"masks[{i}]")
        high, wide = mask.shape
        if size is not None and not 0.97 < (wide * size[0]) / (high * size[1]) < 1.03:
            raise ValueError(
                f"masks[{i}] must have the proportions of the picture, {size[0]} x {size[1]}, got {high} x {wide}"
            )
        rows.append(token_masks(mask[None, None], grid)[0, 0])
    return torch.stack(rows)


def read_picture(given: Any, name: str = "picture") -> Any:
    """A PIL picture in RGB from a file, a PIL picture, (H, W, 3 or 4) bytes, or numbers in [0, 1] as (3, H, W) tensor or (H, W, 3) array.

    What is see-through becomes white; 16-bit and float pictures keep their brightness; EXIF's orientation is applied.

    Raises:
        ValueError: It cannot be read, or its numbers may mean several things.
        ImportError: diffusers is missing; the message names the pip line.
    """
    if _is_picture(given):
        return _loaded(given, name, lambda picture: _rgb(picture, name))
    if isinstance(given, Tensor) and given.dim() == 3 and given.shape[0] == 3:
        given = given.permute(1, 2, 0)
    whole = str(given.dtype).endswith("uint8") if hasattr(given, "dtype") else False
    values = _numbers(given, name) / (255 if whole else 1)
    if values.shape[2] not in (3, 4) or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"{name} must be three or four channels of bytes or of numbers in [0, 1], got {tuple(values.shape)} up to {float(values.max()):g}"
        )
    if values.shape[2] == 4:
        values = values[..., :3] * values[..., 3:] + 1 - values[..., 3:]
    from diffusers.utils.pil_utils import numpy_to_pil

    return numpy_to_pil(values.float().numpy())[0]


def to_tensor(picture: Any, mode: str = "RGB") -> Float[Tensor, "c h w"]:
    """A PIL picture in [0, 1]."""
    raw = picture.convert(mode)
    flat = torch.frombuffer(bytearray(raw.tobytes()), dtype=torch.uint8)
    return flat.view(raw.height, raw.width, -1).permute(2, 0, 1).float() / 255


def _is_picture(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike)) or hasattr(given, "getbands")


def _loaded(given: Any, name: str, convert: Any) -> Any:
    """A file or PIL picture, turned as its EXIF says."""
    try:
        from diffusers.utils import load_image, loading_utils
    except ImportError as error:
        raise ImportError('pictures need diffusers: pip install "idar[diffusers]"') from error
    if isinstance(given, (str, os.PathLike)):
        if not os.path.isfile(given):
            raise ValueError(f"{name} must be a file, but there is no {os.fspath(given)}")
        try:
            given = loading_utils.PIL.Image.open(given)
            given.load()
        except Exception as error:
            raise ValueError(f"{name} must be a readable image, got {type(error).__name__}") from error
    if getattr(given, "n_frames", 1) > 1:
        raise ValueError(f"{name} must be one picture, got {given.n_frames} in one file")
    return load_image(given, convert_method=convert)


def _rgb(picture: Any, name: str) -> Any:
    """A PIL picture of any mode in RGB."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        wide = picture if picture.mode == "F" else picture.convert("I")
        low, high = wide.getextrema()
        white = 65535 if picture.mode.startswith("I;16") else next((w for w in (1, *WHITES) if high <= w), None)
        if picture.mode == "I" and white == 1:
            white = 255
        if white is None or not low >= 0:
            raise ValueError(f"{name} must hold numbers from 0 to 1, 255 or 65535, got {low:g} to {high:g}")
        return wide.convert("F").point(lambda v: v * (255 / white) + 0.5).convert("L").convert("RGB")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        ground = layer.copy()
        ground.paste((255, 255, 255, 255), (0, 0, *layer.size))
        ground.alpha_composite(layer)
        return ground.convert("RGB")
    return picture.convert("RGB")


def _numbers(given: Any, name: str) -> Float[Tensor, "H W c"]:
    """What a picture or an array holds, with its channels last: grey, grey and alpha, RGB, or RGB and alpha."""
    import numpy as np

    if hasattr(given, "getbands"):
        if given.mode in ("P", "PA", "RGBa", "La") or "transparency" in given.info:
            see_through = given.mode != "P" or "transparency" in given.info
            given = given.convert("RGBA" if see_through else "RGB")
        elif given.mode not in ("LA", "RGB", "RGBA", *GREYSCALE) and not given.mode.startswith("I;16"):
            given = given.convert("RGB")
    elif isinstance(given, Tensor):
        if given.is_meta or given.layout != torch.strided or given.is_complex():
            raise ValueError(
                f"{name} must be a file, a picture or real numbers, got a tensor of {given.dtype} on {given.device}"
            )
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() else given
    if hasattr(given, "getbands") and given.width * given.height > MAX_PIXELS:
        raise ValueError(f"{name} must have at most {MAX_PIXELS:,} pixels, got {given.width} x {given.height}")
    try:
        array = np.asarray(given)
        if array.dtype.kind == "c":
            raise TypeError
        values = torch.from_numpy(array.astype(np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a file, a picture or numbers, got {type(given).__name__}") from None
    if values.dim() == 3 and values.shape[0] == 1:
        values = values[0]
    values = values[..., None] if values.dim() == 2 else values
    if values.dim() != 3 or values.shape[2] not in (1, 2, 3, 4) or not values.numel():
        raise ValueError(
            f"{name} must be (height, width), with channels last where there are some, got {tuple(values.shape)}"
        )
    return values


def _spread(channels: Tensor) -> float:
    """How far the channels of a pixel are apart, at most."""
    return float((channels.amax(-1) - channels.amin(-1)).max()) if channels.numel() else 0.0


def _levels(values: Tensor) -> list[float]:
    found: list[float] = torch.unique(values)[:8].tolist()
    return found


def _unit(values: Tensor, name: str) -> Float[Tensor, "H W"]:
    """Numbers to 1, 255 or 65535 in [0, 1]."""
    high, levels = float(values.max()), _levels(values)
    if high <= 1:
        return values.float()
    white = next((white for white in WHITES if NEAR_WHITE * white <= high <= white), None)
    if white is None or (len(levels) == 3 and levels[0] == 0 and levels[1] <= 0.08 * white):
        seen = ", ".join(f"{level:g}" for level in levels[:4]) + (", ..." if len(levels) > 4 else "")
        raise ValueError(
            f"{name} must be black (0) and white (1, 255 or 65535) with grey edges, got {seen} up to {high:g}"
        )
    return (values / white).float()
