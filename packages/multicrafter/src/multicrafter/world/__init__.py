"""A procedural world in which truth is known exactly: subjects, scenes, references, captions."""

from pathlib import Path

from multicrafter.world.attributes import FAMILIES, OBJECTS, PEOPLE, Attribute, Family, Split
from multicrafter.world.scenes import (
    ARRANGEMENTS,
    NUMBERS,
    SETTINGS,
    TIMES,
    Scenes,
    WorldConfig,
    caption,
    make_references,
    make_scenes,
)

__all__ = [
    "ARRANGEMENTS",
    "FAMILIES",
    "NUMBERS",
    "OBJECTS",
    "PEOPLE",
    "SETTINGS",
    "TIMES",
    "Attribute",
    "Family",
    "Scenes",
    "Split",
    "WorldConfig",
    "caption",
    "make_references",
    "make_scenes",
    "shipped_adapter",
]


def shipped_adapter(stage: int = 1) -> Path:
    """Folder of a trained adapter of the tiny FLUX that ships with the package.

    Raises:
        ValueError: There is none of this stage.
    """
    folder = Path(__file__).parent / "weights" / "adapters" / f"stage{stage}"
    if not (folder / "adapter.json").is_file():
        raise ValueError(f"stage must be one whose adapter ships, got {stage}")
    return folder
