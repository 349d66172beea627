"""What drawing a picture needs, by arithmetic and before any weight is read: a request that cannot fit is refused with the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multicrafter import UserError

CGROUP = Path("/sys/fs/cgroup")
MAX_WIDTHS = 10  # tensors of a token's width that are live in a block: stream, norm, query, key, value, output, and the FFN's four


def free_memory(device: str | torch.device | None = None) -> int:
    """Bytes that are free on a device; of the machine, or of the container's share of it, where that is None or "cpu"."""
    kind = torch.device(device or "cpu")
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0])
    import psutil  # type: ignore[import-untyped]

    return min(int(psutil.virtual_memory().available), _container_share())


def _container_share() -> int:
    """What a limit of the container (cgroup v2) leaves: the limit less what is used and not given back for the asking."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return 1 << 62 if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 1 << 62


def drawing_bytes(
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    *,
    size: tuple[int, int],
    reference_size: int,
    references: int,
    pictures: int,
    text_tokens: int,
    itemsize: int,
    token_side: int | None = None,
) -> dict[str, float]:
    """Bytes that drawing needs beside the weights; a lower bound, so that what it refuses could not have fitted.

        transformer = pictures * tokens * width * 10 * itemsize,   width = heads * head_dim
        VAE         = height * width * channels * 2 * itemsize,    channels: of its outermost level, one picture at a time
        pictures    = pictures * height * width * 3 * 4

    Args:
        transformer: Its configuration.
        vae: Its configuration.
        size: Height and width of a picture in pixels.
        reference_size: Side of a reference in pixels.
        references: Of one picture.
        pictures: That are drawn together.
        text_tokens: Of a prompt.
        itemsize: Bytes of a number.
        token_side: Pixels of a token's side; by default that of a VAE whose levels each halve the picture.

    >>> config = {"num_attention_heads": 2, "attention_head_dim": 16}
    >>> need = drawing_bytes(config, {"block_out_channels": (8, 8, 8)}, size=(64, 64), reference_size=32, references=1, pictures=1,
    ...     text_tokens=16, itemsize=4)
    >>> {name: round(value) for name, value in need.items()}
    {'transformer': 122880, 'VAE': 262144, 'pictures': 49152}
    """
    channels = list(vae.get("block_out_channels", (vae.get("base_dim", 128),)))
    side = token_side or 2 ** len(channels)
    height, width = size
    tokens = text_tokens + height * width / side**2 + references * (reference_size / side) ** 2
    hidden = float(transformer["num_attention_heads"]) * float(transformer["attention_head_dim"])
    return {
        "transformer": pictures * tokens * hidden * MAX_WIDTHS * itemsize,
        "VAE": height * width * float(channels[0]) * 2 * itemsize,
        "pictures": pictures * height * width * 3 * 4.0,
    }


def require_drawing(need: Mapping[str, float], *, device: str | torch.device | None = None, what: str) -> None:
    """Compares `drawing_bytes` with the memory that is free.

    Raises:
        ValueError: It is not enough; the sentence has the numbers.
    """
    total, free = sum(need.values()), free_memory(device)
    if total > free:
        parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in need.items() if value >= 5e7)
        raise UserError(
            f"memory must hold at least {total / 1e9:.1f} GB to draw {what} ({parts}), got {free / 1e9:.1f} GB free on "
            f"{device or 'cpu'}; what helps: a smaller size or fewer pictures at once; force (--force) tries it all the same"
        )


def config_file(folder: Path, part: str) -> dict[str, Any]:
    """``config.json`` of a part of a pipeline's folder; empty where there is none."""
    import json

    file = folder / part / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        content = {}
    return content if isinstance(content, dict) else {}


__all__ = ["config_file", "drawing_bytes", "free_memory", "require_drawing"]
