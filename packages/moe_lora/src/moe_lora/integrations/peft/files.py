"""Files of one adapter, as PEFT writes them, for models with and without its wrapper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from moe_lora.checkpoint import check_numbers, make_folder, read_tensors, whole, write_adapter
from moe_lora.inject import MoELoRA
from moe_lora.integrations.peft.config import PeftMoELoRAConfig
from moe_lora.integrations.peft.handle import PeftMoELoRA, handle
from moe_lora.integrations.peft.tuner import find_targets, mixtures_of
from moe_lora.layer import infer_features

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def save_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, as `PeftModel.save_pretrained` does, for any model with adapters.

    Raises:
        ValueError: The model has no such adapter, or it holds NaN; nothing is written then.
    """
    folder = Path(folder)
    if adapter_name not in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name must be an adapter of the model, got {adapter_name!r}")
    meta = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config[adapter_name].to_dict().items()}  # type: ignore[index, union-attr]
    meta.pop("runtime_config", None)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    # diffusers makes a LoraConfig of what stands under this key, and fails, instead of loading next to nothing
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(meta)}
    held = {k: whole(t.detach()).contiguous().cpu() for k, t in tensors.items()}
    check_numbers("adapter to save", held)
    make_folder(folder)
    write_adapter(folder / WEIGHTS, held, header, folder / CONFIG, dict(sorted(meta.items())))
    return folder


def _read(folder: Path) -> tuple[PeftMoELoRAConfig, dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold {name}, but it is missing")
    try:
        config = PeftMoELoRAConfig.from_pretrained(str(folder))
    except (json.JSONDecodeError, TypeError, OSError) as error:
        raise ValueError(
            f"{folder} must be written by save_adapter or save_pretrained, got {type(error).__name__}: {error}"
        ) from None
    return config, {k.removeprefix(PREFIX): t for k, t in read_tensors(folder / WEIGHTS).items()}


def _expected(model: nn.Module, config: PeftMoELoRAConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the adapter's tensors at mixtures and linears, before anything is put into the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    e = config.num_experts
    for name, module in find_targets(model, config).items():
        base = getattr(module, "base_layer", module)
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        if config.wants_mixture(name):
            d, o = infer_features(base)
            shapes[f"{name}.lora_router.weight"] = (e, d)
            shapes |= {f"{name}.lora_experts_a": (e, r, d), f"{name}.lora_experts_b": (e, o, r)}
        elif isinstance(base, nn.Linear):
            shapes |= {
                f"{name}.lora_A.weight": (r, base.in_features),
                f"{name}.lora_B.weight": (base.out_features, r),
            }
    return shapes


def load_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> MoELoRA:
    """Adds the adapter in a folder (of `save_adapter` or `PeftModel.save_pretrained`) to a PEFT, diffusers or transformers model.

    An ordinary LoRA's folder is added as one, beside the mixtures; the handle then has no layers.

    Raises:
        ValueError: A file is missing or broken, or a tensor is missing, unknown or of another shape; the model is unchanged.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which the model has already")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    want = _expected(base, config)
    given = {k: tuple(t.shape) for k, t in tensors.items()}
    for key in sorted(want.keys() | {k for k in given if ".lora_router" in k or ".lora_experts_" in k}):
        if want.get(key) != given.get(key):
            raise ValueError(f"{folder / WEIGHTS} must hold {key!r} of shape {want.get(key)}, got {given.get(key)}")
    add: Any = model.add_adapter
    if isinstance(model, PeftModel):
        add(adapter_name, config)
    else:
        add(config, adapter_name=adapter_name)
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    set_peft_model_state_dict(model, {prefix + k: t for k, t in tensors.items()}, adapter_name=adapter_name)
    return (
        handle(model, adapter_name)
        if mixtures_of(base, [adapter_name])
        else PeftMoELoRA(model, config.mixture(), {}, adapter_name)
    )
