"""The number format in which the drawn world's own networks are trained."""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16; else it is emulated, and a product or a convolution takes 10 to 80 times as long."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_autocast() -> torch.autocast:
    """bfloat16 on processors that compute in it, float32 on others.

    >>> with fast_autocast():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16())
