"""Scaling: quality against the steps of stage 1 and against the width of the model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.experiment import Base, Budget, Experiment
from benchmarks.report import Record, cell, markdown_table, mean_over_seeds, save_plot
from benchmarks.science import Study, main

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


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Means by steps and by width."""
    means = {label: {n: mean_over_seeds(by, n) for n in NAMES} for label, by in records.items()}
    return {
        kind: {k: m for k, m in means.items() if word in k} for kind, word in (("steps", "steps"), ("widths", "width"))
    }


def _amount(label: str) -> int:
    return int("".join(c for c in label if c.isdigit()))


def page(content: dict[str, Any], folder: Path) -> str:
    """Curves and tables."""
    from matplotlib.figure import Figure

    titles = {"steps": "steps of stage 1", "widths": "width of the transformer"}
    shown = [kind for kind in titles if content[kind]]
    figure = Figure(figsize=(11, 2.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(NAMES), squeeze=False)
    tables = []
    for row, kind in zip(axes, shown, strict=True):
        title = titles[kind]
        found = sorted(content[kind].items(), key=lambda item: _amount(item[0]))
        for axis, name in zip(row, NAMES, strict=True):
            points = [(_amount(k), m[name]) for k, m in found if m[name]["mean"] is not None]
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
            axis.set_title(f"{name} by {title}" if name == NAMES[0] else name, fontsize=9)
        tables.append(markdown_table([title, *NAMES], [[k, *(cell(m[n]) for n in NAMES)] for k, m in found]))
    save_plot(figure, folder / "scaling.png")
    text = "\n\n".join(tables)
    return f"""Stage 1 whole (attention supervision, experts). Steps: from the base that ships, the learning rate decays over the steps of each run. Widths: bases of their own, each trained {content["budget"]["base_minutes"]:.0f} minutes on one machine,
so a wider one saw fewer samples: what a fixed time buys.

![metrics over steps and over width](scaling.png)

{text}"""


STUDY = Study(name="scaling", title="Scaling", arms=arms, summarise=summarise, page=page, seeds=2)

if __name__ == "__main__":
    sys.exit(main(STUDY))
