"""Which experts a token goes to and with what weight, and the losses that keep a router healthy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lora.config import Gating


class Routing(NamedTuple):
    """gate_logits (n, e) fp32, gate_weights (n, k) fp32, expert_index (n, k)."""

    gate_logits: Float[Tensor, "n e"]
    gate_weights: Float[Tensor, "n k"]
    expert_index: Int[Tensor, "n k"]


def route(
    gate_logits: Float[Tensor, "n e"], top_k: int, gating: Gating, *, expert_index: Int[Tensor, "n k"] | None = None
) -> Routing:
    """Top-k routing in fp32.

    "softmax_then_topk": ``p = softmax(logits)``, the k largest p are the weights as they are (Switch, arXiv 2101.03961, section 2.1).
    "topk_then_softmax": softmax over the k largest logits (MultiCrafter's letter, arXiv 2509.21953; Mixtral).

    With ``expert_index`` these experts are taken instead of the largest (replay); the weights are still the router's.

    Raises:
        ValueError: A logit is NaN.
    """
    logits = gate_logits.float()
    chosen = logits.topk(top_k, dim=-1).indices if expert_index is None else expert_index
    if gating == "softmax_then_topk":
        weights = logits.softmax(-1).gather(-1, chosen)
    else:
        weights = logits.gather(-1, chosen).softmax(-1)
    return Routing(logits, weights, chosen)


def load_balance_loss(
    gate_logits: Float[Tensor, "n e"], expert_index: Int[Tensor, "n k"], mask: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """``e * sum_i f_i * P_i`` (Switch, arXiv 2101.03961, Eq. 4-6): f_i share of assignments, P_i mean probability; 1 when balanced."""
    probabilities = gate_logits.softmax(-1)
    count = gate_logits.shape[-1]
    assigned = torch.zeros_like(probabilities).scatter_add_(
        -1, expert_index, torch.ones_like(expert_index, dtype=probabilities.dtype)
    )
    if mask is not None:
        probabilities, assigned = probabilities[mask], assigned[mask]
    if not len(probabilities):
        return gate_logits.sum() * 0
    return count * (assigned.mean(0) / expert_index.shape[-1] * probabilities.mean(0)).sum()


def router_z_loss(gate_logits: Float[Tensor, "n e"], mask: Bool[Tensor, " n"] | None = None) -> Float[Tensor, ""]:
    """``mean over tokens of logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, Eq. 5)."""
    values = gate_logits.logsumexp(-1).square()
    if mask is not None:
        values = values[mask]
    return values.mean() if len(values) else gate_logits.sum() * 0
