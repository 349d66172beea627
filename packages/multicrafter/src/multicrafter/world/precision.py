"""The number format in which the drawn world's own networks are trained."""

from __future__ import annotations

import torch


def fast_autocast() -> torch.autocast:
    """bfloat16 on processors that compute in it; float32 on others, where it would be emulated (40 times slower with AVX2 alone).

    >>> with fast_autocast():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    computes = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=computes)
