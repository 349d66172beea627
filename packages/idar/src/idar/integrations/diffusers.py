"""Capture and separation on diffusers' transformers: FLUX.1, Kontext, FLUX.2, Qwen-Image(-Edit, 2.1), SD3 and relatives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idar.attention import Direction
from idar.capture import CapturedMaps, capture_attention
from idar.integrations.layouts import (
    Layout,
    checker,
    flux_kv_layout,
    flux_layout,
    qwen21_layout,
    qwen_layout,
    sd3_layout,
)
from idar.intercept import inner
from idar.separate import Backend, Layouts, Router, Separation, Strength, separate_attention
from idar.separation import SUBJECT_ARROWS, Arrow, Background

__all__ = [
    "Layout",
    "attention_blocks",
    "capture_subject_attention",
    "flux_kv_layout",
    "flux_layout",
    "qwen21_layout",
    "qwen_layout",
    "sd3_layout",
    "separate_subjects",
]


def attention_blocks(
    transformer: nn.Module, blocks: Callable[[str], bool] | Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Attention modules by name: of the double-stream blocks by default (of Qwen-Image 2.1, all), else of the named or accepted ones.

    Raises:
        ValueError: The transformer has no such blocks.
    """
    found = {
        name: module
        for name, module in transformer.named_modules()
        if hasattr(module, "set_processor") and name.rsplit(".", 1)[-1] == "attn"
    }
    if blocks is None:
        double = {n: m for n, m in found.items() if getattr(m, "added_kv_proj_dim", None) is not None}
        chosen = double or {n: m for n, m in found.items() if re.search(r"(^|\.)transformer_blocks\.", n)}
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
    layout: Layout,
    *,
    direction: Direction = "image_to_reference",
    blocks: Callable[[str], bool] | Sequence[str] | None = None,
    keep_blocks: bool = False,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Iterator[CapturedMaps]:
    """Collects subject maps of the double-stream blocks of a transformer during its forward passes.

    Attention processors stay as they are and outputs bit-equal; gradients of the maps flow, once, also under gradient checkpointing
    (call ``backward`` inside the context then), autocast, torch.compile of the blocks and DDP. The model is restored on exit,
    also after an exception. Enter once around a whole training loop, or once per step: both are cheap.

    Args:
        transformer: A FluxTransformer2DModel, Flux2Transformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel or
            another MM-DiT with the same attention modules; it may be wrapped in DDP.
        layout: Where text, image and references are in the joint sequence; or a function that says so from the arguments of the
            transformer's forward (`flux_layout`, `flux_kv_layout()`, `qwen_layout`, `qwen21_layout`, `sd3_layout(...)`). One that is not
            that of the pass is refused.
        direction: See `idar.capture_attention`.
        blocks: Names of attention modules, or a predicate on them; the double-stream blocks by default.
        keep_blocks: Keep the maps of the single blocks too (``captured.blocks``).
        num_samples: Queries of each reference to estimate from, see `idar.subject_attention`; one subset is drawn per pass.
        generator: Source of the subset.
        chunk_size: See `idar.subject_attention`.

    Yields:
        `CapturedMaps`; ``captured.maps`` is the mean over the blocks of the last forward pass.

    Raises:
        ValueError: The transformer has no such blocks; in the pass, the layout is not that of the sequence.
    """
    with capture_attention(
        transformer,
        attention_blocks(transformer, blocks),
        layout,
        direction=direction,
        keep_blocks=keep_blocks,
        num_samples=num_samples,
        generator=generator,
        chunk_size=chunk_size,
        check=checker(transformer),
    ) as captured:
        yield captured


@contextmanager
def separate_subjects(
    transformer: nn.Module,
    layout: Layouts,
    masks: Float[Tensor, "b s m"] | Router | None,
    *,
    strength: Strength = 1.0,
    blocks: Callable[[str], bool] | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    background: Background = "none",
    arrows: Sequence[Arrow] = SUBJECT_ARROWS,
    backend: Backend = "auto",
) -> Iterator[Separation]:
    """Keeps the attention of different subjects apart in all blocks of a transformer, during its forward passes.

    Image tokens of subject i may not attend to reference k and the other way round, references not to each other, and tokens of
    nobody to no reference (`idar.separation_bias` has the formula). Where nothing is forbidden, outputs are bit-equal to those without.
    It works in training (gradients, gradient checkpointing, autocast, torch.compile of the blocks, DDP) and together with
    `capture_subject_attention`, whose maps are then those of the separated attention.

    Args:
        transformer: As in `capture_subject_attention`.
        layout: As there; or one `SubjectLayout` per row.
        masks: Where each subject is in the picture, (b, s, m) in [0, 1] at token resolution: `owner_masks` of true masks, `box_masks`
            of boxes that a detector found in a draft, soft masks. A batch that guidance doubles may have the rows of one half.
            Or a function of each block's own queries and keys (`idar.attention_owners`). None separates nothing until
            ``separation.masks`` is set.
        strength: 1 forbids, 0 changes nothing, between them arrows are weighed down; one number, one per row, or a function from the
            rows' noise levels (b,) in [0, 1] to strengths.
        blocks: Names of attention modules, or a predicate on them; all blocks by default, single-stream ones included.
        heads: Only these heads; all by default.
        background: Whether tokens of nobody look at no reference ("none") or at all of them ("all").
        arrows: Which arrows are separated, see `idar.ARROWS`.
        backend: "mask" adds a bias to torch's attention; "flex" uses FlexAttention, which skips what is forbidden; "auto" takes
            "flex" on a GPU.

    Yields:
        The `idar.Separation`; its masks and strength may be changed between passes.

    Raises:
        ValueError: The transformer has no such blocks, or masks and layout do not fit each other or, in the pass, the sequence.
    """
    levels = 1000.0 if type(inner(transformer)).__name__ == "SD3Transformer2DModel" else 1.0

    def sigma_of(kwargs: dict[str, Any]) -> Tensor | None:
        timestep = kwargs.get("timestep")
        return None if timestep is None else torch.as_tensor(timestep).float().reshape(-1) / levels

    with separate_attention(
        transformer,
        attention_blocks(transformer, (lambda _: True) if blocks is None else blocks),
        layout,
        masks,
        strength=strength,
        background=background,
        arrows=arrows,
        heads=heads,
        backend=backend,
        sigma_of=sigma_of,
        check=checker(transformer),
    ) as separation:
        yield separation
