"""``multicrafter plan``: does a run fit, how long does a step take; from fake tensors, without weights.

Names are imported when they are first used, so that the command line's help stays quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from multicrafter import renamed

_HOMES = {
    "require_picture": "memory",
    "CARDS": "hardware", "Card": "hardware", "card_for": "hardware", "available_memory": "memory", "require_memory": "memory",
    "require_weights": "memory", "Pass": "estimate", "Plan": "estimate", "measure": "estimate", "predict": "estimate",
    "MemoryTracker": "tracker",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """One of the names above."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


renamed(__name__, {"Tracker": "MemoryTracker"})
