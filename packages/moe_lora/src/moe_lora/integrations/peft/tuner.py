"""PEFT's LoRA model that puts in mixtures, and refuses what it cannot do with them before anything is touched."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from moe_lora.checkpoint import check_numbers
from moe_lora.integrations.peft.config import MixtureType, PeftMoELoRAConfig
from moe_lora.integrations.peft.layer import CANNOT_MERGE, PeftMoELoRALayer
from moe_lora.layer import infer_features
from moe_lora.standin import check_one_place, check_target


def register() -> None:
    """Makes the type known to PEFT's tables, as its own types are."""
    PEFT_TYPE_TO_CONFIG_MAPPING[MixtureType.MOE_LORA] = PeftMoELoRAConfig
    PEFT_TYPE_TO_TUNER_MAPPING[MixtureType.MOE_LORA] = MoELoRAModel
    PEFT_TYPE_TO_PREFIX_MAPPING[MixtureType.MOE_LORA] = "lora_"


def mixtures_of(model: nn.Module, adapter_names: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """(layer, adapter) of the mixtures of these adapters, or of those that are active."""
    names = None if adapter_names is None else list(adapter_names)
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, PeftMoELoRALayer))
    return [(n, a) for n, m in layers for a in (m.active_adapters if names is None else names) if a in m.states]


def refuse_merging(model: nn.Module, adapter_names: Iterable[str] | None = None) -> None:
    """Merging goes from layer to layer, so the first mixture would stop it halfway.

    Raises:
        ValueError: One of the named (or active) adapters has a mixture somewhere.
    """
    if found := mixtures_of(model, adapter_names):
        raise ValueError(
            f"adapters to merge must be ordinary LoRAs, got {found[0][1]!r}, a mixture at {found[0][0]!r}: {CANNOT_MERGE};"
            " nothing was merged"
        )


def find_targets(model: nn.Module, config: PeftMoELoRAConfig) -> dict[str, nn.Module]:
    """The modules that PEFT is going to adapt, by name.

    Raises:
        ValueError: No mixture or LoRA of this config can stand at one of them, or ``mixture_modules`` matches none.
    """
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    modules = dict(model.named_modules())
    adapted = [name for name, m in modules.items() if isinstance(m, LoraLayer)]
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not name or not check_target_module_exists(config, name):
            continue
        outer = next((a for a in adapted if name.startswith(f"{a}.")), None)
        if outer is None:
            found[name] = module
        elif isinstance(modules[outer], PeftMoELoRALayer) and name.startswith(f"{outer}.base_layer."):
            raise ValueError(f"target_modules must not lie inside a mixture, got {name!r} inside {outer!r}")
    for name, module in found.items():
        _check(name, module, config, found, adapted)
    check_one_place(model, {name: module for name, module in found.items() if config.wants_mixture(name)})
    if config.mixture_modules and found and not any(config.wants_mixture(name) for name in found):
        raise ValueError(
            f"mixture_modules must match some of the targets, got {config.mixture_modules!r}, which matches none of {sorted(found)[:4]}"
        )
    return found


def _check(
    name: str, module: nn.Module, config: PeftMoELoRAConfig, found: dict[str, nn.Module], adapted: list[str]
) -> None:
    wanted = config.wants_mixture(name)
    if isinstance(module, LoraLayer):
        if wanted is not isinstance(module, PeftMoELoRALayer):
            has, got = ("an ordinary LoRA", "a mixture") if wanted else ("a mixture", "an ordinary LoRA")
            raise ValueError(
                f"adapter must be {has} on {name!r}, which has one already, got {got}: they cannot share one module"
            )
        return
    if not wanted:
        return
    check_target(module, name)
    inside = [other for other in (*found, *adapted) if other.startswith(f"{name}.")]
    if inside:
        raise ValueError(f"target_modules must not lie inside a mixture, got {inside[0]!r} inside {name!r}")
    infer_features(module)


class _Fuse:
    """diffusers' ``fuse_lora`` of one model, which refuses mixtures first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Any = None) -> Any:
        refuse_merging(self.model, [adapter_names] if isinstance(adapter_names, str) else adapter_names)
        kind: Any = type(self.model)
        return kind.fuse_lora(self.model, lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)


class MoELoRAModel(LoraModel):  # type: ignore[misc]
    """Of the PEFT type ``MOE_LORA``: what `peft.get_peft_model` and ``add_adapter`` make of a `PeftMoELoRAConfig`."""

    @staticmethod
    def _create_new_module(
        lora_config: PeftMoELoRAConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if lora_config.wants_mixture(kwargs.get("target_name", "")):
            return PeftMoELoRALayer(target, adapter_name, lora_config, **kwargs)
        plain: nn.Module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        return plain

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT does, once every target is known to be able to take what it shall get.

        Raises:
            ValueError: See `find_targets`; the model is unchanged.
        """
        config = self._prepare_adapter_config(self.peft_config[adapter_name], self.get_model_config(model))
        find_targets(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if hasattr(type(model), "fuse_lora"):
            model.__dict__["fuse_lora"] = _Fuse(model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges ordinary LoRAs.

        Raises:
            ValueError: One of the adapters has a mixture; nothing is merged then.
        """
        refuse_merging(self.model, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            refuse_merging(self.model, kwargs.get("adapter_names"))
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        return unloaded

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combines ordinary LoRAs into one.

        Raises:
            ValueError: One of them has a mixture; no adapter is added then.
        """
        if found := mixtures_of(self.model, adapters):
            raise ValueError(
                f"adapters must be ordinary LoRAs to be combined into one, got {found[0][1]!r}, a mixture at {found[0][0]!r}:"
                " make them active together instead, with base_model.set_adapter([...])"
            )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftMoELoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT warns where tensors are missing and drops those that fit nowhere; here both are errors.

        Raises:
            ValueError: A tensor of the adapter is missing, unknown, of another shape or not finite; nothing is loaded.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        prefix = "base_model.model."
        wrapped = any(name.startswith(prefix) for name, _ in model.named_parameters())
        given = {k if wrapped else k.removeprefix(prefix): t for k, t in remapped.items() if ".lora_" in k}
        of_adapter = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
        own = {n: p for n, p in model.named_parameters() if of_adapter.search(n)}
        for key in sorted(own.keys() | given.keys()):
            want, got = (tuple(d[key].shape) if key in d else "nothing" for d in (own, given))
            if want != got:
                raise ValueError(f"state_dict must hold {want} for {key!r} of adapter {adapter_name!r}, got {got}")
        check_numbers(f"state_dict of adapter {adapter_name!r}", given)
        return remapped
