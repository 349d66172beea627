"""Loading transformers models from local folders, without surprises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from id_reward.errors import InputError


def transformers_module(extra: str) -> Any:
    """transformers, or an ImportError that names the extra."""
    try:
        import transformers
    except ImportError:
        raise ImportError(f'this backend needs transformers and torch: pip install "id-reward[{extra}]"') from None
    return transformers


def load(cls: Any, source: str | Path, what: str, *, local_files_only: bool = True, **options: Any) -> Any:
    """``cls.from_pretrained``: a folder, or (``local_files_only=False``) a hub id; nothing is unpickled, no code of the folder is run.

    Raises:
        ValueError: The folder is missing or does not hold what is needed; one sentence.
    """
    if local_files_only and not Path(source).is_dir():
        raise InputError(f"{what} must be a folder in transformers' format, but there is no folder {source}")
    try:
        return cls.from_pretrained(str(source), local_files_only=local_files_only, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{what} must be in transformers' format, but {source} cannot be read: {reason}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The state dict in a checkpoint, .safetensors or what `torch.save` writes; only tensors are read.

    Raises:
        ValueError: The file holds anything else.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = next((content[name] for name in ("state_dict", "model") if name in content), content)
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise InputError("it holds no state dict")
        return {name.removeprefix("module."): value for name, value in state.items()}
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} must be a checkpoint of tensors, got: {first}") from error
