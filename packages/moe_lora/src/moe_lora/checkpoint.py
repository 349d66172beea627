"""Files: ``moe_lora.safetensors`` (keys ``<module>.router.weight | .lora_a | .lora_b``) and ``moe_lora.json`` (config, targets)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lora.config import MoELoRAConfig

FORMAT = 1


def save_tensors(folder: Path, tensors: dict[str, Tensor], config: MoELoRAConfig, targets: list[str]) -> Path:
    """Writes both files through temporary names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, meta = folder / "moe_lora.safetensors", folder / "moe_lora.json"
    save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, f"{weights}.tmp")
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
    meta = folder / "moe_lora.json"
    try:
        data = json.loads(meta.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"{meta} must have format {FORMAT}, got {data['format']!r}")
        return MoELoRAConfig(**data["config"]), list(data["targets"])
    except FileNotFoundError:
        raise ValueError(f"{folder} must hold moe_lora.json, but it is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
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
    if sorted(saved_targets) != sorted(targets):
        wrong = sorted(set(saved_targets) ^ set(targets))[:3]
        raise ValueError(f"{folder} must have the model's targets, but they differ in {wrong}")
    try:
        tensors: dict[str, Tensor] = load_file(folder / "moe_lora.safetensors")
        return tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder / 'moe_lora.safetensors'} must be a readable safetensors file, got: {error}"
        ) from None
