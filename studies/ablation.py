"""The paper's ablation, one part at a time, on people nobody has seen; with MoE-LoRA against plain LoRAs of the same compute and of the same size."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter.scoring.evaluate import METRICS

from studies.lab.experiment import Base, Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, cell, compare, forest, markdown_table, tables

NAMES = ("attributes", "identity", "swaps", "leakage", "leakage_single", "text", "aesthetics", "count", "reward")
SIZE_MATCHED = 22  # the smallest rank at which plain LoRA has as many parameters as the experts; tested
PAPER = {  # MultiCrafter, arXiv 2509.21953, its own people: text alignment, identity, aesthetics
    "baseline (UNO)": (0.2645, 0.1474, 0.2954),
    "+ IDAR": (0.2637, 0.4983, 0.2653),
    "+ IDAR + MoE-LoRA": (0.2674, 0.5154, 0.2661),
    "+ IDAR + MoE-LoRA + IPPO": (0.2753, 0.5284, 0.2915),
}
LABELS = {
    "idar": "+ IDAR",
    "idar_paper": "+ IDAR, the paper's letter",
    "moe": "+ IDAR + MoE-LoRA",
    "ippo": "+ IDAR + MoE-LoRA + IPPO",
    "wide": "+ IDAR, plain LoRA of the experts' size",
}
STEPS = (
    (LABELS["idar"], "baseline"),
    (LABELS["moe"], LABELS["idar"]),
    (LABELS["moe"], LABELS["wide"]),
    (LABELS["ippo"], LABELS["moe"]),
)


def arms(budget: Budget, *, base: Base | None = None) -> dict[str, dict[int, Experiment]]:
    """Rows of the ablation for one family."""
    base = base or Base()
    found: dict[str, dict[int, Experiment]] = {}
    for seed in budget.seeds:
        rows = budget.rows(seed)
        idar = rows["idar"][0]
        wide = replace(idar.adapters, rank=SIZE_MATCHED, alpha=float(SIZE_MATCHED))
        rows["wide"] = (replace(idar, adapters=wide), None)
        for name, (pretrain, align) in rows.items():
            world = replace(pretrain.world, family=base.family)
            found.setdefault(LABELS.get(name, name), {})[seed] = Experiment(
                base=base,
                pretrain=replace(pretrain, world=world),
                align=align,
                tests=(budget.test(family=base.family),),
            )
    return found


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Means, differences to the baseline, and what each part adds to the one before."""
    added = {
        f"{a} - {b}": compare({a: records[a], b: records[b]}, NAMES, baseline=b)["minus_baseline"][a]
        for a, b in STEPS
        if a in records and b in records and records[a].keys() & records[b].keys()
    }
    return {**compare(records, (*NAMES, "swaps_by_chance"), baseline="baseline"), "added": added}


def page(content: dict[str, Any], folder: Path) -> str:
    """Tables and a plot."""
    name = content["study"]
    added = [[label, *(cell(m.get(n), "+.3f") for n in NAMES)] for label, m in content["added"].items()]
    picture = ""
    if content.get("minus_baseline"):
        forest(content["minus_baseline"], NAMES[:5], folder / f"{name}.png", content["by_seed"])
        picture = f"![differences to the baseline, by metric]({name}.png)\n\nBars: 95 % intervals over cases; dots: single seeds."
    meaning = "\n".join(f"- **{n}**: {METRICS[n]}" for n in NAMES if n in METRICS)
    return f"""The rows of the paper's table: a plain in-context LoRA, then attention supervision, experts, and policy optimization on top. Plain LoRA has the rank of one expert, so that it computes as much
per token as the mixture does (matched compute); one more row has the rank {SIZE_MATCHED}, as many parameters as all experts together (matched size).

{picture}

## What each part adds

{markdown_table(["", *NAMES], added) if added else "Nothing to compare yet."}

## Against the baseline

{tables(content, (*NAMES, "swaps_by_chance"), baseline="baseline")}

{meaning}
- **reward**: what stage 2 maximises: text, aesthetics and Multi-ID, weighted; here on prompts and people it has not seen
- **swaps_by_chance**: {METRICS["swaps_by_chance"]}
- **leakage_single**: leakage in the single-stream blocks

## Beside the paper

{beside_the_paper(content)}
"""


def beside_the_paper(content: dict[str, Any]) -> str:
    """The paper's columns and ours: changes against the row before, since the scales have nothing in common."""
    columns = ("text", "identity", "aesthetics")
    rows = []
    for (label, theirs), (_, before) in zip(list(PAPER.items())[1:], list(PAPER.items())[:-1], strict=True):
        added = next((m for k, m in content["added"].items() if k.startswith(label + " - ")), {})
        rows.append(
            [label]
            + [f"{x - y:+.4f}" for x, y in zip(theirs, before, strict=True)]
            + [cell(added.get(n), "+.3f") for n in columns]
        )
    head = [
        "against the row before",
        *(f"paper: {n}" for n in ("CLIP-T", "Face-Sim", "AES")),
        *(f"here: {n}" for n in columns),
    ]
    return (
        markdown_table(head, rows)
        + "\n\nThe paper's first row is UNO itself, other people's training; ours is a plain LoRA trained on the same scenes as the other rows. Only directions and order can be compared."
    )


STUDY = Study(name="ablation", title="The ablation, on people", arms=arms, summarise=summarise, page=page)

if __name__ == "__main__":
    sys.exit(main(STUDY))
