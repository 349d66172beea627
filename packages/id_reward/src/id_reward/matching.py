"""One-to-one assignment of generated faces to references."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment


class Matching(NamedTuple):
    """pairs: (reference, face) in order of references; what stayed alone; total: summed similarity of the pairs."""

    pairs: tuple[tuple[int, int], ...]
    unmatched_references: tuple[int, ...]
    unmatched_faces: tuple[int, ...]
    total: float


def check_similarity(similarity: Float[np.ndarray, "r f"]) -> Float[np.ndarray, "r f"]:
    """A float64 matrix of finite numbers, or a ValueError."""
    matrix = np.asarray(similarity, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"similarity must be (num_references, num_faces), got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("similarity must be finite, got NaN or infinity")
    return matrix


def match(similarity: Float[np.ndarray, "r f"]) -> Matching:
    """The assignment with the largest total similarity, every row and column used at most once (Kuhn 1955; scipy's solver).

    min(r, f) pairs are made, also of negative similarity. Ties are broken the same way every time.

    >>> match(np.array([[0.1, 0.9], [0.8, 0.7]])).pairs
    ((0, 1), (1, 0))
    """
    matrix = check_similarity(similarity)
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    pairs = tuple(zip(rows.tolist(), columns.tolist(), strict=True))
    used = set(columns.tolist())
    return Matching(
        pairs=pairs,
        unmatched_references=tuple(sorted(set(range(matrix.shape[0])) - set(rows.tolist()))),
        unmatched_faces=tuple(f for f in range(matrix.shape[1]) if f not in used),
        total=float(matrix[rows, columns].sum()),
    )
