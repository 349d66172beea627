"""Files that appear whole or not at all, and digests of what is in them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> Path:
    """Writes a file through a temporary name beside it; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)
    return path


def write_json(path: Path, content: object) -> None:
    """Writes JSON, whole or not at all; NaN becomes null."""

    def clean(x: object) -> object:
        if isinstance(x, tuple) and hasattr(x, "_asdict"):
            return clean(x._asdict())
        if isinstance(x, Mapping):
            return {str(k): clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        if isinstance(x, float):
            return x if math.isfinite(x) else None
        return x

    write_whole(path, json.dumps(clean(content), indent=1) + "\n")


def content_digest(content: object) -> str:
    """Sixteen hexadecimal digits of a JSON value's SHA-256, the same for equal values.

    >>> content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
