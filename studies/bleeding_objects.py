"""Do attributes of objects bleed as those of people do, and does separating attention stop it there too?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicrafter.training.runs import with_execution

from studies import bleeding
from studies.lab.experiment import Base, Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import markdown_table

ROWS = {bleeding.PLAIN: "baseline", bleeding.APART: "separation"}


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """Plain LoRA and mask dropout from a base of objects, drawn in every way."""
    base = Base(family="objects", minutes=budget.base_minutes)
    tests = bleeding.tests(budget.test(guidance=bleeding.GUIDANCE, family=base.family), *bleeding.WAYS.values())
    found: dict[str, dict[int, Experiment]] = {label: {} for label in ROWS}
    for seed in budget.seeds:
        for label, row in ROWS.items():
            config = with_execution(budget.rows(seed)[row][0], compile_blocks=False)
            config = replace(config, world=replace(config.world, family=base.family))
            found[label][seed] = Experiment(base=base, pretrain=config, tests=tests)
    return found


def page(content: dict[str, Any], folder: Path) -> str:
    """Figure, models, what mask dropout gives, alike and unlike."""
    bleeding.figure(content, folder / "bleeding_objects.png")
    return f"""Two mugs in one picture exchange colours and patterns, as two people exchange hats. The base, the detector and the reader of truth are trained on objects by the same recipes as those of people. {bleeding.MEANING}

![What each way of drawing gives](bleeding_objects.png)

## Models and ways of drawing

All models are trained for the demo's 320 steps. "True masks" is an oracle that nobody has.

{markdown_table(bleeding.HEAD, bleeding.model_rows(content["models"]))}

## What mask dropout gives over a plain LoRA

Attributes, case by case, and the share of what the oracle gives.

{bleeding.gains(content)}

## Objects that look alike, and objects that do not

The same pairs as above, parted by how many visible attributes the two differ in.

{bleeding.likeness(content)}
"""


STUDY = Study(
    name="bleeding_objects",
    title="Why do attributes bleed? On objects",
    arms=arms,
    summarise=bleeding.summarise,
    page=page,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
