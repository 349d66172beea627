"""The command line ``multicrafter plan``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from multicrafter.cli.options import apart, ours, real, writable


def plan(arguments: argparse.Namespace) -> int:
    """Whether a run fits, and what a step takes: memory, arithmetic, traffic, time; without weights."""
    from multicrafter.config.run_options import chosen
    from multicrafter.files import write_whole
    from multicrafter.plan import CARDS, card_for, measure, predict
    from multicrafter.plan.estimate import rows_of, with_cache

    if arguments.out is not None:
        writable(arguments.out, file=True)
        apart(arguments.out, arguments.config)
        ours(arguments.out, "run", "plans")
    run = chosen(arguments)
    if not arguments.uncached:
        run = with_cache(run)
    cards = [card_for(m) for m in arguments.memory or sorted(CARDS)]
    passes: dict[int, Any] = {}
    plans = []
    for gpus in arguments.gpus:
        rows, _ = rows_of(run, gpus) if gpus >= 1 else (0, 0)
        if rows and rows not in passes:
            passes[rows] = measure(run, rows=rows)
        plans += [predict(run, card, gpus=gpus, measured=passes.get(rows)) for card in cards]
    name = arguments.recipe or str(arguments.config)
    print(as_markdown(name, plans))
    if arguments.out is not None:
        write_whole(arguments.out, json.dumps({"run": name, "plans": [as_dict(p) for p in plans]}, indent=1) + "\n")
        print(f"written to {arguments.out}")
    return 0


def as_dict(plan: Any) -> dict[str, Any]:
    """A plan as JSON."""
    from dataclasses import asdict

    return {**asdict(plan), "peak": plan.peak, "needed": plan.needed, "fits": plan.fits}


def as_markdown(name: str, plans: list[Any]) -> str:
    """One row per number of cards and memory size."""
    first = plans[0]
    head = (
        f"**{name}**: {first.tokens:,} tokens a sample, {first.trained_parameters / 1e6:,.0f} M trained parameters, "
        f"{first.flops / 1e12:,.0f} TFLOP and {first.moved / 1e12:.1f} TB of unfused traffic a step, "
        f"{first.cached / 1e9:.0f} GB of encoded data\n\n"
        "| cards | memory | fits | needed | to load | of it | sent a step | s a step |\n|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for p in plans:
        parts = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in p.parts.items() if v >= 5e7)
        rows.append(
            f"| {p.gpus} x {p.card.name} | {p.card.memory / 1e9:g} GB | {'yes' if p.fits else 'no'} | {p.needed / 1e9:.1f} GB "
            f"| {p.loading / 1e9:.1f} GB "
            f"| {parts} | {p.exchanged / 1e9:.1f} GB | {p.seconds:.1f} |"
        )
    return head + "\n".join(rows)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Registers the command."""
    from multicrafter.config.run_options import add_options

    sub: argparse.ArgumentParser = commands.add_parser("plan", help=plan.__doc__, description=plan.__doc__)
    sub.set_defaults(function=plan)
    add_options(sub)
    sub.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of cards")
    sub.add_argument("--memory", type=real, nargs="+", help="memory of a card in GB; default: 24 40 80 141")
    sub.add_argument(
        "--uncached",
        action="store_true",
        help="keep text encoders and VAE on the card, instead of encoding everything first",
    )
    sub.add_argument("--out", type=Path, help="JSON")
    return sub
