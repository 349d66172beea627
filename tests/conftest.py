"""What the tests across packages share."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # for check_fragments


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """A freshly built wheel of each package, by package name."""
    out = tmp_path_factory.mktemp("wheels")
    built = {}
    for package in sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml")):
        target = out / package.name
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
        subprocess.run(command, cwd=package, check=True, capture_output=True)
        (built[package.name],) = target.glob("*.whl")
    return built
