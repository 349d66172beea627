"""Slow twins: token by token, as the equations read. The tests compare values and gradients with them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gate_weights(logits: Float[Tensor, "n e"], top_k: int, gating: str) -> list[dict[int, Tensor]]:
    """Per token, expert -> weight; see `moe_lora.routing.route`."""
    rows = []
    for row in logits:
        best = sorted(range(len(row)), key=lambda i: -float(row[i]))[:top_k]
        among = list(range(len(row))) if gating == "softmax_then_topk" else best
        total = torch.stack([row[i].exp() for i in among]).sum()
        rows.append({i: row[i].exp() / total for i in best})
    return rows


def experts(
    h: Float[Tensor, "n d"],
    lora_a: Float[Tensor, "e r d"],
    lora_b: Float[Tensor, "e o r"],
    gate_weights: Float[Tensor, "n k"],
    expert_index: Int[Tensor, "n k"],
) -> Float[Tensor, "n o"]:
    """``sum_k w_k B_{i_k} A_{i_k} h``, token by token, expert by expert; index -1 adds nothing."""
    rows = []
    for token in range(len(h)):
        total = torch.zeros(lora_b.shape[1], dtype=h.dtype)
        for slot in range(expert_index.shape[1]):
            i = int(expert_index[token, slot])
            if i >= 0:
                total = total + gate_weights[token, slot] * (lora_b[i] @ (lora_a[i] @ h[token]))
        rows.append(total)
    return torch.stack(rows) if rows else h.new_zeros(0, lora_b.shape[1])


def load_balance_loss(
    logits: Float[Tensor, "n e"], expert_index: Int[Tensor, "n k"], mask: Bool[Tensor, " n"]
) -> Tensor:
    """``e * sum_i f_i P_i`` by counting; see `moe_lora.balance.load_balance_loss`."""
    kept = [t for t in range(len(logits)) if mask[t]]
    total = logits.sum() * 0
    for i in range(logits.shape[1]):
        chosen = sum(int(expert_index[t, s]) == i for t in kept for s in range(expert_index.shape[1]))
        share = chosen / (len(kept) * expert_index.shape[1])
        total = total + share * sum(logits[t].softmax(-1)[i] for t in kept) / len(kept)
    return logits.shape[1] * total


def mutual_information(joint: Float[Tensor, "c e"]) -> float:
    """``sum p(c, e) log(p(c, e) / (p(c) p(e)))`` term by term; see `moe_lora.stats.mutual_information`."""
    p = joint.double() / joint.double().sum()
    total = 0.0
    for c in range(p.shape[0]):
        for e in range(p.shape[1]):
            if p[c, e] > 0:
                total += float(p[c, e] * (p[c, e] / (p[c].sum() * p[:, e].sum())).log())
    return total
