"""Files: ``moe_lora.safetensors`` and ``moe_lora.json``; only the adapter, never the base.

Keys are ``<module>.router.weight`` (e, d), ``<module>.lora_a`` (e, r, d) and ``<module>.lora_b`` (e, o, r), with the module's
name in the model. The JSON holds ``format`` (1), ``config`` (the fields of `MoELoRAConfig`) and ``targets`` (module names).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_lora.config import MoELoRAConfig

FORMAT = 1
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
    check_numbers("state to save", tensors)
    make_folder(folder)
    weights, meta = folder / WEIGHTS, folder / META
    about = {"format": FORMAT, "config": asdict(config), "targets": targets}
    write_adapter(weights, {k: t.contiguous().cpu() for k, t in tensors.items()}, {"format": "pt"}, meta, about)
    return folder


def write_adapter(
    weights: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], meta: Path, about: Mapping[str, Any]
) -> None:
    """Writes tensors and the JSON beside them through temporary names, both with the permissions that a new file here gets."""
    new_weights, new_meta = Path(f"{weights}.tmp"), Path(f"{meta}.tmp")
    save_file(dict(tensors), new_weights, dict(header))
    new_meta.write_text(json.dumps(about, indent=2) + "\n")
    new_weights.chmod(stat.S_IMODE(new_meta.stat().st_mode))  # safetensors lets the owner alone read it
    os.replace(new_weights, weights)
    os.replace(new_meta, meta)


def _require_no_pipe(file: Path) -> None:
    """Refuses a pipe or a device, which would be read for ever."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise ValueError(f"{file} must be a file, got a pipe or a device")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose last of two equal names would win without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"every name must be there once, got {max(names, key=names.count)!r} twice")
    return found


def read_config(folder: Path) -> tuple[MoELoRAConfig, list[str]]:
    """Config and targets of a saved adapter.

    Raises:
        ValueError: The file is missing or not ours.
    """
    meta = folder / META
    _require_no_pipe(meta)
    try:
        data = json.loads(meta.read_text("utf-8"), object_pairs_hook=_once)
        if data["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {data['format']!r}")
        if not isinstance(data["targets"], list):
            raise ValueError(f"targets must be a list, got {data['targets']!r}")
        return MoELoRAConfig(**data["config"]), [str(t) for t in data["targets"]]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} must hold {META}, but it is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
    _require_no_pipe(file)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a readable safetensors file, got: {error}") from None
    check_numbers(str(file), tensors)
    return tensors


def check_numbers(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that hold no finite floating-point numbers of a common type: an adapter of NaNs is neither written nor read.

    Raises:
        ValueError: Naming the first.
    """
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            kind = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
            raise ValueError(f"{what} must hold finite floating-point numbers, got {kind} in {key!r}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{what} must hold finite floating-point numbers, got NaN or infinity in {key!r}")


def make_folder(folder: Path) -> None:
    """Makes a folder to write into.

    Raises:
        ValueError: It cannot be one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"path must be a folder, or one that can be made, got {folder}: {error.strerror}") from error


def check_shapes(tensors: Mapping[str, Tensor], config: MoELoRAConfig, targets: Sequence[str], where: Path) -> None:
    """Refuses a config that its own tensors do not bear out, before memory is made for what it says.

    Raises:
        ValueError: Naming the tensor.
    """
    for target in targets:
        key = f"{target}.lora_a"
        got = tuple(tensors[key].shape[:2]) if key in tensors else None
        if got != (config.num_experts, config.rank):
            raise ValueError(
                f"{where} must hold {key!r} of {config.num_experts} experts of rank {config.rank}, as it says, got {got}"
            )
