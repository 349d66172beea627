"""Aggregates maps over blocks while a model runs, keeping one running mean and, on request, the single blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from idar.attention import Direction, Span, check_spans


@dataclass(frozen=True, kw_only=True)
class SubjectLayout:
    """Where things are in the joint sequence of attention.

    Attributes:
        num_text: Text tokens at the front of the sequence.
        image_span: (start, stop) of the image tokens in the joint sequence.
        subject_spans: (start, stop) of every reference in the joint sequence.
    """

    num_text: int
    image_span: Span
    subject_spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        check_spans(
            max(stop for _, stop in [self.image_span, *self.subject_spans]), self.subject_spans, self.image_span
        )
        if self.num_text < 0 or self.image_span[0] < self.num_text:
            raise ValueError(f"num_text must be in [0, {self.image_span[0]}], got {self.num_text}")

    @classmethod
    def in_order(cls, num_text: int, num_image: int, num_references: Sequence[int]) -> SubjectLayout:
        """The layout ``[text | image | reference_1 | ...]``.

        >>> SubjectLayout.in_order(4, 8, [2, 2]).subject_spans
        ((12, 14), (14, 16))
        """
        spans, start = [], num_text + num_image
        for count in num_references:
            spans.append((start, start + count))
            start += count
        return cls(num_text=num_text, image_span=(num_text, num_text + num_image), subject_spans=tuple(spans))


@dataclass
class CapturedMaps:
    """Maps of the last forward pass.

    A block that runs again in the same pass (gradient checkpointing recomputes it in the backward) is not counted twice.
    """

    direction: Direction
    keep_blocks: bool = False
    total: Tensor | None = None
    blocks: dict[str, Tensor] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Forgets the pass before."""
        self.total = None
        self.blocks, self.seen = {}, set()

    def add(self, name: str, maps: Float[Tensor, "b s n"]) -> None:
        """Adds the maps of block ``name``."""
        if name in self.seen:
            return
        self.seen.add(name)
        self.total = maps if self.total is None else self.total + maps
        if self.keep_blocks:
            self.blocks[name] = maps

    @property
    def maps(self) -> Float[Tensor, "b s n"]:
        """Mean over the blocks of the last pass.

        Raises:
            ValueError: No block has run yet.
        """
        if self.total is None:
            raise ValueError("maps are there after a forward pass inside the context, got none so far")
        return self.total / len(self.seen)


def stack_blocks(captured: CapturedMaps) -> Float[Tensor, "k b s n"]:
    """Maps of the single blocks, in the order in which they ran (needs ``keep_blocks``)."""
    if not captured.blocks:
        raise ValueError("captured holds no single blocks: capture with keep_blocks=True")
    return torch.stack(list(captured.blocks.values()))
