"""What the tests across packages share."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # for check_fragments


def build(kind: str, out: Path) -> dict[str, Path]:
    """One archive of each package, by package name."""
    built = {}
    for package in sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml")):
        target = out / package.name
        command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
        subprocess.run(command, cwd=package, check=True, capture_output=True)
        (built[package.name],) = target.iterdir()
    return built


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """A freshly built wheel of each package."""
    return build("wheel", tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def sdists(tmp_path_factory) -> dict[str, Path]:
    """A freshly built source archive of each package."""
    return build("sdist", tmp_path_factory.mktemp("sdists"))
