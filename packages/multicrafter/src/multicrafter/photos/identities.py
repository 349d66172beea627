"""Who is who: faces of one person across photos, and which people must stay on one side of a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

CHUNK = 2048


class Pairs(NamedTuple):
    """Similar faces: i < j and their cosine, most similar first."""

    i: Int[np.ndarray, " p"]
    j: Int[np.ndarray, " p"]
    cosine: Float[np.ndarray, " p"]


def similar_pairs(embeddings: Float[np.ndarray, "n d"], threshold: float) -> Pairs:
    """All pairs of unit rows with a cosine of at least ``threshold``, by blocks of the matrix that is never held whole."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    unit = np.asarray(embeddings, np.float32)
    for start in range(0, len(unit), CHUNK):
        for other in range(start, len(unit), CHUNK):
            block = unit[start : start + CHUNK] @ unit[other : other + CHUNK].T
            rows, columns = np.nonzero(block >= threshold)
            keep = rows + start < columns + other
            rows, columns = rows[keep], columns[keep]
            found.append((rows + start, columns + other, block[rows, columns]))
    if not found:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    i, j, cosine = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((j, i, -cosine))
    return Pairs(i[order], j[order], cosine[order].astype(np.float64))


def group_identities(
    embeddings: Float[np.ndarray, "n d"], photos: Sequence[int], threshold: float
) -> Int[np.ndarray, " n"]:
    """Labels faces by person: the label is the smallest index of the group.

    Pairs are visited from the most similar on. The groups of both faces are joined if the average cosine of their members,
    ``sum(A) . sum(B) / (|A| |B|)`` for unit vectors, is at least ``threshold``, and if they share no photo: nobody is on one photo twice.
    The average keeps a chain of look-alikes apart that single links would join. Our choice: docs/adr/0061. Slow twin:
    `reference.group_identities`.

    Args:
        embeddings: Unit rows.
        photos: The photo of each face.
        threshold: Least average cosine within a person.

    >>> group_identities(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), [0, 0, 1], 0.5).tolist()
    [0, 1, 0]
    """
    count = len(embeddings)
    if len(photos) != count:
        raise ValueError(f"photos must hold one number per face ({count}), got {len(photos)}")
    total = np.asarray(embeddings, np.float64).copy()
    owner, size = list(range(count)), [1] * count
    on = [{photo} for photo in photos]

    def find(x: int) -> int:
        while owner[x] != x:
            owner[x] = owner[owner[x]]
            x = owner[x]
        return x

    pairs = similar_pairs(embeddings, threshold)
    for i, j in zip(pairs.i.tolist(), pairs.j.tolist(), strict=True):
        a, b = sorted((find(i), find(j)))
        if a == b or not on[a].isdisjoint(on[b]):
            continue
        if total[a] @ total[b] >= threshold * size[a] * size[b]:
            owner[b] = a
            total[a] += total[b]
            size[a] += size[b]
            on[a] |= on[b]
    return np.array([find(x) for x in range(count)], np.int64)


def split_groups(identities_of: Mapping[str, Sequence[str]], test_fraction: float) -> dict[str, str]:
    """Train or test for every photo, so that no identity is on both sides.

    Photos that share an identity, directly or through others, form a group; a group is tested if the hash of its smallest identity, as a
    number in [0, 1), is below ``test_fraction``, and if it holds no more than that share of the photos: where everybody knows everybody,
    one group is nearly everything, and it is trained on. Adding photos of strangers moves nobody out of the test split.
    """
    import hashlib

    owner: dict[str, str] = {}

    def find(x: str) -> str:
        owner.setdefault(x, x)
        while owner[x] != x:
            owner[x] = owner[owner[x]]
            x = owner[x]
        return x

    for people in identities_of.values():
        for other in people:
            a, b = sorted((find(people[0]), find(other)))
            owner[b] = a
    smallest: dict[str, str] = {}
    for identity in sorted(owner):
        smallest.setdefault(find(identity), identity)

    def draw(identity: str) -> float:
        return int(hashlib.sha256(identity.encode()).hexdigest()[:12], 16) / 16**12

    size = Counter(find(people[0]) for people in identities_of.values() if people)
    most = test_fraction * len(identities_of)
    tested = {root: draw(identity) < test_fraction and size[root] <= most for root, identity in smallest.items()}
    return {photo: "test" if people and tested[find(people[0])] else "train" for photo, people in identities_of.items()}
