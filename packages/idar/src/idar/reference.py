"""Slow twins: materialised attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from idar.layout import SubjectLayout


def subject_attention(
    query: Tensor,
    key: Tensor,
    subject_spans: Sequence[tuple[int, int]],
    image_span: tuple[int, int],
    *,
    direction: str = "reference_to_image",
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition, with every matrix held (see `idar.subject_attention`)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(dtype), key.to(dtype)
    image, scale = slice(*image_span), q.shape[-1] ** -0.5
    hidden = torch.zeros(()) if key_mask is None else torch.zeros(key_mask.shape).masked_fill(~key_mask, -torch.inf)
    hidden = hidden.to(q).expand(len(q), k.shape[2])[:, None, None] + (0 if bias is None else bias.to(q))
    hidden = hidden.expand(len(q), -1, q.shape[2], -1)
    if direction == "reference_to_image":
        maps = [
            torch.softmax(q[:, :, a:b] @ k[:, :, image].transpose(-1, -2) * scale + hidden[:, :, a:b, image], -1).mean(
                (1, 2)
            )
            for a, b in subject_spans
        ]
    else:
        full = torch.softmax(q[:, :, image] @ k.transpose(-1, -2) * scale + hidden[:, :, image], -1)
        maps = [full[..., a:b].sum(-1).mean(1) for a, b in subject_spans]
    return torch.stack(maps, 1)


def separation_bias(
    layout: SubjectLayout,
    masks: Tensor,
    *,
    strength: float = 1.0,
    background: str = "none",
    arrows: Sequence[str] = ("image_to_reference", "reference_to_image", "reference_to_reference"),
    num_tokens: int | None = None,
) -> Tensor:
    """The definition, one arrow of one row at a time (see `idar.separation_bias`)."""
    length = layout.stop if num_tokens is None else num_tokens
    bias = torch.zeros(len(masks), 1, length, length)
    for b, query, key in itertools.product(range(len(masks)), range(length), range(length)):
        kind_q, i = _role(layout, query)
        kind_k, k = _role(layout, key)
        allowed = 1.0
        if f"{kind_q}_to_{kind_k}" in arrows:
            if kind_q == kind_k == "reference":
                allowed = float(i == k)
            elif kind_q == kind_k == "image":
                a, c = masks[b, :, i].tolist(), masks[b, :, k].tolist()
                allowed = max(1 - min(max(a), max(c)), *(min(x, y) for x, y in zip(a, c, strict=True)))
            elif "text" in (kind_q, kind_k):
                allowed = 0.0
            else:
                subject, token = (k, i) if kind_k == "reference" else (i, k)
                column = masks[b, :, token].tolist()
                allowed = column[subject] + (1 - max(column) if background == "all" else 0)
        weight = 1 - strength * (1 - min(allowed, 1.0))
        bias[b, 0, query, key] = math.log(weight) if weight > 0 else -math.inf
    return bias


def _role(layout: SubjectLayout, position: int) -> tuple[str, int]:
    """What a token is, and which one: the subject of a reference, the place in the picture."""
    for subject, (start, stop) in enumerate(layout.subject_spans):
        if start <= position < stop:
            return "reference", subject
    start, stop = layout.image_span
    return ("image", position - start) if start <= position < stop else ("text", position)
