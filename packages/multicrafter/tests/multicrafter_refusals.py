"""A command that must refuse, and what it may have changed."""

from __future__ import annotations

from pathlib import Path

from multicrafter.cli import main


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


def refused(capsys, folder: Path, *argv: object) -> str:
    """The sentence of a command that must refuse and change nothing."""
    before = contents(folder)
    assert main([str(a) for a in argv]) == 2
    assert contents(folder) == before
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message
