"""A self-contained HTML page of a finished demo, made from its results.json and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.files import read_json, write_whole
from multicrafter.pages import Cell, difference, embedded, interval, render

FIGURES = {
    "pictures.png": (
        "Pictures",
        "Unseen identities, the same noise for every model. The references on top.",
        "A grid: one column a case, its references on top, then one row of pictures per model",
    ),
    "attention.png": (
        "Attention",
        "Where image tokens look for reference A rather than the other: red A, blue the other, white undecided. "
        "Mean over all blocks, noise level 0.6.",
        "True scenes, true masks of reference A, and a map of the attention on A per model",
    ),
    "training.png": (
        "Stage 1",
        "Losses on the training scenes.",
        "Diffusion loss and attention loss over the steps of stage 1",
    ),
    "reward.png": (
        "Stage 2",
        "Reward of the rollouts, which are noisier than pictures drawn for you.",
        "Reward and its parts over the iterations of stage 2",
    ),
}
CHARTS = ("training.png", "reward.png")
"""Figures with axes, whose writing is small."""


BETTER = {
    "identity": "more", "attributes": "more", "swaps": "less", "swaps_above_chance": "less", "count": "more", "setting": "more",
    "text": "more", "aesthetics": "more", "found": "more", "leakage": "less", "reward": "more",
}  # fmt: skip
"""Of each metric; what guessing would give, ``swaps_by_chance``, is neither good nor bad."""


def _table(rows: Mapping[str, Mapping[str, Any]], *, differences: bool = False) -> tuple[list[str], list[list[Cell]]]:
    """One column a row of ``rows``; differences are marked as better or worse."""

    def cell(name: str, found: Mapping[str, Any] | None) -> Cell:
        if found is None:
            return Cell("")
        numbers = (found["mean"], found["low"], found["high"])
        return difference(*numbers, better=BETTER.get(name)) if differences else interval(*numbers)

    names = list(dict.fromkeys(n for row in rows.values() for n in row))
    return ["", *rows], [[Cell(name), *(cell(name, row.get(name)) for row in rows.values())] for name in names]


def _claims(claims: Mapping[str, Mapping[str, Any]]) -> list[list[Cell]]:
    return [
        [Cell(text, kind=kind), Cell(f"{found} in this run", kind=kind)]
        for text, claim in claims.items()
        for found, kind in [("holds", "sure") if claim["holds"] else ("not shown", "unsure")]
    ]


def write_report(run: Path) -> Path:
    """Writes ``run/report.html``."""
    results = read_json(run / "results.json")
    wanted = ("judges", "seconds", "config", "claims", "summary", "differences", "metrics")
    if lacking := [name for name in wanted if not isinstance(results, dict) or name not in results]:
        raise UserError(f"{run / 'results.json'} must be of a finished demo, but it lacks {', '.join(lacking)}")
    opening = run / "side_by_side.png"
    shown = [
        {"title": title, "text": text, "alt": alt, "data": embedded((run / name).read_bytes()), "chart": name in CHARTS}
        for name, (title, text, alt) in FIGURES.items()
        if (run / name).is_file()
    ]
    tails = [
        ("How good the judges are", "On pictures of the world, unseen identities.", results["judges"]),
        ("Seconds", "", results["seconds"]),
        ("Configuration", "", results["config"]),
    ]
    page = render(
        Path(__file__).parent,
        "report.html",
        title="MultiCrafter on the tiny world",
        opening=embedded(opening.read_bytes()) if opening.is_file() else "",
        seconds=results["seconds"],
        config=results["config"],
        claims=_claims(results["claims"]),
        summary=_table(results["summary"]),
        differences=_table(results["differences"], differences=True),
        metrics=list(results["metrics"].items()),
        pictures=shown,
        tails=[(title, text, json.dumps(content, indent=1)) for title, text, content in tails],
    )
    return write_whole(run / "report.html", page)
