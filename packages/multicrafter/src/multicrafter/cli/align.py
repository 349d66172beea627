"""``multicrafter align``."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter import UserError, user_input
from multicrafter.cli.options import add_command, positive, training_options, writable
from multicrafter.cli.runs import load, together, tracker
from multicrafter.config.run_options import add_options

logger = logging.getLogger(__name__)


def align(arguments: argparse.Namespace) -> int:
    """Stage 2, on one process or, under torchrun, on several."""
    return together(arguments, _align)


def _align(arguments: argparse.Namespace) -> int:
    from multicrafter.config import recipes
    from multicrafter.config.recipes import ModelConfig, Stage2, tiny
    from multicrafter.config.run_options import annotate, chosen
    from multicrafter.models.adapters import Adapters
    from multicrafter.training.distributed import is_main
    from multicrafter.training.run_folder import check_free
    from multicrafter.training.runs import prompt_scenes, run_align

    writable(arguments.out, file=False)
    if is_main():  # the others may be late, when this one holds the folder already
        check_free(arguments.out)
    config = tiny(seed=arguments.seed).align
    assert config is not None
    flags = {
        "align.num_steps": arguments.steps,
        "align.prompts": arguments.prompts,
        "align.online.group_size": arguments.group_size,
        "num_scenes": arguments.scenes,
        "align.data": None if arguments.data is None else str(arguments.data.absolute()),
        "align.scorers.faces": arguments.faces,
        "align.scorers.clip": arguments.clip,
        "align.scorers.aesthetics": arguments.aesthetics,
    }
    run = chosen(arguments, Stage2(model=ModelConfig(path=arguments.model, text_tokens=16), align=config), flags)
    assert isinstance(run, Stage2)
    run = _with_photos(run, arguments)
    judged = _judged(run)
    model = load(run, arguments)
    adapters, notes = Adapters.load(model.transformer, arguments.adapter, backbone=model.backbone)
    number = int(notes.get("num_references", 1))
    world = replace(run.world, numbers=(number,), **_sizes(run, notes, arguments))
    run = replace(run, world=world, adapters=adapters.config)
    if is_main() and not (arguments.resume and (arguments.out / "recipe.yaml").exists()):
        recipes.save(arguments.out / "recipe.yaml", run)
    run_align(
        model, adapters, run.align, arguments.out, num_references=number, resume=arguments.resume, sampling=notes.get("sampling"),
        scenes=prompt_scenes(model, run.align, world, run.num_scenes), tracker=tracker(arguments, run), **judged,
    )  # fmt: skip
    if is_main():
        annotate(arguments.out, base_model=run.model.path)
        print(f"adapter: {arguments.out / 'adapter'}")
    return 0


def _with_photos(run: Any, arguments: argparse.Namespace) -> Any:
    """The run on the photos of its data: every record once, at most as many as scenes would be drawn; or --scenes samples."""
    from multicrafter.training.photo_scenes import training_records

    if run.align.data is None:
        for name in ("faces", "clip", "aesthetics"):
            if getattr(arguments, name) is not None:
                raise UserError(
                    f"--{name} is for photos, but no --data is given: drawn scenes have judges of their own"
                )
        return run
    count = len(training_records(run.align.data))
    said = arguments.scenes is not None or arguments.config is not None
    if said or any(change.partition("=")[0].endswith("num_scenes") for change in arguments.changes):
        return run
    if count > run.num_scenes:
        logger.info(f"note: prompts and references of {run.num_scenes} of {count} photos; --scenes takes more")
    return replace(run, num_scenes=min(run.num_scenes, count))


def _judged(run: Any) -> dict[str, Any]:
    """Who judges; what is wrong with them is said before a model is loaded."""
    from multicrafter.scoring.watcher import drawn_watcher
    from multicrafter.training.rewarding import photo_judges

    watched = run.align.watch.action != "none"
    if run.align.data is None:
        return {"watcher": drawn_watcher() if watched else None}
    with user_input():
        found = photo_judges(run.align.reward, run.align.scorers)
    if watched and found.watcher is None:
        raise UserError(
            f"align.scorers.watch must name who watches where align.watch.action is {run.align.watch.action}, got none; say --set "
            "align.scorers.watch=insightface, for example, or --set align.watch.action=none"
        )
    return found._asdict()


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
    sub.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="photos of multicrafter data build whose prompts and references are taken; default: drawn scenes",
    )  # fmt: skip
    sub.add_argument(
        "--scenes", type=positive, help="scenes drawn, default: 512; with --data samples of the photos, default: each once, at most 512"
    )  # fmt: skip
    sub.add_argument("--faces", help="with --data, who finds faces: dlib (default), insightface, torch, tiny, ...")
    sub.add_argument("--clip", metavar="FOLDER", help="with --data, the CLIP (transformers) of the reward's text part")
    sub.add_argument("--aesthetics", help="with --data: closed_form (default), hps:PATH, none")
    training_options(sub)
