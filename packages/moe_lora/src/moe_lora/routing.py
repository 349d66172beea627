"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_lora.balance import load_balance_loss, router_z_loss
from moe_lora.config import Gating
from moe_lora.inputs import check_index, check_one_of, check_tensors, check_whole

__all__ = [
    "Router",
    "Routing",
    "RoutingStatistics",
    "gate_logits",
    "load_balance_loss",
    "route",
    "router_z_loss",
    "routing_statistics",
]


class Routing(NamedTuple):
    """Of n tokens to k of e experts; a masked token has index -1 and weight 0, and its logits are never looked at.

    gate_logits (n, e) fp32, gate_weights (n, k) fp32, expert_index (n, k) int64.
    """

    gate_logits: Float[Tensor, "n e"]
    gate_weights: Float[Tensor, "n k"]
    expert_index: Int[Tensor, "n k"]


def route(
    gate_logits: Float[Tensor, "n e"],
    top_k: int,
    gating: Gating,
    *,
    expert_index: Int[Tensor, "n k"] | None = None,
    token_mask: Bool[Tensor, " n"] | None = None,
    check_gate: bool = True,
) -> Routing:
    """Top-k routing in fp32.

    "softmax_then_topk": ``p = softmax(logits)``, the k largest p are the weights as they are (Switch, arXiv 2101.03961, section 2.1).
    "topk_then_softmax": softmax over the k largest logits (as MultiCrafter writes it, arXiv 2509.21953; Mixtral, arXiv 2401.04088).

    Args:
        gate_logits: Router outputs.
        top_k: Experts per token, in [1, e].
        gating: See above. With top_k 1 the second gives weight 1 and the router exactly zero gradient (docs/adr/0030).
        expert_index: Take these experts instead of the largest (replay; -1 for none); the weights are still the router's.
        token_mask: False for padding: routed nowhere.
        check_gate: Whether to look for NaN; skipped while compiling.

    Raises:
        ValueError: A logit of a routed token is NaN, or its softmax is (an infinite logit); something is of another kind or size.

    >>> routing = route(torch.tensor([[2.0, 1.0, 0.0]]), 2, "topk_then_softmax")
    >>> routing.expert_index.tolist(), [round(w, 3) for w in routing.gate_weights[0].tolist()]
    ([[0, 1]], [0.731, 0.269])
    """
    sizes: dict[str, int] = {}
    check_tensors("real", sizes, gate_logits=(gate_logits, "n e"))
    check_whole("top_k", top_k, 1, sizes.get("e"))
    check_tensors("boolean", sizes, token_mask=(token_mask, "n?"))
    check_one_of("gating", gating, get_args(Gating))
    if expert_index is not None:
        check_tensors("whole", sizes | {"k": top_k}, expert_index=(expert_index, "n k"))
        check_index("expert_index", expert_index, gate_logits.shape[-1])
    logits = gate_logits.float()
    if token_mask is not None:
        logits = logits.masked_fill(~token_mask[:, None], 0.0)
    chosen = logits.topk(top_k, dim=-1).indices if expert_index is None else expert_index
    if gating == "softmax_then_topk":
        weights = logits.softmax(-1).gather(-1, chosen.clamp_min(0))
    else:
        weights = logits.gather(-1, chosen.clamp_min(0)).softmax(-1)
    if expert_index is not None:
        weights = weights.masked_fill(chosen < 0, 0.0)
    if token_mask is not None:
        chosen = chosen.masked_fill(~token_mask[:, None], -1)
        weights = weights.masked_fill(~token_mask[:, None], 0.0)
    if check_gate and not torch.compiler.is_compiling() and bool(logits.isnan().any() | weights.isnan().any()):
        bad = int((logits.isnan().any(-1) | weights.isnan().any(-1)).sum())
        raise ValueError(f"gate_logits must hold no NaN and no infinity, got some in {bad} of {len(logits)} tokens")
    return Routing(logits, weights, chosen)


class _GateLogits(torch.autograd.Function):
    """``(h, W) -> (h, h W^T)`` in fp32. Handing h on lets the router's part of its gradient be added in one pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, weight)
        ctx.alone = alone
        ctx.set_materialize_grads(False)
        with torch.autocast(h.device.type, enabled=False):
            return h.view_as(h), h.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        if grad_logits is None:
            return grad_h, None, None
        with torch.autocast(h.device.type, enabled=False):
            grad_weight = (grad_logits.T @ h.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, grad_weight, None
            if grad_h is None:
                return (grad_logits @ weight.float()).to(h.dtype), grad_weight, None
            if h.dtype != torch.float32:
                return grad_h + (grad_logits @ weight.float()).to(h.dtype), grad_weight, None
            # in place where grad_h was made for us alone; not when this backward is itself differentiated
            add = Tensor.addmm_ if ctx.alone and not torch.is_grad_enabled() else torch.addmm
            return add(grad_h, grad_logits, weight.float()), grad_weight, None


def gate_logits(
    h: Float[Tensor, "n d"], weight: Float[Tensor, "e d"], *, alone: bool = False
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n e"]]:
    """``logits = h W^T`` in fp32 whatever the type of h; returns h (to go on with) and the logits.

    Going on with the returned h adds the router's part of the gradient to the experts' in one pass instead of three; no fp32 copy of
    h is kept for backward.

    Args:
        h: Tokens.
        weight: Gate W.
        alone: Promise that the returned h goes into `moe_lora.experts` and nowhere else: its gradient is then changed in place. An
            addition, for one, shares its gradient with its other summand.

    Raises:
        ValueError: Something is no floating tensor, or of another width.
    """
    check_tensors("floating", {}, h=(h, "n d"), weight=(weight, "e d"))
    if torch.compiler.is_compiling():
        with torch.autocast(h.device.type, enabled=False):
            return h, h.float() @ weight.float().T
    passed, logits = _GateLogits.apply(h, weight, alone)
    return passed, logits


class Router(nn.Linear):
    """The gate ``W``: one linear map without bias that stays in fp32 when the model around it is cast to another type."""

    def __init__(self, in_features: int, num_experts: int, device: torch.device | None = None) -> None:
        """Weights are left to `Mixture.reset_parameters`, which has the generator."""
        super().__init__(in_features, num_experts, bias=False, device=device, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Draws nothing, so that building a mixture takes nothing from the global generator."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def keep_float32(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]


class RoutingStatistics(NamedTuple):
    """How tokens were routed.

    load (e,): share of assignments per expert, sums to 1; load_entropy: its entropy in nats, at most log e; gate_entropy: mean
    entropy of a token's probabilities in nats.
    """

    load: Float[Tensor, " e"]
    load_entropy: float
    gate_entropy: float


def entropy_of(p: Float[Tensor, "*rows e"]) -> Float[Tensor, "*rows"]:
    """``-sum p log p`` over the last axis, in nats."""
    result: Tensor = torch.special.entr(p).sum(-1)
    return result


def routing_statistics(routing: Routing, mask: Bool[Tensor, " n"] | None = None) -> RoutingStatistics:
    """Statistics of one routing; tokens with index -1 or mask False are not counted."""
    if not isinstance(routing, Routing):
        raise ValueError(f"routing must be a Routing, got {type(routing).__name__}")
    check_tensors("boolean", {"n": len(routing.expert_index)}, mask=(mask, "n?"))
    routed = routing.expert_index[:, 0] >= 0
    routed = routed if mask is None else routed & mask
    logits, index = routing.gate_logits.detach()[routed], routing.expert_index[routed]
    load = torch.bincount(index.flatten(), minlength=logits.shape[-1]).cpu().double()
    load = load / load.sum().clamp_min(1)
    entropy = entropy_of(logits.softmax(-1)).sum() / max(len(logits), 1)
    return RoutingStatistics(load.float().to(index.device), float(entropy_of(load)), float(entropy))
