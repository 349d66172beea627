"""Capture of subject attention on diffusers' MM-DiTs.

The model's own attention processors stay in charge, so its outputs are bit-equal: a thin wrapper runs the original one and reads
the normalised queries and keys that pass through ``norm_q``/``norm_k`` (and ``norm_added_q``/``norm_added_k``). RoPE is applied again,
to the rows that are needed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from idar.attention import Direction, subject_attention
from idar.capture import CapturedMaps, SubjectLayout


class _Wrapper:
    """An attention processor that runs another one and captures maps beside it."""

    def __init__(self, name: str, inner: Any, layout: SubjectLayout, captured: CapturedMaps) -> None:
        self.name, self.inner, self.layout, self.captured = name, inner, layout, captured

    def __getattr__(self, item: str) -> Any:
        return getattr(self.inner, item)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        kept: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _m, _i, out, key=key: kept.__setitem__(key, out))
            for key in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
            if isinstance(module := getattr(attn, key, None), nn.Module)
        ]
        try:
            output = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        query = _joint(kept.get("norm_added_q"), kept["norm_q"])
        key = _joint(kept.get("norm_added_k"), kept["norm_k"])
        self.captured.add(self.name, _maps(query, key, image_rotary_emb, self.layout, self.captured.direction))
        return output


def _joint(text: Tensor | None, image: Tensor) -> Tensor:
    return image if text is None else torch.cat([text, image], dim=1)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of x (b, n, h, d) after RoPE, as (b, h, rows, d)."""
    from diffusers.models.embeddings import apply_rotary_emb

    rows = x[:, start:stop]
    if rotary is not None:
        rows = apply_rotary_emb(rows, (rotary[0][start:stop], rotary[1][start:stop]), sequence_dim=1)
    return rows.transpose(1, 2)


def _maps(
    query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor] | None, layout: SubjectLayout, direction: Direction
) -> Tensor:
    """Maps from the rows that matter: image and references, or everything where the softmax needs all keys."""
    length = query.shape[1]
    last = max(stop for _, stop in [layout.image_span, *layout.subject_spans])
    if last > length:
        raise ValueError(f"layout must fit the joint sequence of {length} tokens, got a span that ends at {last}")
    start = 0 if direction == "image_to_reference" else layout.image_span[0]
    stop = length if direction == "image_to_reference" else last
    q, k = _rotate(query, rotary, start, stop), _rotate(key, rotary, start, stop)
    spans = [(a - start, b - start) for a, b in layout.subject_spans]
    image = (layout.image_span[0] - start, layout.image_span[1] - start)
    return subject_attention(q, k, spans, image, direction=direction)


def attention_blocks(
    transformer: nn.Module, blocks: Callable[[str], bool] | Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Attention modules by name: of the double-stream blocks by default, else of the named or accepted ones.

    Raises:
        ValueError: The transformer has no such blocks.
    """
    found = {
        name: module
        for name, module in transformer.named_modules()
        if hasattr(module, "set_processor") and hasattr(module, "norm_q") and name.rsplit(".", 1)[-1] == "attn"
    }
    if blocks is None:
        chosen = {n: m for n, m in found.items() if getattr(m, "added_kv_proj_dim", None) is not None}
    elif callable(blocks):
        chosen = {n: m for n, m in found.items() if blocks(n)}
    else:
        missing = [n for n in blocks if n not in found]
        if missing:
            raise ValueError(f"blocks must name attention modules of the transformer {sorted(found)}, got {missing}")
        chosen = {n: found[n] for n in blocks}
    if not chosen:
        raise ValueError(
            f"transformer must have double-stream blocks with an `attn`, got {type(transformer).__name__} without any chosen"
        )
    return chosen


@contextmanager
def capture_subject_attention(
    transformer: nn.Module,
    layout: SubjectLayout,
    *,
    direction: Direction = "reference_to_image",
    blocks: Callable[[str], bool] | Sequence[str] | None = None,
    keep_blocks: bool = False,
) -> Iterator[CapturedMaps]:
    """Collects subject maps of the double-stream blocks of a transformer during its forward passes.

    Outputs stay bit-equal; gradients of the maps flow, once, also under gradient checkpointing. The model is restored on exit, also
    after an exception.

    Args:
        transformer: A FluxTransformer2DModel, or another MM-DiT with the same attention modules.
        layout: Where text, image and references are in the joint sequence.
        direction: See `idar.subject_attention`.
        blocks: Names of attention modules, or a predicate on them; the double-stream blocks by default.
        keep_blocks: Keep the maps of the single blocks too (``captured.blocks``).

    Yields:
        `CapturedMaps`; ``captured.maps`` is the mean over the blocks of the last forward pass.
    """
    chosen = attention_blocks(transformer, blocks)
    captured = CapturedMaps(direction=direction, keep_blocks=keep_blocks)
    before = {name: module.processor for name, module in chosen.items()}
    hook = transformer.register_forward_pre_hook(lambda *_: captured.start())
    try:
        for name, module in chosen.items():
            module.processor = _Wrapper(name, before[name], layout, captured)  # type: ignore[assignment]
        yield captured
    finally:
        hook.remove()
        for name, module in chosen.items():
            module.processor = before[name]
