"""The ablation again, on objects: shape, colours, pattern and handle in the place of faces and clothes."""

from __future__ import annotations

import sys

from studies import ablation
from studies.lab.experiment import Base, Budget, Experiment
from studies.lab.laboratory import Study, main


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """As for people, from a base of objects."""
    return ablation.arms(budget, base=Base(family="objects", minutes=budget.base_minutes))


STUDY = Study(
    name="ablation_objects",
    title="The ablation, on objects",
    arms=arms,
    summarise=ablation.summarise,
    page=ablation.page,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
