"""``multicrafter compare``."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import apart, ours, writable

logger = logging.getLogger(__name__)


def compare(arguments: argparse.Namespace) -> int:
    """Two runs, case by case: intervals and paired tests."""
    from multicrafter.files import write_whole
    from multicrafter.scoring.leaderboard import compare_runs
    from multicrafter.scoring.pages import compare_page
    from multicrafter.scoring.score import Scores

    if arguments.out is not None and arguments.out.suffix not in (".html", ".json"):
        raise UserError(f"--out must end in .html or .json, got {str(arguments.out)!r}")
    files = [run / "scores.json" if run.is_dir() else run for run in (arguments.first, arguments.second)]
    if arguments.out is not None:
        writable(arguments.out, file=True)
        apart(arguments.out, *files)
        if arguments.out.suffix == ".json":
            ours(arguments.out, "first", "second", "metrics")
    a, b = Scores.load(arguments.first), Scores.load(arguments.second)
    result, notes = compare_runs(a, b, strict=not arguments.allow_different_judges)
    for note in notes:
        logger.info(f"note: {note}")
    print(f"{b.name} - {a.name}")
    for name, c in result.items():
        print(
            f"{name:16} {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]  p {c.p:.4f}, Holm {c.p_corrected:.4f}  {c.cases} pictures"
        )
    if arguments.out is not None:
        if arguments.out.suffix == ".json":
            content = json.dumps(
                {
                    "first": a.name,
                    "second": b.name,
                    "notes": notes,
                    "metrics": {n: c._asdict() for n, c in result.items()},
                },
                indent=1,
            )
        else:
            content = compare_page(a, b, result, notes)
        print(f"written to {write_whole(arguments.out, content)}")
    return 0


def add_parser(commands: Any) -> None:
    """Adds ``compare`` to the command line."""
    sub = commands.add_parser("compare", help=compare.__doc__, description=compare.__doc__)
    sub.set_defaults(function=compare)
    sub.add_argument("first", type=Path, help="folder or scores.json of evaluate --pictures")
    sub.add_argument("second", type=Path, help="the same; differences are second minus first")
    sub.add_argument("--out", type=Path, help="page (.html) or figures (.json)")
    sub.add_argument("--allow-different-judges", action="store_true")
