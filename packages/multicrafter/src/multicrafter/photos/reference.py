"""Slow twins of the fast paths, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt64


def near_duplicates(hashes: UInt64[np.ndarray, " n"], distance: int) -> Int[np.ndarray, " n"]:
    """`pictures.near_duplicates` by comparing all pairs."""
    originals: list[int] = []
    owner = []
    for index, value in enumerate(hashes):
        close = [j for j in originals if bin(int(value) ^ int(hashes[j])).count("1") <= distance]
        owner.append(close[0] if close else index)
        if not close:
            originals.append(index)
    return np.array(owner, np.int64)


def group_identities(
    embeddings: Float[np.ndarray, "n d"], photos: Sequence[int], threshold: float
) -> Int[np.ndarray, " n"]:
    """`identities.group_identities` with the average similarity of two groups taken over all pairs, one by one."""
    cosine = embeddings @ embeddings.T
    groups = [[i] for i in range(len(embeddings))]
    pairs = [
        (cosine[i, j], i, j) for i in range(len(groups)) for j in range(i + 1, len(groups)) if cosine[i, j] >= threshold
    ]
    for _, i, j in sorted(pairs, key=lambda p: (-p[0], p[1], p[2])):
        a = next(g for g in groups if i in g)
        b = next(g for g in groups if j in g)
        if a is b or {photos[x] for x in a} & {photos[x] for x in b}:
            continue
        if np.mean([[cosine[x, y] for y in b] for x in a]) >= threshold:
            a.extend(b)
            groups.remove(b)
    label = np.zeros(len(embeddings), np.int64)
    for group in groups:
        label[group] = min(group)
    return label
