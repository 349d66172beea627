"""What ``pretrain``, ``align`` and ``plan`` share on the command line: ``--recipe``, ``--config``, ``--set``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multicrafter import UserError

if TYPE_CHECKING:
    from multicrafter.config.recipes import Run


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the three options."""
    sub.add_argument(
        "--recipe", help="a named run: tiny_stage1, flux1_dev_stage1, flux2_klein_stage1, ..., or ..._stage2"
    )
    sub.add_argument("--config", type=Path, help="a run as YAML, such as the recipe.yaml of an earlier one")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="change one value, such as pretrain.adapters.rank=64; may be repeated",
    )  # fmt: skip


def chosen(arguments: argparse.Namespace, default: Run | None = None, flags: Mapping[str, Any] | None = None) -> Run:
    """The run that the options name, or ``default``, with ``flags`` (by dotted name; None: not given) and then ``--set`` applied.

    Raises:
        ValueError: See `recipes.resolve`; or the run is of the other stage than ``default``.
    """
    from multicrafter.config import settings
    from multicrafter.config.recipes import resolve

    given = [f"{name}={json.dumps(value)}" for name, value in (flags or {}).items() if value is not None]
    if default is not None and arguments.recipe is None and arguments.config is None:
        return settings.override(default, [*given, *arguments.changes])
    model = getattr(arguments, "model", None)
    changes = [*([f"model.path={json.dumps(model)}"] if model is not None else []), *given, *arguments.changes]
    seed = getattr(arguments, "seed", 0)
    run = resolve(recipe=arguments.recipe, config=arguments.config, changes=changes, seed=seed)
    if default is not None and type(run) is not type(default):
        stage = type(default).__name__[-1]
        raise UserError(
            f"the run must be a stage-{stage} run, got one of the other stage: {arguments.recipe or arguments.config}"
        )
    return run


def annotate(out: Path, **notes: Any) -> None:
    """Adds notes (sizes, the base) to the adapters of a finished run, so that they load without being told."""
    from multicrafter.files import write_whole

    for folder in ("adapter", "adapter_ema"):
        path = out / folder / "adapter.json"
        if path.is_file():
            known = {k: v for k, v in notes.items() if v is not None}
            write_whole(path, json.dumps({**json.loads(path.read_text()), **known}, indent=2) + "\n")
