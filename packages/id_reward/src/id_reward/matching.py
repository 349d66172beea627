"""One-to-one assignment of generated faces to references."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from id_reward.errors import InputError
from id_reward.floats import as_floats
from id_reward.shapes import Float


class Matching(NamedTuple):
    """pairs: (reference, face) in order of references; what stayed alone; total: summed similarity of the pairs."""

    pairs: tuple[tuple[int, int], ...]
    unmatched_references: tuple[int, ...]
    unmatched_faces: tuple[int, ...]
    total: float


def check_similarity(similarity: Float[np.ndarray, "r f"]) -> Float[np.ndarray, "r f"]:
    """A float64 matrix of finite numbers, or a ValueError."""
    matrix = as_floats(similarity)
    if matrix.ndim != 2:
        raise InputError(f"similarity must be (num_references, num_faces), got shape {matrix.shape}")
    # a sum is finite only if every term is, and costs half of asking each one; it may overflow, so ask them before complaining
    if not math.isfinite(matrix.sum()) and not np.isfinite(matrix).all():
        raise InputError("similarity must be finite, got NaN or infinity")
    return matrix


def as_matching(matrix: Float[np.ndarray, "r f"], pairs: tuple[tuple[int, int], ...]) -> Matching:
    """The matching that consists of ``pairs``, with what they leave alone and their summed similarity."""
    references, faces = matrix.shape
    unmatched_references: tuple[int, ...] = ()
    unmatched_faces: tuple[int, ...] = ()
    if len(pairs) < references:
        used = {r for r, _ in pairs}
        unmatched_references = tuple(r for r in range(references) if r not in used)
    if len(pairs) < faces:
        used = {f for _, f in pairs}
        unmatched_faces = tuple(f for f in range(faces) if f not in used)
    total = math.fsum([matrix.item(r, f) for r, f in pairs])
    return Matching(pairs, unmatched_references, unmatched_faces, total)


def _assign(worth: Float[np.ndarray, "r f"]) -> tuple[tuple[int, int], ...]:
    """Scipy's Hungarian assignment with the largest sum; scipy is loaded when it is first needed, which takes a third of a second."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(worth, maximize=True)
    return tuple(zip(rows.tolist(), columns.tolist(), strict=True))


def match(similarity: Float[np.ndarray, "r f"]) -> Matching:
    """The assignment with the largest total similarity, every row and column used at most once (Kuhn 1955; scipy's solver).

    ``max over one-to-one pairs of  sum over pairs of similarity[r, f]``, min(r, f) pairs, also of negative similarity. Of several best
    assignments the solver takes the same one every time; an empty side gives no pairs.

    Raises:
        ValueError: Not a matrix, or not finite.

    >>> match(np.array([[0.1, 0.9], [0.8, 0.7]])).pairs
    ((0, 1), (1, 0))
    """
    matrix = check_similarity(similarity)
    return as_matching(matrix, _assign(matrix))


def match_with_penalties(
    similarity: Float[np.ndarray, "r f"],
    *,
    missing_penalty: float = 0.0,
    extra_penalty: float = 0.0,
    min_similarity: float = 0.0,
    pair_costs: Float[np.ndarray, "r f"] | None = None,
) -> Matching:
    """The one-to-one assignment with the largest reward, in which anyone may stay alone at a price.

    ``max over pairs P of  sum over P of (c[r, f] - pair_costs[r, f]) - missing_penalty * (r - |P|) - extra_penalty * (f - |P|)``, where
    only pairs with ``c > min_similarity`` are allowed. It is the Hungarian assignment of ``max(c - pair_costs + missing_penalty +
    extra_penalty, 0)``, since a pair saves both penalties. Our choice: docs/adr/0041.

    >>> match_with_penalties(np.array([[0.9, 0.2], [0.8, -0.1]])).pairs
    ((0, 1), (1, 0))
    >>> match_with_penalties(np.array([[0.9, 0.2], [0.8, -0.1]]), min_similarity=0.3).pairs
    ((0, 0),)
    """
    matrix = check_similarity(similarity)
    saved = matrix + (missing_penalty + extra_penalty) - (0.0 if pair_costs is None else pair_costs)
    worth = np.where(matrix > min_similarity, saved.clip(min=0.0), 0.0)
    pairs = tuple(pair for pair in _assign(worth) if worth.item(pair) > 0)
    return as_matching(matrix, pairs)
