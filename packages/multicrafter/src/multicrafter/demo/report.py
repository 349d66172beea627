"""A self-contained HTML page of a finished demo, made from its results.json and pictures."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
small, .range { color: #777; font-size: .82em; } img { max-width: 100%; image-rendering: pixelated; }
.yes { background: #e3f4e3; } .no { background: #fbe5e5; }
@media (prefers-color-scheme: dark) { body { background: #181a1b; color: #ddd; } th, td { border-color: #444; }
  img { background: #fff; } .yes { background: #1f3d24; } .no { background: #46211f; } }
"""


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _cell(interval: Mapping[str, Any], *, sign: bool = False) -> str:
    low, high = interval["low"], interval["high"]
    kind = ""
    if sign and low is not None and (low > 0 or high < 0):
        kind = ' class="sure"'
    return f'<td{kind}>{_number(interval["mean"])} <span class="range">[{_number(low)}, {_number(high)}]</span></td>'


def _table(rows: Mapping[str, Mapping[str, Any]], *, sign: bool = False) -> str:
    names = list(dict.fromkeys(n for row in rows.values() for n in row))
    head = "".join(f"<th>{html.escape(label)}</th>" for label in rows)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(_cell(row[name], sign=sign) if name in row else '<td></td>' for row in rows.values())}</tr>"
        for name in names
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _picture(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _claims(claims: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr class="{"yes" if claim["holds"] else "no"}"><td>{html.escape(text)}</td>'
        f"<td>{'holds' if claim['holds'] else 'not shown'} in this run</td></tr>"
        for text, claim in claims.items()
    )
    return f"<table>{rows}</table>"


def _opening(run: Path) -> list[str]:
    """The picture that the page opens with."""
    path = run / "side_by_side.png"
    if not path.is_file():
        return []
    alt = "Two reference people per column, the picture of them by a plain LoRA, and the picture by the method from the same noise"
    return [
        "<p>Each column shows two people, and two pictures of them from the same noise. <b>Without</b> the method a plain LoRA mixes them up. "
        "<b>With</b> it, each stays who they are: the model draws a short draft, finds who stands where, and draws again with attention "
        "between the two people cut.</p>",
        _picture(path, alt),
    ]


def write_report(run: Path) -> Path:
    """Writes ``run/report.html``."""
    results = json.loads((run / "results.json").read_text())
    figures = {
        "pictures.png": ("Pictures", "Unseen identities, the same noise for every model. The references on top."),
        "attention.png": (
            "Attention",
            "Where image tokens look for reference A rather than the other: red A, blue the other, white undecided. "
            "Mean over all blocks, noise level 0.6.",
        ),
        "training.png": ("Stage 1", "Losses on the training scenes."),
        "reward.png": ("Stage 2", "Reward of the rollouts, which are noisier than pictures drawn for you."),
    }
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>MultiCrafter demo</title>",
        f"<style>{STYLE}</style><h1>MultiCrafter on the tiny world</h1>",
        *_opening(run),
        f"<p>Every number here was measured in this run: {results['seconds']['total']:.0f} s of compute, seed {results['config']['seed']}, "
        f"{results['config']['cases']} cases of identities that no model has seen. Brackets: 95 % bootstrap intervals over the cases.</p>",
        "<h2>Claims</h2>", _claims(results["claims"]),
        "<h2>Metrics</h2>", _table(results["summary"]),
        "<h2>Differences, case by case</h2>", _table(results["differences"], sign=True),
        "<h3>What the metrics are</h3><ul>",
        *(f"<li><b>{html.escape(k)}</b>: {html.escape(v)}</li>" for k, v in results["metrics"].items()),
        "</ul>",
    ]  # fmt: skip
    for name, (title, text) in figures.items():
        if (run / name).is_file():
            parts.append(f"<h2>{title}</h2><p>{text}</p>{_picture(run / name, title)}")
    judges = json.dumps(results["judges"], indent=1)
    parts.append(
        f"<h2>How good the judges are</h2><p>On pictures of the world, unseen identities.</p><pre>{html.escape(judges)}</pre>"
    )
    parts.append(f"<h2>Seconds</h2><pre>{html.escape(json.dumps(results['seconds'], indent=1))}</pre>")
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(json.dumps(results['config'], indent=1))}</pre></html>")
    path, temporary = run / "report.html", run / ".report.html.tmp"
    temporary.write_text("\n".join(parts))
    os.replace(temporary, path)
    return path
