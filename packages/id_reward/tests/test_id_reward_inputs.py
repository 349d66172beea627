"""Pictures and embeddings that are broken, odd or hostile."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward import CompositeReward, Faces, IdentityScorer
from id_reward.identity import largest, reference_key
from id_reward.images import as_array, is_animation, open_image
from PIL import Image


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(20_000, 20_000), (100_000, 100_000), (2_000_000_000, 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, size) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(ValueError, match=r"bomb\.png must (have at most 100,000,000 pixels|be a readable picture)"):
        open_image(path)


def test_one_pixel_and_thin_pictures(tmp_path) -> None:
    for size in ((1, 1), (1, 3000), (3000, 1)):
        Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "x.png")
        assert open_image(tmp_path / "x.png").size == size


def test_every_exif_orientation_is_undone(tmp_path) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255
    turns = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(turn(upright))).save(tmp_path / "x.png", exif=exif)
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.png")), upright)
        np.testing.assert_array_equal(as_array(Image.open(tmp_path / "x.png")), upright)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
)
def test_every_mode_becomes_rgb(mode) -> None:
    picture = (
        Image.new(mode, (5, 4))
        if mode in ("PA",)
        else Image.new("RGB", (5, 4), (200, 100, 50)).convert("L" if mode in ("I;16", "LAB") else "RGB")
    )
    picture = (
        picture if picture.mode == mode else (picture.convert(mode) if mode != "LAB" else Image.new("LAB", (5, 4)))
    )
    array = as_array(picture)
    assert array.shape == (4, 5, 3) and array.dtype == np.uint8


def test_alpha_is_laid_over_gray_and_animations_show_their_first_frame(tmp_path) -> None:
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (as_array(clear) == 128).all() and (as_array(Image.fromarray(clear)) == 128).all()
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    for name in ("x.gif", "x.png", "x.webp"):
        red.save(
            tmp_path / name,
            save_all=True,
            append_images=[blue],
            **({"lossless": True} if name.endswith("webp") else {}),
        )
        with pytest.warns(UserWarning, match=f"{name} holds several pictures: the first is taken"):
            assert tuple(as_array(tmp_path / name)[0, 0]) == (255, 0, 0)
        assert is_animation((tmp_path / name).read_bytes())
    for form in ("PNG", "GIF"):
        red.save(buffer := io.BytesIO(), form)
        assert not is_animation(buffer.getvalue())
    red.save(
        buffer := io.BytesIO(), "MPO", save_all=True, append_images=[blue]
    )  # a phone's photo, with a smaller view beside it
    assert not is_animation(buffer.getvalue()) and not is_animation(b"nothing")


def test_sixteen_bit_is_scaled(tmp_path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    found = as_array(tmp_path / "deep.png")[..., 0].astype(int)
    assert np.abs(found - np.arange(256).reshape(16, 16)).max() <= 1


def test_arrays_and_tensors() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for same in (
        array,
        array / 255,
        (array / 255).astype(np.float32),
        tensor,
        tensor / 255,
        (tensor / 255).requires_grad_(),
        tensor.bfloat16() / 255,
    ):
        tolerance = 1 if getattr(same, "dtype", None) == torch.bfloat16 else 0
        assert np.abs(as_array(same).astype(int) - array).max() <= tolerance
    assert as_array(array[..., 0]).shape == (4, 5, 3)
    for wrong in (
        np.zeros(3),
        np.zeros((2, 2, 5)),
        np.zeros((0, 4, 3)),
        np.zeros((2, 2, 3), np.int64),
        np.full((2, 2, 3), np.nan),
        "nothing",
    ):
        with pytest.raises(ValueError, match="picture"):
            as_array(wrong)


def samples() -> list[bytes]:
    """Small good files in many formats."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    files = []
    for form, options in [
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {"save_all": True, "append_images": [noise.rotate(90)]}),
        ("WEBP", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("ICO", {}), ("TGA", {}),
    ]:  # fmt: skip
        buffer = io.BytesIO()
        noise.save(buffer, form, **options)
        files.append(buffer.getvalue())
    return files


def test_a_thousand_fuzzed_files_give_a_picture_or_a_sentence(tmp_path) -> None:
    """Truncated, bits flipped, blocks overwritten, repeated or swapped: no crash, no hang, no other exception, no memory beyond reason."""
    rng, good, outcomes = np.random.default_rng(0), samples(), {"picture": 0, "sentence": 0}
    path = tmp_path / "x.bin"
    for number in range(1000):
        data = bytearray(good[number % len(good)])
        kind = rng.integers(5)
        if kind == 0:
            data = data[: rng.integers(0, len(data))]
        elif kind == 1:
            for at in rng.integers(0, len(data), rng.integers(1, 12)):
                data[at] ^= 1 << rng.integers(8)
        elif kind == 2:
            at, size = rng.integers(0, len(data)), rng.integers(1, 32)
            data[at : at + size] = rng.bytes(size)
        elif kind == 3:
            at, size = rng.integers(0, len(data)), rng.integers(1, 64)
            data[at:at] = data[at : at + size] * int(rng.integers(1, 4))
        else:  # the header of one format on the body of another
            data[: rng.integers(4, 40)] = good[rng.integers(len(good))][: rng.integers(4, 40)]
        path.write_bytes(bytes(data))
        try:
            picture = open_image(path)
            assert picture.mode == "RGB" and picture.width * picture.height <= 100_000_000
            outcomes["picture"] += 1
        except ValueError as error:
            outcomes["sentence"] += str(path) in str(error)
    assert sum(outcomes.values()) == 1000
    assert min(outcomes.values()) > 100  # both happen, so both are tested


class Known:
    """Pictures are arrays (f, d) of embeddings; boxes grow with the row."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
        self.seen.append(len(images))
        return [
            Faces(
                np.stack([np.zeros(len(i)), np.zeros(len(i)), 1.0 + np.arange(len(i)), np.ones(len(i))], 1),
                np.ones(len(i)),
                np.asarray(i, float),
            )
            for i in images
        ]


def test_nan_embeddings_make_the_reward_nan_and_nothing_else() -> None:
    people = np.eye(4)
    broken = people[:2].copy()
    broken[1, 1] = np.nan
    scorer = IdentityScorer(Known())
    rewards = scorer([people[:2], broken, people[:2]], [""] * 3, [[people[:1], people[1:2]]] * 3)
    assert rewards[[0, 2]].tolist() == [1, 1] and np.isnan(rewards[1])
    assert np.isnan(scorer([people[:1]], [""], [[broken[1:]]])).all()
    total = CompositeReward({"id": (scorer, 1.0)}, nan_policy="zero")([broken], [""], [[people[:1]]]).totals
    assert total.tolist() == [0]


def test_references_with_no_face_or_several() -> None:
    people = np.eye(4)
    with pytest.warns(UserWarning, match="reference 1 must show one face, got 2"):
        row = IdentityScorer(Known()).embed_references([people[:2]])
    np.testing.assert_array_equal(row, people[1:2])  # the largest box
    with pytest.raises(ValueError, match="reference 2 must show one face, got 3"):
        IdentityScorer(Known(), several_faces="error").embed_references([people[:1], people[:3]])
    with pytest.raises(ValueError, match="reference 1 must show a face"):
        IdentityScorer(Known(), no_face="error").embed_references([np.zeros((0, 4))])
    rows = IdentityScorer(Known()).embed_references([np.zeros((0, 0)), people[:1]])
    assert np.isnan(rows[0]).all() and rows.shape == (2, 4)
    assert np.isnan(largest(Faces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 0))))).all()
    for wrong in ({"several_faces": "smallest"}, {"no_face": "x"}, {"convention": "x"}, {"cache_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            IdentityScorer(Known(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="references"):
        IdentityScorer(Known())([people], [""], [])


def test_equal_content_is_embedded_once_and_changed_content_again(tmp_path) -> None:
    people, backend = np.eye(4), Known()
    scorer = IdentityScorer(backend, cache_size=2)
    scorer.embed_references([people[:1], people[:1].copy()])
    scorer.embed_references([people[:1].copy()])
    assert backend.seen == [1]
    changing = people[1:2].copy()
    np.testing.assert_array_equal(scorer.embed_references([changing]), people[1:2])
    changing[:] = people[2]
    np.testing.assert_array_equal(scorer.embed_references([changing]), people[2:3])
    scorer.embed_references([people[:1]])  # has been unused for longest, so it went
    assert backend.seen == [1, 1, 1, 1] and len(scorer._cache) == 2
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    assert reference_key(picture) == reference_key(picture.copy()) != reference_key(picture.rotate(90, expand=True))
    picture.save(tmp_path / "a.png")
    before = reference_key(tmp_path / "a.png")
    assert before == reference_key(str(tmp_path / "a.png"))
    picture.resize((9, 9)).save(tmp_path / "a.png")
    assert reference_key(tmp_path / "a.png") != before
