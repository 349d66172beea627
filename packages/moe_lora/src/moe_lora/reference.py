"""Slow twins."""

from __future__ import annotations

import torch
from torch import Tensor


def experts(h: Tensor, lora_a: Tensor, lora_b: Tensor, gate_weights: Tensor, expert_index: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in range(len(h)):
        total = torch.zeros(lora_b.shape[1], dtype=h.dtype)
        for slot in range(expert_index.shape[1]):
            i = int(expert_index[token, slot])
            total = total + gate_weights[token, slot] * (lora_b[i] @ (lora_a[i] @ h[token]))
        rows.append(total)
    return torch.stack(rows)
