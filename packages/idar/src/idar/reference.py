"""Slow twins: materialised attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
