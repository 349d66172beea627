"""Losses that keep a router healthy. They are returned; nothing is stored."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lora.inputs import check_index, check_tensors


def _routed(expert_index: Tensor, mask: Tensor | None) -> Tensor:
    """(n, 1) fp32, 1 where a token counts."""
    routed = expert_index[:, :1] >= 0
    return (routed if mask is None else routed & mask[:, None]).float()


def load_balance_loss(
    gate_logits: Float[Tensor, "n e"], expert_index: Int[Tensor, "n k"], mask: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """``e * sum_i f_i * P_i`` (Switch, arXiv 2101.03961, Eq. 4-6; top-k form of Mixtral): 1 when balanced, e when one expert takes all.

    f_i is the share of assignments that expert i got, P_i the mean of its probability; only P_i has a gradient. Tokens with index
    -1 or mask False are not counted; without a token the loss is 0.

    Args:
        gate_logits: Router outputs.
        expert_index: Chosen experts.
        mask: False for padding.

    >>> float(load_balance_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]])))
    1.0
    """
    sizes: dict[str, int] = {}
    check_tensors("real", sizes, gate_logits=(gate_logits, "n e"))
    check_tensors("whole", sizes, expert_index=(expert_index, "n k"))
    check_tensors("boolean", sizes, mask=(mask, "n?"))
    check_index("expert_index", expert_index, gate_logits.shape[-1])
    count = gate_logits.shape[-1]
    routed = _routed(expert_index, mask)
    tokens = routed.sum().clamp_min(1)
    probabilities = (gate_logits.float().softmax(-1) * routed).sum(0) / tokens
    assigned = torch.zeros_like(gate_logits, dtype=torch.float32).scatter_add(
        -1, expert_index.clamp_min(0), routed.expand_as(expert_index)
    )
    shares = assigned.sum(0) / (tokens * expert_index.shape[-1])
    return count * (shares * probabilities).sum()


def router_z_loss(gate_logits: Float[Tensor, "n e"], mask: Bool[Tensor, " n"] | None = None) -> Float[Tensor, ""]:
    """``mean over tokens of logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, Eq. 5): keeps logits small; 0 without a token.

    >>> round(float(router_z_loss(torch.zeros(3, 1))), 4)
    0.0
    """
    sizes: dict[str, int] = {}
    check_tensors("real", sizes, gate_logits=(gate_logits, "n e"))
    check_tensors("boolean", sizes, mask=(mask, "n?"))
    values = gate_logits.float().logsumexp(-1).square()
    if mask is None:
        return values.sum() / max(len(values), 1)
    return (values * mask).sum() / mask.sum().clamp_min(1)
