"""What the metadata says about the photos of a folder: read, and given to the photo that is meant however its name is spelled."""

from __future__ import annotations

import csv
import difflib
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.files import parse_json

METADATA = ("metadata.jsonl", "metadata.csv")
ANSWERS = ("yes", "no", "unknown")
FIELDS = ("file_name", "consent", "minor", "licence", "license", "source", "caption", "text", "people")
OF_PEOPLE = ("box", "consent", "minor")


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

    @property
    def refuses(self) -> bool:
        """Whether somebody on the photo says no, or is marked as a minor."""
        said = [(self.consent, self.minor), *((p.consent, p.minor) for p in self.people)]
        return any(consent == "no" or minor == "yes" for consent, minor in said)


def read_notes(root: Path, *, licence: str = "unknown", consent: str = "unknown") -> dict[str, PhotoNote]:
    """Notes by relative path, from ``metadata.jsonl`` or ``metadata.csv`` (columns file_name, consent, minor, licence, source, caption, people).

    A consent that cannot be read must not be guessed, so a malformed line or a misspelt column stops the build.

    Raises:
        ValueError: Names file, line and what is wrong.
    """
    present = [root / name for name in METADATA if (root / name).is_file()]
    if len(present) > 1:
        raise UserError(f"{root} must hold one of {' and '.join(METADATA)}, but it holds both")
    if root.is_dir():
        for path in sorted(root.iterdir()):
            if is_metadata(path.name) and path not in present:
                how = f"must be called {' or '.join(METADATA)} to be read, or something else altogether"
                raise UserError(f"{path} {'must be a file, got none' if path.name in METADATA else how}")
    if not present:
        return {}
    notes: dict[str, PhotoNote] = {}
    for line, row in _rows(present[0]):
        where = f"{present[0]}, line {line}"
        row = _known(row, FIELDS, where)
        name = row.get("file_name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: file_name must name a photo, got {name!r}")
        name = os.path.normpath(name)
        if name in notes:
            raise UserError(f"{where}: file_name must be there once, but {name!r} is there twice")
        notes[name] = _note(row, where, licence, consent)
    return notes


def is_metadata(name: str) -> bool:
    """Whether a file's name looks like one of `METADATA`.

    >>> is_metadata("Metadata.CSV"), is_metadata("metadata.txt"), is_metadata("dog.csv")
    (True, True, False)
    """
    stem, _, suffix = name.casefold().rpartition(".")
    return stem == "metadata" and suffix in ("jsonl", "csv", "json", "txt", "tsv", "ndjson")


def spelling(path: str) -> str:
    r"""A path however it is written: slashes, Unicode forms, case, spaces around and marks that cannot be seen make no difference.

    >>> spelling(".\\Fotos\\ZOE\u0308.JPG") == spelling("fotos/zoë.jpg")
    True
    """
    text = unicodedata.normalize("NFKC", path.replace("\\", "/"))
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc"))
    text = unicodedata.normalize("NFKC", text.casefold())
    parts = [part.strip() for part in text.split("/")]
    return "/".join(part for part in parts if part not in ("", "."))


def match_notes(
    notes: Mapping[str, PhotoNote], photos: Iterable[str], others: Iterable[str], *, root: Path
) -> tuple[dict[str, PhotoNote], list[str]]:
    """Notes by the path of the photo that each is about, and the names that are about none.

    A photo takes the note of exactly its name, or else of its name in another spelling.

    Args:
        notes: See `read_notes`.
        photos: Paths of photos.
        others: Paths that are no photos, which a note may name all the same.
        root: The folder, which a name may start with.

    Raises:
        ValueError: Somebody says no under a name that is no photo's, or two notes could be meant for one photo.
    """
    by_spelling: dict[str, list[str]] = {}
    for name in notes:
        inside = os.path.relpath(name, root) if os.path.isabs(name) else name
        by_spelling.setdefault(spelling(inside), []).append(name)
    found: dict[str, PhotoNote] = {}
    used: set[str] = set()
    for path in photos:
        names = [path] if path in notes else by_spelling.get(spelling(path), [])
        if len(names) > 1:
            raise UserError(
                f"metadata must speak of each photo once, but {names[0]!r} and {names[1]!r} could both be {path!r}"
            )
        for name in names:
            found[path] = notes[name]
            used.add(name)
    skipped = {spelling(path) for path in others}
    unused = [n for n in notes if n not in used and spelling(n) not in skipped]
    refusing = [n for n in unused if notes[n].refuses]
    if refusing:
        near = difflib.get_close_matches(refusing[0], list(photos), n=1, cutoff=0.5)
        hint = f", nearest: {near[0]!r}" if near else ""
        raise UserError(
            f"metadata must name photos that are there where somebody refuses, but {refusing[0]!r} matches none{hint}: correct the "
            "name, or take the line out if the photo is gone"
        )
    return found, unused


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(
                    file, strict=True
                )  # a quote that never ends would swallow the answers of others
                _check_columns(path, reader.fieldnames or [])
                for row in reader:
                    if None in row or None in row.values():
                        raise UserError(f"{path}, line {reader.line_num}: must have as many values as columns")
                    yield reader.line_num, row
            return
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = parse_json(line, f"{path}, line {number}:")
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: must be a JSON object, got {type(row).__name__}")
                    yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8, got {error}") from error
    except csv.Error as error:
        raise UserError(f"{path} must be CSV, got {error}") from error


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """Of two columns of one name the last would count, and a table without names has none at all."""
    names = [spelling(column) for column in columns]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path} must have every column once, but {twice[0]!r} is there twice")
    near = difflib.get_close_matches("file_name", names, n=1, cutoff=0.75)
    if "file_name" not in names and not near:  # what is nearly right is named with its line
        raise UserError(
            f"{path} must have a column file_name in its first line, got {', '.join(columns)[:100] or 'none'}"
        )


def _known(row: Mapping[str, Any], fields: tuple[str, ...], where: str) -> dict[str, Any]:
    """The row by the names of its fields; one that is nearly a known one stops the build, others are somebody else's."""
    known: dict[str, Any] = {}
    for key, value in row.items():
        name = spelling(str(key))
        if name in known:
            raise UserError(f"{where}: {name} must be there once, but it is there twice")
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.75) if name not in fields else []
        if near:
            raise UserError(f"{where}: {key!r} must be spelled {near[0]!r}, or differently altogether")
        known[name] = value
    return known


def _answer(row: Mapping[str, Any], name: str, where: str, default: str = "unknown") -> str:
    value = row.get(name)
    if value is None or value == "":
        return default
    value = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else spelling(str(value))
    if value not in ANSWERS:
        raise UserError(f"{where}: {name} must be yes, no or unknown, got {value!r}")
    return str(value)


def _note(row: Mapping[str, Any], where: str, licence: str, consent: str) -> PhotoNote:
    people = row.get("people") or []
    try:
        people = parse_json(people, f"{where}: people") if isinstance(people, str) else people
        people = [_known(person, OF_PEOPLE, where) if isinstance(person, Mapping) else person for person in people]
        boxes = [tuple(float(x) for x in person["box"]) for person in people]
        good = all(len(b) == 4 and all(map(math.isfinite, b)) and b[2] > b[0] and b[3] > b[1] for b in boxes)
    except (KeyError, TypeError, AttributeError, OverflowError):
        good = False
    except ValueError as error:
        if where in str(error):
            raise
        good = False
    if not good:
        raise UserError(
            f"{where}: people must be a list of objects with a box [left, top, right, bottom], got {row.get('people')!r}"
        )
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
