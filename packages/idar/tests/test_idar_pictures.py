"""One mask in every encoding is the same mask, or is refused; pictures keep their brightness in every mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numpy", reason="needs idar[diffusers]")
pytest.importorskip("PIL", reason="needs idar[diffusers]")
pytest.importorskip("diffusers", reason="needs idar[diffusers]")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from idar.integrations.pictures import read_mask, read_masks, read_picture, to_tensor
from PIL import Image

INSIDE = np.zeros((6, 8), dtype=bool)
INSIDE[:, :3] = True
TRUTH = torch.from_numpy(INSIDE).float()
PHOTO = np.random.default_rng(0).integers(1, 255, (6, 8, 3), dtype=np.uint8)


def palette(colors: dict[int, tuple[int, int, int]], indices: Any) -> Image.Image:
    made = Image.fromarray(indices.astype(np.uint8), "L").convert("P")
    made.putdata(indices.astype(np.uint8).ravel().tolist())
    flat = [0] * 768
    for index, color in colors.items():
        flat[3 * index : 3 * index + 3] = color
    made.putpalette(flat)
    return made


def alpha(colors: Any, opacity: Any) -> Image.Image:
    return Image.fromarray(np.dstack([colors, opacity.astype(np.uint8)]), "LA" if colors.ndim == 2 else "RGBA")


def rgb(values: Any) -> Image.Image:
    return Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, 2))


BLACK = np.zeros((6, 8), dtype=np.uint8)
RIGHT: dict[str, Callable[[], Any]] = {
    "0/255": lambda: Image.fromarray(INSIDE.astype(np.uint8) * 255),
    "0/1": lambda: Image.fromarray(INSIDE.astype(np.uint8)),
    "one bit": lambda: Image.fromarray(INSIDE.astype(np.uint8) * 255).convert("1"),
    "RGB": lambda: rgb(INSIDE * 255),
    "RGB 0/1": lambda: rgb(INSIDE),
    "red on black": lambda: Image.fromarray(np.dstack([INSIDE * 200, BLACK, BLACK]).astype(np.uint8)),
    "CMYK": lambda: rgb(INSIDE * 255).convert("CMYK"),
    "HSV": lambda: rgb(INSIDE * 255).convert("HSV"),
    "palette of black and white": lambda: rgb(INSIDE * 255).convert("P"),
    "palette of a data set (DAVIS)": lambda: palette({1: (128, 0, 0)}, INSIDE),
    "palette whose black is not first": lambda: palette({0: (255, 255, 255), 1: (0, 0, 0)}, ~INSIDE),
    "float 0..1": lambda: Image.fromarray(INSIDE.astype(np.float32)),
    "float 0..255": lambda: Image.fromarray(INSIDE.astype(np.float32) * 255),
    "16 bits": lambda: Image.fromarray(INSIDE.astype(np.uint16) * 65535),
    "16 bits, 0/255": lambda: Image.fromarray(INSIDE.astype(np.uint16) * 255),
    "16 bits, 0/1": lambda: Image.fromarray(INSIDE.astype(np.uint16)),
    "32 bits": lambda: Image.fromarray(INSIDE.astype(np.int32) * 255),
    "cut-out": lambda: alpha(PHOTO, INSIDE * 255),
    "cut-out in grey": lambda: alpha(PHOTO[..., 0], INSIDE * 255),
    "alpha alone, white": lambda: alpha(np.full((6, 8), 255, np.uint8), INSIDE * 255),
    "alpha alone, black": lambda: alpha(BLACK, INSIDE * 255),
    "alpha that says nothing": lambda: alpha(INSIDE.astype(np.uint8) * 255, np.full((6, 8), 255)),
    "boolean array": lambda: INSIDE,
    "integer array": lambda: INSIDE.astype(np.int64),
    "bytes": lambda: INSIDE.astype(np.uint8)[..., None] * 255,
    "tensor": lambda: TRUTH[None],
    "half precision": lambda: TRUTH.bfloat16(),
    "lists": lambda: INSIDE.tolist(),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "labels": (lambda: Image.fromarray(INSIDE.astype(np.uint8) * 3), "black"),
    "labels with a void of 255": (
        lambda: Image.fromarray((INSIDE + np.pad([[254]], ((5, 0), (7, 0)))).astype(np.uint8)),
        "black",
    ),
    "half grey": (lambda: Image.fromarray(INSIDE.astype(np.uint8) * 128), "black"),
    "a photo": (lambda: Image.fromarray(PHOTO), "colours"),
    "two colours without black": (lambda: palette({0: (0, 0, 90), 1: (90, 0, 0)}, INSIDE), "colours"),
    "three colours": (lambda: palette({1: (128, 0, 0), 2: (0, 128, 0)}, INSIDE + 2 * (np.arange(8) > 5)), "colours"),
    "alpha against colour": (lambda: alpha(INSIDE.astype(np.uint8) * 255, ~INSIDE * 255 // 2 + 128), "one way"),
    "see-through": (lambda: alpha(PHOTO, BLACK), "see-through"),
    "percent": (lambda: INSIDE * 100.0, "black"),
    "negative": (lambda: INSIDE * -1.0, "from 0 on"),
    "NaN": (lambda: np.where(INSIDE, np.nan, 0), "NaN"),
    "four dimensions": (lambda: TRUTH[None, None].expand(2, 1, 6, 8), "height"),
    "nothing": (lambda: np.zeros((0, 4)), "height"),
    "a word": (lambda: object(), "numbers"),
    "no file": (lambda: "nowhere.png", "nowhere.png"),
}


@pytest.mark.parametrize("what", RIGHT)
def test_one_mask_in_every_encoding(what: str, tmp_path: Path) -> None:
    made = RIGHT[what]()
    torch.testing.assert_close(read_mask(made), TRUTH)
    if isinstance(made, Image.Image):
        path = tmp_path / (
            "mask.tif" if made.mode in ("F", "CMYK", "I") or made.mode.startswith("I;16") else "mask.png"
        )
        if made.mode != "HSV":
            made.save(path)
            torch.testing.assert_close(read_mask(path), TRUTH)


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(what: str) -> None:
    make, word = REFUSED[what]
    with pytest.raises(ValueError, match=word) as caught:
        read_mask(make(), "--mask a.png")
    assert str(caught.value).startswith("--mask a.png must") and "\n" not in str(caught.value)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 1), st.booleans())
def test_soft_masks_keep_their_values(grey: float, wide: bool) -> None:
    soft = TRUTH.clone()
    soft[2] *= grey
    white = 65535 if wide else 255
    picture = Image.fromarray((soft.numpy() * white).round().astype(np.uint16 if wide else np.uint8))
    torch.testing.assert_close(read_mask(picture), soft, atol=0.51 / white, rtol=0)
    torch.testing.assert_close(read_mask(soft), soft)


def test_lossy_masks_and_turned_ones(tmp_path: Path) -> None:
    large = Image.fromarray(INSIDE.astype(np.uint8) * 255).resize((80, 60), Image.Resampling.NEAREST)
    large.save(tmp_path / "mask.jpg", quality=85)
    want = torch.from_numpy(np.asarray(large) / 255).float()
    assert (read_mask(tmp_path / "mask.jpg") - want).abs().mean() < 0.02
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    large.save(tmp_path / "turned.jpg", exif=exif)
    assert read_mask(tmp_path / "turned.jpg").shape == (80, 60)


def test_several_pictures_in_one_file_are_refused(tmp_path: Path) -> None:
    pages = [RIGHT["0/255"](), Image.fromarray(255 - INSIDE.astype(np.uint8) * 255)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="2 in one file"):
        read_mask(tmp_path / "pages.tif")


def test_masks_have_the_proportions_of_the_picture() -> None:
    assert read_masks([INSIDE, ~INSIDE], (3, 4), (60, 80))[0].view(3, 4)[0].tolist() == [1, 0.5, 0, 0]
    with pytest.raises(ValueError, match=r"masks\[1\] must have the proportions of the picture, 60 x 80, got 8 x 6"):
        read_masks([INSIDE, INSIDE.T], (3, 4), (60, 80))


GREY = np.full((4, 4), 51, np.uint8)
PICTURES: dict[str, Callable[[], Any]] = {
    "grey": lambda: Image.fromarray(GREY),
    "16 bits": lambda: Image.fromarray(GREY.astype(np.uint16) * 257),
    "float 0..1": lambda: Image.fromarray(GREY.astype(np.float32) / 255),
    "float 0..255": lambda: Image.fromarray(GREY.astype(np.float32)),
    "32 bits": lambda: Image.fromarray(GREY.astype(np.int32)),
    "half see-through": lambda: alpha(np.full((4, 4, 3), 0, np.uint8), np.full((4, 4), 204)),
    "palette": lambda: palette({1: (51, 51, 51)}, np.ones((4, 4))),
    "CMYK": lambda: rgb(GREY).convert("CMYK"),
    "bytes": lambda: np.repeat(GREY[..., None], 3, 2),
    "tensor": lambda: torch.full((3, 4, 4), 0.2),
    "array": lambda: np.full((4, 4, 3), 0.2),
}


@pytest.mark.parametrize("what", PICTURES)
def test_pictures_keep_their_brightness(what: str) -> None:
    found = read_picture(PICTURES[what]())
    assert found.mode == "RGB"
    torch.testing.assert_close(to_tensor(found), torch.full((3, 4, 4), 0.2), atol=1.01 / 255, rtol=0)


def test_pictures_that_mean_several_things_are_refused() -> None:
    for wrong in (
        np.full((4, 4, 3), 20.0),
        np.zeros((4, 4)),
        torch.full((3, 4, 4), -1.0),
        Image.fromarray(np.full((4, 4), -1.0, np.float32)),
        "nowhere.png",
    ):
        with pytest.raises(ValueError, match="picture must"):
            read_picture(wrong)
