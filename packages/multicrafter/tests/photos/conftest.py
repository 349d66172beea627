"""Drawn people as photos: their number and identities are known."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from multicrafter.photos import BuildConfig, FilterConfig, ReferenceConfig, WriteConfig, build
from PIL import Image

PEOPLE, PHOTOS = 10, 24


def config(**changes) -> BuildConfig:
    """A build of drawn photos."""
    settings = {
        "faces": "tiny",
        "people": "same",
        "filter": FilterConfig(min_side=32, min_face_pixels=4, duplicate_distance=2),
        "references": ReferenceConfig(scale=1.1),
        "write": WriteConfig(test_fraction=0.7),  # puts the smaller circle into the test split
    }
    return BuildConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def make_config():
    return config


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> tuple[Path, list[tuple[int, ...]]]:
    """Photos 000.png ... of two people each, and which of ten people are on them; no pair is drawn twice."""
    from multicrafter.world import PEOPLE as FAMILY
    from multicrafter.world import WorldConfig, make_scenes

    folder = tmp_path_factory.mktemp("drawn")
    generator = torch.Generator().manual_seed(4)
    people = FAMILY.sample(PEOPLE, "train", generator)
    # 0 to 5 know each other, 6 to 9 too, and the two circles share no photo
    circles = [[(a, b) for a in c for b in c if a < b] for c in (range(6), range(6, 10))]
    pairs = [*circles[0][:14], *circles[1][:6]]
    pairs = (pairs * 2)[:PHOTOS]
    identities = people[torch.tensor(pairs)]
    scenes = make_scenes(len(pairs), WorldConfig(numbers=(2,)), generator, identities=identities)
    for index, picture in enumerate(scenes.images):
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return folder, [tuple(p) for p in pairs]


@pytest.fixture(scope="session")
def built(drawn, tmp_path_factory):
    """A dataset of the drawn photos, and what the build said; do not change it."""
    out = tmp_path_factory.mktemp("built") / "set"
    summary = build(drawn[0], out, config(), progress=False)
    return out, summary


@pytest.fixture
def few(drawn, tmp_path):
    """Six photos of the first circle, to be spoiled."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        shutil.copy(drawn[0] / f"{i:03d}.png", folder)
    return folder


@pytest.fixture
def photo():
    """A photo-like picture: smooth areas, edges, texture."""

    def make(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 255, (7, 9, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noise = random.normal(0, 4, (height, width, 3))
        pixels = np.asarray(coarse, np.float64) + noise
        pixels[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 255, 3)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return make
