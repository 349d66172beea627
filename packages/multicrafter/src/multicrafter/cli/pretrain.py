"""``multicrafter pretrain``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import add_command, positive, real, training_options, writable
from multicrafter.cli.runs import load, together, tracker
from multicrafter.config.run_options import add_options


def pretrain(arguments: argparse.Namespace) -> int:
    """Stage 1, on one process or, under torchrun, on several."""
    return together(arguments, _pretrain)


def _pretrain(arguments: argparse.Namespace) -> int:
    from multicrafter.config import recipes
    from multicrafter.config.recipes import ModelConfig, Stage1, ablation
    from multicrafter.config.run_options import annotate, chosen
    from multicrafter.training.distributed import is_main
    from multicrafter.training.run_folder import check_free
    from multicrafter.training.runs import run_pretrain

    writable(arguments.out, file=False)
    if is_main():  # the others may be late, when this one holds the folder already
        check_free(arguments.out)
    config = ablation(seed=arguments.seed)[arguments.row].pretrain
    flags = {
        "pretrain.num_steps": arguments.steps,
        "pretrain.batch": arguments.batch,
        "pretrain.num_scenes": arguments.scenes,
        "pretrain.idar.coef": arguments.idar_coef,
        "pretrain.world.numbers": None if arguments.references is None else [arguments.references],
    }
    run = chosen(arguments, Stage1(model=ModelConfig(path=arguments.model, text_tokens=16), pretrain=config), flags)
    assert isinstance(run, Stage1)
    if arguments.adapter is not None:
        run = replace(run, pretrain=_from_adapter(run.pretrain, arguments.adapter))
    if arguments.data is not None:
        run = replace(run, pretrain=_with_photos(run.pretrain, arguments))
    model = load(run, arguments)
    if is_main() and not (arguments.resume and (arguments.out / "recipe.yaml").exists()):
        recipes.save(arguments.out / "recipe.yaml", run)
    run_pretrain(model, run.pretrain, arguments.out, resume=arguments.resume, tracker=tracker(arguments, run))
    if is_main():
        annotate(arguments.out, base_model=run.model.path)
        print(f"adapter: {arguments.out / 'adapter'}")
    return 0


def _from_adapter(config: Any, folder: Path) -> Any:
    """The configuration that goes on from an adapter, with adapters of its kind."""
    from multicrafter.models.adapters import read_adapter

    return replace(config, start=str(folder.absolute()), adapters=read_adapter(folder)[0])


def _with_photos(config: Any, arguments: argparse.Namespace) -> Any:
    """The configuration on the photos of --data: every record once, or --scenes samples."""
    from multicrafter.training.photo_scenes import training_records

    if arguments.references is not None:
        raise UserError(
            "--references is for drawn scenes, but --data is given: each photo says how many people are on it"
        )
    count = len(training_records(arguments.data))
    return replace(config, data=str(arguments.data.absolute()), num_scenes=arguments.scenes or count)


def add_parser(commands: Any) -> None:
    """Adds ``pretrain`` to the command line."""
    sub = add_command(commands, "pretrain", pretrain)
    add_options(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument(
        "--row",
        default="full",
        choices=("baseline", "idar", "idar_paper", "moe", "separation", "full"),
        help="row of the ablation; full is the method",
    )
    sub.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="stage-1 adapter to go on from, in a run of its own"
    )
    sub.add_argument("--steps", type=positive)
    sub.add_argument("--batch", type=positive)
    sub.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="photos of multicrafter data build to train on; default: drawn scenes",
    )
    sub.add_argument(
        "--scenes",
        type=positive,
        help="training scenes drawn; with --data samples of the photos, default: each photo once",
    )
    sub.add_argument("--references", type=int, choices=(2, 3, 4), help="subjects of a drawn scene")
    sub.add_argument("--idar-coef", type=real)
    training_options(sub)
