"""Comparing runs: two in detail, several in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from multicrafter import UserError
from multicrafter.scoring.metrics import METRICS
from multicrafter.scoring.score import Scores
from multicrafter.scoring.statistics import Comparison, compare, holm, paired_test


def differences_in_kind(a: Scores, b: Scores) -> list[str]:
    """Why two runs may not be comparable, one sentence each."""
    notes: list[str] = []
    if a.about["judges"] != b.about["judges"]:
        keys = sorted(
            k
            for k in a.about["judges"].keys() | b.about["judges"].keys()
            if a.about["judges"].get(k) != b.about["judges"].get(k)
        )
        notes.append(
            f"{a.name} and {b.name} were judged by different models ({', '.join(keys)}): their numbers do not compare"
        )
    if a.about["format"] != b.about["format"] or a.about["prompts"] != b.about["prompts"]:
        notes.append(f"{a.name} and {b.name} answer different prompt lists: only prompts of both are compared")
    return notes


def align(a: Scores, b: Scores) -> tuple[list[int], list[int]]:
    """Rows of the cases that both have, in the order of a.

    Raises:
        ValueError: There is none; or one key stands for two prompts.
    """
    place = {c["key"]: i for i, c in enumerate(b.cases)}
    for case in a.cases:
        if case["key"] in place and "asked" in case:
            other = b.cases[place[case["key"]]].get("asked", case["asked"])
            if other != case["asked"]:
                raise UserError(
                    f"{a.name} and {b.name} must answer the same prompts with the same references, but {case['key']!r} asks for "
                    "something else in each"
                )
    pairs = [(i, place[c["key"]]) for i, c in enumerate(a.cases) if c["key"] in place]
    if not pairs:
        raise UserError(f"{a.name} and {b.name} must share cases, but no key is in both")
    return [i for i, _ in pairs], [j for _, j in pairs]


def compare_runs(a: Scores, b: Scores, *, strict: bool = True) -> tuple[dict[str, Comparison], list[str]]:
    """Every metric of both, b minus a on the same cases, and notes about what differs.

    Raises:
        ValueError: No case in common; or, if ``strict``, other judges.
    """
    notes = differences_in_kind(a, b)
    if strict and a.about["judges"] != b.about["judges"]:
        raise UserError(f"{notes[0]}; say --allow-different-judges to compare them all the same")
    rows, other = align(a, b)
    names = [n for n in a.names if n in b.names]
    if not names:
        raise UserError(
            f"{a.name} and {b.name} must share a metric, got {', '.join(a.names) or 'none'} and {', '.join(b.names) or 'none'}"
        )
    if len(rows) < max(len(a.cases), len(b.cases)):
        notes.append(f"{len(rows)} cases are in both, of {len(a.cases)} and {len(b.cases)}")
    groups = [a.groups[i] for i in rows]
    return compare({n: a.values(n, rows) for n in names}, {n: b.values(n, other) for n in names}, groups), notes


@dataclass(frozen=True)
class Board:
    """Rows (name, summary, best, tied, pictures, missing), metrics, notes."""

    rows: list[dict[str, Any]]
    names: list[str]
    notes: list[str]


def leaderboard(runs: Sequence[Scores], *, sort_by: str | None = None, metrics: Sequence[str] | None = None) -> Board:
    """Several runs of one prompt list, by the same judges, best first.

    For each metric the best mean is marked, and those that a paired test cannot tell from it (p of at least .05 after Holm over the runs).

    Args:
        runs: At least one, names all different.
        sort_by: Metric; None takes the first that all have.
        metrics: Columns; None takes all.

    Raises:
        ValueError: Names twice, other judges, other prompts, or an unknown metric.
    """
    names = [r.name for r in runs]
    if not runs or len(set(names)) < len(names):
        raise UserError(f"runs must be at least one, with different names, got {names}")
    for run in runs[1:]:
        if run.about["judges"] != runs[0].about["judges"]:
            raise UserError(f"{differences_in_kind(runs[0], run)[0]}; a leaderboard needs the same judges")
        if differences_in_kind(runs[0], run):
            raise UserError(
                f"{runs[0].name} and {run.name} answer different prompt lists, whose means do not compare; a leaderboard needs the same "
                f"one: see multicrafter compare for the prompts of both"
            )
        align(runs[0], run)  # refuses one key for two prompts
    columns = [n for n in METRICS if any(n in r.names for r in runs)]
    if unknown := [m for m in [*(metrics or ()), *([sort_by] if sort_by else ())] if m not in columns]:
        raise UserError(f"metrics must be some of {', '.join(columns)}, got {', '.join(unknown)}")
    columns = [n for n in columns if not metrics or n in metrics]
    summaries = {r.name: r.summary() for r in runs}
    rows: dict[str, dict[str, Any]] = {
        r.name: {
            "name": r.name,
            "summary": summaries[r.name],
            "best": set(),
            "tied": set(),
            "pictures": len(r.cases),
            "missing": len(r.missing),
        }
        for r in runs
    }
    for column in columns:
        holders = [r for r in runs if column in summaries[r.name]]
        best = max(
            holders, key=lambda r: (1 if METRICS[column].better == "more" else -1) * summaries[r.name][column].mean
        )
        rows[best.name]["best"].add(column)
        p_values = {}
        for run in holders:
            if run is not best and {c["key"] for c in run.cases} & {c["key"] for c in best.cases}:
                mine, theirs = align(run, best)
                groups = [run.groups[i] for i in mine]
                p_values[run.name] = paired_test(
                    run.values(column, mine), best.values(column, theirs), groups, resamples=1999
                ).p
        for name, p in holm(p_values).items():
            if not np.isfinite(p) or p >= 0.05:
                rows[name]["tied"].add(column)
    first = sort_by or next((n for n in columns if all(n in summaries[r.name] for r in runs)), columns[0])
    sign = -1 if METRICS[first].better == "more" else 1

    def rank(row: dict[str, Any]) -> tuple[bool, float]:
        return (first not in row["summary"], sign * row["summary"][first].mean if first in row["summary"] else 0.0)

    return Board(sorted(rows.values(), key=rank), columns, [])


def as_markdown(board: Board) -> str:
    """The board as a Markdown table; the best means in bold."""
    from multicrafter.pages import interval

    lines = [
        "| run | " + " | ".join(board.names) + " | pictures | missing |",
        "|---|" + "---|" * (len(board.names) + 2),
    ]
    for row in board.rows:
        cells = []
        for name in board.names:
            value = row["summary"].get(name)
            text = "" if value is None else " ".join(interval(value.mean, value.low, value.high)[:2])
            cells.append(f"**{text}**" if name in row["best"] else text)
        run = " ".join(row["name"].split()).replace("|", r"\|")  # a name that ends a cell would move all others
        lines.append(f"| {run} | {' | '.join(cells)} | {row['pictures']} | {row['missing']} |")
    return "\n".join(lines) + "\n"
