"""Recording the routing of one pass and replaying it in another: the rollout's experts, reused in the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from moe_lora.inject import MoELoRA
from moe_lora.layer import MoELoRALayer
from moe_lora.routing import Routing, route


@dataclass
class RouteRecord:
    """Chosen experts per layer, one (n, k) int8 tensor per forward pass, in order."""

    choices: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def _hooked(handle: MoELoRA, make: object) -> Iterator[None]:
    before = {name: layer.recorder for name, layer in handle.layers.items()}
    try:
        for name, layer in handle.layers.items():
            layer.recorder = make(name, layer)  # type: ignore[operator]
        yield
    finally:
        for name, layer in handle.layers.items():
            layer.recorder = before[name]


@contextmanager
def record(handle: MoELoRA) -> Iterator[RouteRecord]:
    """Records which experts every forward pass inside the context chooses."""
    kept = RouteRecord()

    def make(name: str, layer: MoELoRALayer) -> object:
        def note(routing: Routing) -> Routing:
            kept.choices.setdefault(name, []).append(routing.expert_index.to("cpu").short())
            return routing

        return note

    with _hooked(handle, make):
        yield kept


@contextmanager
def replay(handle: MoELoRA, kept: RouteRecord, *, start: int = 0) -> Iterator[None]:
    """Forward passes inside the context choose the recorded experts, from pass ``start`` on; gate weights stay the router's own.

    Raises:
        ValueError: More passes than recorded, or another number of tokens.
    """
    position = dict.fromkeys(handle.layers, start)

    def make(name: str, layer: MoELoRALayer) -> object:
        def use(routing: Routing) -> Routing:
            passes = kept.choices.get(name, [])
            if position[name] >= len(passes):
                raise ValueError(f"record must hold pass {position[name]} of {name!r}, got {len(passes)} passes")
            chosen = passes[position[name]].to(routing.expert_index.device).long()
            if chosen.shape != routing.expert_index.shape:
                raise ValueError(
                    f"record of {name!r} must have shape {tuple(routing.expert_index.shape)}, got {tuple(chosen.shape)}"
                )
            position[name] += 1
            return route(routing.gate_logits, layer.config.top_k, layer.config.gating, expert_index=chosen)

        return use

    with _hooked(handle, make):
        yield
