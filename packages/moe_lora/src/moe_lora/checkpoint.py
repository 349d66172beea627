"""Files: ``moe_lora.safetensors`` and ``moe_lora.json``; only the adapter, never the base.

Keys are ``<module>.router.weight`` (e, d), ``<module>.lora_a`` (e, r, d) and ``<module>.lora_b`` (e, o, r), with the module's
name in the model. The JSON holds ``format`` (1), ``config`` (the fields of `MoELoRAConfig`) and ``targets`` (module names).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_lora.config import MoELoRAConfig

FORMAT = 1
WEIGHTS, META = "moe_lora.safetensors", "moe_lora.json"


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or a sharded one gathered from all ranks."""
    gather = getattr(tensor, "full_tensor", None)
    result: Tensor = tensor if gather is None else gather()
    return result


def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Copies a whole tensor into a parameter, sharded or not."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        local = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(local, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(value)


def _first_rank() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def save_tensors(folder: Path, tensors: dict[str, Tensor], config: MoELoRAConfig, targets: list[str]) -> Path:
    """Writes both files through temporary names; of several ranks the first does."""
    if not _first_rank():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights, meta = folder / WEIGHTS, folder / META
    save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, f"{weights}.tmp", {"format": "pt"})
    Path(f"{meta}.tmp").write_text(
        json.dumps({"format": FORMAT, "config": asdict(config), "targets": targets}, indent=2) + "\n"
    )
    os.replace(f"{weights}.tmp", weights)
    os.replace(f"{meta}.tmp", meta)
    return folder


def read_config(folder: Path) -> tuple[MoELoRAConfig, list[str]]:
    """Config and targets of a saved adapter.

    Raises:
        ValueError: The file is missing or not ours.
    """
    meta = folder / META
    try:
        data = json.loads(meta.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {data['format']!r}")
        return MoELoRAConfig(**data["config"]), [str(t) for t in data["targets"]]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} must hold {META}, but it is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{meta} must be a config written by moe_lora, got {type(error).__name__}: {error}") from None


def load_tensors(folder: Path, config: MoELoRAConfig, targets: list[str]) -> dict[str, Tensor]:
    """Tensors of a saved adapter for a model with this config and these targets.

    Raises:
        ValueError: Missing or broken file, another rank, another number of experts, other targets.
    """
    saved, saved_targets = read_config(folder)
    for name in ("rank", "num_experts", "alpha", "top_k", "gating"):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(f"{folder} must have {name} = {getattr(config, name)!r}, got {getattr(saved, name)!r}")
    if lacking := sorted(set(targets) - set(saved_targets)):
        raise ValueError(f"{folder} must have the model's targets, but lacks {lacking[:3]}")
    if unknown := sorted(set(saved_targets) - set(targets)):
        raise ValueError(f"{folder} must have the model's targets only, got {unknown[:3]} too")
    return read_tensors(folder / WEIGHTS)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ValueError: It cannot be read, or a tensor is no floating-point tensor of finite numbers.
    """
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a readable safetensors file, got: {error}") from None
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            what = "NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{file} must hold finite floating-point numbers, got {what} in {key!r}")
    return tensors
