"""How does stage 1 learn on a base that has never seen a reference, as FLUX.1-dev is, and does supervising attention help it there?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from multicrafter.models.binding import BindingConfig
from multicrafter.scoring.evaluate import Interval
from multicrafter.training.pretrain import PretrainConfig

from studies.lab.experiment import Base, Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, cell, difference, markdown_table, mean_over_seeds, save_plot

NAMES = ("attributes", "identity", "swaps", "swaps_by_chance", "count")
STEPS = (160, 640, 2560)
PLAIN, LOSS, LETTER, APART = "plain LoRA", "attention loss", "attention loss, the paper's letter", "mask dropout"
WAYS: dict[str, BindingConfig | None] = {"as it is": None, "bound by its own draft": BindingConfig(mode="draft")}
BASE_MINUTES = 45.0
ALONE = "the base, without any adapter"


def forms(budget: Budget, seed: int) -> dict[str, PretrainConfig]:
    """Stage 1 with and without each form of supervision; all of plain LoRA."""
    rows = {name: config for name, (config, _) in budget.rows(seed).items()}
    return {PLAIN: rows["baseline"], LOSS: rows["idar"], LETTER: rows["idar_paper"], APART: rows["separation"]}


def label_of(form: str, steps: int) -> str:
    """Name of an arm."""
    return f"{form}, {steps} steps"


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """Every form at every number of steps, each with a schedule of its own; the base alone."""
    minutes = BASE_MINUTES if budget.base_minutes >= 1 else budget.base_minutes
    base = Base(minutes=minutes, text_only=True)
    tests = tuple(budget.test(guidance=1.0, separation=way) for way in WAYS.values())
    found = {ALONE: {seed: Experiment(base=base, pretrain=None, tests=tests[:1]) for seed in budget.seeds[:1]}}
    for steps in STEPS:
        scaled = max(1, steps * budget.steps // 320)
        for seed in budget.seeds:
            for form, config in forms(budget, seed).items():
                experiment = Experiment(base=base, pretrain=replace(config, num_steps=scaled), tests=tests)
                found.setdefault(label_of(form, steps), {})[seed] = experiment
    return found


def steps_to(level: float, curve: dict[int, float]) -> float | None:
    """Steps at which a curve first reaches a level, between two points on a logarithmic scale; None if it does not.

    >>> round(steps_to(0.5, {100: 0.4, 400: 0.6}))
    200
    >>> steps_to(0.7, {100: 0.4, 400: 0.6}) is None
    True
    """
    steps = sorted(curve)
    if steps and curve[steps[0]] >= level:
        return float(steps[0])
    for before, after in zip(steps, steps[1:], strict=False):
        if curve[before] < level <= curve[after]:
            share = (level - curve[before]) / (curve[after] - curve[before])
            return float(before * (after / before) ** share)
    return None


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Every metric along the steps, differences to the plain LoRA, and steps to what that has at its last."""
    curves: dict[str, Any] = {}
    for form in (PLAIN, LOSS, LETTER, APART):
        for test, way in enumerate(WAYS):
            by = {n: records[label] for n in STEPS if (label := label_of(form, n)) in records}
            if by:
                points = {n: {name: mean_over_seeds(r, name, test) for name in NAMES} for n, r in by.items()}
                plain = {n: records[label] for n in by if (label := label_of(PLAIN, n)) in records}
                minus = {n: difference_to(by[n], plain[n], test) for n in plain if form != PLAIN or test}
                curves[f"{form}, {way}"] = {"points": points, "minus": minus}
    found: dict[str, Any] = {"curves": curves, "seeds": sorted({s for by in records.values() for s in by})}
    if ALONE in records:
        found["alone"] = {name: mean_over_seeds(records[ALONE], name) for name in NAMES}
    reference = curves.get(f"{PLAIN}, as it is", {}).get("points", {})
    if reference:
        last = max(reference)
        level = reference[last]["attributes"].mean
        found["level"] = {"attributes": level, "steps": last}
        means = {k: {n: p["attributes"].mean for n, p in v["points"].items()} for k, v in curves.items()}
        found["steps_to"] = {k: steps_to(level, curve) for k, curve in means.items()}
    return found


def difference_to(a: dict[int, Record], plain: dict[int, Record], test: int) -> Interval:
    """Attributes of a model drawn in some way minus those of the plain LoRA as it is, over the seeds that both have."""
    if not test:
        return difference(a, plain, "attributes")
    shifted = {s: {**r, "tests": r["tests"][test:]} for s, r in a.items()}
    return difference(shifted, plain, "attributes")


def page(content: dict[str, Any], folder: Path) -> str:
    """Curves first, then what each form gives, then everything."""
    figure(content, folder / "text_only_base.png")
    curves = content["curves"]
    steps = sorted({int(n) for c in curves.values() for n in c["points"]})
    gains = [
        [name, *(cell(c["minus"].get(str(n)), "+.3f") for n in steps), _steps(content.get("steps_to", {}).get(name))]
        for name, c in curves.items()
        if c["minus"]
    ]
    everything = [
        [name if i == 0 else "", n, *(cell(p[m]) for m in NAMES)]
        for name, c in curves.items()
        for i, (n, p) in enumerate(c["points"].items())
    ]
    alone = ""
    if "alone" in content:
        alone = f" Without any adapter it draws what the caption says and nobody in particular: {cell(content['alone']['attributes'])} of the attributes."
    level = content.get("level")
    reached = (
        f" The last column says after how many steps a form has the {level['attributes']:.2f} that the plain LoRA has after {level['steps']}."
        if level
        else ""
    )
    return f"""The base that ships has learnt to read one reference, as the paper's single-subject model has. FLUX.1-dev has not: it knows text only. Here such a base is trained for {BASE_MINUTES:.0f} minutes on captions alone, and stage 1 has to teach it what a reference is, and two of them at once.{alone} This base is the study's alone and does not ship: from the one that ships a plain LoRA is far better after 320 steps ([Why do attributes bleed?](bleeding.md)).

![Attributes by steps of stage 1](text_only_base.png)

## What supervision gives

Attributes minus those of the plain LoRA of as many steps, case by case; every number of steps is a run with a schedule of its own. Training seeds: {", ".join(map(str, content["seeds"]))}.{reached}

{markdown_table(["", *(f"{n} steps" for n in steps), "steps to that level"], gains)}

## Everything

{markdown_table(["", "steps", *NAMES], everything)}
"""


def _steps(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f}"


def figure(content: dict[str, Any], path: Path) -> None:
    """Attributes over steps, on a logarithmic scale."""
    from matplotlib.figure import Figure

    colours = {PLAIN: "tab:gray", LOSS: "tab:orange", LETTER: "tab:red", APART: "tab:blue"}
    made = Figure(figsize=(7, 4.2), layout="constrained")
    axis = made.subplots()
    for name, curve in content["curves"].items():
        form = next(f for f in sorted(colours, key=len, reverse=True) if name.startswith(f"{f}, "))
        points = curve["points"]
        steps = np.array([int(n) for n in points])
        mean, low, high = (
            np.array([p["attributes"][k] for p in points.values()], float) for k in ("mean", "low", "high")
        )
        plain = name.endswith("as it is")
        axis.errorbar(
            steps, mean, yerr=[mean - low, high - mean], color=colours[form], linestyle="-" if plain else "--",
            marker="o", fillstyle="full" if plain else "none", capsize=2, label=name,
        )  # fmt: skip
    if "alone" in content and content["alone"]["attributes"]["mean"] is not None:
        axis.axhline(content["alone"]["attributes"]["mean"], color="0.7", linestyle=":", label=ALONE)
    axis.set(xscale="log", xlabel="steps of stage 1", ylabel="right attributes")
    axis.set_xticks(STEPS, [str(n) for n in STEPS])
    axis.minorticks_off()
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    save_plot(made, path)


STUDY = Study(
    name="text_only_base",
    title="A base that has never seen a reference",
    arms=arms,
    summarise=summarise,
    page=page,
    seeds=2,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
