"""The handle of `moe_lora.inject` on mixtures that PEFT put in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from moe_lora.inject import MoELoRA
from moe_lora.integrations.peft.layer import PeftMoELoRALayer
from moe_lora.state import AuxLoss


class _View:
    """One adapter of a `PeftMoELoRALayer` as `MoELoRA` wants a layer."""

    def __init__(self, layer: PeftMoELoRALayer, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter

    state = property(lambda self: self.layer.states[self.adapter])
    config = property(lambda self: self.state.config)
    last = property(lambda self: self.state.last)
    base = property(lambda self: self.layer.base_layer)
    router = property(lambda self: self.layer.lora_router[self.adapter])
    lora_a = property(lambda self: self.layer.lora_experts_a[self.adapter])
    lora_b = property(lambda self: self.layer.lora_experts_b[self.adapter])

    def aux_loss(self) -> AuxLoss | None:
        found: AuxLoss | None = self.state.aux_loss(self.layer.training and self.lora_a.requires_grad)
        return found


class PeftMoELoRA(MoELoRA):
    """Handle on the mixtures of one PEFT adapter: losses, statistics, masks, record and replay as with `moe_lora.inject`."""

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Without any adapter inside the context."""
        layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        before = [(layer, layer._disable_adapters) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was in before:
                layer._disable_adapters = was

    def remove(self) -> None:
        """Not ours to do.

        Raises:
            ValueError: Always.
        """
        raise ValueError("adapters of PEFT must be removed by PEFT, got remove(): use unload() or delete_adapter()")


def handle(model: nn.Module, adapter_name: str = "default") -> MoELoRA:
    """The mixtures of an adapter that PEFT, diffusers or transformers put into ``model``.

    Raises:
        ValueError: The model has no mixture of that name.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, PeftMoELoRALayer)}
    layers: dict[str, Any] = {n: _View(m, adapter_name) for n, m in found.items() if adapter_name in m.states}
    if not layers:
        names = sorted({a for m in found.values() for a in m.states})
        raise ValueError(f"adapter_name must be an adapter with mixtures, one of {names}, got {adapter_name!r}")
    return PeftMoELoRA(model, next(iter(layers.values())).config, layers)
