"""Judges of the tiny world: a reader of truth for evaluation, and learned judges for rewards."""

import json
from pathlib import Path
from typing import Any


def shipped() -> Path:
    """Folder of the judges' weights that ship with the package."""
    return Path(__file__).parent.parent / "weights" / "judges"


def accuracy(folder: Path | None = None) -> dict[str, Any]:
    """How accurate the judges are on unseen identities, as their recipes measured (`multicrafter.world.judges.train`)."""
    folder = folder or shipped()
    files = {"reader": "reader.json", "people": "people.json", "clip": "clip/training.json"}
    return {name: json.loads((folder / path).read_text())["measured"] for name, path in files.items()}
