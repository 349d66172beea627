"""The demonstration on the drawn world: both stages, their evaluation, figures, a report."""

from typing import Any


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: a report alone needs none of it."""
    if name not in ("Clock", "DemoConfig", "claims", "run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from multicrafter.demo import both_stages

    return getattr(both_stages, name)
