"""One picture in every form that a file, Pillow, NumPy or torch can keep it in: each must come out as the same pixels, or be refused."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward.images import GROUND, as_array, as_image, float_levels, open_image, to_rgb
from PIL import Image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)


def through_a_file(picture, name: str, folder: Path, **options):
    picture.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("peak", [65535, 300, 255, 1])
def test_sixteen_bits_have_one_white_however_dark_the_picture_is(tmp_path, peak) -> None:
    """A quarter of .05 % gray stays black: before, a maximum up to 255 made it 257 times too bright."""
    deep = np.array([[0, peak], [peak // 2, peak]], np.uint16)
    expected = np.round(deep / 257).astype(np.uint8)
    for name in ("deep.png", "deep.tif"):
        for picture in (through_a_file(Image.fromarray(deep), name, tmp_path), Image.open(tmp_path / name)):
            np.testing.assert_array_equal(as_array(picture)[..., 0], expected)
    big_endian = Image.frombytes("I;16B", (2, 2), deep.astype(">u2").tobytes())
    for picture in (Image.fromarray(deep), big_endian, deep, np.stack([deep] * 3, -1)):
        np.testing.assert_array_equal(as_array(picture)[..., 0], expected)
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    np.testing.assert_array_equal(as_array(torch.from_numpy(deep)[None])[..., 2], expected)


def test_sixteen_bits_in_a_portable_graymap(tmp_path) -> None:
    """Pillow opens it as 32-bit integers, already stretched to 65535."""
    values = np.array([[0, 1, 2], [512, 1022, 1023]], ">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5\n3 2\n1023\n" + values.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_array(tmp_path / "x.pgm")[..., 0]
    np.testing.assert_allclose(found, values.astype(float) * 255 / 1023, atol=0.51)


def test_32_bit_integers_are_levels_or_16_bits_or_refused(tmp_path) -> None:
    sixteen = Image.fromarray(np.array([[0, 257], [30000, 65535]], np.int32))
    for picture in (sixteen, through_a_file(sixteen, "x.tif", tmp_path)):
        assert as_array(picture)[..., 0].tolist() == [[0, 1], [117, 255]]
    with pytest.warns(UserWarning, match="at most 200, are taken for 8-bit levels"):
        assert as_array(Image.fromarray(np.array([[0, 200]], np.int32)))[..., 0].tolist() == [[0, 200]]
    for wrong in ([[0, 65536]], [[-1, 5]]):
        with pytest.raises(ValueError, match="32-bit integers must hold values from 0 to 65535, got"):
            as_array(Image.fromarray(np.array(wrong, np.int32)))


def test_floats_from_0_to_1_in_a_file(tmp_path) -> None:
    """It became black before."""
    unit = (RAMP / 255).astype(np.float32)
    for name in ("x.tif", "x.pfm") if ".pfm" in Image.registered_extensions() else ("x.tif",):
        file = through_a_file(Image.fromarray(unit), name, tmp_path)
        for picture in (file, Image.open(file), to_rgb(Image.open(file)), Image.fromarray(unit)):
            np.testing.assert_array_equal(as_array(picture)[..., 1], RAMP)
    levels = through_a_file(Image.fromarray(RAMP.astype(np.float32)), "levels.tif", tmp_path)
    np.testing.assert_array_equal(as_array(levels)[..., 0], RAMP)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_float_arrays_in_either_range(kind) -> None:
    np.testing.assert_array_equal(as_array((COLOURS / 255).astype(kind)), COLOURS)
    np.testing.assert_array_equal(as_array(COLOURS.astype(kind)), COLOURS)  # before: white
    dark = np.zeros((4, 4, 3), kind)
    dark[0, 0] = 3
    assert as_array(dark)[0, 0].tolist() == [3, 3, 3] and as_array(dark).sum() == 9


@pytest.mark.parametrize(("values", "words"), [
    ([-1.0, 1.0], "got values from -1 to 1"), ([0.0, 1.5], "got values from 0 to 1.5"), ([0.0, 256.0], "to 256"), ([-3.0, 200.0], "from -3"),
    ([0.0, 1e30], "1e.30"), ([0.2, 0.4, 0.6, 60.0], "from 0.2 to 60"), ([0.0, np.nan], "finite"), ([0.0, np.inf], "finite"),
    ([0.0, -np.inf], "finite"),
])  # fmt: skip
def test_floats_outside_are_refused_not_clipped(values, words, tmp_path) -> None:
    array = np.array([values], np.float32)
    colour = np.stack([array] * 3, -1)
    file = through_a_file(Image.fromarray(array), "x.tif", tmp_path)
    for picture in (array, colour, Image.fromarray(array), file):
        with pytest.raises(ValueError, match=words) as caught:
            as_array(picture)
        assert "\n" not in str(caught.value)
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    with pytest.raises(ValueError, match=words):
        as_array(torch.from_numpy(colour).permute(2, 0, 1))


def test_rounding_errors_at_the_ends_are_rounded_away() -> None:
    assert float_levels(np.array([-1e-6, 1 + 1e-3])).tolist() == [0, 255]
    assert float_levels(np.array([-0.4, 255.4])).tolist() == [0, 255]


@pytest.mark.parametrize("background", [GROUND, (255, 0, 10)])
def test_transparency_is_laid_over_the_ground_in_every_form(tmp_path, background) -> None:
    alpha = np.array([[0, 255], [128, 64]], np.uint8)
    gray = np.array([[200, 200], [200, 10]], np.uint8)
    expected = np.round(
        (alpha[..., None] * gray[..., None].astype(float) + (255.0 - alpha[..., None]) * np.array(background)) / 255
    )
    rgba = np.dstack([gray, gray, gray, alpha])
    forms = {
        "RGBA": Image.fromarray(rgba), "LA": Image.fromarray(np.dstack([gray, alpha])), "array": rgba, "two channels": np.dstack([gray, alpha]),
        "floats": rgba / 255, "levels, alpha in [0, 1]": np.dstack([gray.astype(float)] * 3 + [alpha / 255]),
        "png": through_a_file(Image.fromarray(rgba), "x.png", tmp_path),
        "tiff": through_a_file(Image.fromarray(rgba), "x.tif", tmp_path),
        "webp": through_a_file(Image.fromarray(rgba), "x.webp", tmp_path, lossless=True, exact=True),
        "gray png": through_a_file(Image.fromarray(np.dstack([gray, alpha])), "la.png", tmp_path),
    }  # fmt: skip
    for name, picture in forms.items():
        np.testing.assert_allclose(as_array(picture, background=background), expected, atol=0.51, err_msg=name)
    for mode in ("RGBa", "La"):
        premultiplied = Image.fromarray(rgba).convert("LA" if mode == "La" else "RGBA").convert(mode)
        np.testing.assert_allclose(as_array(premultiplied, background=background), expected, atol=3, err_msg=mode)
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    tensor = torch.from_numpy(rgba).permute(2, 0, 1)
    np.testing.assert_allclose(as_array(tensor, background=background), expected, atol=0.51)


def test_transparent_colours_of_files_without_an_alpha_channel(tmp_path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    with_alpha = Image.new("P", (2, 1))
    with_alpha.putpalette([255, 0, 0, 255, 0, 0, 255, 0], "RGBA")
    with_alpha.putpixel((1, 0), 1)
    deep = Image.fromarray(np.array([[500, 65535]], np.uint16))
    deep.info["transparency"] = 500  # as Pillow keeps what a file says
    files = [
        (through_a_file(palette, "p.png", tmp_path, transparency=1), [[255, 0, 0], [*GROUND]]),
        (through_a_file(palette, "p.gif", tmp_path, transparency=1), [[255, 0, 0], [*GROUND]]),
        (with_alpha, [[255, 0, 0], [*GROUND]]),
        (deep, [[*GROUND], [255] * 3]),
        (through_a_file(Image.fromarray(np.array([[50, 9]], np.uint8)), "l.png", tmp_path, transparency=50), [[*GROUND], [9] * 3]),
    ]  # fmt: skip
    for picture, expected in files:
        assert as_array(picture)[0].tolist() == expected, picture


def test_palette_one_bit_cmyk(tmp_path) -> None:
    few = Image.fromarray(COLOURS // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    np.testing.assert_array_equal(as_array(through_a_file(few, "p.png", tmp_path)), np.asarray(few.convert("RGB")))
    bits = COLOURS[..., 0] > 127
    for picture in (bits, Image.fromarray(bits), through_a_file(Image.fromarray(bits), "bits.png", tmp_path)):
        np.testing.assert_array_equal(as_array(picture)[..., 0], 255 * bits)
    cmyk = through_a_file(Image.fromarray(COLOURS).convert("CMYK"), "cmyk.tif", tmp_path)
    np.testing.assert_array_equal(as_array(cmyk), COLOURS)


def test_orientation_wherever_the_picture_comes_from(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.ascontiguousarray(np.rot90(COLOURS, 1))
    for name in ("x.png", "x.tif", "x.webp"):
        file = through_a_file(
            Image.fromarray(turned), name, tmp_path, exif=exif, **({"lossless": True} if "webp" in name else {})
        )
        for picture in (
            file,
            str(file),
            file.read_bytes(),
            io.BytesIO(file.read_bytes()),
            Image.open(file),
            Image.open(file).convert("RGB"),
            {"bytes": file.read_bytes(), "path": None},
            {"path": str(file)},
        ):
            np.testing.assert_array_equal(as_array(picture), COLOURS)
        assert as_image(file).getexif().get(0x0112) is None


def test_a_picture_that_was_turned_already_is_not_turned_again(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = through_a_file(Image.fromarray(np.ascontiguousarray(np.rot90(COLOURS, 1))), "x.png", tmp_path, exif=exif)
    np.testing.assert_array_equal(as_array(open_image(file)), COLOURS)
    np.testing.assert_array_equal(as_array(as_image(as_image(file))), COLOURS)


def test_the_first_frame_of_a_file_with_several(tmp_path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for name in ("x.gif", "x.png", "x.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert as_array(tmp_path / name)[0, 0].tolist() == [255, 0, 0]


def test_tensors_of_every_layout_and_kind() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    first = torch.from_numpy(COLOURS.copy()).permute(2, 0, 1)
    for tensor in (first, first / 255, (first / 255).double(), first.float(), first.permute(1, 2, 0), first.to("cpu")):
        np.testing.assert_array_equal(as_array(tensor), COLOURS)
    gray = torch.from_numpy(COLOURS[..., 0].copy())
    np.testing.assert_array_equal(as_array(gray), as_array(gray[None]))
    assert (as_array(torch.ones(3, 4, 4, dtype=torch.bfloat16)) == 255).all()


@pytest.mark.parametrize(("picture", "words"), [
    (np.zeros((3, 8, 9)), r"channels come first: \.transpose\(1, 2, 0\)"), (np.zeros((1, 8, 9)), "channels come first"),
    (np.zeros((2, 8, 8, 3)), "a batch: give its pictures one by one"), (np.zeros((8, 8, 5)), r"shape \(8, 8, 5\)"),
    (np.zeros((0, 8, 3)), r"shape \(0, 8, 3\)"), (np.zeros(3), r"shape \(3,\)"), (np.zeros((4, 4, 3), np.int64), "int64"),
    (np.zeros((4, 4, 3), complex), "complex"), (np.full((4, 4), None), "picture"), (None, "NoneType"), (3.5, "float"),
    ({"mask": 1}, "'bytes' or 'path', got mask"), (b"", "readable picture"), (b"no picture", "readable picture"),
])  # fmt: skip
def test_what_is_no_picture_is_refused_in_one_sentence(picture, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        as_array(picture)
    assert "\n" not in str(caught.value) and "picture" in str(caught.value)


def test_a_damaged_file_in_a_pil_picture_is_named(tmp_path) -> None:
    file = through_a_file(Image.effect_noise((64, 64), 90), "whole.png", tmp_path)
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:2000])
    for read in (lambda: as_array(Image.open(tmp_path / "cut.png")), lambda: as_array(tmp_path / "cut.png")):
        with pytest.raises(ValueError, match=r"cut\.png must be a readable picture"):
            read()


def test_a_picture_is_not_changed_by_being_looked_at() -> None:
    picture = Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]]))
    before, array = picture.tobytes(), COLOURS.copy()
    as_array(picture), as_image(array)
    assert picture.tobytes() == before and picture.mode == "RGBA"
    np.testing.assert_array_equal(array, COLOURS)


def test_opening_in_threads_leaves_the_filters_of_warnings_alone(tmp_path) -> None:
    """Switching warnings off for a moment is the whole process's affair: threads that did it left them off."""
    file = through_a_file(Image.fromarray(COLOURS.repeat(8, 0).repeat(8, 1)), "x.png", tmp_path)
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [open_image(file) for _ in range(30)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
