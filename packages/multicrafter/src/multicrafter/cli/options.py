"""What several commands share on the command line."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multicrafter import UserError, user_input
from multicrafter.models.checks import finite


def writable(path: Path, *, file: bool | None = None, most: int = 1) -> None:
    """Fails before the work, not after it.

    Args:
        path: Of ``--out``.
        file: Whether it is a file, which may be there: it is written anew. None tells by the suffix.
        most: Files that are written under names like it, NAME_0 and so on.
    """
    if "\0" in str(path):
        raise UserError(f"--out must be a name that a file can have, got {str(path)[:60]!r}")
    folder, file = path.absolute(), bool(path.suffix) if file is None else file
    try:
        if path.exists() and path.is_dir() == file:
            raise UserError(
                f"--out {path} must be a {'file' if file else 'folder'}, but it is a {'folder' if file else 'file'}"
            )
        if path.is_file():
            if not os.access(path, os.W_OK):
                raise UserError(f"--out {path} must be writable, but the file that is there is not")
            folder = folder.parent
        while not folder.exists():
            folder = folder.parent
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except OSError as error:  # a name that is too long cannot even be looked for
        raise UserError(
            f"--out must be a name that a file can have, got {str(path)[:60]!r}...: {error.strerror}"
        ) from error
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {path} must be writable, but {folder} is not a folder that can be written to")
    extra = len(f"..tmp{path.suffix}") + (len(f"_{most - 1}") if most > 1 else 0)
    for part in path.parts:
        if (size := len(os.fsencode(part)) + (extra if part == path.name else 0)) > longest:
            raise UserError(
                f"--out must have names of at most {longest} bytes, those of temporary files included, got {size} in {part[:40]!r}..."
            )


def room(folder: Path, needed: float, *, what: str) -> None:
    """Fails before the work where the disk of a folder, which may not be there yet, has too few bytes left."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"{what} must have {needed / 1e6:.0f} MB of the disk that {folder} is on, got {free / 1e6:.0f} MB free"
        )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isdigit() and text.isascii()) or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def picture_size(text: str) -> int | tuple[int, int]:
    """A side in pixels, or HEIGHTxWIDTH.

    >>> picture_size("512"), picture_size("512x768")
    (512, (512, 768))
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and part.isascii() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"must be a side in pixels or HEIGHTxWIDTH, such as 512x768, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def seed(text: str) -> int:
    """A whole number that torch's generators take, with room for what is added to it."""
    digits = text.removeprefix("-")
    if not (digits.isdigit() and digits.isascii()) or len(digits) > 18:
        raise argparse.ArgumentTypeError(f"must be a whole number of at most 18 digits, got {text[:40]!r}")
    return int(text)


def apart(out: Path, *given: Path | None, option: str = "--out") -> None:
    """Raises UserError where ``out`` is one of the files that are read: through links, and in other spellings, too."""
    for path in given:
        if path is not None and os.path.realpath(out) == os.path.realpath(path):
            raise UserError(f"{option} must be another file than {path}, which is read, got {out}")


def ours(out: Path, *names: str) -> None:
    """Raises UserError where ``out`` is a file that is there and holds no JSON object with these names: somebody else's."""
    from multicrafter.files import read_json

    if not out.exists():
        return
    try:
        content = read_json(out)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not set(names) <= content.keys():
        raise UserError(
            f"--out would overwrite {out}, which this command did not write; name another file, or remove it"
        )


def real(text: str) -> float:
    """A finite number."""
    try:
        if "_" in text or not text.isascii():
            raise ValueError("digits that only Python groups or knows")
        return finite("it", float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}") from error


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], *, model: bool = True
) -> argparse.ArgumentParser:
    """A command that calls ``function``, whose docstring is its help; most take a model and a seed."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
    sub.set_defaults(function=function)
    if model:
        sub.add_argument("--model", help="pipeline directory of diffusers, or hub id; default: the tiny one that ships")
        sub.add_argument("--seed", type=seed, default=0)
    return sub


def force_option(sub: argparse.ArgumentParser) -> None:
    """``--force``."""
    sub.add_argument("--force", action="store_true", help="start even what by arithmetic does not fit into memory")


def training_options(sub: argparse.ArgumentParser) -> None:
    """``--resume``, ``--tracker`` and ``--force``."""
    force_option(sub)
    sub.add_argument(
        "--resume", nargs="?", const="auto", default=False, metavar="auto|CHECKPOINT",
        help="go on from the newest good checkpoint in --out (auto, also without a value), or from this one",
    )  # fmt: skip
    sub.add_argument(
        "--tracker", choices=("tensorboard", "wandb", "trackio", "none"), help="default: tensorboard, into --out"
    )


def separation_options(sub: argparse.ArgumentParser) -> None:
    """How subjects are kept apart while a picture is drawn."""
    sub.add_argument(
        "--separation", choices=("none", "draft", "in-flight", "attention", "masks"),
        help="keep the attention of different subjects apart: places from a short draft, from the picture being drawn, or from --mask; "
        "default: as the adapter was made for",
    )  # fmt: skip
    sub.add_argument("--draft-steps", type=positive, help="steps of the draft; default: 3")
    sub.add_argument(
        "--bind-at", type=real, help="noise level at which --separation in-flight looks for places; default: 0.95"
    )
    sub.add_argument(
        "--look-until", type=real,
        help="places are looked for again at every noise level down to this one; default: 0.7 for in-flight from 0.7 on, else not again",
    )  # fmt: skip
    finder_option(sub)


def finder_option(sub: argparse.ArgumentParser) -> None:
    """``--finder``."""
    sub.add_argument(
        "--finder", choices=("auto", "people", "maps", "dlib", "insightface"), default="auto",
        help="what finds subjects in a draft: the drawn world's people, the attention maps alone, or a face detector; auto: people for "
        "the tiny model, else maps",
    )  # fmt: skip


def binding(arguments: argparse.Namespace, notes: Any) -> Any:
    """The `BindingConfig` of --separation and its numbers, or what the adapter was made for."""
    from multicrafter.models.binding import BindingConfig

    mode = arguments.separation or notes.get("sampling", {}).get("separation", "none")
    names = ("draft_steps", "bind_at", "look_until")
    return BindingConfig.chosen(mode, **{k: v for k in names if (v := getattr(arguments, k)) is not None})


def finder(name: str, model: str | None) -> Any:
    """What finds subjects in a draft."""
    from multicrafter.models.finding import MapFinder
    from multicrafter.photos.people import people_finder

    if name == "auto":
        name = "people" if model is None else "maps"
    if name == "maps":
        return MapFinder()
    with user_input("--finder"):
        return people_finder("tiny" if name == "people" else name)


def loaded_pipeline(arguments: argparse.Namespace) -> Any:
    """The pipeline of --model, --adapter, --finder, --dtype, --device and --backbone; without a model, the tiny one with its adapter."""
    from multicrafter.models.backbones import get_backbone
    from multicrafter.pipeline import MultiCrafterPipeline
    from multicrafter.world import shipped_adapter

    adapter = arguments.adapter
    if adapter is None and arguments.model is None:
        adapter = shipped_adapter(2)
    elif str(adapter) == "none":
        adapter = None
    return MultiCrafterPipeline.from_pretrained(
        arguments.model, adapter=adapter, dtype=arguments.dtype, device=arguments.device,
        backbone=get_backbone(arguments.backbone) if arguments.backbone else None,
        finder=finder(arguments.finder, arguments.model),
    )  # fmt: skip
