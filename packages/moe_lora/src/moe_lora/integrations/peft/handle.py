"""The handle of `moe_lora.inject` on mixtures that PEFT put in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moe_lora.checkpoint import whole
from moe_lora.config import MoELoRAConfig
from moe_lora.inject import MoELoRA
from moe_lora.integrations.peft.layer import PeftMoELoRALayer
from moe_lora.standin import StandIn
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
    scaling = property(lambda self: self.layer.scaling[self.adapter])

    def aux_loss(self) -> AuxLoss | None:
        found: AuxLoss | None = self.state.aux_loss(self.layer.training and self.lora_a.requires_grad)
        return found


class PeftMoELoRA(MoELoRA):
    """Handle on the mixtures of one PEFT adapter: losses, statistics, masks, record, replay and export as with `moe_lora.inject`."""

    def __init__(self, model: nn.Module, config: MoELoRAConfig, layers: Mapping[str, Any], adapter_name: str) -> None:
        """Made by `handle`."""
        super().__init__(model, config, layers)
        self.adapter_name = adapter_name

    def module(self, name: str) -> StandIn:
        """What stands in the model at the place of a layer."""
        view: Any = self.layers[name]
        layer: StandIn = view.layer
        return layer

    def name_in_base(self, name: str) -> str:
        """A layer's name in the model as it was before anybody wrapped it."""
        return name.removeprefix("base_model.model.") if isinstance(self.model, PeftModel) else name

    def ordinary_loras(self) -> dict[str, tuple[Float[Tensor, "r d"], Float[Tensor, "o r"]]]:
        """A and scaled B of the ordinary LoRAs of the same adapter, by their names in the base.

        Raises:
            ValueError: The adapter has parts that are no LoRAs of linears: biases, whole modules, tokens, convolutions, embeddings.
        """
        peft_config = self.model.peft_config[self.adapter_name]  # type: ignore[index]
        for option, neutral in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
            if (got := getattr(peft_config, option)) != neutral:
                raise ValueError(f"{option} must be {neutral} for an adapter that is written as a LoRA, got {got!r}")
        found = {}
        for name, layer in self.model.named_modules():
            if not isinstance(layer, LoraLayer) or isinstance(layer, PeftMoELoRALayer):
                continue
            if self.adapter_name in layer.lora_A and isinstance(layer.get_base_layer(), nn.Linear):
                a, b = (t[self.adapter_name].weight.detach() for t in (layer.lora_A, layer.lora_B))
                found[self.name_in_base(name)] = whole(a), whole(b) * layer.scaling[self.adapter_name]
            elif self.adapter_name in layer.r:
                kind = type(layer.get_base_layer()).__name__
                raise ValueError(f"{name} must be one nn.Linear to be written as a LoRA, got {kind}")
        return found

    def save(self, path: str | Path) -> Path:
        """Not ours to do.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"adapters of PEFT must be saved as PEFT's, got save({str(path)!r}): use save_adapter(model, folder)"
        )

    def load(self, path: str | Path) -> None:
        """Not ours to do.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"adapters of PEFT must be loaded as PEFT's, got load({str(path)!r}): use load_adapter(model, folder)"
        )

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
    return PeftMoELoRA(model, next(iter(layers.values())).config, layers, adapter_name)
