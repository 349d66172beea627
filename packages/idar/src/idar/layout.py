"""Where text, image and references are in the joint sequence of attention."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from idar.attention import Span, check_spans
from idar.masks import is_whole, one_line

Text = tuple[Literal["first", "last"], int]
"""Where the text is in the joint sequence of a pass, and how many tokens it has."""


@dataclass(frozen=True, kw_only=True)
class SubjectLayout:
    """Where things are in the joint sequence of attention.

    Attributes:
        num_text: Text tokens.
        image_span: (start, stop) of the image tokens in the joint sequence.
        subject_spans: (start, stop) of every reference in the joint sequence.
        length: Tokens of the whole sequence, where that is known: passes of another length are refused then. None where tokens
            may follow that belong to no subject.
        causal: Whether text and references attend only to what precedes them and to themselves, the image to everything, in several calls,
            each with the last queries of its keys (Qwen-Image 2.1). The image is last then, and text may stand between the references.
    """

    num_text: int
    image_span: Span
    subject_spans: tuple[Span, ...]
    length: int | None = field(default=None, compare=False)
    causal: bool = False

    def __post_init__(self) -> None:
        try:
            places = [self.num_text, *self.image_span, *(end for span in self.subject_spans for end in span)]
        except TypeError as error:
            given = f"{one_line(self.image_span)} and {one_line(self.subject_spans)}"
            raise ValueError(f"image_span must be (start, stop), and subject_spans such pairs, got {given}") from error
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be True or False, got {self.causal!r}")
        if self.length is not None:
            places.append(self.length)
        if wrong := [n for n in places if not is_whole(n)]:
            raise ValueError(f"a layout must be of whole numbers of tokens, got {wrong[0]!r}")
        check_spans(self.stop, self.subject_spans, self.image_span)
        if self.num_text < 0:
            raise ValueError(f"num_text must not be negative, got {self.num_text}")
        if self.length is not None and self.length < self.stop:
            raise ValueError(f"length must be at least {self.stop}, where the last span stops, got {self.length}")
        if self.causal and self.image_span[1] != self.stop:
            raise ValueError(
                f"image_span must be the last of a causal layout, got {self.image_span} before {self.stop}"
            )

    @property
    def stop(self) -> int:
        """The first position after the image and all references."""
        return max(stop for _, stop in [self.image_span, *self.subject_spans])

    @property
    def num_image(self) -> int:
        """Image tokens."""
        return self.image_span[1] - self.image_span[0]

    def image_queries(self, num_queries: int, num_keys: int) -> Span:
        """Where the image is among the queries of a causal layout's call, which are the last of its keys.

        Raises:
            ValueError: It is not among them.
        """
        missing = num_keys - num_queries
        start, stop = self.image_span[0] - missing, self.image_span[1] - missing
        if not 0 <= start < stop <= num_queries:
            raise ValueError(
                f"attention must hold the queries of the image at {self.image_span}, got the last {num_queries} of {num_keys}"
            )
        return start, stop

    @classmethod
    def in_order(
        cls, num_text: int, num_image: int, num_references: Sequence[int], *, text: Literal["first", "last"] = "first"
    ) -> SubjectLayout:
        """The layout ``[text | image | reference_1 | ...]`` of FLUX and Qwen-Image, or with the text last as in SD3.

        >>> SubjectLayout.in_order(4, 8, [2, 2]).subject_spans
        ((12, 14), (14, 16))
        """
        if text not in ("first", "last"):
            raise ValueError(f"text must be 'first' or 'last', got {text!r}")
        counts = [num_text, num_image, *(num_references if isinstance(num_references, Sequence) else [num_references])]
        if not isinstance(num_references, Sequence) or not all(isinstance(n, numbers.Integral) for n in counts):
            raise ValueError(
                f"num_text and num_image must be whole numbers and num_references a list of them, got {counts}"
            )
        begin = num_text if text == "first" else 0
        spans, start = [], begin + num_image
        for count in num_references:
            spans.append((start, start + count))
            start += count
        length = num_text + num_image + sum(num_references)
        return cls(num_text=num_text, image_span=(begin, begin + num_image), subject_spans=tuple(spans), length=length)


def check_sequence(layouts: Sequence[SubjectLayout], num_keys: int, text: Text | None) -> None:
    """Raises ValueError unless layouts are those of a sequence of so many keys, with its text where it is known to be."""
    for one in layouts:
        begin, stop = 0, num_keys
        if text is not None:
            begin, stop = (text[1], num_keys) if text[0] == "first" else (0, num_keys - text[1])
        low = min(start for start, _ in (one.image_span, *one.subject_spans))
        misplaced = text is not None and (one.num_text != text[1] or low < begin or one.stop > stop)
        if misplaced or one.length not in (None, num_keys):
            place = "" if text is None else f", {text[1]} of text ({text[0]}) and the rest at {begin} to {stop}"
            raise ValueError(
                f"layout must be that of the {num_keys} tokens of the attention{place}, got one of {one.length or one.stop} tokens, "
                f"{one.num_text} of text and the rest at {low} to {one.stop}"
            )
