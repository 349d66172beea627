"""Mixtures as adapters of PEFT: `get_peft_model`, diffusers' and transformers' `add_adapter`, several adapters, files.

PEFT's hook for layers of one's own (`LoraConfig._register_custom_module`) is experimental; what is used of it is tested (docs/adr/0032).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_lora.checkpoint import whole
from moe_lora.config import MoELoRAConfig
from moe_lora.inject import MoELoRA
from moe_lora.layer import infer_features, mixture, reset_mixture
from moe_lora.routing import Router
from moe_lora.state import AuxLoss, RoutingState

try:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import dispatch_default
    from peft.tuners.tuners_utils import check_target_module_exists
except ImportError as error:  # pragma: no cover
    raise ImportError('moe_lora.integrations.peft needs peft: pip install "moe-lora[peft]"') from error

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@dataclass
class PeftMoELoRAConfig(LoraConfig):  # type: ignore[misc]
    """PEFT's LoraConfig for mixtures: ``r``, ``lora_alpha``, ``target_modules``, ``lora_dropout``, ``use_rslora`` mean what they mean there.

    Attributes:
        num_experts, top_k, gating, dispatch, jitter, balance_coef, z_coef: See `moe_lora.MoELoRAConfig`.
        mixture_modules: Which of the targets become mixtures, as in ``target_modules`` (suffixes, or one regex); the others, which have to be
            linear, become ordinary LoRAs. None: all of them.

    Raises:
        ValueError: See `moe_lora.MoELoRAConfig`; or an option that a mixture does not have (DoRA, biases, special initialisations).
    """

    num_experts: int = field(default=4, metadata={"help": "Experts per mixture."})
    top_k: int = field(default=1, metadata={"help": "Experts per token."})
    gating: str = field(default="softmax_then_topk", metadata={"help": "How gate weights are made."})
    dispatch: str = field(default="grouped", metadata={"help": "How experts are computed."})
    jitter: float = field(default=0.0, metadata={"help": "Noise on the router's input in training."})
    balance_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balance loss."})
    z_coef: float = field(default=0.001, metadata={"help": "Weight of the router z-loss."})
    mixture_modules: list[str] | str | None = field(default=None, metadata={"help": "Targets that become mixtures."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixture()
        for name, neutral in (("use_dora", False), ("lora_bias", False), ("layer_replication", None)):
            if getattr(self, name) != neutral:
                raise ValueError(f"{name} must be {neutral} for mixtures, got {getattr(self, name)!r}")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"init_lora_weights must be a bool for mixtures, got {self.init_lora_weights!r}")
        self._register_custom_module({nn.Module: _adapted})

    def mixture(self, rank: int | None = None, alpha: int | float | None = None) -> MoELoRAConfig:
        """The mixture's own config, for a layer of another rank or alpha if PEFT's patterns say so."""
        return MoELoRAConfig(
            rank=self.r if rank is None else rank,
            alpha=float(self.lora_alpha if alpha is None else alpha),
            num_experts=self.num_experts, top_k=self.top_k, gating=self.gating, dispatch=self.dispatch,  # type: ignore[arg-type]
            jitter=self.jitter, balance_coef=self.balance_coef, z_coef=self.z_coef,
        )  # fmt: skip

    def wants_mixture(self, name: str) -> bool:
        """Whether the module of this name becomes a mixture."""
        if self.mixture_modules is None:
            return True
        chosen = LoraConfig(target_modules=self.mixture_modules)
        return bool(check_target_module_exists(chosen, name))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftMoELoRAConfig:
        """PEFT would make a plain LoraConfig of the file and drop what it does not know."""
        known = {name for name in cls.__dataclass_fields__ if name not in ("peft_type", "runtime_config")}
        return cls(**{k: v for k, v in kwargs.items() if k in known})


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


class PeftMoELoRALayer(nn.Module, LoraLayer):  # type: ignore[misc]
    """``h_out = base(h) + sum over active adapters of their mixtures`` around any module that maps (..., d_in) to (..., d_out)."""

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
        """Called by PEFT."""
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_router, self.states = nn.ModuleDict(), {}
        self.lora_experts_a, self.lora_experts_b = nn.ParameterDict(), nn.ParameterDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, kwargs.pop("r"), lora_alpha=kwargs.pop("lora_alpha"), config=config, **kwargs)

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
        like = next(self.base_layer.parameters())
        dtype = like.dtype if like.dtype.is_floating_point else torch.float32
        e, d, o = own.num_experts, self.in_features, self.out_features
        self.states[adapter_name] = RoutingState(own)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / math.sqrt(r) if config.use_rslora else own.scaling
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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "mixtures must stay beside their base, got merge: different tokens get different updates (see moe_lora.approximate)"
        )

    unmerge = merge

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus that of the active adapters."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names must not be given with mixtures, got a batch of mixed adapters")
        out: Tensor = self.base_layer(hidden_states, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.states:
                h, state = self.lora_dropout[name](hidden_states), self.states[name]
                delta = mixture(h, *self.tensors(name), state, scaling=self.scaling[name], training=self.training)
                out = out + delta.to(out.dtype).view_as(out)
        return out


def _adapted(target: nn.Module, adapter_name: str, config: PeftMoELoRAConfig, **kwargs: Any) -> nn.Module | None:
    """What PEFT puts in place of a target: a mixture, or its own LoRA."""
    if config.wants_mixture(kwargs.get("target_name", "")):
        return PeftMoELoRALayer(target, adapter_name, config, **kwargs)
    plain: nn.Module | None = dispatch_default(target, adapter_name, config=config, **kwargs)
    return plain


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


def save_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, as `PeftModel.save_pretrained` does, for any model with adapters."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if adapter_name not in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name must be an adapter of the model, got {adapter_name!r}")
    meta = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config[adapter_name].to_dict().items()}  # type: ignore[index, union-attr]
    meta.pop("runtime_config", None)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    save_file(
        {k: whole(t.detach()).contiguous().cpu() for k, t in tensors.items()},
        folder / f"{WEIGHTS}.tmp",
        {"format": "pt"},
    )
    (folder / f"{CONFIG}.tmp").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
    os.replace(folder / f"{WEIGHTS}.tmp", folder / WEIGHTS)
    os.replace(folder / f"{CONFIG}.tmp", folder / CONFIG)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> MoELoRA:
    """Adds the adapter in a folder (of `save_adapter` or `PeftModel.save_pretrained`) to a PEFT, diffusers or transformers model.

    `PeftModel.from_pretrained` works too, given the config: without ``config=PeftMoELoRAConfig.from_pretrained(folder)`` PEFT takes it for an
    ordinary LoRA and warns.

    Raises:
        ValueError: A file is missing or broken, or a tensor is missing, unknown or of another shape.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold {name}, but it is missing")
    try:
        config = PeftMoELoRAConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, json.JSONDecodeError, TypeError, OSError) as error:
        raise ValueError(
            f"{folder} must be written by save_adapter or save_pretrained, got {type(error).__name__}: {error}"
        ) from None
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which the model has already")
    wrapped = isinstance(model, PeftModel)
    add: Any = model.add_adapter
    if wrapped:
        add(adapter_name, config)
    else:
        add(config, adapter_name=adapter_name)
    prefix = PREFIX if wrapped else ""
    tensors = {prefix + key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    own = {k: tuple(t.shape) for k, t in get_peft_model_state_dict(model, adapter_name=adapter_name).items()}
    given = {k: tuple(t.shape) for k, t in tensors.items()}
    for key in sorted(own.keys() | given.keys()):
        if own.get(key) != given.get(key):
            delete: Any = (
                getattr(model, "delete_adapters", None) or model.delete_adapter
            )  # diffusers' name, or the others'
            delete(adapter_name)
            raise ValueError(f"{folder / WEIGHTS} must hold {key!r} of shape {own.get(key)}, got {given.get(key)}")
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    return handle(model, adapter_name)


__all__ = ["PeftMoELoRAConfig", "PeftMoELoRALayer", "handle", "load_adapter", "save_adapter"]
