"""Putting mixtures into a model and taking them out again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_lora.checkpoint import load_tensors, save_tensors
from moe_lora.config import MoELoRAConfig
from moe_lora.layer import MoELoRALayer
from moe_lora.stats import RoutingStatistics, routing_statistics

Targets = Sequence[str] | Callable[[str], bool]


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (model.get_submodule(path) if path else model), leaf


def find_targets(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the modules that a list of regexes (full match) or a predicate chooses.

    Raises:
        ValueError: Nothing matches (the nearest names are listed), or one target lies inside another.
    """
    names = [name for name, _ in model.named_modules() if name]
    if callable(targets):
        found = [n for n in names if targets(n)]
    else:
        found = [n for n in names if any(re.fullmatch(t, n) for t in targets)]
        for pattern in targets:
            if not any(re.fullmatch(pattern, n) for n in names):
                near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.0)
                raise ValueError(
                    f"targets must match modules of the model, got {pattern!r}, which matches none; nearest: {near}"
                )
    if not found:
        raise ValueError(f"targets must match at least one module, got none of {len(names)}; for example {names[:4]}")
    for name in found:
        if any(name.startswith(other + ".") for other in found):
            raise ValueError(f"targets must not lie inside each other, got {name!r} inside another target")
    return found


class MoELoRA:
    """Handle on the mixtures injected into one model."""

    def __init__(self, model: nn.Module, config: MoELoRAConfig, layers: dict[str, MoELoRALayer]) -> None:
        """Made by `inject`."""
        self.model, self.config, self.layers = model, config, layers

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters: routers and experts, not the base."""
        return (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Keys as in the file: ``<module>.router.weight``, ``<module>.lora_a``, ``<module>.lora_b``."""
        for name, layer in self.layers.items():
            router: nn.Parameter = layer.router.weight  # type: ignore[assignment]
            yield f"{name}.router.weight", router
            yield f"{name}.lora_a", layer.lora_a
            yield f"{name}.lora_b", layer.lora_b

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors, detached."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads tensors; the error names the key that is wrong."""
        own = dict(self.named_parameters())
        for key in own.keys() | state.keys():
            if key not in state:
                raise ValueError(f"state must hold {key!r}, but it is missing")
            if key not in own:
                raise ValueError(f"state must hold keys of this model only, got {key!r}")
            if own[key].shape != state[key].shape:
                raise ValueError(
                    f"{key} must have shape {tuple(own[key].shape)}, got {tuple(state[key].shape)} (another rank, width or number of experts?)"
                )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    def aux_loss(self) -> Tensor:
        """``balance_coef * mean balance + z_coef * mean z`` over the layers that ran since the last call; then forgets them."""
        parts = [part for layer in self.layers.values() if (part := layer.aux_loss()) is not None]
        self.forget()
        if not parts:
            return torch.zeros((), device=next(self.parameters()).device)
        balance = torch.stack([p.balance for p in parts]).mean()
        return self.config.balance_coef * balance + self.config.z_coef * torch.stack([p.z for p in parts]).mean()

    def forget(self) -> None:
        """Drops the routing kept from the last forward pass."""
        for layer in self.layers.values():
            layer.last = None

    def stats(self) -> dict[str, RoutingStatistics]:
        """Expert load and entropy of each layer's last forward pass."""
        return {
            n: routing_statistics(layer.last, layer.last_mask)
            for n, layer in self.layers.items()
            if layer.last is not None
        }

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The base model, exactly, inside the context."""
        before = {name: layer.enabled for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for name, layer in self.layers.items():
                layer.enabled = before[name]

    def remove(self) -> None:
        """Puts the original modules back."""
        for name, layer in self.layers.items():
            parent, leaf = _parent(self.model, name)
            setattr(parent, leaf, layer.base)
        self.layers = {}

    def save(self, path: str | Path) -> Path:
        """Writes ``moe_lora.safetensors`` and ``moe_lora.json`` into the folder ``path``, atomically."""
        return save_tensors(Path(path), self.state_dict(), self.config, list(self.layers))

    def load(self, path: str | Path) -> None:
        """Reads what `save` wrote; checks targets, shapes and ranks."""
        self.load_state_dict(load_tensors(Path(path), self.config, list(self.layers)))


def inject(
    model: nn.Module, config: MoELoRAConfig, targets: Targets, *, generator: torch.Generator | None = None
) -> MoELoRA:
    """Wraps the chosen modules of ``model`` in `MoELoRALayer`s; no output bit changes.

    Args:
        model: Changed in place.
        config: Of every mixture.
        targets: Regexes that match whole module names, or a predicate on names.
        generator: Source of the initial A and router weights.

    Raises:
        ValueError: See `find_targets`.
    """
    layers = {}
    for name in find_targets(model, targets):
        parent, leaf = _parent(model, name)
        layer = MoELoRALayer(getattr(parent, leaf), config)
        layer.reset_parameters(generator)
        setattr(parent, leaf, layer)
        layers[name] = layer
    return MoELoRA(model, config, layers)
