"""HTML of one run, of two runs compared, and of a leaderboard."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multicrafter.pages import Cell, embedded, interval, number, render
from multicrafter.scoring.metrics import METRICS
from multicrafter.scoring.score import Scores, open_any
from multicrafter.scoring.statistics import Comparison

HERE = Path(__file__).parent
GALLERY = 6
COMPARED = (
    "Same prompts, differences case by case. Brackets: 95 % bootstrap. p: sign-flip permutation test of the prompts' mean differences; "
    "Holm: corrected for the number of metrics. Coloured where that is below .05: green better, red worse."
)
RANKED = (
    "Bold: best mean. Green: not distinguishable from the best (paired sign-flip test on the same prompts, p of at least .05 after "
    "Holm's correction for the number of runs). Brackets: 95 % bootstrap intervals over prompts."
)


def glossary(names: Sequence[str]) -> list[tuple[str, str]]:
    """What the metrics are."""
    return [(n, f"{METRICS[n].text} ({METRICS[n].better} is better)") for n in names]


def _thumb(path: str | None, alt: str, side: int = 200) -> list[tuple[str, str]]:
    """Alternative text and picture; nothing if there is none that can be read."""
    try:
        picture = open_any(Path(path or ""))
    except ValueError:
        return []
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return [(alt, embedded(buffer.getvalue(), "jpeg"))]


def gallery(scores: Scores, metric: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The cases with the lowest and the highest value of a metric, references first."""
    values = scores.values(metric)
    order = [int(i) for i in np.argsort(values, kind="stable") if np.isfinite(values[i])]

    def figure(i: int) -> dict[str, Any]:
        case = scores.cases[i]
        thumbs = [
            t for k, r in enumerate(case["references"]) for t in _thumb(r, f"reference {k + 1} of {case['key']}", 90)
        ]
        text = f"{case['key']}: {metric} {number(values[i])}, {case['faces']} faces"
        return {"pictures": [*thumbs, *_thumb(case["picture"], f"picture of {case['key']}")], "text": text}

    few = min(GALLERY, len(order))
    if not few:
        return []
    return [("Lowest", [figure(i) for i in order[:few]]), ("Highest", [figure(i) for i in order[::-1][:few]])]


def run_page(scores: Scores) -> str:
    """The report of one run."""
    missing = []
    if scores.missing:
        shown = ", ".join(scores.missing[:12]) + (" ..." if len(scores.missing) > 12 else "")
        missing = [f"{len(scores.missing)} pictures are missing and left out of every mean: {shown}"]
    rows = [[n, interval(e.mean, e.low, e.high), e.cases, e.groups] for n, e in scores.summary().items()]
    categories = [[c or "(none)", *(number(p[n].mean) for n in scores.names)] for c, p in scores.by_category().items()]
    metric = next((m for m in ("face_sim", "clip_i", "aes", "count") if m in scores.names), scores.names[0])
    return render(
        HERE, "run.html", title=f"Scores of {scores.name}", pictures=len(scores.cases), prompts=len(set(scores.groups)),
        format=scores.about["format"], missing=missing, problem_count=len(scores.problems), problems=scores.problems[:20], rows=rows,
        names=["", *scores.names], categories=categories, metric=metric, gallery=gallery(scores, metric),
        metrics=glossary(scores.names), judges=list(scores.about["judges"].items()),
    )  # fmt: skip


def compare_page(a: Scores, b: Scores, result: Mapping[str, Comparison], notes: Sequence[str]) -> str:
    """Two runs, case by case."""
    rows = []
    for name, c in result.items():
        gain = c.difference > 0 if METRICS[name].better == "more" else c.difference < 0
        kind = ("sure" if gain else "worse") if np.isfinite(c.p_corrected) and c.p_corrected < 0.05 else ""
        rows.append(
            [
                name, number(float(np.nanmean(a.values(name)))), number(float(np.nanmean(b.values(name)))),
                interval(c.difference, c.low, c.high, kind, sign=True), f"{c.p:.4f}", f"{c.p_corrected:.4f}",
                c.cases, c.groups,
            ]
        )  # fmt: skip
    head = ["metric", a.name, b.name, f"{b.name} - {a.name}", "p", "p, Holm", "pictures", "prompts"]
    title = f"{b.name} against {a.name}"
    return render(
        HERE, "table.html", title=title, notes=notes, head=head, rows=rows, text=COMPARED, metrics=glossary(list(result))
    )  # fmt: skip


def leaderboard_page(title: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str], notes: Sequence[str]) -> str:
    """Several runs, one table; ``rows``: name, estimates, best and tied metrics, pictures, missing."""

    def cell(row: Mapping[str, Any], name: str) -> Cell:
        if name not in row["summary"]:
            return Cell("–")
        found = row["summary"][name]
        kind = "best" if name in row["best"] else "sure" if name in row["tied"] else ""
        return interval(found.mean, found.low, found.high, kind)

    body = [[row["name"], *(cell(row, n) for n in names), row["pictures"], row["missing"]] for row in rows]
    head = ["run", *(f"{n} {'↑' if METRICS[n].better == 'more' else '↓'}" for n in names), "pictures", "missing"]
    return render(
        HERE, "table.html", title=title, notes=notes, head=head, rows=body, text=RANKED, metrics=glossary(names)
    )
