"""Files that a command writes: whole or not at all, and never over anything that it did not write itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from id_reward.errors import InputError

MARK = {"Software": "id-reward"}  # in the header of every PNG that this package writes
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif"}


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether an existing file was written by the same command before: a marked PNG, or JSON of scores."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        if path.suffix.lower() == ".png":
            from PIL import Image

            with Image.open(path) as picture:
                return picture.info.get("Software") == MARK["Software"]
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and {"references", "convention", "pictures"} <= content.keys()
    except Exception:
        return False


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file, through links and in other spellings too."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def check_target(path: Path, option: str, inputs: Sequence[str]) -> None:
    """Whether a file may be written, asked before work begins.

    Args:
        path: Where it would go.
        option: The option that says so, for the message.
        inputs: Files that are read.

    Raises:
        InputError: It is one of the inputs, a folder, a file that this package did not write, or in a place where nothing can be written.
    """
    if "\0" in str(path):
        raise InputError(f"{option!r} must name a place that can be written to, got a name with a 0 in it")
    for given in inputs:
        if _same(path, Path(given)):
            raise InputError(f"{option} would overwrite {given}, which is read; name another place")
    if path.is_dir():
        raise InputError(f"{option} must name a file, but {path} is a folder")
    if path.exists() and not _is_ours(path):
        raise InputError(
            f"{option} would overwrite {path}, which id-reward did not write; name another place, or remove it"
        )
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option} must name a place that can be written to, but {folder} cannot")


def check_targets(json_file: str | None, sheets: Sequence[Path], inputs: Sequence[str]) -> None:
    """`check_target` of everything that a command is about to write.

    Raises:
        InputError: See `check_target`; or the JSON has a picture's name, as where ``--json`` stands before a picture.
    """
    if json_file is not None:
        path = Path(json_file)
        if path.suffix.lower() in PICTURES:
            raise InputError(
                f"--json must name a file for JSON, got {json_file}; put --json last, or write --json=FILE"
            )
        if any(path in (sheet, sheet.parent) for sheet in sheets):
            raise InputError(f"--json must be another place than --annotate, got {json_file} for both")
        check_target(path, f"--json {json_file}", inputs)
    for sheet in sheets:
        check_target(sheet, f"--annotate {sheet.parent}", inputs)
