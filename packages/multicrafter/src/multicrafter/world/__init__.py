"""A procedural world in which truth is known exactly: subjects, scenes, references, captions."""

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
]
