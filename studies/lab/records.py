"""Records of experiments: a table a study, a row a record.

    python -m studies.lab.records                          what is recorded, and where
    python -m studies.lab.records FILE ...                 takes the rows of other tables, or records KEY.json, in
    python -m studies.lab.records FILE ... --into NAME     the same, into the table of that study
    python -m studies.lab.records --drop KEY ...           forgets these records

A table is a Parquet file. Its column ``key`` names the record; every other column is one field of the records as JSON text, and null where a record has no such
field. JSON gives back every number bit by bit. The same rows make the same bytes, in whatever order they came. Why a table: docs/adr/0092-records-in-tables.md.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
from multicrafter.files import write_whole

from benchmarks.run import ROOT

KEY = "key"
OTHERS = "others"
"""The table of what no study asked for."""
RUNS = ROOT / "runs" / "science"
TABLES = ROOT / "studies" / "results"

Row = dict[str, str]
"""Field to JSON text."""


def encode(record: Mapping[str, Any]) -> Row:
    """A record as a row.

    >>> encode({"seed": 0, "loss": [0.1, None]})
    {'seed': '0', 'loss': '[0.1,null]'}
    """
    return {name: json.dumps(content, separators=(",", ":"), allow_nan=False) for name, content in record.items()}


def decode(row: Row) -> dict[str, Any]:
    """The record of a row."""
    return {name: json.loads(text) for name, text in row.items()}


def read_table(path: Path) -> dict[str, Row]:
    """Rows by key.

    Raises:
        ValueError: The file is no table of records.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a table of records, got what cannot be read as Parquet: {error}") from error
    if KEY not in table.column_names or any(kind != pa.string() for kind in table.schema.types):
        raise ValueError(f"{path} must be a table of records: {KEY!r} and other columns of text, got {table.schema}")
    rows = {row.pop(KEY): row for row in table.to_pylist()}
    return {key: {name: text for name, text in row.items() if text is not None} for key, row in rows.items()}


def write_table(path: Path, rows: Mapping[str, Row]) -> None:
    """Writes a table, whole or not at all."""
    names = dict.fromkeys(name for key in sorted(rows) for name in rows[key])
    columns = {KEY: sorted(rows), **{name: [rows[key].get(name) for key in sorted(rows)] for name in names}}
    table = pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=19, use_dictionary=False, write_statistics=False)
    write_whole(path, sink.getvalue())


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of a table, or the one of a record ``KEY.json``.

    Raises:
        ValueError: The file is neither.
    """
    if path.suffix != ".json":
        return read_table(path)
    try:
        return {path.stem: encode(json.loads(path.read_text()))}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a record, got what cannot be read as such: {error}") from error


@dataclass
class Records:
    """All tables of a folder. A key is in one of them only.

    Attributes:
        folder: Where the tables lie.
        lock: Whoever writes holds this file; tables are part of the repository, it is not. Who reads needs no lock.
    """

    folder: Path
    lock: Path
    _read: dict[Path, tuple[tuple[int, ...], dict[str, Row]]] = field(default_factory=dict)

    def tables(self) -> dict[str, dict[str, Row]]:
        """Rows by key by table, as they are now; a file is read again when another took its place."""
        found = {}
        for path in sorted(self.folder.glob("*.parquet")):
            status = path.stat()
            state = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._read.get(path, ((), {}))[0] != state:
                self._read[path] = (state, read_table(path))
            found[path.stem] = self._read[path][1]
        return found

    def keys(self) -> set[str]:
        """Names of all records."""
        return {key for rows in self.tables().values() for key in rows}

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of this name, if there is one."""
        return next((decode(rows[key]) for rows in self.tables().values() if key in rows), None)

    def add(self, table: str, rows: Mapping[str, Row]) -> list[str]:
        """Adds what is new to a table. What is recorded already stays as it is, wherever it lies: the keys that would have changed are returned."""
        with self._alone():
            known = {key: row for there in self.tables().values() for key, row in there.items()}
            if fresh := {key: row for key, row in rows.items() if key not in known}:
                write_table(self.folder / f"{table}.parquet", self.tables().get(table, {}) | fresh)
        return sorted(key for key, row in rows.items() if key in known and known[key] != row)

    def drop(self, keys: Iterable[str]) -> list[str]:
        """Forgets records; returns the keys that are not there."""
        gone = set(keys)
        with self._alone():
            tables = self.tables()
            for name, rows in tables.items():
                if gone & rows.keys():
                    write_table(self.folder / f"{name}.parquet", {k: r for k, r in rows.items() if k not in gone})
        return sorted(gone.difference(*tables.values()))

    def _alone(self) -> filelock.BaseFileLock:
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.lock)


def main(arguments: Sequence[str] | None = None, *, folder: Path = TABLES, runs: Path = RUNS) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.lab.records", description="Records of the studies.")
    parser.add_argument("files", nargs="*", type=Path, help="tables, or records KEY.json, to take in")
    parser.add_argument("--into", metavar="NAME", help=f"table; else of the file's own name, {OTHERS} for JSON")
    parser.add_argument("--drop", nargs="+", metavar="KEY", default=[], help="records to forget")
    options = parser.parse_args(arguments)
    records = Records(folder, runs / "records.lock")
    try:
        taken = [(path, read_rows(path)) for path in options.files]  # all of them, before anything is written
    except ValueError as error:
        parser.error(str(error))
    for path, rows in taken:
        left = records.add(options.into or (OTHERS if path.suffix == ".json" else path.stem), rows)
        print(f"{path}: {len(rows)} rows" + (f"; these stay as they were: {', '.join(left)}" if left else ""))
    if missing := records.drop(options.drop):
        parser.error(f"--drop must name records that are there, got {', '.join(missing)}")
    for name, rows in records.tables().items():
        print(f"{name:24}{len(rows):5} records{(folder / f'{name}.parquet').stat().st_size / 1e3:10.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
