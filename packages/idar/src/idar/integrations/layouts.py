"""Layouts of diffusers' MM-DiTs, read off what a pass is given, and the check that a layout is that of the pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from idar.intercept import inner
from idar.layout import SubjectLayout, Text

Layout = SubjectLayout | Callable[[dict[str, Any]], SubjectLayout]
TEXT: dict[str, Literal["first", "last"]] = {
    "FluxTransformer2DModel": "first",
    "Flux2Transformer2DModel": "first",
    "QwenImageTransformer2DModel": "first",
    "ChromaTransformer2DModel": "first",
    "SD3Transformer2DModel": "last",
}
"""Where the text is in the joint sequence of each known class."""


def flux_layout(kwargs: dict[str, Any]) -> SubjectLayout:
    """Layout of a pass of FLUX.1-Kontext or FLUX.2, read off the position ids: the first axis numbers the pictures.

    The picture that is being made has 0 there; each reference another number (FLUX.2: 10, 20, ...).

    Raises:
        ValueError: There are no references in the pass, or it is one of another model.
    """
    _require("flux_layout", kwargs, "img_ids", "txt_ids")
    return _layout_of_groups(_rows(kwargs["img_ids"])[:, 0], _rows(kwargs["txt_ids"]).shape[0])


def flux_kv_layout() -> Callable[[dict[str, Any]], SubjectLayout]:
    """A layout function for FLUX.2-klein-KV: that of `flux_layout`, kept while the references come out of the cache.

    Call it for each context: it remembers the last pass that held the references themselves.
    """
    last: list[SubjectLayout] = []

    def layout(kwargs: dict[str, Any]) -> SubjectLayout:
        if kwargs.get("kv_cache_mode") != "cached":
            last[:] = [flux_layout(kwargs)]
        elif not last:
            raise ValueError("flux_kv_layout must see the pass that fills the cache first, got one that reads it")
        return last[0]

    return layout


def qwen_layout(kwargs: dict[str, Any]) -> SubjectLayout:
    """Layout of a pass of Qwen-Image-Edit, read off ``img_shapes``: the picture that is being made, then the references.

    Raises:
        ValueError: There are no references in the pass, or it is one of another model.
    """
    _require("qwen_layout", kwargs, "img_shapes", "encoder_hidden_states")
    image, *references = _qwen_sizes(kwargs["img_shapes"])
    if not references:
        raise ValueError("img_shapes must hold at least one reference, got the picture alone")
    return SubjectLayout.in_order(kwargs["encoder_hidden_states"].shape[1], image, references)


def qwen21_layout(kwargs: dict[str, Any]) -> SubjectLayout:
    """Layout of a pass of Qwen-Image 2.1, read off ``img_shapes`` and ``img_mask``: references between the words, the picture last.

    Each True of the mask stands for four tokens of a picture.

    Raises:
        ValueError: There are no references in the pass, or it is one of another model.
    """
    _require("qwen21_layout", kwargs, "img_shapes", "img_mask")
    sizes, slots = _qwen_sizes(kwargs["img_shapes"]), kwargs["img_mask"][0].tolist()
    if len(sizes) < 2:
        raise ValueError("img_shapes must hold at least one reference, got the picture alone")
    spans, position, slot = [], 0, 0
    for size in sizes:
        while not slots[slot]:
            position, slot = position + 1, slot + 1
        spans.append((position, position + size))
        position, slot = position + size, slot + size // 4
    *references, image = spans
    return SubjectLayout(
        num_text=slots.count(False), image_span=image, subject_spans=tuple(references), length=position, causal=True
    )


def sd3_layout(transformer: nn.Module, reference_rows: Sequence[int]) -> Callable[[dict[str, Any]], SubjectLayout]:
    """A layout function for SD3, whose text comes last and which has no references of its own: they share one canvas with the picture.

    The canvas holds the picture above and the references below it, each as wide as the canvas.

    Args:
        transformer: The SD3Transformer2DModel; its patch size says how many rows of tokens a canvas has.
        reference_rows: Rows of tokens of each reference, from above to below.

    Raises:
        ValueError: There is no reference, or one without rows; in the pass, no row is left for the picture.
    """
    rows = [int(count) for count in reference_rows]
    if not rows or min(rows) < 1:
        raise ValueError(f"reference_rows must hold at least one number from 1 on, got {list(reference_rows)}")
    patch = int(inner(transformer).config.patch_size)  # type: ignore[union-attr, arg-type]

    def layout(kwargs: dict[str, Any]) -> SubjectLayout:
        _require("sd3_layout", kwargs, "hidden_states", "encoder_hidden_states")
        high, wide = (int(n) // patch for n in kwargs["hidden_states"].shape[-2:])
        if high <= sum(rows):
            raise ValueError(f"reference_rows must leave rows to the picture on a canvas of {high}, got {rows}")
        num_text = kwargs["encoder_hidden_states"].shape[1]
        image, references = (high - sum(rows)) * wide, [count * wide for count in rows]
        return SubjectLayout.in_order(num_text, image, references, text="last")

    return layout


def checker(
    transformer: nn.Module,
) -> Callable[[SubjectLayout | Sequence[SubjectLayout], dict[str, Any]], Text | None]:
    """Raises ValueError where a layout's pictures are not those of a pass, and says where the text of the pass is, for classes in `TEXT`.

    How long the sequence is says the attention call itself: other hooks may still add references to what the forward is given.
    """
    core = inner(transformer)
    if any(cls.__name__ == "QwenImage21Transformer2DModel" for cls in type(core).__mro__):
        return _check_between_words
    place = next((TEXT[cls.__name__] for cls in type(core).__mro__ if cls.__name__ in TEXT), None)
    known: set[tuple[SubjectLayout, ...]] = set()

    def check(layout: SubjectLayout | Sequence[SubjectLayout], kwargs: dict[str, Any]) -> Text | None:
        text = kwargs.get("encoder_hidden_states")
        if place is None or not isinstance(text, Tensor):
            return None
        layouts = (layout,) if isinstance(layout, SubjectLayout) else tuple(layout)
        if not torch.compiler.is_compiling() and layouts not in known:
            for one in layouts:
                _check_edges(core, one, text.shape[1], kwargs)
            known.add(layouts)
        return place, text.shape[1]

    return check


def _check_between_words(layout: SubjectLayout | Sequence[SubjectLayout], kwargs: dict[str, Any]) -> None:
    """Of Qwen-Image 2.1: spans must start and stop where pictures do; one span may hold several of them."""
    mask = kwargs.get("img_mask")
    if type(mask) is not Tensor or mask.device.type == "meta" or torch.compiler.is_compiling():
        return
    found = qwen21_layout(kwargs)
    starts, stops = ({edge for edge, _ in found.subject_spans}, {edge for _, edge in found.subject_spans})
    for one in (layout,) if isinstance(layout, SubjectLayout) else layout:
        own = one.subject_spans
        fits = one.causal and one.image_span == found.image_span and one.length in (None, found.length)
        if not fits or not {a for a, _ in own} <= starts or not {b for _, b in own} <= stops:
            raise ValueError(
                f"layout must be causal, with its references where QwenImage21Transformer2DModel is given them, at "
                f"{list(found.subject_spans)}, and the image at {found.image_span}, got {list(own)} and {one.image_span}"
            )


def _check_edges(core: nn.Module, layout: SubjectLayout, num_text: int, kwargs: dict[str, Any]) -> None:
    """Where the pass numbers its pictures (FLUX's position ids, Qwen's shapes), each span must be one of them."""
    ids, shapes = kwargs.get("img_ids"), kwargs.get("img_shapes")
    if shapes is not None:
        sizes = _qwen_sizes(shapes)
    elif type(ids) is Tensor and ids.device.type != "meta":  # not a fake one, which has no values
        sizes = torch.unique_consecutive(_rows(ids)[:, 0], return_counts=True)[1].tolist()
    else:
        return
    spans = sorted([layout.image_span, *layout.subject_spans])
    edges = [num_text, *itertools.accumulate(sizes, initial=num_text)][1:]
    want = list(itertools.pairwise(edges))
    if len(want) == len(spans) and want != spans and want[-1][1] == spans[-1][1]:
        raise ValueError(
            f"layout must have its pictures where {type(core).__name__} is given them, at {want}, got {spans}"
        )


def _require(function: str, kwargs: dict[str, Any], *names: str) -> None:
    missing = [name for name in names if kwargs.get(name) is None]
    if missing:
        raise ValueError(
            f"{function} must be given a pass with {' and '.join(names)}, got one without {' and '.join(missing)} "
            f"(is it the layout of another model?)"
        )


def _qwen_sizes(shapes: Sequence[Any]) -> list[int]:
    shapes = shapes[0] if isinstance(shapes[0], list) else shapes
    return [frames * rows * columns for frames, rows, columns in shapes]


def _rows(ids: Tensor) -> Tensor:
    return ids[0] if ids.dim() == 3 else ids


def _layout_of_groups(group: Tensor, num_text: int) -> SubjectLayout:
    """Consecutive equal numbers are one picture; 0 is the one being made."""
    values, counts = torch.unique_consecutive(group, return_counts=True)
    stops = (counts.cumsum(0) + num_text).tolist()
    spans = [(stop - count, stop) for stop, count in zip(stops, counts.tolist(), strict=True)]
    image = [span for span, value in zip(spans, values.tolist(), strict=True) if value == 0]
    if len(image) != 1 or len(spans) < 2:
        raise ValueError(
            f"img_ids must number one picture 0 and each reference otherwise on their first axis, got {values.tolist()}"
        )
    references = tuple(span for span in spans if span != image[0])
    return SubjectLayout(num_text=num_text, image_span=image[0], subject_spans=references, length=stops[-1])
