"""Watches the attention of chosen modules while a model runs, and aggregates subject maps over them.

Modules are met at their entry (`idar.intercept`): outputs stay bit-equal, no rotary embedding has to be known, and the backward keeps
no tensor that attention does not keep anyway. What `separate_subjects` forbids is forbidden in the maps too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idar.attention import Direction, check_direction, draw_queries, streaming_maps
from idar.intercept import Call, Visitor, additive, by_name, meet
from idar.layout import SubjectLayout, Text, check_sequence


class _Block:
    """What is remembered of one watched module in the present pass."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.done = self.differentiable = False
        self.maps: Tensor | None = None


@dataclass
class CapturedMaps:
    """Maps of the last forward pass.

    Only a running sum is kept, unless ``keep_blocks``. A block that runs again in the same pass (gradient checkpointing recomputes
    it in the backward) is not counted twice.
    """

    direction: Direction
    layout: SubjectLayout
    keep_blocks: bool = False
    num_samples: int | None = None
    generator: torch.Generator | None = None
    chunk_size: int | None = None
    _blocks: list[_Block] = field(default_factory=list, repr=False)
    _rows: list[Tensor] = field(default_factory=list, repr=False)
    _total: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)
    _nowhere: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)
    _aside: Tensor | None = field(default=None, repr=False)
    _text: Text | None = field(default=None, repr=False)

    def start(self, layout: SubjectLayout | None = None) -> None:
        """Forgets the pass before (called by the model's forward; call it yourself where you run blocks one by one)."""
        self.layout = layout or self.layout
        self._rows = draw_queries(self.layout.subject_spans, self.direction, self.num_samples, self.generator)
        self._total, self._aside = torch.zeros(()), None
        for block in self._blocks:
            block.done, block.maps = False, None

    def _add(self, block: _Block, call: Call) -> None:
        maps = _maps_of_call(call, self)
        again = block.done
        if again and maps.requires_grad and not block.differentiable:
            raise ValueError(
                "gradient checkpointing must be non-reentrant (use_reentrant=False): maps lost their gradient"
            )
        # Run again, a compiled block must keep the same tensors as before: the sum is formed, and goes nowhere.
        total = (self._nowhere if again else self._total).to(maps.device) + maps
        if again:
            self._aside = total
            return
        block.done, block.differentiable, self._total = True, maps.requires_grad, total
        if self.keep_blocks:
            block.maps = maps

    @property
    def maps(self) -> Float[Tensor, "b s n"]:
        """Mean over the blocks of the last pass; not finite where queries or keys were not (`idar_loss` and the metrics refuse it).

        Raises:
            ValueError: No block has run yet.
        """
        count = sum(block.done for block in self._blocks)
        if not count:
            raise ValueError("maps are there after a forward pass inside the context, got none so far")
        return self._total / count

    @property
    def blocks(self) -> dict[str, Float[Tensor, "b s n"]]:
        """Maps of the single blocks by name, in the order of the model (needs ``keep_blocks``)."""
        return {block.name: block.maps for block in self._blocks if block.maps is not None}


def stack_blocks(captured: CapturedMaps) -> Float[Tensor, "k b s n"]:
    """Maps of the single blocks, in the order of the model (needs ``keep_blocks``)."""
    if not captured.blocks:
        raise ValueError("captured holds no single blocks: capture with keep_blocks=True")
    return torch.stack(list(captured.blocks.values()))


def _maps_of_call(call: Call, captured: CapturedMaps) -> Tensor:
    """Maps from the arguments of an attention call."""
    layout = captured.layout
    query, key = call["query"], call["key"]
    image, missing = layout.image_span, key.shape[2] - query.shape[2]
    if layout.causal:  # Qwen-Image 2.1: references never attend to the image, whose call has no queries but its own
        if captured.direction == "reference_to_image":
            raise ValueError(
                f"direction must be 'image_to_reference' for a causal layout, whose references attend to no image, got "
                f"{captured.direction!r}"
            )
        image = layout.image_queries(query.shape[2], key.shape[2])
    elif (
        missing
    ):  # FLUX.2-klein-KV: references attend to themselves only, or come from a cache; their queries are elsewhere
        lengths = [stop - start for start, stop in layout.subject_spans]
        if captured.direction == "reference_to_image" or missing != sum(lengths):
            raise ValueError(
                f"attention must hold a query for every key for direction {captured.direction!r}, got {query.shape[2]} queries "
                f"and {key.shape[2]} keys; with queries of all but the references, only 'image_to_reference' exists"
            )
        before = sum(stop - start for start, stop in layout.subject_spans if stop <= image[0])
        image = (image[0] - before, image[1] - before)
    key_mask, bias = _split_mask(call.get("attn_mask"), query, key)
    return streaming_maps(
        query,
        key,
        captured._rows,
        layout.subject_spans,
        image,
        layout.image_span,
        captured.direction,
        captured.chunk_size,
        call.get("scale"),
        key_mask,
        bias,
    )


def _split_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mask of an attention call as (b, n) over keys, where it hides keys from all queries alike, else as a bias (b, h, q, k)."""
    if mask is None:
        return None, None
    if mask.dim() != 4:
        raise ValueError(f"the attention mask must be (b, h or 1, q or 1, n), got {tuple(mask.shape)}")
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(key.shape[0], -1), None
    bias = additive(mask, query)
    assert bias is not None
    return None, bias.detach().expand(-1, -1, query.shape[2], -1)


@contextmanager
def capture_attention(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layout: SubjectLayout | Callable[[dict[str, Any]], SubjectLayout],
    *,
    direction: Direction = "image_to_reference",
    keep_blocks: bool = False,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    check: Callable[[SubjectLayout, dict[str, Any]], Text | None] = lambda _, __: None,
) -> Iterator[CapturedMaps]:
    """Collects subject maps of ``modules`` during the forward passes of ``model``; any torch model will do.

    The model is restored on exit, also after an exception. Where gradient checkpointing is on, call ``backward`` inside the context:
    the blocks run again there.

    Args:
        model: What a pass is a pass of.
        modules: Modules of it, by name, whose forward calls ``torch.nn.functional.scaled_dot_product_attention``.
        layout: Where text, image and references are in the joint sequence, or a function of the arguments (by name) of the model's forward.
        direction: See `idar.subject_attention`. By default "image_to_reference": what carries features into the picture, and what is worth
            supervising (docs/adr/0020).
        keep_blocks: Keep the maps of the single blocks too (``captured.blocks``).
        num_samples: See `idar.subject_attention`; one subset is drawn per pass.
        generator: Source of the subset.
        chunk_size: See `idar.subject_attention`.
        check: Raises ValueError where a layout does not fit the arguments (by name) of the model's forward, and says whether the text
            comes first or last and how long it is, where it knows.

    Yields:
        `CapturedMaps`; ``captured.maps`` is the mean over the modules in the last forward pass.

    Raises:
        ValueError: A number is out of range; in the pass, the layout is not that of the sequence.
    """
    check_direction(direction)
    fixed = layout if isinstance(layout, SubjectLayout) else SubjectLayout.in_order(0, 1, [1])
    captured = CapturedMaps(direction, fixed, keep_blocks, num_samples, generator, chunk_size)
    blocks = {name: _Block(name) for name in modules}
    captured._blocks = list(blocks.values())
    captured.start()

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = by_name(model, args, kwargs)
        found = layout if isinstance(layout, SubjectLayout) else layout(given)
        captured._text = check(found, given)
        captured.start(found)

    def visitor_of(name: str) -> Visitor:
        block = blocks[name]  # a cell of its own: torch.compile must not see the name, or it compiles every block anew
        return Visitor(
            num_keys=lambda: captured.layout.stop,
            check=lambda keys: check_sequence((captured.layout,), keys, captured._text),
            watch=lambda call: captured._add(block, call),
        )

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with meet(modules, visitor_of):
            yield captured
    finally:
        hook.remove()
