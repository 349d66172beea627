"""The command line ``multicrafter``, one file a command; everything heavy is imported when a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from multicrafter.cli import (
    align,
    compare,
    data,
    demo,
    draw_references,
    evaluate,
    generate,
    leaderboard,
    plan,
    pretrain,
    report,
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


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for name in (
        "bitsandbytes",
        "torch.utils._pytree",
        "torch.utils.cpp_extension",
    ):  # what diffusers imports where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="multicrafter", description="Several given subjects in one picture, nobody blended."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        generate,
        draw_references,
        pretrain,
        align,
        evaluate,
        demo,
        data,
        compare,
        leaderboard,
        report,
        plan,
    ):
        command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, 130 when stopped."""
    _quiet()
    arguments = parser().parse_args(argv)
    from multicrafter.training.loop import Interrupted

    try:
        return int(arguments.function(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
