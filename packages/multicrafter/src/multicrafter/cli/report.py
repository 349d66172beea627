"""``multicrafter report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import add_command


def report(arguments: argparse.Namespace) -> int:
    """The HTML report of a finished demo, written anew."""
    from multicrafter.demo.report import write_report

    if not (arguments.run / "results.json").is_file():
        raise UserError(f"run must be a folder of a finished demo, but {arguments.run} has no results.json")
    print(write_report(arguments.run))
    return 0


def add_parser(commands: Any) -> None:
    """Adds ``report`` to the command line."""
    sub = add_command(commands, "report", report, model=False)
    sub.add_argument("run", type=Path)
