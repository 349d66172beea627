"""Writes docs/results/id_reward.md from the recorded figures.

python packages/id_reward/benchmarks/report_id_reward.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FIGURES = ROOT / "benchmarks" / "results" / "id_reward-scoring.json"
PAGE = ROOT / "docs" / "results" / "id_reward.md"


def row(name: str, figure: dict, digits: int = 2) -> str:
    return f"| {name} | {figure['median']:,.{digits}f} | {figure['min']:,.{digits}f} to {figure['max']:,.{digits}f} | {figure['rounds']} |"


def main() -> None:
    figures = json.loads(FIGURES.read_text())
    lines = ["# id_reward: speed", ""]
    lines += [
        "What is compared with what is written in `packages/id_reward/benchmarks/bench_id_reward_scoring.py`; this page is made from its JSON."
    ]
    for part, title in (
        ("dlib", "12 photos, 3 references, dlib"),
        ("insightface", "12 pictures, 3 references, insightface"),
    ):
        if part not in figures:
            continue
        found = figures[part]
        lines += ["", f"## {title}", "", "| times faster than | median | range | rounds |", "|---|---|---|---|"]
        lines += [row(name, value) for name, value in found["times faster than"].items()]
        lines += ["", "| seconds | median | range | rounds |", "|---|---|---|---|"]
        lines += [row(name, value) for name, value in found["seconds"].items()]
        if "bookkeeping" in found:
            share = found["bookkeeping"]["share of the whole"]
            lines += [
                "",
                f"Matching and bookkeeping are {100 * share['median']:.2f} % of it ({100 * share['min']:.2f} to {100 * share['max']:.2f} %).",
            ]
    for part, title, digits in (
        ("matching", "4x4 matrices a second, one core", 0),
        ("import", "Import, seconds beyond a bare interpreter", 3),
    ):
        if part in figures:
            lines += ["", f"## {title}", "", "| | median | range | rounds |", "|---|---|---|---|"]
            lines += [
                row(name, value, digits)
                for name, value in figures[part].items()
                if isinstance(value, dict) and "median" in value
            ]
    lines += ["", "## Circumstances", ""]
    for part, found in figures.items():
        about = found["circumstances"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        clock = f"{about['clock']} (load {about['load']:.0f})"
        where = f"{about['device']}, Python {about['python']}, {versions}"
        lines.append(f"- {part}: `{about['command']}`, commit {about['commit'][:10]}, {clock}, {where}")
    unfinished = PAGE.with_suffix(".tmp")
    unfinished.write_text("\n".join(lines) + "\n")
    os.replace(unfinished, PAGE)


if __name__ == "__main__":
    main()
