"""What routers do: load, entropy, load by token kind, specialisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lora.routing import Routing


class RoutingStatistics(NamedTuple):
    """How tokens were routed.

    load (e,): share of assignments per expert, sums to 1; load_entropy: its entropy in nats, at most log e; gate_entropy: mean
    entropy of a token's probabilities in nats.
    """

    load: Float[Tensor, " e"]
    load_entropy: float
    gate_entropy: float


def _entropy(p: Tensor) -> Tensor:
    result: Tensor = torch.special.entr(p).sum(-1)
    return result


def routing_statistics(routing: Routing, mask: Bool[Tensor, " n"] | None = None) -> RoutingStatistics:
    """Statistics of one routing; masked tokens (False) are not counted."""
    logits, index = routing.gate_logits.detach(), routing.expert_index
    if mask is not None:
        logits, index = logits[mask], index[mask]
    load = torch.bincount(index.flatten(), minlength=logits.shape[-1]).double()
    load = load / load.sum().clamp_min(1)
    return RoutingStatistics(load.float(), float(_entropy(load)), float(_entropy(logits.softmax(-1)).mean()))


def load_by_kind(expert_index: Int[Tensor, "n k"], kinds: Int[Tensor, " n"], num_experts: int) -> Float[Tensor, "c e"]:
    """Joint shares (c, e) of token kinds and experts; sums to 1."""
    count = int(kinds.max()) + 1
    joint = torch.bincount((kinds[:, None] * num_experts + expert_index).flatten(), minlength=count * num_experts)
    return joint.double().view(count, num_experts).div(joint.sum()).float()


def mutual_information(joint: Float[Tensor, "c e"]) -> float:
    """``sum p(c, e) log(p(c, e) / (p(c) p(e)))`` in nats: 0 if experts ignore the kind.

    >>> round(mutual_information(torch.eye(2) / 2), 4)
    0.6931
    """
    p = joint.double()
    return float(_entropy(p.sum(0)) + _entropy(p.sum(1)) - _entropy(p.flatten()))
