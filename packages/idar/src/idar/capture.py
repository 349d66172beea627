"""Watches the attention of chosen modules while a model runs, and aggregates subject maps over them.

Nothing in the model is replaced but the entry of each watched module: inside it, the call of
``torch.nn.functional.scaled_dot_product_attention`` is seen on its way, with the very queries and keys (normalised, rotated) that the
model uses. So outputs stay bit-equal, no rotary embedding has to be known, and the backward keeps no tensor that attention does
not keep anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from idar.attention import Direction, Span, check_direction, check_spans, draw_queries, streaming_maps

_ATTENTION = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class SubjectLayout:
    """Where things are in the joint sequence of attention.

    Attributes:
        num_text: Text tokens.
        image_span: (start, stop) of the image tokens in the joint sequence.
        subject_spans: (start, stop) of every reference in the joint sequence.
    """

    num_text: int
    image_span: Span
    subject_spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        check_spans(self.stop, self.subject_spans, self.image_span)
        if self.num_text < 0:
            raise ValueError(f"num_text must not be negative, got {self.num_text}")

    @property
    def stop(self) -> int:
        """The first position after the image and all references."""
        return max(stop for _, stop in [self.image_span, *self.subject_spans])

    @property
    def num_image(self) -> int:
        """Image tokens."""
        return self.image_span[1] - self.image_span[0]

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
        begin = num_text if text == "first" else 0
        spans, start = [], begin + num_image
        for count in num_references:
            spans.append((start, start + count))
            start += count
        return cls(num_text=num_text, image_span=(begin, begin + num_image), subject_spans=tuple(spans))


class _Watch(TorchFunctionMode):
    """Remembers the first attention call that holds every key of the layout."""

    def __init__(self, num_keys: int) -> None:
        super().__init__()
        self.num_keys = num_keys
        self.seen: dict[str, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION and not self.seen:
            call = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            if call["key"].shape[2] >= self.num_keys:
                self.seen = call
        return func(*args, **kwargs)


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

    def start(self, layout: SubjectLayout | None = None) -> None:
        """Forgets the pass before (called by the model's forward; call it yourself where you run blocks one by one)."""
        self.layout = layout or self.layout
        self._rows = draw_queries(self.layout.subject_spans, self.direction, self.num_samples, self.generator)
        self._total, self._aside = torch.zeros(()), None
        for block in self._blocks:
            block.done, block.maps = False, None

    def _add(self, block: _Block, call: dict[str, Any]) -> None:
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


def _maps_of_call(call: dict[str, Any], captured: CapturedMaps) -> Tensor:
    """Maps from the arguments of an attention call."""
    layout = captured.layout
    query, key = call["query"], call["key"]
    image, missing = layout.image_span, key.shape[2] - query.shape[2]
    if (
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
        _key_mask(call.get("attn_mask"), key),
    )


def _key_mask(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """The (b, n) form of a mask that hides keys from all queries alike."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(f"the attention mask must be boolean (b, 1, 1, n), got {mask.dtype} {tuple(mask.shape)}")
    return mask[:, 0, 0].expand(key.shape[0], -1)


def _watched(forward: Callable[..., Any], block: _Block, captured: CapturedMaps) -> Callable[..., Any]:
    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        watch = _Watch(captured.layout.stop)
        with watch:
            output = forward(*args, **kwargs)
        if not watch.seen:
            raise ValueError(
                f"{block.name} must call torch's scaled_dot_product_attention (diffusers' 'native' attention backend) on a sequence "
                f"that holds the layout's {captured.layout.stop} tokens, got no such call"
            )
        captured._add(block, watch.seen)
        return output

    return watched_forward


@contextmanager
def capture_attention(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layout: SubjectLayout | Callable[[dict[str, Any]], SubjectLayout],
    *,
    direction: Direction = "reference_to_image",
    keep_blocks: bool = False,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Iterator[CapturedMaps]:
    """Collects subject maps of ``modules`` during the forward passes of ``model``; any torch model will do.

    The model is restored on exit, also after an exception. Where gradient checkpointing is on, call ``backward`` inside the context:
    the blocks run again there.

    Args:
        model: What a pass is a pass of.
        modules: Modules of it, by name, whose forward calls ``torch.nn.functional.scaled_dot_product_attention``.
        layout: Where text, image and references are in the joint sequence, or a function of the keyword arguments of the model's forward.
        direction: See `idar.subject_attention`.
        keep_blocks: Keep the maps of the single blocks too (``captured.blocks``).
        num_samples: See `idar.subject_attention`; one subset is drawn per pass.
        generator: Source of the subset.
        chunk_size: See `idar.subject_attention`.

    Yields:
        `CapturedMaps`; ``captured.maps`` is the mean over the modules in the last forward pass.
    """
    check_direction(direction)
    fixed = layout if isinstance(layout, SubjectLayout) else SubjectLayout.in_order(0, 1, [1])
    captured = CapturedMaps(direction, fixed, keep_blocks, num_samples, generator, chunk_size)
    captured._blocks = [_Block(name) for name in modules]
    captured.start()

    def begin(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.start(None if isinstance(layout, SubjectLayout) else layout(kwargs))

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for block, module in zip(captured._blocks, modules.values(), strict=True):
            module.forward = _watched(module.forward, block, captured)
        yield captured
    finally:
        hook.remove()
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]
