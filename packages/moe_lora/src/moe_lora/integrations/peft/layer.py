"""What PEFT puts in place of a target."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moe_lora.integrations.peft.config import PeftMoELoRAConfig
from moe_lora.layer import infer_features, mixture, reset_mixture
from moe_lora.routing import Router
from moe_lora.standin import StandIn, check_target
from moe_lora.state import RoutingState

CANNOT_MERGE = "different tokens get different updates (moe_lora.approximate gives the nearest ordinary LoRA)"


class PeftMoELoRALayer(StandIn, LoraLayer):  # type: ignore[misc]
    """``h_out = base(h) + sum over active adapters of their mixtures`` around any module that maps (..., d_in) to (..., d_out)."""

    wrapped: ClassVar[str] = "base_layer"
    adapter_layer_names = ("lora_router", "lora_experts_a", "lora_experts_b")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "states")
    base_layer: nn.Module
    lora_router: nn.ModuleDict
    lora_experts_a: nn.ParameterDict
    lora_experts_b: nn.ParameterDict
    lora_dropout: nn.ModuleDict
    states: dict[str, RoutingState]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    use_rslora: dict[str, bool]
    scaling: dict[str, float]
    in_features: int
    out_features: int
    disable_adapters: bool
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Called by PEFT.

        Raises:
            ValueError: No mixture can stand beside it; see `moe_lora.standin.check_target` and `moe_lora.layer.infer_features`.
        """
        super().__init__()
        check_target(base_layer, kwargs.get("target_name", ""))
        LoraLayer.__init__(self, base_layer)
        self.lora_router, self.states = nn.ModuleDict(), {}
        self.lora_experts_a, self.lora_experts_b = nn.ParameterDict(), nn.ParameterDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, kwargs.pop("r"), lora_alpha=kwargs.pop("lora_alpha"), config=config, **kwargs)
        self.stand_for(base_layer, kwargs.get("target_name", ""))

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return infer_features(module)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int | float, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter.

        Raises:
            ValueError: It is an ordinary LoRA, which cannot share a layer with mixtures.
        """
        name = kwargs.get("target_name", "")
        if not isinstance(config, PeftMoELoRAConfig) or not config.wants_mixture(name):
            raise ValueError(
                f"adapter {adapter_name!r} must be a mixture on {name!r}, which has mixtures already, got an ordinary LoRA"
            )
        own = config.mixture(r, lora_alpha)
        like = next(self.base_layer.parameters(), torch.empty(0))
        dtype = like.dtype if like.dtype.is_floating_point else torch.float32
        e, d, o = own.num_experts, self.in_features, self.out_features
        self.states[adapter_name] = RoutingState(own)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name], self.scaling[adapter_name] = config.use_rslora, 1.0
        self.set_scale(adapter_name, 1.0)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_router[adapter_name] = Router(d, e, like.device)
        self.lora_experts_a[adapter_name] = nn.Parameter(torch.empty(e, r, d, device=like.device, dtype=dtype))
        self.lora_experts_b[adapter_name] = nn.Parameter(torch.empty(e, o, r, device=like.device, dtype=dtype))
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        LoraLayer.set_adapter(self, self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool) -> None:
        """As `moe_lora.layer.reset_mixture`; with False B is not zero either, which tests use."""
        router, a, b = self.tensors(adapter_name)
        reset_mixture(router, a, b)
        if not init_lora_weights:
            nn.init.normal_(b, 0, 0.02)

    def tensors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Router weight (e, d), A (e, r, d) and B (e, o, r) of an adapter."""
        router = self.lora_router[adapter_name]
        assert isinstance(router, Router)
        return router.weight, self.lora_experts_a[adapter_name], self.lora_experts_b[adapter_name]

    def _active_mixtures(self, adapter_names: list[str] | None = None) -> list[str]:
        return [name for name in (adapter_names or self.active_adapters) if name in self.states]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters; PEFT's own looks for ``lora_A``."""
        for name in self._active_mixtures():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Takes `scale_layer` back; without ``scale`` to what the config says."""
        for name in self._active_mixtures():
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible; nothing to do where none of the adapters has a mixture here.

        Raises:
            ValueError: One of the named (or active) adapters has.
        """
        if found := self._active_mixtures(adapter_names):
            raise ValueError(f"{found[0]!r} must stay beside its base, got merge: {CANNOT_MERGE}")

    def unmerge(self) -> None:
        """Nothing to do: mixtures are never merged."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus that of the active adapters."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names must not be given with mixtures, got a batch of mixed adapters")
        out: Tensor = self.base_layer(*args, **kwargs)
        active = [] if self.disable_adapters else self._active_mixtures()
        for name in active:
            tokens = self.tokens(args, kwargs, self.in_features)
            h, state = self.lora_dropout[name](tokens), self.states[name]
            delta = mixture(h, *self.tensors(name), state, scaling=self.scaling[name], training=self.training)
            out = self.joined(out, delta, tokens)
        return out
