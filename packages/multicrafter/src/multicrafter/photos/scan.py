"""Walking a folder of photos; what its metadata says about them is read in `notes`. Nothing in the folder is ever changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from multicrafter.photos.notes import METADATA, PersonNote, PhotoNote, read_notes

__all__ = ["METADATA", "SUFFIXES", "Found", "PersonNote", "PhotoNote", "Skipped", "printable", "read_notes", "walk"]


SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"})


class Found(NamedTuple):
    """A file that may be a photo: path relative to the folder, and what tells that it changed."""

    path: str
    size: int
    mtime_ns: int

    @property
    def key(self) -> str:
        """Cache key of the file's state."""
        return f"{printable(self.path)}|{self.size}|{self.mtime_ns}"


class Skipped(NamedTuple):
    """A file or folder that is no photo, and why."""

    path: str
    reason: str
    detail: str


def printable(path: str) -> str:
    r"""The path as text that every file format can hold; bytes that are no UTF-8 become ``\xNN``.

    >>> printable("a\udcffb")
    'a\\xffb'
    """
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def walk(root: Path) -> Iterator[Found | Skipped]:
    """Every file under ``root`` in a fixed order, folders first entered once: links may form loops.

    Links are followed. Files and folders whose names start with a dot, and the metadata file, are left out silently.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            state = os.stat(root / folder)
            if (state.st_dev, state.st_ino) in seen:
                yield Skipped(folder, "link loop", "the folder was already visited by another path")
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(root / folder) as entries:
                inside = sorted(entries, key=lambda e: e.name)
        except OSError as error:
            yield Skipped(folder, "unreadable", _reason(error))
            continue
        below = []
        for entry in inside:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or path in METADATA:
                continue
            try:
                if entry.is_dir():
                    below.append(path)
                    continue
                if not entry.is_file():
                    yield Skipped(path, "not a picture", "a broken link, or no regular file")
                elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                    yield Skipped(
                        path, "not a picture", f"suffix {printable(os.path.splitext(entry.name)[1]) or 'missing'}"
                    )
                else:
                    state = entry.stat()
                    yield Found(path, state.st_size, state.st_mtime_ns)
            except OSError as error:
                yield Skipped(path, "unreadable", _reason(error))
        waiting.extend(reversed(below))


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
