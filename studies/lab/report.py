"""From records to what pages show: means, paired differences, tables, plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from multicrafter.scoring.evaluate import Interval, bootstrap

Record = dict[str, Any]


def values(record: Record, name: str, test: int = 0) -> np.ndarray:
    """One metric by case; NaN where it is undefined."""
    return np.array(record["tests"][test]["metrics"][name], np.float64)


def by_case(records: Mapping[int, Record], name: str, test: int = 0) -> np.ndarray:
    """One metric by case, averaged over seeds: a case is one unit, not one per seed."""
    return np.asarray(np.mean([values(r, name, test) for r in records.values()], 0))


def mean_over_seeds(records: Mapping[int, Record], name: str, test: int = 0) -> Interval:
    """`by_case`, bootstrapped over cases."""
    return bootstrap(by_case(records, name, test))


def difference(a: Mapping[Any, Record], b: Mapping[Any, Record], name: str, test: int = 0) -> Interval:
    """``a - b`` case by case, averaged over the seeds both have, bootstrapped over cases."""
    seeds = sorted(a.keys() & b.keys())
    return bootstrap(np.mean([values(a[s], name, test) - values(b[s], name, test) for s in seeds], 0))


def spread(a: Mapping[Any, Record], b: Mapping[Any, Record] | None, name: str, test: int = 0) -> list[float]:
    """The same by seed: how far one training run is from another."""
    seeds = sorted(a.keys() & b.keys()) if b is not None else sorted(a)
    return [
        float(np.nanmean(values(a[s], name, test) - (values(b[s], name, test) if b is not None else 0))) for s in seeds
    ]


def compare(
    records: dict[str, dict[int, Record]], names: Sequence[str], *, baseline: str | None = None, test: int = 0
) -> dict[str, Any]:
    """Means by label and metric, and differences to the baseline with what single seeds gave: what most pages show."""
    has = {
        label: [n for n in names if n in next(iter(by.values()))["tests"][test]["metrics"]]
        for label, by in records.items()
    }
    means = {label: {n: mean_over_seeds(by, n, test) for n in has[label]} for label, by in records.items()}
    found: dict[str, Any] = {"means": means}
    base = records.get(baseline) if baseline else None
    if base:
        others = {k: by for k, by in records.items() if k != baseline and by.keys() & base.keys()}
        shared = {k: [n for n in has[k] if n in has[baseline]] for k in others}  # type: ignore[index]
        found["minus_baseline"] = {k: {n: difference(by, base, n, test) for n in shared[k]} for k, by in others.items()}
        found["by_seed"] = {k: {n: spread(by, base, n, test) for n in shared[k]} for k, by in others.items()}
    return found


def tables(content: Mapping[str, Any], names: Sequence[str], *, baseline: str | None = None) -> str:
    """The tables of `compare`: differences to the baseline first."""
    parts = []
    if content.get("minus_baseline"):
        rows = [
            [label, *(cell(metrics.get(n), "+.3f") for n in names)]
            for label, metrics in content["minus_baseline"].items()
        ]
        parts += [f"Minus {baseline}, case by case:", markdown_table([f"- {baseline}", *names], rows)]
    rows = [[label, *(cell(metrics.get(n)) for n in names)] for label, metrics in content["means"].items()]
    return "\n\n".join([*parts, "Means:", markdown_table(["", *names], rows)])


def forest(
    differences: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    path: Path,
    by_seed: Mapping[str, Any] | None = None,
) -> None:
    """One panel per metric: differences with their intervals (bars) and single seeds (dots), one line per label."""
    from matplotlib.figure import Figure

    labels = list(differences)
    figure = Figure(figsize=(2.2 + 2.3 * len(names), 1.1 + 0.32 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        axis.axvline(0, color="0.6", linewidth=0.8)
        for y, label in enumerate(labels):
            interval = differences[label].get(name)
            if not interval or interval["mean"] is None:
                continue
            clear = interval["low"] > 0 or interval["high"] < 0
            colour = "tab:blue" if clear else "0.5"
            axis.plot([interval["low"], interval["high"]], [y, y], color=colour, linewidth=2)
            axis.plot(interval["mean"], y, "o", color=colour, markersize=5)
            seeds = (by_seed or {}).get(label, {}).get(name, [])
            axis.plot(seeds, [y + 0.22] * len(seeds), ".", color="tab:orange", markersize=4)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    save_plot(figure, path)


def cell(interval: Mapping[str, float | None] | Sequence[float] | None, form: str = ".3f") -> str:
    """``mean [low, high]``; bold where the interval of a difference (form with "+") excludes 0.

    >>> cell((0.1, 0.05, 0.15), "+.2f"), cell({"mean": 0.1, "low": 0.0, "high": 0.2}), cell(None)
    ('**+0.10 [+0.05, +0.15]**', '0.100 [0.000, 0.200]', '')
    """
    if interval is None:
        return ""
    mean, low, high = (interval[k] for k in ("mean", "low", "high")) if isinstance(interval, Mapping) else interval[:3]
    if mean is None or low is None or high is None:
        return ""
    text = f"{mean:{form}} [{low:{form}}, {high:{form}}]"
    return f"**{text}**" if "+" in form and (low > 0 or high < 0) else text


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows))


def save_plot(figure: Any, path: Path) -> None:
    """A matplotlib figure as PNG, whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=110, format="png")
    unfinished.replace(path)
