"""Who watches stage 2 in the drawn world: a judge that no reward is made of, so that training cannot import it and is given it."""

from __future__ import annotations

from pathlib import Path

from id_reward import IdentityScorer

from multicrafter.world import judges
from multicrafter.world.judges.reader import Reader, ReaderBackend


def drawn_watcher(folder: Path | None = None) -> IdentityScorer:
    """Identity of drawn people as the reader of truth sees it, for `training.runs.run_align`."""
    return IdentityScorer(ReaderBackend(Reader.from_pretrained(folder or judges.shipped())))
