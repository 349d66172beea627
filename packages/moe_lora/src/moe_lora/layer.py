"""A module with a mixture of LoRA experts beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_lora.config import MoELoRAConfig
from moe_lora.dispatch import experts
from moe_lora.routing import Router, Routing
from moe_lora.standin import StandIn, check_target
from moe_lora.state import AuxLoss, RoutingState


def mixture(
    hidden_states: Float[Tensor, "*tokens d"],
    router_weight: Float[Tensor, "e d"],
    lora_a: Float[Tensor, "e r d"],
    lora_b: Float[Tensor, "e o r"],
    state: RoutingState,
    *,
    scaling: float,
    training: bool = False,
) -> Float[Tensor, "n o"]:
    """``delta(h) = sum_i p_i(h) * scaling * B_i A_i h`` (MultiCrafter, arXiv 2509.21953, section 3.3), tokens flattened.

    Experts compute in the type of lora_a, or in autocast's; the router in fp32, on the tokens in that type.

    Args:
        hidden_states: Tokens of any leading shape.
        router_weight: Gate W.
        lora_a: Down projections.
        lora_b: Up projections.
        state: How to route; keeps the routing.
        scaling: alpha / r.
        training: Whether the router's input is jittered.
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lora_a.dtype
    h = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
    h, routing = state.route(h, router_weight, tuple(hidden_states.shape[:-1]), training)
    weights = routing.gate_weights * scaling
    return experts(h, lora_a.to(dtype), lora_b.to(dtype), weights, routing.expert_index, state.config.dispatch)


def infer_features(base: nn.Module) -> tuple[int, int]:
    """Input and output width of a module: of a linear (or GPT-2's Conv1D), or of its first and last one.

    A gated FFN may name its gate last (Qwen-Image 2.1). Linears at the end that are as wide as the first one then do not count, unless
    the module is a Sequential, which runs in its order.

    Raises:
        ValueError: It holds no linear.

    >>> gated = nn.ModuleDict({"proj": nn.Linear(4, 12), "out": nn.Linear(12, 4), "gate": nn.Linear(4, 12)})
    >>> infer_features(gated), infer_features(nn.Sequential(*gated.values()))
    ((4, 4), (4, 12))
    """
    names = (("in_features", "out_features"), ("nx", "nf"))
    found = [(getattr(m, i, None), getattr(m, o, None)) for m in base.modules() for i, o in names]
    widths = [(i, o) for i, o in found if isinstance(i, int) and isinstance(o, int)]
    if not widths:
        raise ValueError(
            f"base must hold a linear layer to infer widths from, got {type(base).__name__}: give in_features and out_features"
        )
    while not isinstance(base, nn.Sequential) and widths[-1] == widths[0] and len(set(widths)) > 1:
        widths.pop()
    return widths[0][0], widths[-1][1]


def reset_mixture(
    router_weight: Tensor, lora_a: Tensor, lora_b: Tensor, generator: torch.Generator | None = None
) -> None:
    """Kaiming-uniform A as in LoRA (arXiv 2106.09685; each expert its own), zero B, router weights of deviation 0.02."""
    bound = 1 / math.sqrt(lora_a.shape[-1])

    def draw(t: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
        if t.device.type == "meta" or generator is None or generator.device == t.device:
            fill(t)
        else:
            t.copy_(fill(torch.empty(t.shape, device=generator.device)))

    with torch.no_grad():
        draw(lora_a, lambda t: t.uniform_(-bound, bound, generator=generator))
        draw(router_weight, lambda t: t.normal_(0, 0.02, generator=generator))
        lora_b.zero_()


class Mixture(nn.Module):
    """The experts and their router without a base; see `mixture`.

    B is zero at first. Parameters: ``router.weight`` (e, d), ``lora_a`` (e, r, d), ``lora_b`` (e, o, r). `state` keeps the routing of the
    last pass, for the losses and statistics.
    """

    def __init__(
        self,
        config: MoELoRAConfig,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draws A and the router from ``generator``; parameters are fp32."""
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width}")
        self.config, self.state = config, RoutingState(config)
        self.router = Router(in_features, config.num_experts, device)
        self.lora_a = nn.Parameter(torch.empty(config.num_experts, config.rank, in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(config.num_experts, out_features, config.rank, device=device))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """See `reset_mixture`."""
        reset_mixture(self.router.weight, self.lora_a, self.lora_b, generator)

    def extra_repr(self) -> str:
        """Experts, rank and widths."""
        e, r, d = self.lora_a.shape
        return (
            f"{d} -> {self.lora_b.shape[1]}, num_experts={e}, top_k={self.config.top_k}, rank={r}, {self.config.gating}"
        )

    def forward(self, hidden_states: Float[Tensor, "*tokens d"]) -> Float[Tensor, "n o"]:
        """The mixture's part alone, tokens flattened."""
        return mixture(
            hidden_states, self.router.weight, self.lora_a, self.lora_b, self.state,
            scaling=self.scaling, training=self.training,
        )  # fmt: skip

    @property
    def scaling(self) -> float:
        """What the experts' sum is multiplied by."""
        return self.config.scaling

    @property
    def last(self) -> Routing | None:
        """Routing of the last forward pass, with its graph; None before one and after `MoELoRA.aux_loss`."""
        return self.state.last

    def aux_loss(self) -> AuxLoss | None:
        """Load-balance and z-loss of the last forward pass; None if there was none (see `RoutingState.aux_loss`)."""
        return self.state.aux_loss(self.training and self.router.weight.requires_grad)


class MoELoRALayer(StandIn, Mixture):
    """``h_out = base(h) + sum_i p_i * (alpha / r) * B_i A_i h`` (MultiCrafter, arXiv 2509.21953, section 3.3).

    B is zero at first, so wrapping changes no output bit. Attributes of the base are visible through the layer (see `StandIn`), unless the layer
    has one of that name: then ask ``layer.base``.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoELoRAConfig,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        generator: torch.Generator | None = None,
        name: str = "",
    ) -> None:
        """Wraps ``base``, any module that maps (..., d_in) to (..., d_out); ``name`` is for messages.

        Raises:
            ValueError: Widths are not given and ``base`` holds no linear; or see `moe_lora.standin.check_target`.

        >>> layer = MoELoRALayer(nn.Linear(8, 8), MoELoRAConfig(rank=2, alpha=2.0))
        >>> x = torch.randn(3, 8)
        >>> torch.equal(layer(x), layer.base(x))
        True
        """
        check_target(base, name)
        if in_features is None or out_features is None:
            inferred = infer_features(base)
            in_features, out_features = in_features or inferred[0], out_features or inferred[1]
        like = next(iter(base.parameters()), torch.empty(0))
        super().__init__(config, in_features, out_features, device=like.device, generator=generator)
        self.base = base
        self.enabled = True
        self.train(base.training)
        self.stand_for(base, name)

    def delta(self, hidden_states: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens o"]:
        """The mixture's part alone."""
        return Mixture.forward(self, hidden_states).view(*hidden_states.shape[:-1], self.lora_b.shape[1])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, plus the mixture of the first argument where it is enabled.

        Raises:
            ValueError: The first argument is no tokens of the expected width, or the base returns something else than one tensor.
        """
        out: Tensor = self.base(*args, **kwargs)
        if not self.enabled:
            return out
        tokens = self.tokens(args, kwargs, self.lora_a.shape[-1])
        return self.joined(out, Mixture.forward(self, tokens), tokens)
