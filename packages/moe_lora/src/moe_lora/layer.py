"""A module with a mixture of LoRA experts beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe_lora.config import MoELoRAConfig
from moe_lora.dispatch import experts
from moe_lora.routing import Routing, load_balance_loss, route, router_z_loss


class AuxLoss(NamedTuple):
    """Router losses, unweighted scalars."""

    balance: Float[Tensor, ""]
    z: Float[Tensor, ""]


def infer_features(base: nn.Module) -> tuple[int, int]:
    """Input and output width of a module: of a linear, or of its first and last linear.

    Raises:
        ValueError: It holds no linear.
    """
    linears = [m for m in base.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(
            f"base must hold a linear layer to infer widths from, got {type(base).__name__}: give in_features and out_features"
        )
    return linears[0].in_features, linears[-1].out_features


class MoELoRALayer(nn.Module):
    """``h_out = base(h) + sum_i p_i * (alpha / r) * B_i A_i h`` (MultiCrafter, arXiv 2509.21953, section 3.3).

    B is zero at first, so wrapping changes no output bit. The router runs in fp32. The routing of the last forward pass is kept on the
    layer (`last`) with its graph, for the losses and statistics; `MoELoRA.aux_loss` collects and forgets it.
    """

    def __init__(
        self, base: nn.Module, config: MoELoRAConfig, in_features: int | None = None, out_features: int | None = None
    ) -> None:
        """Wraps ``base``, any module that maps (..., d_in) to (..., d_out)."""
        super().__init__()
        if in_features is None or out_features is None:
            inferred = infer_features(base)
            in_features, out_features = in_features or inferred[0], out_features or inferred[1]
        self.base, self.config = base, config
        like = next(iter(base.parameters()), torch.empty(0))
        self.router = nn.Linear(in_features, config.num_experts, bias=False, device=like.device, dtype=torch.float32)
        self.lora_a = nn.Parameter(torch.empty(config.num_experts, config.rank, in_features, device=like.device))
        self.lora_b = nn.Parameter(torch.zeros(config.num_experts, out_features, config.rank, device=like.device))
        self.enabled = True
        self.last: Routing | None = None
        self.last_mask: Bool[Tensor, " n"] | None = None
        self.token_mask: Bool[Tensor, " n"] | None = None
        self.recorder: Callable[[Routing], Routing] | None = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Kaiming-uniform A as in LoRA (arXiv 2106.09685), zero B, small router."""
        bound = 1 / math.sqrt(self.lora_a.shape[-1])
        with torch.no_grad():
            self.lora_a.uniform_(-bound * math.sqrt(3), bound * math.sqrt(3), generator=generator)
            self.lora_b.zero_()
            self.router.weight.normal_(0, 0.02, generator=generator)

    def _route(self, h: Tensor) -> Routing:
        x = h.float()
        if self.training and self.config.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        with torch.autocast(h.device.type, enabled=False):
            logits = x @ self.router.weight.float().T
        routing = route(logits, self.config.top_k, self.config.gating)
        return routing if self.recorder is None else self.recorder(routing)

    def delta(self, hidden_states: Float[Tensor, "... d"]) -> Float[Tensor, "... o"]:
        """The mixture's part alone."""
        h = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self._route(h)
        self.last, self.last_mask = routing, self.token_mask
        weights = routing.gate_weights
        if self.token_mask is not None:
            if self.token_mask.shape != (len(h),):
                raise ValueError(
                    f"token_mask must hold one entry per token ({len(h)}), got {tuple(self.token_mask.shape)}"
                )
            weights = weights * self.token_mask[:, None]
        dtype = (
            torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else self.lora_a.dtype
        )
        out = experts(
            h.to(dtype),
            self.lora_a.to(dtype),
            self.lora_b.to(dtype),
            weights * self.config.scaling,
            routing.expert_index,
            self.config.dispatch,
        )
        return out.view(*hidden_states.shape[:-1], -1)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, plus the mixture where it is enabled."""
        out: Tensor = self.base(hidden_states, *args, **kwargs)
        return out + self.delta(hidden_states).to(out.dtype) if self.enabled else out

    def aux_loss(self) -> AuxLoss | None:
        """Load-balance and z-loss of the last forward pass; None if there was none."""
        if self.last is None:
            return None
        return AuxLoss(
            load_balance_loss(self.last.gate_logits, self.last.expert_index, self.last_mask),
            router_z_loss(self.last.gate_logits, self.last_mask),
        )
