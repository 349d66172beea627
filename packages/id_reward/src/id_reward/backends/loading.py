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
        raise InputError(f"{what} must be in transformers' format, but {source} cannot be read: {reason}") from None
