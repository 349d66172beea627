"""Numbers of subjects: one to four in the picture, trained on up to two and on up to four."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter.scoring.evaluate import bootstrap

from studies.lab.experiment import Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, by_case, cell, difference, markdown_table, mean_over_seeds, save_plot

NUMBERS = (1, 2, 3, 4)
NAMES = ("attributes", "identity", "swaps", "swaps_by_chance", "count", "leakage")
TRAINED = {"trained on 1 and 2": (1, 2), "trained on 1 to 4": (1, 2, 3, 4)}


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """Stage 1 whole (IDAR, experts), on two mixtures of scenes."""
    found: dict[str, dict[int, Experiment]] = {}
    for seed in budget.seeds:
        config = budget.rows(seed)["moe"][0]
        for label, numbers in TRAINED.items():
            found.setdefault(label, {})[seed] = Experiment(
                pretrain=replace(config, world=replace(config.world, numbers=numbers)),
                tests=tuple(budget.test(num_references=n) for n in NUMBERS),
            )
    return found


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Means by training and number of subjects, swaps beyond chance, and what training on more subjects changes."""
    known = {
        label: [[n for n in NAMES if n in test["metrics"]] for test in next(iter(by.values()))["tests"]]
        for label, by in records.items()
    }
    found: dict[str, Any] = {
        "numbers": NUMBERS,
        "means": {
            label: [
                {n: mean_over_seeds(by, n, i) for n in known[label][i]}
                | {"bleeding": bootstrap(by_case(by, "swaps", i) - by_case(by, "swaps_by_chance", i))}
                for i in range(len(NUMBERS))
            ]
            for label, by in records.items()
        },
    }
    few, many = TRAINED
    if few in records and many in records and records[few].keys() & records[many].keys():
        found["more"] = [
            {n: difference(records[many], records[few], n, i) for n in known[few][i]} for i in range(len(NUMBERS))
        ]
    return found


def breaks(content: dict[str, Any]) -> str:
    """From which number of subjects on a picture rarely shows all of them, and where a swap is no longer told from a guess."""
    sentences = []
    for label, by in content["means"].items():
        numbered = list(zip(content["numbers"], by, strict=True))
        rare = [k for k, m in numbered if m["count"]["high"] < 0.5]
        bleeding = [str(k) for k, m in numbered if m["bleeding"]["low"] is not None and m["bleeding"]["low"] > 0]
        sentences.append(
            f"{label.capitalize()}: fewer than half of the pictures show everyone {f'from {rare[0]} subjects on' if rare else 'at no number tried'}; "
            f"bleeding is shown at {' and '.join(bleeding) or 'no number of'} subjects."
        )
    return " ".join(sentences)


def page(content: dict[str, Any], folder: Path) -> str:
    """A table, and curves over the number of subjects."""
    from matplotlib.figure import Figure

    rows = [
        [label, str(number), *(cell(metrics.get(n)) for n in NAMES), cell(metrics["bleeding"], "+.3f")]
        for label, by in content["means"].items()
        for number, metrics in zip(content["numbers"], by, strict=True)
    ]
    shown = ("attributes", "identity", "swaps", "count")
    more = [
        [str(number), *(cell(metrics.get(n), "+.3f") for n in NAMES)]
        for number, metrics in zip(content["numbers"], content.get("more", ()), strict=False)
    ]
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for label, by in content["means"].items():
            points = [
                (k, m[name])
                for k, m in zip(content["numbers"], by, strict=True)
                if m.get(name, {}).get("mean") is not None
            ]
            x, y = [k for k, _ in points], [m["mean"] for _, m in points]
            error = [[m["mean"] - m["low"] for _, m in points], [m["high"] - m["mean"] for _, m in points]]
            axis.errorbar(x, y, error, marker="o", capsize=3, label=label)
        if name == "swaps":
            for by in list(content["means"].values())[:1]:
                points = [
                    (k, m["swaps_by_chance"]["mean"]) for k, m in zip(content["numbers"], by, strict=True) if k > 1
                ]
                axis.plot(*zip(*points, strict=True), color="0.6", linestyle=":", label="swaps by chance")
            axis.legend(fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_xticks(content["numbers"])
        axis.set_xlabel("subjects", fontsize=8)
    save_plot(figure, folder / "subjects.png")
    return f"""How many subjects can one model hold apart? Both are trained with equally many scenes and steps, mixed evenly over the numbers of subjects named; swaps above chance are bleeding (the same case by case); attention that tells nobody apart leaks 1 - 1/subjects.

**Where it breaks.** {breaks(content)}

![metrics over the number of subjects](subjects.png)

{markdown_table(["", "subjects", *NAMES, "bleeding"], rows)}

Trained on 1 to 4 minus trained on 1 and 2, seeds that both have, case by case:

{markdown_table(["subjects", *NAMES], more)}"""


STUDY = Study(name="subjects", title="One to four subjects", arms=arms, summarise=summarise, page=page, seeds=3)

if __name__ == "__main__":
    sys.exit(main(STUDY))
