"""The folder of a run: held by one run at a time, and nothing of an earlier run in it is deleted."""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.training import distributed
from multicrafter.training.checkpoint import Checkpoint, checkpoints_in, step_of


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds the folder of a run; the lock goes with the process, however it ends.

    Raises:
        ValueError: Another run holds it; the same on every rank.
    """
    file, problem = None, ""
    if distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a+")
        if not _lock(file):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            problem = f"out must be a folder that no other run is writing to, but {out} is held by {holder or 'another process'}"
    problem = distributed.broadcast_object(problem)
    if problem:
        raise UserError(problem)
    if file is not None:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    try:
        yield
    finally:
        if file is not None:
            file.close()  # the file stays: to remove it would let two others lock two different ones


def _lock(file: Any) -> bool:
    """Whether the file could be locked; always, where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_free(out: Path) -> None:
    """Raises ValueError where another run is writing into ``out``, before anything of it is touched."""
    if not (out / ".lock").exists():
        return
    with (out / ".lock").open("a+") as file:
        if not _lock(file):
            file.seek(0)
            raise UserError(f"out must be a folder that no other run is writing to, but {out} is held by {file.read()}")


def _new_folder(out: Path, name: str) -> Path:
    """``name``, or ``name-2``, ``name-3``, ... where that is taken."""
    numbered = (out / f"{name}-{i}" for i in itertools.count(2))
    return next(t for t in itertools.chain([out / name], numbered) if not t.exists())


def start_over(out: Path, checkpoints: Path) -> None:
    """Moves what an earlier run left into a folder of its own; a forgotten --resume must not cost it, however often."""
    if not checkpoints_in(checkpoints):
        return
    target = _new_folder(out, "checkpoints.previous")
    os.replace(checkpoints, target)
    for name in ("metrics.jsonl", "config.json", "adapter", "adapter_ema"):
        if (out / name).exists():
            os.replace(out / name, target / name)
    print(f"the earlier run is kept in {target}", file=sys.stderr, flush=True)


def give_up_branch(out: Path, checkpoints: Path, found: Checkpoint) -> None:
    """Moves checkpoints that do not lead to ``found`` aside: "auto" would take the newest of them for this run's."""
    inside = found.path.resolve().parent == checkpoints.resolve()
    others = [p for p in checkpoints_in(checkpoints) if not inside or step_of(p) > found.step]
    if not others:
        return
    target = _new_folder(out, "checkpoints.abandoned")
    target.mkdir()
    for path in others:
        os.replace(path, target / path.name)
    print(f"{len(others)} checkpoints of another branch are kept in {target}", file=sys.stderr, flush=True)
