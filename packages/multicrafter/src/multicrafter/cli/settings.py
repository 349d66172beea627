"""The command line ``multicrafter settings``."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from multicrafter import UserError


def settings(arguments: argparse.Namespace) -> int:
    """Every value of a run: its name for --set, what it is, what it means, and where it comes from."""
    from multicrafter.config.described import described
    from multicrafter.config.recipes import tiny_stage1
    from multicrafter.config.run_options import chosen
    from multicrafter.config.settings import as_yaml, to_dict

    named = arguments.recipe is not None or arguments.config is not None
    run = chosen(arguments, default=None if named else tiny_stage1())
    words = [word.lower() for word in arguments.words]
    found = [d for d in described(run) if all(w in f"{d.name} {d.meaning}".lower() for w in words)]
    if not found:
        raise UserError(f"words must be in the name or the meaning of a value, got {' '.join(arguments.words)!r}")
    for one in found:
        value = as_yaml({one.name: to_dict(one.value)}).removeprefix(f"{one.name}:").strip()
        print(f"{one.name} = {value}  ({one.kind}; {one.origin})")
        print(textwrap.indent(textwrap.fill(one.meaning, 110), "    "))
    return 0


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Registers the command."""
    from multicrafter.config.run_options import add_options

    sub: argparse.ArgumentParser = commands.add_parser("settings", help=settings.__doc__, description=settings.__doc__)
    sub.set_defaults(function=settings)
    sub.add_argument(
        "words", nargs="*", help="only values whose name or meaning has all of these, such as: learning rate"
    )
    add_options(sub)
    return sub
