"""Recording the routing of one pass and replaying it in another: the rollout's experts, reused in the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lora.config import MoELoRAConfig
from moe_lora.inject import MoELoRA
from moe_lora.routing import Routing, route
from moe_lora.state import Observer, Override, in_backward


@dataclass
class RouteRecord:
    """Chosen experts per layer: one (..., k) int16 tensor per forward pass, in order, shaped like the layer's tokens; -1 is padding."""

    choices: dict[str, list[Tensor]] = field(default_factory=dict)

    def rows(self, index: Int[Tensor, " b"] | Sequence[int]) -> RouteRecord:
        """The record of some rows of the batch, for an update in smaller batches (tokens of shape (b, n) only)."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        return RouteRecord({name: [p[chosen] for p in passes] for name, passes in self.choices.items()})

    @classmethod
    def joined(cls, parts: Sequence[RouteRecord]) -> RouteRecord:
        """The record of one batch of which ``parts`` are the rows, in order (tokens of shape (b, n) only); the inverse of `rows`.

        Raises:
            ValueError: There are no parts, or they differ in layers or passes.
        """
        if len({tuple((name, len(passes)) for name, passes in p.choices.items()) for p in parts}) != 1:
            raise ValueError(
                f"parts must be records of the same layers and passes, got {len(parts)} that differ or none"
            )
        return cls(
            {n: [torch.cat(p) for p in zip(*(x.choices[n] for x in parts), strict=True)] for n in parts[0].choices}
        )

    def passes(self, index: Sequence[int]) -> RouteRecord:
        """The record of some passes, in this order: for example the steps inside a window."""
        return RouteRecord({name: [passes[i] for i in index] for name, passes in self.choices.items()})


@contextmanager
def record(handle: MoELoRA) -> Iterator[RouteRecord]:
    """Records which experts every forward pass inside the context chooses.

    With `handle` of a model that routes 1000 tokens top-1 through 57 layers, a pass takes 114 kB of host memory.
    """
    kept = RouteRecord()

    def observer(name: str) -> Observer:
        def note(routing: Routing, shape: tuple[int, ...]) -> None:
            chosen = routing.expert_index.to("cpu", torch.int16)
            kept.choices.setdefault(name, []).append(chosen.view(*shape, -1))

        return note

    observers = {name: observer(name) for name in handle.layers}
    try:
        for name, layer in handle.layers.items():
            layer.state.observers.append(observers[name])
        yield kept
    finally:
        for name, layer in handle.layers.items():
            layer.state.observers.remove(observers[name])


class _Replayed:
    """One layer's part of `replay`. Gradient checkpointing's second pass is recognised by its logits, which are equal to the bit."""

    def __init__(self, name: str, config: MoELoRAConfig, passes: list[Tensor], start: int) -> None:
        self.name, self.config, self.passes, self.position = name, config, passes, start
        self.done: list[tuple[Tensor, Tensor]] = []

    def _again(self, logits: Tensor) -> Tensor:
        for before, chosen in reversed(self.done):
            if torch.equal(before, logits):
                return chosen
        raise RuntimeError(
            f"checkpointing must repeat a pass of {self.name!r} exactly, got other gate logits than in any pass"
        )

    def _next(self, routing: Routing, shape: tuple[int, ...]) -> Tensor:
        if self.position >= len(self.passes):
            raise ValueError(f"record must hold pass {self.position} of {self.name!r}, got {len(self.passes)} passes")
        chosen = self.passes[self.position]
        want = (*shape, routing.expert_index.shape[1])
        if tuple(chosen.shape) != want:
            raise ValueError(f"record of {self.name!r} must have shape {want}, got {tuple(chosen.shape)}")
        highest = int(chosen.max()) if chosen.numel() else -1
        if highest >= self.config.num_experts:
            raise ValueError(
                f"record of {self.name!r} must name experts below {self.config.num_experts}, got {highest}"
            )
        self.position += 1
        return chosen.reshape(len(routing.expert_index), -1).to(routing.expert_index.device, torch.int64)

    def __call__(self, routing: Routing, shape: tuple[int, ...]) -> Routing:
        logits = routing.gate_logits.detach()
        if in_backward():
            chosen = self._again(logits)
        else:
            chosen = self._next(routing, shape)
            self.done.append((logits, chosen))
        config = self.config
        return route(
            routing.gate_logits, config.top_k, config.gating, expert_index=chosen, check_gate=config.check_gate
        )


@contextmanager
def replay(handle: MoELoRA, kept: RouteRecord, *, start: int = 0) -> Iterator[None]:
    """Forward passes inside the context choose the recorded experts, from pass ``start`` on; gate weights stay the router's own.

    With unchanged weights the outputs are equal to the bit; the router still gets its gradient. Under gradient checkpointing backward
    belongs inside the context too. A token mask is part of the record.

    Args:
        handle: Of the model; its layers must be those recorded.
        kept: From `record`.
        start: Pass to begin with, at least 0.

    Raises:
        ValueError: A layer that was not recorded, more passes than recorded, another number of tokens, an expert that does not exist.
    """
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    if lacking := [name for name in handle.layers if name not in kept.choices]:
        raise ValueError(f"record must hold every layer of the handle, got none for {lacking[:3]}")
    before = {name: layer.state.override for name, layer in handle.layers.items()}
    overrides: dict[str, Override] = {
        name: _Replayed(name, layer.config, kept.choices[name], start) for name, layer in handle.layers.items()
    }
    try:
        for name, layer in handle.layers.items():
            layer.state.override = overrides[name]
        yield
    finally:
        for name, layer in handle.layers.items():
            layer.state.override = before[name]
