"""``multicrafter align``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import add_command, positive, training_options, writable
from multicrafter.cli.runs import load, together, tracker
from multicrafter.config.run_options import add_options


def align(arguments: argparse.Namespace) -> int:
    """Stage 2, on one process or, under torchrun, on several."""
    return together(arguments, _align)


def _align(arguments: argparse.Namespace) -> int:
    from multicrafter.config import recipes
    from multicrafter.config.recipes import ModelConfig, Stage2, tiny
    from multicrafter.config.run_options import annotate, chosen
    from multicrafter.models.adapters import Adapters
    from multicrafter.scoring.watcher import drawn_watcher
    from multicrafter.training.distributed import is_main
    from multicrafter.training.run_folder import check_free
    from multicrafter.training.runs import run_align
    from multicrafter.training.scenes import encode_shaped_scenes

    writable(arguments.out, file=False)
    if is_main():  # the others may be late, when this one holds the folder already
        check_free(arguments.out)
    config = tiny(seed=arguments.seed).align
    assert config is not None
    flags = {
        "align.num_steps": arguments.steps,
        "align.prompts": arguments.prompts,
        "align.online.group_size": arguments.group_size,
    }
    run = chosen(arguments, Stage2(model=ModelConfig(path=arguments.model, text_tokens=16), align=config), flags)
    assert isinstance(run, Stage2)
    model = load(run, arguments)
    adapters, notes = Adapters.load(model.transformer, arguments.adapter, backbone=model.backbone)
    number = int(notes.get("num_references", 1))
    world = replace(run.world, numbers=(number,), **_sizes(run, notes, arguments))
    run = replace(run, world=world, adapters=adapters.config)
    if is_main() and not (arguments.resume and (arguments.out / "recipe.yaml").exists()):
        recipes.save(arguments.out / "recipe.yaml", run)
    scenes = encode_shaped_scenes(
        model, world, run.num_scenes, run.align.shapes, seed=run.align.online.seed + 10_000, cache=run.execution.cache
    )
    run_align(
        model, adapters, run.align, arguments.out, num_references=number, scenes=scenes, resume=arguments.resume, sampling=notes.get("sampling"),
        watcher=drawn_watcher() if run.align.watch.action != "none" else None, tracker=tracker(arguments, run),
    )  # fmt: skip
    if is_main():
        annotate(arguments.out, base_model=run.model.path)
        print(f"adapter: {arguments.out / 'adapter'}")
    return 0


def _sizes(run: Any, notes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The sizes that the adapter was trained at; others only where --set says so."""
    from multicrafter.training.runs import trained_sizes

    sizes = trained_sizes(notes)
    changed = {change.partition("=")[0].rpartition(".")[2] for change in arguments.changes}
    for name in sorted(sizes.keys() & changed):
        del sizes[name]
    if arguments.recipe is not None or arguments.config is not None:
        for name, trained in sizes.items():
            if (asked := getattr(run.world, name)) != trained:
                raise UserError(
                    f"world.{name} must be {trained}, which {arguments.adapter} was trained at, got {asked}; to align at another size all "
                    f"the same, say --set world.{name}={asked}"
                )
    return sizes


def add_parser(commands: Any) -> None:
    """Adds ``align`` to the command line."""
    sub = add_command(commands, "align", align)
    add_options(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--adapter", type=Path, required=True, help="stage-1 adapter")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--steps", type=positive)
    sub.add_argument("--prompts", type=positive)
    sub.add_argument("--group-size", type=positive)
    training_options(sub)
