"""Results of stages, kept by content hash in one SQLite file: whole batches or nothing, whatever interrupts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multicrafter import UserError

Result = dict[str, Any]


class Cache:
    """``get`` and ``put`` of JSON results by (stage fingerprint, key)."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Raises:
            ValueError: Another build works on it, or it is no cache.
        """
        self.path = path
        try:
            self._file = sqlite3.connect(path, timeout=0.5, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS results (stage TEXT, key TEXT, value TEXT, PRIMARY KEY (stage, key)) WITHOUT ROWID"
            )
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise UserError(f"{path} must be free for this build, but another one works here ({error})") from error
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} must be a cache of a build, got: {error}; remove it to start afresh") from error

    def known(self, stage: str) -> set[str]:
        """Keys with a result."""
        return {row[0] for row in self._file.execute("SELECT key FROM results WHERE stage = ?", (stage,))}

    def get(self, stage: str, key: str) -> Result | None:
        """The result, or None."""
        row = self._file.execute("SELECT value FROM results WHERE stage = ? AND key = ?", (stage, key)).fetchone()
        return None if row is None else json.loads(row[0])

    def items(self, stage: str, keys: Sequence[str]) -> Iterator[tuple[str, Result]]:
        """Results of ``keys`` in their order, those that exist."""
        for key in keys:
            if (value := self.get(stage, key)) is not None:
                yield key, value

    def put(self, stage: str, results: Mapping[str, Result]) -> None:
        """Stores a batch, whole or not at all."""
        rows = [(stage, key, json.dumps(value, separators=(",", ":"))) for key, value in results.items()]
        with self._transaction():
            self._file.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", rows)

    def forget(self, stage: str, key: str) -> None:
        """Removes one result."""
        self._file.execute("DELETE FROM results WHERE stage = ? AND key = ?", (stage, key))

    def keep_only(self, keys: Collection[str], stages: Iterable[str]) -> int:
        """Forgets every result of other keys or stages (a photo that was withdrawn leaves no embedding behind); returns how many."""
        with self._transaction():
            self._file.execute("CREATE TEMP TABLE wanted (key TEXT PRIMARY KEY)")
            self._file.executemany("INSERT OR IGNORE INTO wanted VALUES (?)", ((k,) for k in keys))
            marks = list(stages)
            gone = self._file.execute(
                f"DELETE FROM results WHERE key NOT IN (SELECT key FROM wanted) OR stage NOT IN ({','.join('?' * len(marks))})",
                marks,
            ).rowcount
            self._file.execute("DROP TABLE wanted")
        if gone:
            self._file.execute("VACUUM")
        return int(gone)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._file)


class _Transaction:
    def __init__(self, file: sqlite3.Connection) -> None:
        self.file = file

    def __enter__(self) -> None:
        self.file.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self.file.execute("ROLLBACK" if kind is not None else "COMMIT")
