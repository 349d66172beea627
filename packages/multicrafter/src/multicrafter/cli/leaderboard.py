"""``multicrafter leaderboard``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import apart, writable

logger = logging.getLogger(__name__)


def leaderboard(arguments: argparse.Namespace) -> int:
    """Several runs in one table."""
    from multicrafter.files import write_whole
    from multicrafter.scoring.leaderboard import as_markdown
    from multicrafter.scoring.leaderboard import leaderboard as make
    from multicrafter.scoring.pages import leaderboard_page
    from multicrafter.scoring.score import Scores

    if arguments.out is not None and arguments.out.suffix not in (".html", ".md"):
        raise UserError(f"--out must end in .html or .md, got {str(arguments.out)!r}")
    if arguments.out is not None:
        writable(arguments.out, file=True)
        apart(arguments.out, *(run / "scores.json" if run.is_dir() else run for run in arguments.runs))
    board = make([Scores.load(path) for path in arguments.runs], sort_by=arguments.sort_by, metrics=arguments.metrics)
    text = as_markdown(board)
    print(text, end="")
    for note in board.notes:
        logger.info(f"note: {note}")
    if arguments.out is not None:
        whole = (
            text
            if arguments.out.suffix == ".md"
            else leaderboard_page(arguments.title, board.rows, board.names, board.notes)
        )
        print(f"written to {write_whole(arguments.out, whole)}")
    return 0


def add_parser(commands: Any) -> None:
    """Adds ``leaderboard`` to the command line."""
    sub = commands.add_parser("leaderboard", help=leaderboard.__doc__, description=leaderboard.__doc__)
    sub.set_defaults(function=leaderboard)
    sub.add_argument("runs", type=Path, nargs="+", help="folders or scores.json of evaluate --pictures")
    sub.add_argument("--out", type=Path, help="page (.html) or table (.md)")
    sub.add_argument("--title", default="Leaderboard")
    sub.add_argument("--sort-by", help="metric")
    sub.add_argument("--metrics", nargs="+", help="columns")
