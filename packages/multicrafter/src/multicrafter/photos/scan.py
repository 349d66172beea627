"""Walking a folder of photos, and reading what its metadata says about them. Nothing in the folder is ever changed."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from multicrafter import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"})
METADATA = ("metadata.jsonl", "metadata.csv")
ANSWERS = ("yes", "no", "unknown")


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


@dataclass(frozen=True, kw_only=True)
class PersonNote:
    """What is known about one person on a photo: ``box`` (left, top, right, bottom) in pixels of the upright photo."""

    box: tuple[float, float, float, float]
    consent: str = "unknown"
    minor: str = "unknown"


@dataclass(frozen=True, kw_only=True)
class PhotoNote:
    """What the metadata says about a photo."""

    consent: str = "unknown"
    minor: str = "unknown"
    licence: str = "unknown"
    source: str = ""
    caption: str = ""
    people: tuple[PersonNote, ...] = field(default=())


def read_notes(root: Path, *, licence: str = "unknown", consent: str = "unknown") -> dict[str, PhotoNote]:
    """Notes by relative path, from ``metadata.jsonl`` or ``metadata.csv`` (columns file_name, consent, minor, licence, source, caption, people).

    A consent that cannot be read must not be guessed, so a malformed line stops the build.

    Raises:
        ValueError: Names file, line and what is wrong.
    """
    present = [root / name for name in METADATA if (root / name).is_file()]
    if len(present) > 1:
        raise UserError(f"{root} must hold one of {' and '.join(METADATA)}, but it holds both")
    if not present:
        return {}
    notes: dict[str, PhotoNote] = {}
    for line, row in _rows(present[0]):
        where = f"{present[0]}, line {line}"
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: file_name must name a photo, got {name!r}")
        name = os.path.normpath(name)
        if name in notes:
            raise UserError(f"{where}: file_name must be there once, but {name!r} is there twice")
        notes[name] = _note(row, where, licence, consent)
    return notes


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                for row in (reader := csv.DictReader(file)):
                    yield reader.line_num, row
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: must be a JSON object, got {type(row).__name__}")
                    yield number, row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: must be JSON, got {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8, got {error}") from error


def _answer(row: Mapping[str, Any], name: str, where: str, default: str = "unknown") -> str:
    value = row.get(name)
    if value is None or value == "":
        return default
    value = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else str(value).strip().lower()
    if value not in ANSWERS:
        raise UserError(f"{where}: {name} must be yes, no or unknown, got {value!r}")
    return str(value)


def _note(row: Mapping[str, Any], where: str, licence: str, consent: str) -> PhotoNote:
    people = row.get("people") or []
    try:
        people = json.loads(people) if isinstance(people, str) else people
        boxes = [tuple(float(x) for x in person["box"]) for person in people]
        if any(len(b) != 4 or b[2] <= b[0] or b[3] <= b[1] for b in boxes):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: people must be a list of objects with a box [left, top, right, bottom], got {people!r}"
        ) from error
    return PhotoNote(
        consent=_answer(row, "consent", where, consent),
        minor=_answer(row, "minor", where),
        licence=str(row.get("licence") or row.get("license") or licence),
        source=str(row.get("source") or ""),
        caption=str(row.get("caption") or row.get("text") or "").strip(),
        people=tuple(
            PersonNote(box=box, consent=_answer(person, "consent", where), minor=_answer(person, "minor", where))  # type: ignore[arg-type]
            for box, person in zip(boxes, people, strict=True)
        ),
    )
