"""MultiCrafter: several given subjects in one picture, each faithful, nobody blended (arXiv 2509.21953)."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

__version__ = "0.2.0"


class UserError(ValueError):
    """What whoever calls can mend, in one sentence: what was given, and what is expected.

    Command lines print the sentence and exit with code 2. Every other exception is a defect of this software and keeps its traceback.
    """


@contextmanager
def user_input(what: str = "") -> Iterator[None]:
    """Around reading what a user named: a ValueError or OSError inside is the user's, not a defect, and becomes a `UserError`.

    Args:
        what: The front of the sentence, such as ``"--faces"``.

    >>> with user_input("--seed"):
    ...     int("x")
    Traceback (most recent call last):
    multicrafter.UserError: --seed: invalid literal for int() with base 10: 'x'
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error


_HOMES = {
    "MultiCrafterPipeline": "pipeline",
    "load_into": "models.loading",
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
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


# Until 0.3: where modules, with all that is in them, and functions were before the rooms (docs/adr/0004-rooms-by-purpose.md).
_MOVED = {
    "adapters": "models.adapters",
    "backbones": "models.backbones",
    "backbones.tiny": "world.tiny_backbones",
    "benchmarking": "scoring",
    "cache": "training.encoding_cache",
    "checkpoint": "training.checkpoint",
    "data.cli": "cli.data",
    "data.photos": "photos",
    "data.photos.encode": "training.photo_scenes",
    "data.synthetic": "world",
    "distributed": "training.distributed",
    "evaluate": "scoring.evaluate",
    "execution": "training.precision",
    "figures": "demo.figures",
    "flux": "models.flux",
    "flux.tiny": "world.tiny_flux",
    "flux.train_base": "world.train_base",
    "flux.train_vae": "world.train_vae",
    "judges": "world.judges",
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
    "stages.data": "training.scenes",
    "stages.look": "training.previews",
    "stages.scoring": "training.rewarding",
    "trackers": "training.trackers",
}
_MOVED_OUT = {
    "benchmarking.judges.hps_scorer": "photos.quality.hps_scorer",
    "data.photos.cache.fingerprint": "files.content_digest",
    "data.photos.write.replace": "files.write_whole",
    "evaluate.write_json": "files.write_json",
    "recipes.PAPER": "config.provenance.PAPER",
    "recipes.STUDIED": "config.provenance.STUDIED",
    "recipes.marks": "config.provenance.provenance",
    "settings.write_text": "files.write_whole",
}


def _today(old: str) -> str | None:
    """The name of a module now, if it or what it is in moved.

    >>> _today("flux.model"), _today("flux.tiny"), _today("pipeline")
    ('models.flux.model', 'world.tiny_flux', None)
    """
    moved = [p for p in _MOVED if f"{old}.".startswith(f"{p}.")]
    return _MOVED[p] + old.removeprefix(p) if (p := max(moved, key=len, default="")) else None


def _warn(old: str, new: str) -> None:
    message = f"multicrafter.{old} is now multicrafter.{new}; the old name leaves with multicrafter 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def _moved_out(module: str, otherwise: Callable[[str], Any] | None, name: str) -> Any:
    """What moved out of a module that had this old name, or is called otherwise in it."""
    new = _MOVED_OUT.get(f"{module}.{name}")
    if new is None and otherwise is not None:
        return otherwise(name)
    if new is None:
        raise AttributeError(f"module 'multicrafter.{_today(module)}' has no attribute {name!r}")
    _warn(f"{module}.{name}", new)
    home, _, now = new.rpartition(".")
    return getattr(importlib.import_module(f"multicrafter.{home}"), now)


def renamed(module: str, names: Mapping[str, str]) -> None:
    """Says of a module which names in it are called otherwise now; the old ones work until 0.3, with a warning."""
    otherwise = vars(sys.modules[module]).get("__getattr__")

    def find(name: str) -> Any:
        if name not in names and otherwise is not None:
            return otherwise(name)
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        inside = module.removeprefix("multicrafter.")
        _warn(f"{inside}.{name}", f"{inside}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    vars(sys.modules[module])["__getattr__"] = find


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Puts today's module under its old name: one module, never two. Comes first, so that no folder is searched under an old name."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "multicrafter" or (old != "data" and _today(old) is None):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=old == "data")

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("multicrafter.")
        if (new := _today(old)) is not None:  # the folder data only held others
            _warn(old, new)
            found = sys.modules[module.__name__] = importlib.import_module(f"multicrafter.{new}")
            if any(name.rpartition(".")[0] == old for name in _MOVED_OUT):
                before = vars(found).get("__getattr__")
                if not isinstance(before, partial):
                    vars(found)["__getattr__"] = partial(_moved_out, old, before)


sys.meta_path.insert(0, _OldNames())
