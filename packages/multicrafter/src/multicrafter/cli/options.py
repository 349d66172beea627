"""What several commands share on the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def writable(path: Path) -> None:
    """Fails before the work, not after it."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {path} must be writable, but {folder} is not a folder that can be written to")
    if path.is_dir() and path.suffix:
        raise ValueError(f"--out {path} must be a file, but it is a folder")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], *, model: bool = True
) -> argparse.ArgumentParser:
    """A command that calls ``function``, whose docstring is its help; most take a model and a seed."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
    sub.set_defaults(function=function)
    if model:
        sub.add_argument(
            "--model", help="FLUX directory in diffusers format, or hub id; default: the tiny one that ships"
        )
        sub.add_argument("--seed", type=int, default=0)
    return sub


def training_options(sub: argparse.ArgumentParser) -> None:
    """``--resume`` and ``--tracker``."""
    sub.add_argument(
        "--resume", nargs="?", const="auto", default=False, metavar="auto|CHECKPOINT",
        help="go on from the newest good checkpoint in --out (auto, also without a value), or from this one",
    )  # fmt: skip
    sub.add_argument(
        "--tracker", choices=("tensorboard", "wandb", "trackio", "none"), help="default: tensorboard, into --out"
    )
