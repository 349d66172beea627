"""The sum over experts ``sum_k w_k B_{i_k} A_{i_k} h``, three ways that agree in value and gradient."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lora.config import Dispatch
from moe_lora.grouped import grouped_experts
from moe_lora.inputs import check_index, check_one_of, check_tensors


def _dense(h: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Every expert for every token: one wide LoRA whose middle is gated."""
    e, r, d = lora_a.shape
    weights = weights.masked_fill(index < 0, 0.0).to(h.dtype)
    gate = torch.zeros(len(h), e, dtype=h.dtype, device=h.device).scatter_add(1, index.clamp_min(0), weights)
    middle = (h @ lora_a.reshape(e * r, d).T).view(-1, e, r) * gate[:, :, None]
    return middle.flatten(1) @ lora_b.transpose(1, 2).reshape(e * r, -1)


def _loop(h: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Expert by expert over the tokens that chose it (unbound once: indexing a stacked parameter per expert costs e^2 in backward)."""
    out = torch.zeros(len(h), lora_b.shape[1], dtype=h.dtype, device=h.device)
    for i, (a, b) in enumerate(zip(lora_a.unbind(0), lora_b.unbind(0), strict=True)):
        rows, slot = torch.where(index == i)
        part = (h[rows] @ a.T) * weights[rows, slot, None].to(h.dtype)
        out = out.index_add(0, rows, part @ b.T)
    return out


def experts(
    h: Float[Tensor, "n d"],
    lora_a: Float[Tensor, "e r d"],
    lora_b: Float[Tensor, "e o r"],
    gate_weights: Float[Tensor, "n k"],
    expert_index: Int[Tensor, "n k"],
    dispatch: Dispatch = "grouped",
) -> Float[Tensor, "n o"]:
    """``out = sum_k gate_weights[:, k] * B_{index[:, k]} A_{index[:, k]} h`` (MultiCrafter, arXiv 2509.21953, section 3.3, without the scale).

    The slow twin is `moe_lora.reference.experts`. No token is dropped, an expert without tokens is fine, index -1 is no expert.

    Args:
        h: Tokens; h, lora_a and lora_b have one type.
        lora_a: Down projections A.
        lora_b: Up projections B.
        gate_weights: Weight of each chosen expert, usually fp32.
        expert_index: Chosen experts in [-1, e); a token names each expert at most once.
        dispatch: "grouped" (sorted by expert, no gradient copies; the fastest), "loop" or "dense" (plain autograd, twice differentiable).

    >>> h, a, b = torch.ones(1, 2), torch.ones(3, 1, 2), torch.arange(3.0).view(3, 1, 1)
    >>> experts(h, a, b, torch.tensor([[0.5, 0.5]]), torch.tensor([[1, 2]]))
    tensor([[3.]])

    Raises:
        ValueError: Something is of another kind or size, or an expert is not there (looked for on the CPU; an accelerator is not waited for).
    """
    sizes: dict[str, int] = {}
    check_tensors("floating", sizes, h=(h, "n d"), lora_a=(lora_a, "e r d"), lora_b=(lora_b, "e o r"))
    check_tensors("floating", sizes, gate_weights=(gate_weights, "n k"))
    check_tensors("whole", sizes, expert_index=(expert_index, "n k"))
    check_index("expert_index", expert_index, lora_a.shape[0])
    check_one_of("dispatch", dispatch, get_args(Dispatch))
    if dispatch == "dense":
        return _dense(h, lora_a, lora_b, gate_weights, expert_index)
    if dispatch == "loop":
        return _loop(h, lora_a, lora_b, gate_weights, expert_index)
    return grouped_experts(h, lora_a, lora_b, gate_weights, expert_index)
