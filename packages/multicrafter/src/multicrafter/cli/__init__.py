"""The command line ``multicrafter``, one file a command; everything heavy is imported when a command runs."""

from __future__ import annotations

import argparse
import errno
import re
import sys
import warnings
from collections.abc import Sequence

from multicrafter import UserError
from multicrafter.cli import (
    align,
    check_real,
    compare,
    data,
    demo,
    draw_references,
    evaluate,
    export,
    generate,
    leaderboard,
    messages,
    plan,
    pretrain,
    report,
    serve,
    settings,
)

ROWS = (
    "baseline",
    "idar",
    "idar_paper",
    "moe",
    "ippo",
    "separation",
    "full",
)  # keys of `recipes.ablation`, which is not imported for --help alone
FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the machine says when a disk is full or a folder closed: never a defect of this software."""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="multicrafter", description="Several given subjects in one picture, nobody blended."
    )
    top.add_argument("--debug", action="store_true", help="say more, and show the traceback of every error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        generate,
        draw_references,
        pretrain,
        align,
        evaluate,
        demo,
        data,
        export,
        compare,
        leaderboard,
        report,
        plan,
        settings,
        serve,
        check_real,
    ):
        command.add_parser(commands)
    return top


def answer(error: BaseException) -> str | None:
    """The sentence that a user gets for an exception; None for a defect, which keeps its traceback."""
    from id_reward.errors import InputError

    from multicrafter.training.checkpoint import CheckpointError
    from multicrafter.training.distributed import WorkerLost

    known = isinstance(error, (UserError, InputError, CheckpointError, WorkerLost))
    missing_extra = isinstance(error, ImportError) and "pip install" in str(error)
    closed = _errno(error) in FULL_OR_CLOSED
    return " ".join(str(error).split()) if known or missing_extra or closed else None


def _errno(error: BaseException) -> int | None:
    """What the machine said; safetensors, which writes the large files, hands its number on in the text only.

    >>> _errno(OSError(28, "No space left on device")), _errno(ValueError("os error 28"))
    (28, None)
    """
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(said[1]) if said else None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, 130 when stopped. A defect raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words  # before the command or after it
    arguments = parser().parse_args([w for w in words if w != "--debug"])
    with warnings.catch_warnings(), messages.shown(debug=debug):
        try:
            return int(arguments.function(arguments))
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            return 130
        except Exception as error:
            from multicrafter.training.loop import Interrupted

            if isinstance(error, Interrupted):
                print(f"\n{error}", file=sys.stderr)
                return 130
            sentence = answer(error)
            if sentence is None:
                raise
            if debug:
                messages.traceback(error)
            print(f"error: {sentence}", file=sys.stderr)
            return 2
