"""What was measured once and is kept in `benchmarks/results`: a table a study (`studies.lab.records`), a row a run, numbers that are not finite included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from benchmarks.run import circumstances
from studies.lab.records import decode, encode, read_table, write_table

LOST = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no word for these."""


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """What is recorded, by name; nothing where there is no file.

    Raises:
        ValueError: The file is no table of records.
    """
    return {name: _mapped(decode(row), _heard) for name, row in read_table(path).items()} if path.exists() else {}


def add(path: Path, name: str, record: Mapping[str, Any]) -> None:
    """One more row of the table; nobody else writes meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        rows = read_table(path) if path.exists() else {}
        row = encode(_mapped({**record, "circumstances": circumstances()}, _told))
        write_table(path, {**rows, name: row})


def _mapped(content: Any, function: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _mapped(value, function) for name, value in content.items()}
    return [_mapped(value, function) for value in content] if isinstance(content, (list, tuple)) else function(content)


def _told(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _heard(value: Any) -> Any:
    return LOST.get(value, value) if isinstance(value, str) else value
