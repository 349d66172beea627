"""Base models behind one small interface; a model of your own is one class in one file (docs/guides/backbones.md)."""

from __future__ import annotations

import importlib
from typing import Any

from multicrafter import UserError
from multicrafter.models.backbones.base import Backbone, ReferenceCache
from multicrafter.models.backbones.flux1 import Flux1, Flux1Kontext
from multicrafter.models.backbones.flux2_dev import Flux2Dev
from multicrafter.models.backbones.flux2_klein import Flux2Klein
from multicrafter.models.backbones.flux2_klein_kv import Flux2KleinKV
from multicrafter.models.backbones.qwen_image21 import QwenImage21
from multicrafter.models.backbones.qwen_image_edit import QwenImageEdit

BACKBONES: tuple[Backbone, ...] = (
    Flux1(), Flux1Kontext(), Flux2Klein(), Flux2KleinKV(), Flux2Dev(), QwenImageEdit(), QwenImage21(),
)  # fmt: skip


def backbone_of(pipe_or_transformer: Any) -> Backbone:
    """The backbone of a loaded pipeline, or of a bare transformer (then Kontext counts as FLUX.1-dev, FLUX.2-dev and KV as klein).

    Raises:
        ValueError: None of the known ones.
    """
    for backbone in BACKBONES:
        if backbone.matches(pipe_or_transformer):
            return backbone
    known = ", ".join(b.pipeline_class for b in BACKBONES)
    raise UserError(
        f"pipeline must be one of {known}, or come with a backbone, got {type(pipe_or_transformer).__name__}"
    )


def get_backbone(name: str) -> Backbone:
    """By name, or ``module:attribute`` for one of your own (an instance or a class).

    Raises:
        ValueError: No such backbone.
    """
    for backbone in BACKBONES:
        if backbone.name == name:
            return backbone
    module, _, attribute = name.partition(":")
    if attribute:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"backbone must be importable as module:attribute, got {name!r}: {error}") from error
        made = found() if isinstance(found, type) else found
        if isinstance(made, Backbone):
            return made
    known = ", ".join(b.name for b in BACKBONES)
    raise UserError(f"backbone must be one of {known}, or module:attribute of a Backbone, got {name!r}")


__all__ = [
    "BACKBONES",
    "Backbone",
    "Flux1",
    "Flux1Kontext",
    "Flux2Dev",
    "Flux2Klein",
    "Flux2KleinKV",
    "QwenImage21",
    "QwenImageEdit",
    "ReferenceCache",
    "backbone_of",
    "get_backbone",
]
