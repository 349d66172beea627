"""Separated attention by FlexAttention, which skips blocks of forbidden arrows and never holds the n x n matrix of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from idar.intercept import Call


def can_take(call: Call) -> bool:
    """Whether FlexAttention can take the call: as many queries as keys, no mask of the model's own, no dropout."""
    return (
        call["query"].shape[2] == call["key"].shape[2]
        and call.get("attn_mask") is None
        and not call.get("is_causal")
        and not call.get("dropout_p")
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weight: Callable[..., Tensor],
    hard: bool,
    per_head: bool,
    rows: int,
    length: int,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """``softmax(log w + scale Q K^T) V`` with blocks of ``w = 0`` left out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(
        lambda b, h, q, k: weight(b, h, q, k) > 0,
        B=rows, H=query.shape[1] if per_head else None, Q_LEN=length, KV_LEN=length, device=str(query.device),
    )  # fmt: skip
    score_mod = None if hard else (lambda score, b, h, q, k: score + weight(b, h, q, k).log().to(score.dtype))
    plain: Any = flex_attention
    attend = _compiled() if query.is_cuda else plain
    result: Tensor = attend(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale)
    return result
