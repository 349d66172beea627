"""Copy-paste or understanding: pose, scale and light of generated people against those of their references."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from studies import ablation
from studies.lab import poses
from studies.lab.experiment import Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, cell, markdown_table, save_plot

ALONE = "the base, one reference"


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """The base with one reference, and rows of the ablation."""
    rows = ablation.arms(budget)
    alone = Experiment(pretrain=None, tests=(budget.test(num_references=1),))
    chosen = ("baseline", ablation.LABELS["idar"], ablation.LABELS["moe"], ablation.LABELS["ippo"])
    return {ALONE: {budget.seeds[0]: alone}, **{label: rows[label] for label in chosen}}


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Slopes of generated on reference values, people of all seeds together."""
    rows = {}
    for label, by in records.items():
        joined: dict[str, dict[str, list[float]]] = {}
        for record in by.values():
            for name, columns in record["tests"][0]["copies"]["values"].items():
                into = joined.setdefault(name, {k: [] for k in columns})
                for k, v in columns.items():
                    into[k] += v
        rows[label] = poses.slopes(joined)
    first = next(iter(next(iter(records.values())).values()))
    return {"rows": rows, "reader": first["tests"][0]["copies"]["reader"]}


def page(content: dict[str, Any], folder: Path) -> str:
    """A table and a plot of the slopes."""
    from matplotlib.figure import Figure

    names = list(next(iter(content["rows"].values())))
    figure = Figure(figsize=(2 + 1.6 * len(names), 1.2 + 0.35 * len(content["rows"])), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.axvline(1, color="tab:red", linewidth=0.8, linestyle=":")
        for y, slopes in enumerate(content["rows"].values()):
            slope = slopes[name]
            axis.plot([slope["low"], slope["high"]], [y, y], color="tab:blue", linewidth=2)
            axis.plot(slope["mean"], y, "o", color="tab:blue", markersize=4)
        axis.set_title(name, fontsize=8)
        axis.set_yticks(range(len(content["rows"])), list(content["rows"]), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlim(-0.6, 1.2)
    figure.axes[0].invert_yaxis()
    save_plot(figure, folder / "copy_paste.png")
    reader = [f"{content['reader'][name]:.2f}" for name in names]
    rows = [[label, *(cell(slopes[n]) for n in names)] for label, slopes in content["rows"].items()]
    return f"""If a person of the reference raises an arm, does the generated one raise it too? The slope of the generated value on the reference's, over all people that were found: 1 is copy-paste, 0 is a person who was understood and drawn anew. The
captions say nothing about the pose or the light of a reference. Height is in pixels: a reference is 32 pixels high, a picture 64.

![slopes: 0 (grey) is independent of the reference, 1 (red) is copied](copy_paste.png)

{markdown_table(["slope on the reference", *names], rows)}

## How well the reader reads

R^2 on drawn people of the test split, found as in generated pictures: a perfect copy would show about this slope, and where it is low nothing can be said.

{markdown_table(["", *names], [["R^2", *reader]])}"""


STUDY = Study(name="copy_paste", title="Copy-paste or understanding?", arms=arms, summarise=summarise, page=page)

if __name__ == "__main__":
    sys.exit(main(STUDY))
