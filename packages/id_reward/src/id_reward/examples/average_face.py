"""What one-to-one matching stops, and what it does not: ``python -m id_reward.examples.average_face``.

One face painted for everybody earns little, because each face counts once. The mean of all identities, painted once for each of them, is as
like every reference as it can be, and passes. The table shows what every way of painting earns, by convention and by ``off_pair_penalty``.
"""

from __future__ import annotations

import numpy as np

from id_reward import CONVENTIONS, multi_id_alignment_reward

MISSING_PENALTY = 0.5
OFF_PAIR_PENALTIES = (0.0, 0.5, 1.0)


def pictures(count: int = 2) -> dict[str, np.ndarray]:
    """Embeddings of the faces in each picture; the references are orthogonal."""
    people = np.eye(count, count + 1)
    mean = people.mean(0, keepdims=True)
    return {
        "everybody, faithful": people,
        "one is missing": people[1:],
        "the first one, painted for all": people[[0] * count],
        "the average face, once": mean,
        "the average face, for all": mean[[0] * count],
    }


def study(count: int = 2) -> dict[str, dict[str, float]]:
    """Picture -> reward by name of the convention, and by off-pair penalty of ours."""
    references = np.eye(count, count + 1)
    table: dict[str, dict[str, float]] = {}
    for name, faces in pictures(count).items():
        row = {
            f"ours, off-pair {penalty}": multi_id_alignment_reward(
                references, faces, missing_penalty=MISSING_PENALTY, off_pair_penalty=penalty
            ).reward
            for penalty in OFF_PAIR_PENALTIES
        }
        for other in CONVENTIONS[1:]:
            row[other] = multi_id_alignment_reward(references, faces, convention=other).reward
        table[name] = row
    return table


def main() -> None:
    """Prints the table for two people."""
    table = study()
    columns = list(next(iter(table.values())))
    width = max(map(len, table))
    print(" " * width, *(f"{column:>18}" for column in columns))
    for name, row in table.items():
        print(f"{name:{width}}", *(f"{row[column]:18.3f}" for column in columns))


if __name__ == "__main__":
    main()
