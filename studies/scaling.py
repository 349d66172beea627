"""Scaling: quality against the steps of stage 1 and against the width of the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from multicrafter.scoring.evaluate import bootstrap

from studies.lab.experiment import Base, Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, by_case, cell, markdown_table, mean_over_seeds, save_plot

NAMES = ("attributes", "identity", "swaps", "leakage", "count")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
HEADS = (2, 4, 8)


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """Stage 1 whole. Steps from the base that ships; widths from bases of their own, all trained equally long."""
    found: dict[str, dict[int, Experiment]] = {}
    for seed in budget.seeds:
        config = budget.rows(seed)["moe"][0]
        for factor in FACTORS:
            steps = max(1, round(budget.steps * factor))
            found.setdefault(f"{steps} steps", {})[seed] = Experiment(
                pretrain=replace(config, num_steps=steps), tests=(budget.test(),)
            )
        for heads in HEADS:
            base = Base(minutes=budget.base_minutes, num_heads=heads)
            found.setdefault(f"width {32 * heads}", {})[seed] = Experiment(
                base=base, pretrain=config, tests=(budget.test(),)
            )
    return found


def _amount(label: str) -> int:
    return int("".join(c for c in label if c.isdigit()))


def trend(amounts: Sequence[float], measured: np.ndarray) -> dict[str, Any]:
    """What a doubling brings, and how far the line through all but the largest amount misses the largest: least squares of each case.

    Args:
        amounts: ``(n,)``, ascending, at least two.
        measured: ``(n, cases)``; a case with a NaN is left out.
    """
    doublings = np.log2(amounts)
    found = {"a doubling": bootstrap(np.polyfit(doublings, measured, 1)[0])}
    if len(amounts) > 2:
        slope, start = np.polyfit(doublings[:-1], measured[:-1], 1)
        found["measured - foretold"] = bootstrap(measured[-1] - (start + slope * doublings[-1]))
    return found


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Means and trends by steps and by width."""
    found: dict[str, Any] = {"trends": {}, "base_samples": {}}
    for kind, word in (("steps", "steps"), ("widths", "width")):
        these = dict(sorted((_amount(k), by) for k, by in records.items() if word in k))
        found[kind] = {f"{a}": {n: mean_over_seeds(by, n) for n in NAMES} for a, by in these.items()}
        if kind == "widths":
            trained = {a: r.get("base_training") for a, by in these.items() for r in by.values()}
            found["base_samples"] = {f"{a}": t["samples"] for a, t in trained.items() if t}
        if len(these) > 1:
            found["trends"][kind] = {
                n: trend(list(these), np.stack([by_case(by, n) for by in these.values()])) for n in NAMES
            }
    return found


def page(content: dict[str, Any], folder: Path) -> str:
    """Curves and tables."""
    from matplotlib.figure import Figure

    titles = {"steps": "steps of stage 1", "widths": "width of the transformer (scenes its base saw)"}
    shown = [kind for kind in titles if content[kind]]
    figure = Figure(figsize=(11, 2.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(NAMES), squeeze=False)
    tables = []
    for row, kind in zip(axes, shown, strict=True):
        title, found = titles[kind], content[kind]
        for axis, name in zip(row, NAMES, strict=True):
            points = [(int(k), m[name]) for k, m in found.items() if m[name]["mean"] is not None]
            if points:
                x, m = zip(*points, strict=True)
                axis.errorbar(
                    x,
                    [v["mean"] for v in m],
                    [[v["mean"] - v["low"] for v in m], [v["high"] - v["mean"] for v in m]],
                    marker="o",
                    capsize=3,
                )
                axis.set_xscale("log", base=2)
                axis.set_xticks(x, [str(v) for v in x])
            axis.set_title(f"{name} by {title.split(' (')[0]}" if name == NAMES[0] else name, fontsize=9)
        trends = content["trends"].get(kind, {n: {} for n in NAMES})
        seen = content["base_samples"] if kind == "widths" else {}
        rows = [[k + (f" ({seen[k]:,})" if k in seen else ""), *(cell(m[n]) for n in NAMES)] for k, m in found.items()]
        for label in ("a doubling", "measured - foretold"):
            rows.append([label, *(cell(trends[n].get(label), "+.3f") for n in NAMES)])
        tables.append(markdown_table([title, *NAMES], rows))
    save_plot(figure, folder / "scaling.png")
    text = "\n\n".join(tables)
    return f"""Stage 1 whole (attention supervision, experts). Steps: from the base that ships, the learning rate decays over the steps of each run. Widths: bases of their own, each trained {content["budget"]["base_minutes"]:.0f} minutes on one machine,
so a wider one saw fewer samples: what a fixed time buys.

To extrapolate: "a doubling" is the slope of a straight line over the doublings, fitted case by case; "measured - foretold" is how far such a line through all but the last row misses the last.
An interval there that excludes 0 says that the line does not go on: gains shrink (or grow).

![metrics over steps and over width](scaling.png)

{text}"""


STUDY = Study(name="scaling", title="Scaling", arms=arms, summarise=summarise, page=page, seeds=2)

if __name__ == "__main__":
    sys.exit(main(STUDY))
