"""HTML of one run, of two runs compared, and of a leaderboard."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multicrafter.scoring.metrics import METRICS
from multicrafter.scoring.score import Scores, open_any
from multicrafter.scoring.statistics import Comparison, Estimate

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text { white-space: normal; text-align: left; }
small, .range { color: #777; font-size: .82em; } .best { font-weight: 700; } .sure { background: #e3f4e3; } .worse { background: #fbe5e5; }
.note { background: #fff3d6; padding: .6rem 1rem; border-radius: 4px; } figure { display: inline-block; margin: .3rem; vertical-align: top; }
figure img { height: 130px; } figcaption { font-size: .78em; color: #777; max-width: 420px; }
@media (prefers-color-scheme: dark) { body { background: #181a1b; color: #ddd; } th, td { border-color: #444; } .note { background: #4a3c14; }
  .sure { background: #1f3d24; } .worse { background: #46211f; } }
"""
GALLERY = 6


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.3f}"


def estimate(value: Estimate) -> str:
    """Mean and interval."""
    return f'{number(value.mean)} <span class="range">[{number(value.low)}, {number(value.high)}]</span>'


def page(title: str, *parts: str) -> str:
    """A whole page."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; a cell may begin with a class in braces: ``{best}.5``."""
    lines = []
    for row in rows:
        cells = []
        for cell in row:
            kind, _, rest = cell[1:].partition("}") if cell.startswith("{") else ("", "", cell)
            cells.append(f'<td class="{kind}">{rest}</td>' if kind else f"<td>{rest}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>{''.join(lines)}</table>"


def glossary(names: Sequence[str]) -> str:
    """What the metrics are."""
    items = "".join(
        f"<li><b>{n}</b> ({METRICS[n].better} is better): {html.escape(METRICS[n].text)}</li>" for n in names
    )
    return f"<h2>What the metrics are</h2><ul>{items}</ul>"


def gaps(scores: Scores) -> str:
    """A note about pictures that are missing and what could not be scored."""
    note = ""
    if scores.missing:
        shown = ", ".join(map(html.escape, scores.missing[:12])) + (" ..." if len(scores.missing) > 12 else "")
        note += f"<p class=note>{len(scores.missing)} pictures are missing and left out of every mean: {shown}</p>"
    if scores.problems:
        items = "".join(f"<li>{html.escape(p)}</li>" for p in scores.problems[:20])
        note += f"<div class=note>{len(scores.problems)} files could not be scored fully:<ul>{items}</ul></div>"
    return note


def _thumb(path: str | None, side: int = 200) -> str:
    try:
        picture = open_any(Path(path or ""))
    except ValueError:
        return ""
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def gallery(scores: Scores, metric: str) -> str:
    """The cases with the lowest and the highest value of a metric, references first."""
    values = scores.values(metric)
    order = [int(i) for i in np.argsort(values, kind="stable") if np.isfinite(values[i])]
    if not order:
        return ""

    def figure(i: int) -> str:
        case = scores.cases[i]
        pictures = "".join(_thumb(r, 90) for r in case["references"]) + _thumb(case["picture"])
        text = f"{case['key']}: {metric} {number(values[i])}, {case['faces']} faces"
        return f"<figure>{pictures}<figcaption>{html.escape(text)}</figcaption></figure>"

    few = min(GALLERY, len(order))
    low, high = "".join(map(figure, order[:few])), "".join(map(figure, order[::-1][:few]))
    return f"<h2>Pictures</h2><p>References, then the picture. Lowest {metric}:</p>{low}<p>Highest:</p>{high}"


def run_page(scores: Scores) -> str:
    """The report of one run."""
    summary = scores.summary()
    rows = [[n, estimate(e), str(e.cases), str(e.groups)] for n, e in summary.items()]
    parts = [
        f"<p>{len(scores.cases)} pictures of {len(set(scores.groups))} prompts, format {html.escape(scores.about['format'])}. "
        "Brackets: 95 % bootstrap intervals; prompts are drawn, with all their pictures.</p>",
        gaps(scores), table(["metric", "mean", "pictures", "prompts"], rows),
    ]  # fmt: skip
    if categories := scores.by_category():
        cells = [
            [html.escape(c or "(none)"), *(number(p[n].mean) for n in scores.names)] for c, p in categories.items()
        ]
        parts += [
            "<h2>By category</h2>",
            table(["", *scores.names], cells),
            "<p><small>macro: mean over the categories, each counting once.</small></p>",
        ]
    judges = "".join(f"<li>{html.escape(k)}: {html.escape(v)}</li>" for k, v in scores.about["judges"].items())
    first = next((m for m in ("face_sim", "clip_i", "aes", "count") if m in scores.names), scores.names[0])
    parts += [gallery(scores, first), glossary(scores.names), f"<h2>Judges</h2><ul>{judges}</ul>"]
    return page(f"Scores of {scores.name}", *parts)


def compare_page(a: Scores, b: Scores, result: Mapping[str, Comparison], notes: Sequence[str]) -> str:
    """Two runs, case by case."""
    rows = []
    for name, c in result.items():
        better = METRICS[name].better
        gain = c.difference > 0 if better == "more" else c.difference < 0
        kind = ("{sure}" if gain else "{worse}") if np.isfinite(c.p_corrected) and c.p_corrected < 0.05 else ""
        rows.append(
            [
                name, number(float(np.nanmean(a.values(name)))), number(float(np.nanmean(b.values(name)))),
                f'{kind}{c.difference:+.3f} <span class="range">[{c.low:+.3f}, {c.high:+.3f}]</span>', f"{c.p:.4f}", f"{c.p_corrected:.4f}",
                str(c.cases), str(c.groups),
            ]
        )  # fmt: skip
    head = ["metric", a.name, b.name, f"{b.name} - {a.name}", "p", "p, Holm", "pictures", "prompts"]
    return page(
        f"{b.name} against {a.name}",
        "".join(f"<p class=note>{html.escape(n)}</p>" for n in notes), table(head, rows),
        "<p>Same prompts, differences case by case. Brackets: 95 % bootstrap. p: sign-flip permutation test of the prompts' mean differences; "
        "Holm: corrected for the number of metrics. Coloured where that is below .05: green better, red worse.</p>",
        glossary(list(result)),
    )  # fmt: skip


def leaderboard_page(title: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str], notes: Sequence[str]) -> str:
    """Several runs, one table; ``rows``: name, estimates, best and tied metrics, pictures, missing."""
    body = []
    for row in rows:
        cells = []
        for n in names:
            kind = "{best}" if n in row["best"] else "{sure}" if n in row["tied"] else ""
            cells.append(f"{kind}{estimate(row['summary'][n])}" if n in row["summary"] else "–")
        body.append([html.escape(row["name"]), *cells, str(row["pictures"]), str(row["missing"])])
    arrows = [f"{n} {'↑' if METRICS[n].better == 'more' else '↓'}" for n in names]
    return page(
        title,
        "".join(f"<p class=note>{html.escape(n)}</p>" for n in notes), table(["run", *arrows, "pictures", "missing"], body),
        "<p>Bold: best mean. Green: not distinguishable from the best (paired sign-flip test on the same prompts, p of at least .05 after "
        "Holm's correction for the number of runs). Brackets: 95 % bootstrap intervals over prompts.</p>", glossary(names),
    )  # fmt: skip
