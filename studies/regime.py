"""When does attention supervision help? One setting changed at a time, on the validation split: recipes take their defaults from here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter.training.pretrain import IDARConfig, PretrainConfig

from studies.lab.experiment import Base, Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, cell, compare, forest, markdown_table, save_plot

NAMES = ("attributes", "swaps", "identity", "leakage", "leakage_single", "count")
PLAIN = IDARConfig(coef=0.0)
HERE = IDARConfig(coef=0.1, sigma_max=0.8, all_blocks=True, until=1.0)
"""The centre of the map: image queries over reference keys, all blocks, where the place of a person can be known."""


def forms() -> dict[str, IDARConfig]:
    """Settings of the loss, each one step from `HERE` but for the paper's letter."""
    return {
        "centre": HERE,
        "lambda .01": replace(HERE, coef=0.01),
        "lambda .03": replace(HERE, coef=0.03),
        "lambda .3": replace(HERE, coef=0.3),
        "first half of the steps": replace(HERE, until=0.5),
        "lambda .3, first half of the steps": replace(HERE, coef=0.3, until=0.5),
        "double blocks": replace(HERE, all_blocks=False),
        "every sigma": replace(HERE, sigma_max=1.0),
        "sigma < .5": replace(HERE, sigma_max=0.5),
        "Dice of shares": replace(HERE, kind="dice", normalization="share"),
        "soft IoU of shares": replace(HERE, kind="soft_iou", normalization="share"),
        "cross-entropy of tokens, lambda .03": replace(HERE, kind="token_cross_entropy", coef=0.03),
        "balanced (FastComposer), lambda .3": replace(HERE, kind="balanced", coef=0.3),
        "reference -> image, cross-entropy": replace(HERE, direction="reference_to_image", kind="cross_entropy", normalization="sum"),
        "the paper's letter, lambda .1": IDARConfig.paper(0.1),
        "the paper's letter, lambda .3": IDARConfig.paper(0.3),
        "the paper's letter, min-max": replace(IDARConfig.paper(0.1), normalization="minmax"),
    }  # fmt: skip


def circumstances(budget: Budget) -> dict[str, tuple[Base, dict[str, Any], dict[str, Any]]]:
    """Where plain LoRA and `HERE` are compared: base, changes of stage 1, changes of the test."""
    return {
        "as above": (Base(), {}, {}),
        f"a young base ({budget.base_minutes:.0f} minutes)": (Base(minutes=budget.base_minutes), {}, {}),
        "a quarter of the steps": (Base(), {"num_steps": max(1, budget.steps // 4)}, {}),
        "four times the steps": (Base(), {"num_steps": 4 * budget.steps}, {}),
        "more tokens a person (96 pixels)": (Base(), {"size": 96, "reference_size": 48}, {"size": 96, "reference_size": 48}),
        "unlike pairs": (Base(), {}, {"shared_attributes": 0}),
        "very alike pairs": (Base(), {}, {"shared_attributes": 7}),
    }  # fmt: skip


def stage1(budget: Budget, seed: int, idar: IDARConfig, changes: dict[str, Any]) -> PretrainConfig:
    """Plain LoRA with one setting of the loss, and changes of stage 1 or its world."""
    config = replace(budget.rows(seed)["baseline"][0], idar=idar)
    sizes = {k: v for k, v in changes.items() if k in ("size", "reference_size")}
    rest = {k: v for k, v in changes.items() if k not in sizes}
    return replace(config, world=replace(config.world, **sizes), **rest)


def _all(budget: Budget, seed: int) -> Iterator[tuple[str, Experiment]]:
    likeness = [budget.test(split="validation", seed=2000, shared_attributes=n) for n in (4, 0, 7)]
    for label, idar in {"plain": PLAIN, **forms()}.items():
        yield label, Experiment(pretrain=stage1(budget, seed, idar, {}), tests=tuple(likeness))
    for where, (base, changes, test) in circumstances(budget).items():
        if not changes and base == Base():
            continue
        tests = (budget.test(split="validation", seed=2000, **test),)
        # where supervision matters most, the paper's letter as well
        letter = {"the paper's letter": IDARConfig.paper(HERE.coef)} if "size" in changes else {}
        for label, idar in {"plain": PLAIN, "centre": HERE, **letter}.items():
            yield f"{where}: {label}", Experiment(base=base, pretrain=stage1(budget, seed, idar, changes), tests=tests)


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """All settings by seed."""
    found: dict[str, dict[int, Experiment]] = {}
    for seed in budget.seeds:
        for label, experiment in _all(budget, seed):
            found.setdefault(label, {})[seed] = experiment
    return found


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Forms against plain LoRA; the centre against plain LoRA under other circumstances."""
    these = {k: by for k, by in records.items() if k in ("plain", *forms())}
    found: dict[str, Any] = compare(these, NAMES, baseline="plain")
    centre = next(iter(forms()))
    where: dict[str, Any] = {}
    if "plain" in records and centre in records:
        for test, name in enumerate(("alike pairs (as above)", "unlike pairs", "very alike pairs")):
            pair = {"plain": records["plain"], "centre": records[centre]}
            where[name] = compare(pair, NAMES, baseline="plain", test=test)
    for label in records:
        name, _, form = label.rpartition(": ")
        if name and form != "plain" and f"{name}: plain" in records:
            pair = {"plain": records[f"{name}: plain"], form: records[label]}
            where[name if form == centre else f"{name}, {form}"] = compare(pair, NAMES, baseline="plain")
    return {**found, "circumstances": where}


def trade(found: dict[str, Any], path: Path, x: str = "leakage_single", y: str = "attributes") -> None:
    """What less leakage buys: differences to plain LoRA, one panel for each entry of ``found``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2 + 0.1 * max(map(len, found.values()))), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (title, rows) in zip(axes, found.items(), strict=True):
        axis.axhline(0, color="0.7", linewidth=0.8)
        axis.axvline(0, color="0.7", linewidth=0.8)
        for number, (label, metrics) in enumerate(rows.items()):
            a, b = metrics[x], metrics[y]
            colour = f"C{number % 10}"
            place = (a["mean"], b["mean"])
            axis.plot([a["low"], a["high"]], [b["mean"]] * 2, color=colour, linewidth=1)
            axis.plot([a["mean"]] * 2, [b["low"], b["high"]], color=colour, linewidth=1)
            axis.plot(*place, "o", color=colour, markersize=4, label=f"{number + 1} {label}")
            axis.annotate(str(number + 1), place, xytext=(3, 3), textcoords="offset points", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"{x} - plain LoRA's", fontsize=9)
        axis.set_ylabel(f"{y} - plain LoRA's", fontsize=9)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, frameon=False)
    save_plot(figure, path)


def page(content: dict[str, Any], folder: Path) -> str:
    """The map."""
    picture, rows, elsewhere = "", [], []
    if content.get("minus_baseline"):
        forest(content["minus_baseline"], NAMES[:5], folder / "regime.png", content["by_seed"])
        picture = "![settings against plain LoRA](regime.png)\n\nBars: 95 % intervals over cases; dots: single seeds."
        rows = [[k, *(cell(m.get(n), "+.3f") for n in NAMES)] for k, m in content["minus_baseline"].items()]
    plain = content["means"].get("plain", {})
    around = {k: m for k, v in content["circumstances"].items() for m in v.get("minus_baseline", {}).values()}
    if rows:
        maps = {"settings of the loss": content["minus_baseline"]} | ({"elsewhere": around} if around else {})
        trade(maps, folder / "regime_map.png")
        picture += "\n\nThe map: how far a setting takes the leakage, and what that buys.\n\n![attributes against leakage](regime_map.png)"
    for name, difference in around.items():
        before = content["circumstances"][name]["means"]["plain"].get("attributes")
        elsewhere.append([name, cell(before), *(cell(difference.get(n), "+.3f") for n in NAMES)])
    return f"""Plain LoRA on attention and FFNs, with one setting of the attention loss each; validation split, so that the test split stays unseen by these choices. The centre is image queries over reference keys, cross-entropy of shares, all blocks, lambda {HERE.coef}, sigma below {HERE.sigma_max}; every other row is one step from it; the paper's letter is
Dice on maps of reference queries over image keys, divided by their maximum, in the double blocks. Plain LoRA: {", ".join(f"{n} {cell(plain.get(n))}" for n in NAMES)}.

{picture}

{markdown_table(["minus plain LoRA", *NAMES], rows) if rows else ""}

## Under other circumstances

The centre (where named, the paper's letter) against plain LoRA, both trained and tested under the circumstances named.

{markdown_table(["", "attributes of plain LoRA", *(f"{n}" for n in NAMES)], elsewhere) if elsewhere else "Not run yet."}
"""


STUDY = Study(
    name="regime", title="When does attention supervision help?", arms=arms, summarise=summarise, page=page, seeds=2
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
