"""Files that appear whole or not at all, and digests of what is in them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from multicrafter import UserError


def read_text(path: Path) -> str:
    """Text that somebody may have written by hand: UTF-8, with or without its mark.

    Raises:
        ValueError: There is no such file, it is no regular one (a pipe would be waited for), or no UTF-8.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} must be a file, got {'a folder' if path.is_dir() else 'a pipe or a device'}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8, got {error}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} must be a file that can be read, got: {getattr(error, 'strerror', None) or error}"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """JSON in which every name is there once: of two answers the standard library would keep the last.

    Raises:
        ValueError: It is no JSON, nested without end, holds an endless number, or names something twice.

    >>> parse_json('{"a": [1, 2]}', "x.json")
    {'a': [1, 2]}
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be JSON, got {str(error)[:200]}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise json.JSONDecodeError(f"{next(n for n in names if names.count(n) > 1)!r} there twice", "", 0)
    return found


def read_json(path: Path) -> Any:
    """`parse_json` of a file.

    Raises:
        ValueError: See `read_text` and `parse_json`.
    """
    return parse_json(read_text(path), str(path))


@contextmanager
def appearing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to: the file takes its place when the block ends, and is removed if the block raises.

    Args:
        path: Of the finished file; its folder is made where there is none. The temporary path ends in the same suffix.
        sync: Wait until the content is on the disk, so that it outlives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if sync:
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str, *, sync: bool = False) -> Path:
    """Writes a file whole or not at all, see `appearing`."""
    with appearing(path, sync=sync) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def follow_umask(*paths: Path) -> None:
    """Gives files the permissions that any new file here gets; safetensors lets nobody but the owner read what it writes."""
    for path in paths:
        probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
        probe.unlink()


def write_json(path: Path, content: object) -> None:
    """Writes JSON, whole or not at all; NaN becomes null."""
    write_whole(path, json_text(content))


def json_text(content: object) -> str:
    """JSON with a line a value; NaN becomes null, a named tuple what it names.

    >>> json.loads(json_text({"loss": (float("nan"), 1.0)}))
    {'loss': [None, 1.0]}
    """

    def clean(x: object) -> object:
        if isinstance(x, tuple) and hasattr(x, "_asdict"):
            return clean(x._asdict())
        if isinstance(x, Mapping):
            return {str(k): clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        if isinstance(x, float):
            return x if math.isfinite(x) else None
        return x

    return json.dumps(clean(content), indent=1) + "\n"


def content_digest(content: object) -> str:
    """Sixteen hexadecimal digits of a JSON value's SHA-256, the same for equal values.

    >>> content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def source_commit() -> str | None:
    """The commit that this code was checked out from, with ``-dirty`` where files were changed since; None for an installed package."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", here.name
        )  # a package inside somebody's own repository is not of that repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
