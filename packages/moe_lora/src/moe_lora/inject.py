"""Putting mixtures into a model and taking them out again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe_lora.checkpoint import (
    check_numbers,
    check_shapes,
    load_tensors,
    read_config,
    save_tensors,
    whole,
    write_parameter,
)
from moe_lora.config import MoELoRAConfig
from moe_lora.inputs import one_line
from moe_lora.layer import MoELoRALayer
from moe_lora.routing import RoutingStatistics, routing_statistics
from moe_lora.standin import StandIn, check_one_place, check_target

Targets = str | Sequence[str] | Callable[[str], bool]


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (model.get_submodule(path) if path else model), leaf


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"names must be regular expressions, got {pattern!r}: {error}") from None


def find_targets(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the modules that regexes (full match) or a predicate on names choose.

    Raises:
        ValueError: A regex matches nothing (the nearest names are listed), one target lies inside another or inside a mixture, or no mixture
            can stand beside one (see `moe_lora.standin.check_target`).

    >>> find_targets(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["[02]"])
    ['0', '2']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    modules = {name: module for name, module in model.named_modules() if name}
    names = list(modules)
    several = isinstance(targets, Iterable) and not isinstance(targets, (str, bytes, Tensor))
    if several:
        targets = list(targets)  # type: ignore[arg-type]
    if not (callable(targets) or isinstance(targets, str) or (several and all(isinstance(t, str) for t in targets))):
        raise ValueError(f"targets must be regular expressions or a function of names, got {one_line(targets)}")
    if callable(targets):
        found = [n for n in names if targets(n)]
    else:
        patterns = [_compiled(t) for t in ([targets] if isinstance(targets, str) else targets)]
        found = [n for n in names if any(p.fullmatch(n) for p in patterns)]
        for pattern in patterns:
            if not any(pattern.fullmatch(n) for n in names):
                near = difflib.get_close_matches(pattern.pattern, names, n=4, cutoff=0.0)
                raise ValueError(
                    f"targets must match modules of the model, got {pattern.pattern!r}, which matches none; nearest: {near}"
                )
    if not found:
        raise ValueError(f"targets must match at least one module, got none of {len(names)}; for example {names[:4]}")
    for name in found:
        if any(name.startswith(other + ".") for other in found):
            raise ValueError(f"targets must not lie inside each other, got {name!r} inside another target")
        around = [n for n, m in modules.items() if isinstance(m, MoELoRALayer) and f"{name}.".startswith(f"{n}.")]
        inner = [m for m in modules[name].modules() if isinstance(m, MoELoRALayer)]
        if around or inner:
            raise ValueError(
                f"targets must be modules without a mixture, got {name!r}: remove() the first handle or name others"
            )
        check_target(modules[name], name)
    check_one_place(model, {name: modules[name] for name in found})
    return found


def for_layer(labels: Tensor | Mapping[str, Tensor], name: str) -> Tensor | None:
    """What belongs to a layer: the tensor itself, or that of the first regex which matches the layer's whole name; None if none does."""
    if isinstance(labels, Tensor):
        return labels
    return next((t for pattern, t in labels.items() if _compiled(pattern).fullmatch(name)), None)


class MoELoRA:
    """Handle on the mixtures injected into one model."""

    def __init__(self, model: nn.Module, config: MoELoRAConfig, layers: Mapping[str, Any]) -> None:
        """Made by `inject`; the layers of other integrations look alike."""
        self.model, self.config = model, config
        self.layers: dict[str, MoELoRALayer] = dict(layers)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters: routers and experts, not the base."""
        return (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Keys as in the file: ``<module>.router.weight``, ``<module>.lora_a``, ``<module>.lora_b``."""
        for name, layer in self.layers.items():
            router = layer.router.weight
            assert isinstance(router, nn.Parameter)
            yield f"{name}.router.weight", router
            yield f"{name}.lora_a", layer.lora_a
            yield f"{name}.lora_b", layer.lora_b

    def module(self, name: str) -> StandIn:
        """What stands in the model at the place of a layer."""
        return self.layers[name]

    def name_in_base(self, name: str) -> str:
        """A layer's name in the model as it was before anybody wrapped it."""
        return name

    def ordinary_loras(self) -> dict[str, tuple[Float[Tensor, "r d"], Float[Tensor, "o r"]]]:
        """A and scaled B of the ordinary LoRAs of the same adapter, by name; here there are none, PEFT's adapters have some."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors, detached; sharded ones (`fully_shard`) are gathered, which every rank has to join."""
        return {name: whole(p.detach()) for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads tensors, all or none.

        Raises:
            ValueError: A key is missing, unknown or of another shape; the message names it.
        """
        own = dict(self.named_parameters())
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be tensors by name, got {type(state).__name__}")
        for key in [*own, *state]:
            if key not in state:
                raise ValueError(f"state must hold {key!r}, but it is missing")
            if key not in own:
                near = difflib.get_close_matches(key, own, n=1, cutoff=0.0)
                raise ValueError(f"state must hold keys of this model only, got {key!r}; nearest: {near}")
            if not isinstance(state[key], Tensor):
                raise ValueError(f"{key} must be a tensor, got {type(state[key]).__name__}")
            if own[key].shape != state[key].shape:
                raise ValueError(
                    f"{key} must have shape {tuple(own[key].shape)}, got {tuple(state[key].shape)} (another rank, width or number of experts?)"
                )
        check_numbers("state", {key: state[key] for key in own})
        for key, parameter in own.items():
            write_parameter(parameter, state[key])

    def aux_loss(self) -> Float[Tensor, ""]:
        """``balance_coef * mean balance + z_coef * mean z`` over the layers that ran since the last call; then forgets them.

        Each layer counts with its last forward pass: call it once per pass that is trained on. In distributed training it is the
        loss of this rank's tokens.
        """
        wanted = self.config.balance_coef > 0 or self.config.z_coef > 0
        parts = [part for layer in self.layers.values() if wanted and (part := layer.aux_loss()) is not None]
        self.forget()
        if not parts:
            return torch.zeros((), device=next((p.device for p in self.parameters()), None))
        balance = torch.stack([p.balance for p in parts]).mean()
        return self.config.balance_coef * balance + self.config.z_coef * torch.stack([p.z for p in parts]).mean()

    def forget(self) -> None:
        """Drops the graph of the last forward pass, as `aux_loss` does; `stats` still knows where tokens went."""
        for layer in self.layers.values():
            layer.state.last = None

    def stats(self) -> dict[str, RoutingStatistics]:
        """Expert load and entropy of each layer's last forward pass; see `moe_lora.collect` for several passes."""
        last = {name: layer.state.seen for name, layer in self.layers.items()}
        return {name: routing_statistics(routing) for name, routing in last.items() if routing is not None}

    def jitter(self, generator: torch.Generator) -> None:
        """Draws the router noise of the coming passes from ``generator``, once per layer: call it once per step.

        The noise is then a function of the drawn seed, so gradient checkpointing's second pass sees the same. Before the first
        call it comes from torch's default generator, as dropout's does.
        """
        seeds = torch.randint(2**62, (len(self.layers),), generator=generator, device=generator.device).tolist()
        for layer, seed in zip(self.layers.values(), seeds, strict=True):
            layer.state.jitter_seed = seed

    @contextmanager
    def token_mask(self, mask: Bool[Tensor, ...] | Mapping[str, Bool[Tensor, ...]]) -> Iterator[None]:
        """Tokens with mask False (padding) are not routed, not computed, not counted inside the context.

        With gradient checkpointing, backward belongs inside the context too: it runs forward again.

        Args:
            mask: (n,) for every row, or (b, n) as the layer's tokens; or regex on layer names -> mask, where layers see different tokens.
        """
        masks = mask.values() if isinstance(mask, Mapping) else [mask]
        if wrong := [m for m in masks if not isinstance(m, Tensor)]:
            raise ValueError(
                f"token_mask must be a boolean tensor, or such tensors by name, got {type(wrong[0]).__name__}"
            )
        before = {name: layer.state.token_mask for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.state.token_mask = for_layer(mask, name)
            yield
        finally:
            for name, layer in self.layers.items():
                layer.state.token_mask = before[name]

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
        """Puts the original modules back; the handle is empty afterwards."""
        for name, layer in self.layers.items():
            parent, leaf = _parent(self.model, name)
            setattr(parent, leaf, layer.base)
        self.layers = {}

    def save(self, path: str | Path) -> Path:
        """Writes ``moe_lora.safetensors`` and ``moe_lora.json`` into the folder ``path``, atomically.

        Of several ranks the first writes. With sharded parameters every rank has to call it, and returns when the files are there.

        Raises:
            ValueError: The mixtures were removed, or hold NaN; or the folder cannot be made.
        """
        if not self.layers:
            raise ValueError("handle must hold mixtures to be written, got none (removed?)")
        folder = save_tensors(Path(path), self.state_dict(), self.config, list(self.layers))
        if any(hasattr(p, "full_tensor") for p in self.parameters()):
            torch.distributed.barrier()
        return folder

    def load(self, path: str | Path) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: Another rank, number of experts, target or shape, or a broken file; the message says which.
        """
        self.load_state_dict(load_tensors(Path(path), self.config, list(self.layers)))


def inject(
    model: nn.Module, config: MoELoRAConfig, targets: Targets, *, generator: torch.Generator | None = None
) -> MoELoRA:
    """Wraps the chosen modules of ``model`` in `MoELoRALayer`s; no output bit changes.

    Args:
        model: Changed in place. Which of its own parameters train is left as it is.
        config: Of every mixture.
        targets: Regexes that match whole module names, or a predicate on names.
        generator: Source of the initial A and router weights.

    Raises:
        ValueError: See `find_targets`, `moe_lora.layer.infer_features`.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> handle = inject(model, MoELoRAConfig(rank=2, alpha=2.0), ["0"])
    >>> sorted(handle.state_dict())
    ['0.lora_a', '0.lora_b', '0.router.weight']
    """
    if not isinstance(model, nn.Module) or not isinstance(config, MoELoRAConfig):
        raise ValueError(
            f"model must be a torch module and config a MoELoRAConfig, got {type(model).__name__} and {type(config).__name__}"
        )
    layers = {
        name: MoELoRALayer(model.get_submodule(name), config, generator=generator, name=name)
        for name in find_targets(model, targets)
    }
    for name, layer in layers.items():
        parent, leaf = _parent(model, name)
        setattr(parent, leaf, layer)
    return MoELoRA(model, config, layers)


def inject_saved(model: nn.Module, path: str | Path) -> MoELoRA:
    """Injects what a folder written by `MoELoRA.save` holds: its config, its targets, its weights.

    Raises:
        ValueError: The folder is broken or the model lacks its targets; the model is unchanged then.
    """
    config, targets = read_config(Path(path))
    check_shapes(load_tensors(Path(path), config, targets), config, targets, Path(path))
    handle = inject(model, config, [re.escape(t) for t in targets])
    try:
        handle.load(path)
    except BaseException:
        handle.remove()
        raise
    return handle
