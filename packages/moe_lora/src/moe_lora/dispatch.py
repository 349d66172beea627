"""The sum over experts ``sum_k w_k B_{i_k} A_{i_k} h``, three ways that agree in value and gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lora.config import Dispatch


def _dense(h: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Every expert for every token: one wide LoRA whose middle is gated."""
    e, r, d = lora_a.shape
    gate = torch.zeros(len(h), e, dtype=h.dtype, device=h.device).scatter_add(1, index, weights.to(h.dtype))
    middle = (h @ lora_a.reshape(e * r, d).T).view(-1, e, r) * gate[:, :, None]
    return middle.flatten(1) @ lora_b.transpose(1, 2).reshape(e * r, -1)


def _loop(h: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Expert by expert over the tokens that chose it."""
    out = torch.zeros(len(h), lora_b.shape[1], dtype=h.dtype, device=h.device)
    for i, (a, b) in enumerate(zip(lora_a.unbind(0), lora_b.unbind(0), strict=True)):
        rows, slot = torch.where(index == i)
        part = (h[rows] @ a.T) * weights[rows, slot, None].to(h.dtype)
        out = out.index_add(0, rows, part @ b.T)
    return out


def _grouped_mm_fits(*tensors: Tensor) -> bool:
    """`torch.nn.functional.grouped_mm` wants strides in multiples of 16 bytes."""
    return all(t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)


def _grouped(h: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Sort tokens by expert, two grouped matmuls, weigh, put back."""
    k = index.shape[1]
    flat = index.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=len(lora_a)).cumsum(0).to(torch.int32)
    rows = order if k == 1 else order // k
    weight = weights.flatten()[order, None].to(h.dtype)
    middle = torch.nn.functional.grouped_mm(h[rows], lora_a.transpose(1, 2), offs=ends)
    sorted_out = torch.nn.functional.grouped_mm(middle * weight, lora_b.transpose(1, 2), offs=ends)
    if k == 1:
        return torch.empty_like(sorted_out).index_copy(0, rows, sorted_out)
    return torch.zeros(len(h), sorted_out.shape[1], dtype=h.dtype, device=h.device).index_add(0, rows, sorted_out)


def experts(
    h: Float[Tensor, "n d"],
    lora_a: Float[Tensor, "e r d"],
    lora_b: Float[Tensor, "e o r"],
    gate_weights: Float[Tensor, "n k"],
    expert_index: Int[Tensor, "n k"],
    dispatch: Dispatch = "grouped",
) -> Float[Tensor, "n o"]:
    """``sum_k gate_weights[:, k] * B_{index[:, k]} A_{index[:, k]} h`` (slow twin: `moe_lora.reference.experts`).

    "grouped" quietly becomes "loop" where `grouped_mm` cannot take the widths. No token is dropped, an empty expert is fine.
    """
    if dispatch == "dense":
        return _dense(h, lora_a, lora_b, gate_weights, expert_index)
    if (
        dispatch == "grouped"
        and len(h)
        and _grouped_mm_fits(h, lora_a, lora_b)
        and hasattr(torch.nn.functional, "grouped_mm")
    ):
        return _grouped(h, lora_a, lora_b, gate_weights, expert_index)
    return _loop(h, lora_a, lora_b, gate_weights, expert_index)
