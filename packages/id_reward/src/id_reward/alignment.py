"""The Multi-ID Alignment Reward, and the conventions of others by name."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from id_reward.matching import Matching, check_similarity, match

Convention = Literal["multicrafter", "umo", "xverse", "multihuman"]


class IdentityScore(NamedTuple):
    """reward; per_reference (r,): similarity of each reference's face, 0 where it has none; the matching behind it."""

    reward: float
    per_reference: Float[np.ndarray, " r"]
    matching: Matching


def cosine_similarity(a: Float[np.ndarray, "r d"], b: Float[np.ndarray, "f d"]) -> Float[np.ndarray, "r f"]:
    """Cosines between the rows of a and of b; a zero row has cosine 0 with everything.

    Raises:
        ValueError: Shapes do not fit, or an embedding is not finite.
    """
    x, y = np.atleast_2d(np.asarray(a, np.float64)), np.asarray(b, np.float64)
    if y.size == 0:
        return np.zeros((len(x), 0))
    y = np.atleast_2d(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"embeddings must have equal width, got {x.shape[1]} and {y.shape[1]}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("embeddings must be finite, got NaN or infinity")
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    y = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)
    cosine: np.ndarray = np.clip(x @ y.T, -1, 1)
    return cosine


def _positive_match(matrix: Float[np.ndarray, "r f"]) -> Matching:
    """The optimal matching of ``max(similarity, 0)``; a pair that is worth nothing is no pair: its reference is missing, its face extra."""
    best = match(np.maximum(matrix, 0.0))
    pairs = tuple((r, f) for r, f in best.pairs if matrix[r, f] > 0)
    return Matching(
        pairs=pairs,
        unmatched_references=tuple(sorted(set(range(matrix.shape[0])) - {r for r, _ in pairs})),
        unmatched_faces=tuple(sorted(set(range(matrix.shape[1])) - {f for _, f in pairs})),
        total=best.total,
    )


def score_similarity(
    similarity: Float[np.ndarray, "r f"],
    *,
    missing_penalty: float = 0.0,
    extra_penalty: float = 0.0,
    convention: Convention = "multicrafter",
) -> IdentityScore:
    """The reward of a similarity matrix; see `multi_id_alignment_reward`."""
    if missing_penalty < 0 or extra_penalty < 0:
        raise ValueError(
            f"missing_penalty and extra_penalty must not be negative, got {missing_penalty} and {extra_penalty}"
        )
    matrix = check_similarity(similarity)
    matching = _positive_match(matrix) if convention == "multicrafter" else match(matrix)
    count, faces = matrix.shape
    if count == 0:
        raise ValueError("reference_embeddings must hold at least one reference, got none")
    per_reference = np.zeros(count)
    for reference, face in matching.pairs:
        per_reference[reference] = matrix[reference, face]
    if convention == "umo":
        reward = (2 * matching.total - matrix.sum()) / matrix.size if matrix.size else 0.0
    elif convention == "xverse":
        per_reference = matrix.max(1) if faces else per_reference
        reward = per_reference.mean()
    elif convention == "multihuman":
        reward = matching.total / count
    elif convention == "multicrafter":
        missing = len(matching.unmatched_references)
        extra = len(matching.unmatched_faces)
        reward = (per_reference.sum() - missing_penalty * missing - extra_penalty * extra) / count
    else:
        raise ValueError(f"convention must be 'multicrafter', 'umo', 'xverse' or 'multihuman', got {convention!r}")
    return IdentityScore(float(reward), per_reference, matching)


def multi_id_alignment_reward(
    reference_embeddings: Float[np.ndarray, "r d"],
    face_embeddings: Float[np.ndarray, "f d"],
    *,
    missing_penalty: float = 0.0,
    extra_penalty: float = 0.0,
    convention: Convention = "multicrafter",
) -> IdentityScore:
    """How faithfully the references appear in one picture (MultiCrafter, arXiv 2509.21953, section 3.4).

    "multicrafter": ``(sum over matched pairs of cos - missing_penalty * missing - extra_penalty * extra) / r``, pairs by the optimal
    one-to-one assignment of ``max(cos, 0)``: one face painted many times can be matched only once, and a face with a cosine of at most 0
    is nobody's: its reference counts as missing and the face as extra.
    "umo" (arXiv 2509.06818): mean over the matrix of +cos on matched pairs, -cos elsewhere; does not punish a missing face.
    "xverse": mean over references of the best face's cosine, not exclusive.
    "multihuman" (MultiHuman-Testbench): matched sum / r, missing counts 0.

    Args:
        reference_embeddings: One per reference, any norm.
        face_embeddings: One per face found in the picture, may be empty.
        missing_penalty: Taken for each reference without a face.
        extra_penalty: Taken for each face without a reference.
        convention: See above.

    >>> multi_id_alignment_reward(np.eye(2), np.eye(2)).reward
    1.0
    """
    return score_similarity(
        cosine_similarity(reference_embeddings, face_embeddings),
        missing_penalty=missing_penalty,
        extra_penalty=extra_penalty,
        convention=convention,
    )


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos(cosine_similarity(a[None], b[None])[0, 0]))


def copy_paste(
    generated: Float[np.ndarray, " d"], target: Float[np.ndarray, " d"], reference: Float[np.ndarray, " d"]
) -> float:
    """``(angle(generated, target) - angle(generated, reference)) / angle(target, reference)`` (WithAnyone, arXiv 2510.14975).

    1: a copy of the reference; -1: the target itself; 0 where target and reference coincide.
    """
    spread = _angle(target, reference)
    return 0.0 if spread < 1e-6 else (_angle(generated, target) - _angle(generated, reference)) / spread


def swap_matrix(similarity: Float[np.ndarray, "r f"]) -> Float[np.ndarray, "r r"]:
    """Confusion of identities: entry (i, j) is the similarity of reference i with the face matched to reference j (NaN if none)."""
    matrix = np.asarray(similarity, np.float64)
    result = np.full((len(matrix), len(matrix)), np.nan)
    for reference, face in match(matrix).pairs:
        result[:, reference] = matrix[:, face]
    return result
