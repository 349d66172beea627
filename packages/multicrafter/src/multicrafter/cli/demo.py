"""``multicrafter demo``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter.cli.options import add_command, positive, writable


def demo(arguments: argparse.Namespace) -> int:
    """Both stages, evaluation, report."""
    from multicrafter.demo.both_stages import DemoConfig, run
    from multicrafter.models.loading import get_device

    writable(arguments.out, file=False)
    get_device(arguments.device)
    config = DemoConfig(seed=arguments.seed)
    for name in ("stage1_steps", "stage2_steps", "scenes", "cases"):
        value = getattr(arguments, name)
        config = config if value is None else replace(config, **{name: value})
    run(arguments.out, config, model=arguments.model, resume=arguments.resume, device=arguments.device)
    return 0


def add_parser(commands: Any) -> None:
    """Adds ``demo`` to the command line."""
    sub = add_command(commands, "demo", demo)
    sub.add_argument("--out", type=Path, default=Path("runs/demo"))
    sub.add_argument("--device", default="cpu", help="cuda, cuda:1, ...")
    sub.add_argument("--stage1-steps", type=positive)
    sub.add_argument("--stage2-steps", type=positive)
    sub.add_argument("--scenes", type=positive, help="training scenes drawn")
    sub.add_argument("--cases", type=positive)
    sub.add_argument("--resume", action="store_true")
