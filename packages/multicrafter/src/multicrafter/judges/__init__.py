"""Judges of the tiny world: a reader of truth for evaluation, and learned judges for rewards."""

from pathlib import Path


def shipped() -> Path:
    """Folder of the judges' weights that ship with the package."""
    return Path(__file__).parent.parent / "weights" / "judges"
