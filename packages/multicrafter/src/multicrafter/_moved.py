"""Where modules and functions were before 0.2. An old name still works for one version, and a DeprecationWarning says the new one.

A moved module imports as the new module itself. Where only a function moved out of a module, that module asks `moved_out`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

MOVED = {
    "adapters": "models.adapters",
    "backbones": "models.backbones",
    "backbones.base": "models.backbones.base",
    "backbones.drift": "models.backbones.drift",
    "backbones.flux1": "models.backbones.flux1",
    "backbones.flux2_klein": "models.backbones.flux2_klein",
    "backbones.flux2_klein_kv": "models.backbones.flux2_klein_kv",
    "backbones.tiny": "world.tiny_backbones",
    "benchmarking": "scoring",
    "benchmarking.judges": "scoring.judges",
    "benchmarking.leaderboard": "scoring.leaderboard",
    "benchmarking.manifest": "scoring.manifest",
    "benchmarking.metrics": "scoring.metrics",
    "benchmarking.pages": "scoring.pages",
    "benchmarking.score": "scoring.score",
    "benchmarking.statistics": "scoring.statistics",
    "cache": "training.encoding_cache",
    "checkpoint": "training.checkpoint",
    "data.cli": "cli.data",
    "data.photos": "photos",
    "data.photos.build": "photos.build",
    "data.photos.cache": "photos.cache",
    "data.photos.captions": "photos.captions",
    "data.photos.check": "photos.check",
    "data.photos.config": "photos.config",
    "data.photos.encode": "training.photo_scenes",
    "data.photos.engines": "photos.engines",
    "data.photos.identities": "photos.identities",
    "data.photos.loader": "photos.loader",
    "data.photos.masks": "photos.masks",
    "data.photos.people": "photos.people",
    "data.photos.pictures": "photos.pictures",
    "data.photos.quality": "photos.quality",
    "data.photos.records": "photos.records",
    "data.photos.reference": "photos.reference",
    "data.photos.references": "photos.references",
    "data.photos.report": "photos.report",
    "data.photos.run": "photos.run",
    "data.photos.samples": "photos.samples",
    "data.photos.scan": "photos.scan",
    "data.photos.schema": "photos.schema",
    "data.photos.select": "photos.select",
    "data.photos.stages": "photos.stages",
    "data.photos.store": "photos.store",
    "data.photos.write": "photos.write",
    "data.synthetic": "world",
    "data.synthetic.attributes": "world.attributes",
    "data.synthetic.render": "world.render",
    "data.synthetic.scenes": "world.scenes",
    "distributed": "training.distributed",
    "evaluate": "scoring.evaluate",
    "execution": "training.precision",
    "figures": "demo.figures",
    "flux": "models.flux",
    "flux.model": "models.flux.model",
    "flux.packing": "models.flux.packing",
    "flux.tiny": "world.tiny_flux",
    "flux.train_base": "world.train_base",
    "flux.train_vae": "world.train_vae",
    "judges": "world.judges",
    "judges.aesthetics": "world.judges.aesthetics",
    "judges.clip": "world.judges.clip",
    "judges.network": "world.judges.network",
    "judges.people": "world.judges.people",
    "judges.reader": "world.judges.reader",
    "judges.train": "world.judges.train",
    "loading": "models.loading",
    "loop": "training.loop",
    "model_card": "demo.base_card",
    "plan.command": "cli.plan",
    "publish": "models.publish",
    "recipes": "config.recipes",
    "report": "demo.report",
    "rewards": "world.rewards",
    "run_options": "config.run_options",
    "settings": "config.settings",
    "stages": "training",
    "stages.align": "training.align",
    "stages.data": "training.scenes",
    "stages.look": "training.previews",
    "stages.noise": "training.noise",
    "stages.pretrain": "training.pretrain",
    "stages.runs": "training.runs",
    "stages.scoring": "training.rewarding",
    "stages.trainee": "training.trainee",
    "trackers": "training.trackers",
}
"""Old name below ``multicrafter`` -> new name below it."""
NAMES = {
    "config.recipes": {
        "PAPER": "config.provenance.PAPER",
        "STUDIED": "config.provenance.STUDIED",
        "marks": "config.provenance.provenance",
    },
    "config.settings": {"write_text": "files.write_whole"},
    "demo": {name: f"demo.both_stages.{name}" for name in ("Clock", "DemoConfig", "claims", "run")},
    "photos.cache": {"fingerprint": "files.content_digest"},
    "photos.write": {"replace": "files.write_whole"},
    "scoring.evaluate": {"write_json": "files.write_json"},
    "scoring.judges": {"hps_scorer": "photos.quality.hps_scorer"},
}
"""Module -> name that moved out of it -> its place and name now."""
GONE = ("data",)
"""Packages that only held others."""


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}; the old name leaves with multicrafter 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class _Alias(importlib.abc.Loader):
    """Puts the new module under the old name; there is one module, never two."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"multicrafter.{MOVED[old.removeprefix('multicrafter.')]}"
        _warn(old, new)
        sys.modules[old] = importlib.import_module(new)


class _Empty(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it but what moved."""


class _Finder(importlib.abc.MetaPathFinder):
    """Knows the old names. It comes first: a moved package's folder must not be searched under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "multicrafter":
            return None
        if name in MOVED:
            return importlib.machinery.ModuleSpec(fullname, _Alias())
        if name in GONE:
            return importlib.machinery.ModuleSpec(fullname, _Empty(), is_package=True)
        if name.rpartition(".")[0] in (*MOVED, *GONE):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def install() -> None:
    """Makes the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def moved_out(module: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module from which `NAMES` moved."""
    names = NAMES[module.removeprefix("multicrafter.")]

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = f"multicrafter.{names[name]}"
        _warn(f"{module}.{name}", new)
        home, _, attribute = new.rpartition(".")
        return getattr(importlib.import_module(home), attribute)

    return get
