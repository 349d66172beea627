"""MultiCrafter: several given subjects in one picture, each faithful, nobody blended (arXiv 2509.21953)."""

from typing import Any

from multicrafter import _moved

__version__ = "0.1.0"

_moved.install()
_HOMES = {
    "MultiCrafterPipeline": "pipeline",
    "tiny": "config.recipes",
    "flux1_dev_stage1": "config.recipes",
    "flux1_dev_stage2": "config.recipes",
    "flux2_klein_stage1": "config.recipes",
    "flux2_klein_stage2": "config.recipes",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: diffusers takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
