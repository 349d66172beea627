"""What a mixture keeps between passes, and how it routes with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lora.balance import load_balance_loss, router_z_loss
from moe_lora.config import MoELoRAConfig
from moe_lora.routing import Routing, gate_logits, route

# both get the routing and the shape of the tokens, (n,) or (b, n) or longer
Override = Callable[[Routing, tuple[int, ...]], Routing]
Observer = Callable[[Routing, tuple[int, ...]], None]


class AuxLoss(NamedTuple):
    """Router losses, unweighted scalars."""

    balance: Float[Tensor, ""]
    z: Float[Tensor, ""]


def in_backward() -> bool:
    """Whether autograd is running backward on this thread: a forward pass now is gradient checkpointing's second one."""
    # private, but what torch.utils.module_tracker.ModuleTracker.is_bw reads
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


class RoutingState:
    """Of one mixture; contexts of the handle (`MoELoRA.token_mask`, `route_replay`, `collect`) change it for a while.

    Attributes:
        token_mask: False for padding: (b, n) or (n,), see `MoELoRA.token_mask`.
        jitter_seed: Of the router noise; None draws from torch's default generator.
        override: Replaces the routing (replay).
        observers: See every routing, except in gradient checkpointing's second pass.
        last: Routing of the last forward pass, with its graph; None once the losses were taken.
        seen: The same without a graph, for statistics.
    """

    def __init__(self, config: MoELoRAConfig) -> None:
        """Nothing masked, nothing kept."""
        self.config = config
        self.token_mask: Bool[Tensor, ...] | None = None
        self.jitter_seed: int | None = None
        self.override: Override | None = None
        self.observers: list[Observer] = []
        self.last: Routing | None = None
        self.seen: Routing | None = None
        self._ran_with: tuple[Tensor | None, Override | None] = (None, None)

    def __deepcopy__(self, memo: dict[int, object]) -> RoutingState:
        """A copy of a model starts without the graph of the last pass and without anybody's contexts."""
        copied = RoutingState(self.config)
        copied.jitter_seed = self.jitter_seed
        return copied

    def jittered(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """``h * u``, u uniform in [1 - jitter, 1 + jitter] (Switch, arXiv 2101.03961, section 2.2), fp32."""
        noise = torch.empty(h.shape, dtype=torch.float32, device=h.device)
        low, high = 1 - self.config.jitter, 1 + self.config.jitter
        if self.jitter_seed is None:
            return h.float() * noise.uniform_(low, high)
        return h.float() * noise.uniform_(low, high, generator=torch.Generator(h.device).manual_seed(self.jitter_seed))

    def flat_mask(self, shape: tuple[int, ...]) -> Bool[Tensor, " n"] | None:
        """The token mask for tokens of this shape, flattened.

        Raises:
            ValueError: It does not fit, or is not boolean.
        """
        mask = self.token_mask
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape not in (shape, (math.prod(shape),), shape[-1:]):
            raise ValueError(
                f"token_mask must be boolean of shape {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        return (mask.expand(shape) if mask.shape == shape[-1:] else mask).reshape(-1)

    def route(
        self, h: Float[Tensor, "n d"], weight: Float[Tensor, "e d"], shape: tuple[int, ...], training: bool
    ) -> tuple[Float[Tensor, "n d"], Routing]:
        """Routes n tokens of shape ``shape``; returns the tokens to go on with (see `moe_lora.routing.gate_logits`).

        Gradient checkpointing's second pass routes alike, but is neither kept nor observed.

        Raises:
            RuntimeError: That second pass runs outside of the context that its first pass ran in.
        """
        config, mask = self.config, self.flat_mask(shape)
        if mask is not None:
            h = h.masked_fill(~mask[:, None], 0.0)
        if training and config.jitter:
            _, logits = gate_logits(self.jittered(h), weight)
        else:
            h, logits = gate_logits(h, weight, alone=True)
        routing = route(logits, config.top_k, config.gating, token_mask=mask, check_gate=config.check_gate)
        if self.override is not None:
            routing = self.override(routing, shape)
        if in_backward():
            if self._ran_with[0] is not self.token_mask or self._ran_with[1] is not self.override:
                raise RuntimeError(
                    "backward must run inside the token_mask or replay context of its forward pass, got a checkpointed pass outside of it"
                )
            return h, routing
        self.last, self._ran_with = routing, (self.token_mask, self.override)
        self.seen = Routing(*(t.detach() for t in routing))
        for observe in self.observers:
            observe(routing, shape)
        return h, routing

    def aux_loss(self, wants_gradient: bool) -> AuxLoss | None:
        """Load-balance and z-loss of the last forward pass; None if there was none.

        Raises:
            RuntimeError: A gradient is wanted, but the pass kept no graph: it ran under reentrant gradient checkpointing.
        """
        if self.last is None:
            return None
        logits, _, index = self.last
        if wants_gradient and torch.is_grad_enabled() and not logits.requires_grad:
            raise RuntimeError(
                "aux_loss must see a graph to train the router, got a forward pass without one: checkpoint with use_reentrant=False"
                " (or call it under torch.no_grad() if no gradient is wanted)"
            )
        return AuxLoss(load_balance_loss(logits, index), router_z_loss(logits, index[:, 0] >= 0))
