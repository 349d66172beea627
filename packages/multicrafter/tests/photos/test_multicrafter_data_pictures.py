"""Fingerprints, duplicates, mask files, quality: closed forms against slow twins and hand-made cases."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multicrafter.photos import reference
from multicrafter.photos.pictures import (
    content_hash,
    near_duplicates,
    open_photo,
    pack_masks,
    perceptual_hash,
    unpack_masks,
)
from multicrafter.photos.quality import sharpness
from PIL import Image, ImageFilter

SEED = st.integers(0, 2**32 - 1)


def bits(a: int, b: int) -> int:
    return bin(a ^ b).count("1")


def test_hash_survives_what_copies_suffer_and_tells_photos_apart(photo):
    original = photo(640, 480)
    jpeg = io.BytesIO()
    original.save(jpeg, "JPEG", quality=40)
    copies = [
        original.resize((200, 150)),
        Image.open(jpeg),
        original.point(lambda v: min(255, int(1.15 * v))),
        original.filter(ImageFilter.BoxBlur(2)),
    ]
    assert max(bits(perceptual_hash(original), perceptual_hash(c)) for c in copies) <= 4
    others = [perceptual_hash(photo(640, 480, seed)) for seed in range(1, 20)]
    assert min(bits(perceptual_hash(original), h) for h in others) >= 12


def test_half_of_the_bits_are_set_whatever_the_photo(photo):
    """Bits say "above the median": thresholds that favour a side would make strangers look alike."""
    counts = [int(perceptual_hash(photo(200, 150, seed)) & ~(1 << 63)).bit_count() for seed in range(8)]
    assert set(counts) == {31}  # of 63, one of which is the median itself


def test_hash_does_not_depend_on_brightness_but_on_place():
    picture = Image.new("L", (64, 64), 40)
    picture.paste(200, (0, 0, 32, 32))
    brighter = picture.point(lambda v: v + 30)
    turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert perceptual_hash(picture.convert("RGB")) == perceptual_hash(brighter.convert("RGB"))
    assert bits(perceptual_hash(picture.convert("RGB")), perceptual_hash(turned.convert("RGB"))) > 8


@settings(deadline=None, max_examples=60)
@given(SEED, st.integers(0, 8), st.integers(1, 60))
def test_near_duplicates_equals_its_slow_twin(seed, distance, count):
    random = np.random.default_rng(seed)
    base = random.integers(0, 2**63, max(1, count // 3), dtype=np.uint64)
    hashes = base[random.integers(0, len(base), count)]
    for flip in range(6):  # each hash differs from its base in up to six bits
        hashes = hashes ^ np.where(
            random.random(count) < 0.7, np.uint64(1) << random.integers(0, 64, count).astype(np.uint64), np.uint64(0)
        )
        assert flip < 6
    assert near_duplicates(hashes, distance).tolist() == reference.near_duplicates(hashes, distance).tolist()


def test_duplicates_point_to_a_photo_that_is_kept():
    hashes = np.array([0, 0b111, 0b111000111, 0xFFFF << 40], np.uint64)  # a chain: 0 - 3 bits - 1 - 6 bits - 2
    owner = near_duplicates(hashes, 3)
    assert owner.tolist() == [0, 0, 2, 3]  # 2 is near 1, but 1 is gone
    assert near_duplicates(hashes, -1).tolist() == [0, 1, 2, 3]


@settings(deadline=None, max_examples=30)
@given(SEED, st.integers(1, 8), st.integers(1, 20), st.integers(1, 20))
def test_masks_make_the_round_trip(seed, count, height, width):
    masks = np.random.default_rng(seed).random((count, height, width)) < 0.5
    planes = np.asarray(Image.open(io.BytesIO(pack_masks(list(masks)))))
    assert planes.shape == (height, width)
    assert (unpack_masks(planes, count) == masks).all()


@pytest.mark.parametrize("count", [0, 9])
def test_a_mask_file_holds_one_to_eight(count):
    with pytest.raises(ValueError, match="1 to 8"):
        pack_masks([np.ones((2, 2), bool)] * count)


def test_sharpness_falls_with_blur_and_hardly_changes_with_size(photo):
    picture = photo(1024, 768)
    values = [sharpness(picture.filter(ImageFilter.GaussianBlur(r))) for r in (0, 1, 3, 8)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 3 * values[2]
    assert sharpness(Image.new("RGB", (300, 300), (90, 90, 90))) == 0
    big = photo(2048, 1536)
    assert sharpness(big) == pytest.approx(sharpness(big.resize((1024, 768), Image.Resampling.BOX)), rel=0.1)
    assert sharpness(Image.new("RGB", (2, 2))) == 0


def test_photos_are_opened_upright(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo(320, 240).save(tmp_path / "a.jpg", exif=exif)
    assert open_photo(tmp_path / "a.jpg").size == (240, 320)


def test_heic_is_read(tmp_path, photo):
    heif = pytest.importorskip("pillow_heif", reason="needs multicrafter[heif]")
    heif.from_pillow(photo(320, 240)).save(tmp_path / "a.HEIC", quality=90)
    opened = open_photo(tmp_path / "a.HEIC")
    assert opened.size == (320, 240)
    assert bits(perceptual_hash(opened), perceptual_hash(photo(320, 240))) <= 2


def test_heic_without_its_extra_names_the_pip_line(tmp_path, monkeypatch):
    import sys

    from multicrafter.photos import pictures

    pictures._register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImportError, match=r'pip install "multicrafter\[heic\]"'):
        open_photo(tmp_path / "a.heic")


def test_content_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"x")
    (tmp_path / "c").write_bytes(b"y")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b") != content_hash(tmp_path / "c")
    assert len(content_hash(tmp_path / "a")) == 32
