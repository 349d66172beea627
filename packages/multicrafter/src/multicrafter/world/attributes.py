"""Identities of the tiny world: vectors of independent categorical attributes, split by identity.

A *family* (people, objects) is a table of attributes. An identity is one row of category indices, ``(a,)`` int64 with
``a`` the number of attributes. Every identity belongs to exactly one split, decided by a hash of its canonical row, so that
an identity of the test split is never trained on, whatever the seed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Split = Literal["train", "validation", "test"]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "yellow": (0.97, 0.87, 0.15),
    "green": (0.16, 0.62, 0.22),
    "blue": (0.16, 0.30, 0.88),
    "purple": (0.60, 0.18, 0.68),
    "cyan": (0.20, 0.82, 0.86),
    "white": (0.97, 0.97, 0.97),
    "black": (0.10, 0.10, 0.12),
}
SKINS: dict[str, tuple[float, float, float]] = {
    "pale": (0.99, 0.86, 0.76),
    "golden": (0.88, 0.64, 0.38),
    "brown": (0.60, 0.38, 0.24),
    "dark": (0.34, 0.21, 0.15),
}


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One categorical attribute; ``needs`` names the attribute whose category 0 makes this one invisible."""

    name: str
    categories: tuple[str, ...]
    needs: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of subjects: its name in captions (singular, plural) and its attributes."""

    name: str
    singular: str
    plural: str
    attributes: tuple[Attribute, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Attribute names in column order."""
        return tuple(a.name for a in self.attributes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of categories per attribute."""
        return tuple(len(a.categories) for a in self.attributes)

    def column(self, name: str) -> int:
        """Column of the attribute ``name``."""
        return self.names.index(name)

    @property
    def num_identities(self) -> int:
        """Number of distinct identities: an invisible attribute does not count.

        >>> PEOPLE.num_identities
        614400
        """
        total = 1
        for a in self.attributes:
            if a.needs is None:
                dependents = [len(d.categories) for d in self.attributes if d.needs == a.name]
                visible = 1
                for n in dependents:
                    visible *= n
                total *= (1 + (len(a.categories) - 1) * visible) if dependents else len(a.categories)
        return total

    def visible(self, identities: Int[Tensor, "n a"]) -> Bool[Tensor, "n a"]:
        """Which attributes can be seen: a hat's colour only where there is a hat."""
        seen = torch.ones_like(identities, dtype=torch.bool)
        for column, a in enumerate(self.attributes):
            if a.needs is not None:
                seen[:, column] = identities[:, self.column(a.needs)] > 0
        return seen

    def canonical(self, identities: Int[Tensor, "n a"]) -> Int[Tensor, "n a"]:
        """Identities with every invisible attribute set to category 0."""
        return torch.where(self.visible(identities), identities, torch.zeros_like(identities))

    def split_of(self, identities: Int[Tensor, "n a"]) -> Int[Tensor, " n"]:
        """Split of each identity: 0 train (80 %), 1 validation (10 %), 2 test (10 %); a fixed integer hash of the canonical row."""
        value = torch.zeros(len(identities), dtype=torch.int64)
        for column, size in enumerate(self.sizes):
            value = value * size + self.canonical(identities)[:, column]
        mixed = (value * 2654435761 + 12345) % 4294967296
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 4294967296
        bucket = (mixed ^ (mixed >> 13)) % 10
        return torch.where(bucket < 8, 0, bucket - 7)

    def sample(
        self,
        count: int,
        split: Split,
        generator: torch.Generator,
        *,
        like: Int[Tensor, "n a"] | None = None,
        shared: int | Tensor = 0,
    ) -> Int[Tensor, "n a"]:
        """Draws ``count`` identities of ``split`` uniformly; with ``like`` each keeps ``shared`` random attributes of that row.

        A row that has no identity of the split so close keeps one attribute less, and so on: look-alikes of a small split are rare.

        Args:
            count: Number of rows.
            split: "train", "validation" or "test".
            generator: Source of randomness.
            like: Rows ``(count, a)`` to look similar to (never equal to).
            shared: How many of its attributes are kept, in [0, a - 1]; one number, or one per row (n,).

        Raises:
            ValueError: ``split`` is unknown or ``shared`` is out of range.
        """
        order = ("train", "validation", "test")
        if split not in order:
            raise ValueError(f"split must be one of {order}, got {split!r}")
        kept = torch.as_tensor(shared).expand(count)
        if not bool(((kept >= 0) & (kept < len(self.sizes))).all()):
            raise ValueError(f"shared must be in [0, {len(self.sizes) - 1}], got {shared}")
        rows = torch.empty(count, len(self.sizes), dtype=torch.int64)
        todo = torch.ones(count, dtype=torch.bool)
        for attempt in itertools.count(1):
            if not bool(todo.any()):
                break
            if attempt % 256 == 0:
                kept = torch.where(todo, (kept - 1).clamp_min(0), kept)
            draw = torch.stack([torch.randint(s, (count,), generator=generator) for s in self.sizes], 1)
            if like is not None:
                keep = torch.rand(count, len(self.sizes), generator=generator).argsort(1) < kept[:, None]
                draw = torch.where(keep, like, draw)
            draw = self.canonical(draw)
            good = self.split_of(draw) == order.index(split)
            if like is not None:
                good &= (draw != self.canonical(like)).any(1)
            rows = torch.where((todo & good)[:, None], draw, rows)
            todo &= ~good
        return rows

    def describe(self, identity: Int[Tensor, " a"]) -> dict[str, str]:
        """Category names of one identity."""
        row = identity.tolist()
        return {a.name: a.categories[i] for a, i in zip(self.attributes, row, strict=True)}


_colours = tuple(COLOURS)
PEOPLE = Family(
    name="people",
    singular="person",
    plural="people",
    attributes=(
        Attribute(name="skin", categories=tuple(SKINS)),
        Attribute(name="hair_colour", categories=_colours),
        Attribute(name="hair_style", categories=("short", "long", "afro", "pigtails")),
        Attribute(name="shirt", categories=_colours),
        Attribute(name="trousers", categories=_colours),
        Attribute(name="hat", categories=("none", "cap", "top hat", "cone")),
        Attribute(name="hat_colour", categories=_colours, needs="hat"),
        Attribute(name="glasses", categories=("none", "sunglasses", "goggles")),
    ),
)
OBJECTS = Family(
    name="objects",
    singular="object",
    plural="objects",
    attributes=(
        Attribute(name="shape", categories=("mug", "bottle", "box", "ball")),
        Attribute(name="colour", categories=_colours),
        Attribute(name="pattern", categories=("plain", "stripes", "band", "patch")),
        Attribute(name="pattern_colour", categories=_colours, needs="pattern"),
        Attribute(name="handle", categories=("none", "one", "two")),
        Attribute(name="lid", categories=("none", "flat", "round")),
        Attribute(name="lid_colour", categories=_colours, needs="lid"),
        Attribute(name="stand", categories=_colours),
    ),
)
FAMILIES = {family.name: family for family in (PEOPLE, OBJECTS)}
