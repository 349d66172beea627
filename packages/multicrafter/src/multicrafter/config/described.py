"""What every value of a run means: the sentence that its class's docstring has for it, read by ``docstring_parser``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from multicrafter.config.provenance import provenance


class Described(NamedTuple):
    """One value of a run.

    Attributes:
        name: Dotted, as ``--set`` takes it.
        value: What it is.
        kind: Type, as the class states it.
        origin: See `provenance`.
        meaning: What it does.
    """

    name: str
    value: Any
    kind: str
    origin: str
    meaning: str


def described(run: object) -> list[Described]:
    """Every value of a run, in the order in which its YAML has them.

    >>> from multicrafter.config.recipes import tiny_stage1
    >>> found = {d.name: d for d in described(tiny_stage1())}
    >>> found["pretrain.adapters.top_k"].kind, found["pretrain.adapters.top_k"].meaning
    ('int', 'Experts per token.')
    """
    origins = provenance(run)
    return [
        Described(name, value, kind, origins.get(name, "ours"), meaning)
        for name, value, kind, meaning in _fields(run, "")
    ]


def _fields(config: Any, path: str) -> Iterator[tuple[str, Any, str, str]]:
    """Name, value, type and meaning of each field, those of nested configurations in its place."""
    meanings = _meanings(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{name}.")
        else:
            yield name, value, str(field.type), meanings.get(field.name, "")


def _meanings(kind: type) -> dict[str, str]:
    """Sentences of "Attributes:" by name, those of a class's parents too; a line may speak of several names."""
    import docstring_parser

    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        for entry in docstring_parser.parse(vars(one).get("__doc__") or "").params:
            for name in entry.arg_name.split(","):
                found[name.strip()] = " ".join((entry.description or "").split())
    return found
