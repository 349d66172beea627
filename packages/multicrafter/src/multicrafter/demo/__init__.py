"""The demonstration on the drawn world: both stages, their evaluation, figures, a report."""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    """What was in the module ``multicrafter.demo`` before 0.2; leaves with 0.3."""
    if name not in ("Clock", "DemoConfig", "claims", "run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"{__name__}.both_stages"
    message = f"{__name__}.{name} is now {new}.{name}; the old name leaves with multicrafter 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(new), name)
