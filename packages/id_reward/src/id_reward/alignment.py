"""The Multi-ID Alignment Reward, and the conventions of others by name."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from id_reward.errors import InputError
from id_reward.floats import as_floats, finite
from id_reward.matching import Matching, check_similarity, match, match_with_penalties
from id_reward.shapes import Float

Convention = Literal["multicrafter", "umo", "xverse", "multihuman", "withanyone"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


class IdentityScore(NamedTuple):
    """reward; per_reference (r,): similarity of each reference's face, 0 where it has none; the matching behind it."""

    reward: float
    per_reference: Float[np.ndarray, " r"]
    matching: Matching


def _unit(vectors: np.ndarray, name: str) -> np.ndarray:
    rows = np.atleast_2d(as_floats(vectors))
    if rows.ndim > 2:
        raise InputError(f"{name} must be one row each, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise InputError(f"{name} must be finite, got NaN or infinity")
    # the largest entry first, so that squares neither overflow nor vanish
    rows = rows / np.maximum(np.abs(rows).max(1, keepdims=True, initial=0.0), 1e-300)
    result: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return result


def cosine_similarity(a: Float[np.ndarray, "r d"], b: Float[np.ndarray, "f d"]) -> Float[np.ndarray, "r f"]:
    """``c[r, f] = <a_r, b_f> / (|a_r| |b_f|)``; a zero row has cosine 0 with everything, an empty side gives an empty matrix.

    Raises:
        ValueError: Shapes do not fit, or an embedding is not finite.

    >>> cosine_similarity(np.array([[1.0, 0.0], [2.0, 2.0]]), np.array([[3.0, 0.0]])).round(3).tolist()
    [[1.0], [0.707]]
    """
    x, y = as_floats(a), as_floats(b)
    if x.size == 0 or y.size == 0:
        return np.zeros((0 if x.size == 0 else len(np.atleast_2d(x)), 0 if y.size == 0 else len(np.atleast_2d(y))))
    x, y = _unit(x, "embeddings"), _unit(y, "embeddings")
    if x.shape[1] != y.shape[1]:
        raise InputError(f"embeddings must have equal width, got {x.shape[1]} and {y.shape[1]}")
    cosine: np.ndarray = np.clip(x @ y.T, -1, 1)
    return cosine


def _off_pair(matrix: np.ndarray, among_references: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What each face shares with the references that are not its own: (r, f) if it is paired with r, (f,) if with nobody.

    ``paired[r, f] = sum over i != r of max(c[i, f] - g[i, r], 0)`` and ``alone[f] = sum over i of max(c[i, f], 0)``; g: the cosines of the
    references with each other, 0 if not given.
    """
    count = len(matrix)
    shared = np.zeros((count, count)) if among_references is None else np.maximum(as_floats(among_references), 0)
    excess = np.maximum(matrix[:, None, :] - shared[:, :, None], 0)  # (i, r, f)
    excess[np.arange(count), np.arange(count)] = 0
    return excess.sum(0), np.maximum(matrix, 0).sum(0)


def off_pair_similarity(
    similarity: Float[np.ndarray, "r f"],
    matching: Matching,
    among_references: Float[np.ndarray, "r r"] | None = None,
) -> float:
    """How much the faces look like references that they are not matched with: 0 for faithful faces, 1/sqrt(r) for the mean face r times.

    ``(sum over pairs (j, f) of sum over i != j of max(c[i, f] - g[i, j], 0)  +  sum over faces f of nobody of sum over i of max(c[i, f],
    0)) / (r max(r - 1, 1))``. After MIMR of UMO (arXiv 2509.06818), which counts -cos off the pairs; subtracting what the references share
    is our choice: docs/adr/0043.

    Args:
        similarity: Cosines c of references with faces.
        matching: Who is who.
        among_references: Cosines g of the references with each other; None: taken for 0, as UMO does.

    >>> average = np.full((2, 2), 0.5**0.5)
    >>> round(off_pair_similarity(average, match(average)), 3), off_pair_similarity(np.eye(2), match(np.eye(2)))
    (0.707, 0.0)
    """
    matrix = check_similarity(similarity)
    paired, alone = _off_pair(matrix, among_references)
    total = sum(paired[r, f] for r, f in matching.pairs) + sum(alone[f] for f in matching.unmatched_faces)
    return float(total / (len(matrix) * max(len(matrix) - 1, 1)))


def check_options(
    *,
    convention: str = "multicrafter",
    missing_penalty: float = 0.0,
    extra_penalty: float = 0.0,
    off_pair_penalty: float = 0.0,
    min_similarity: float = 0.0,
) -> None:
    """Options of the reward, asked before work begins.

    Raises:
        ValueError: One is not what it may be.
    """
    if convention not in CONVENTIONS:
        raise InputError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    for name, value in (
        ("missing_penalty", missing_penalty),
        ("extra_penalty", extra_penalty),
        ("off_pair_penalty", off_pair_penalty),
    ):
        finite(name, value, least=0.0, most=1e100)
    finite("min_similarity", min_similarity, least=-1.0, most=1.0)  # beyond, no face is anybody's, or every one is


def score_similarity(
    similarity: Float[np.ndarray, "r f"],
    *,
    missing_penalty: float = 0.0,
    extra_penalty: float = 0.0,
    convention: Convention = "multicrafter",
    min_similarity: float = 0.0,
    off_pair_penalty: float = 0.0,
    among_references: Float[np.ndarray, "r r"] | None = None,
) -> IdentityScore:
    """The reward of a similarity matrix; see `multi_id_alignment_reward` and, for ``among_references``, `off_pair_similarity`."""
    check_options(
        convention=convention,
        missing_penalty=missing_penalty,
        extra_penalty=extra_penalty,
        off_pair_penalty=off_pair_penalty,
        min_similarity=min_similarity,
    )
    missing_penalty, extra_penalty = float(missing_penalty), float(extra_penalty)  # they may be tensors
    off_pair_penalty, min_similarity = float(off_pair_penalty), float(min_similarity)
    matrix = check_similarity(similarity)
    count, faces = matrix.shape
    if count == 0:
        raise InputError("reference_embeddings must hold at least one reference, got none")
    if among_references is not None and np.shape(among_references) != (count, count):
        raise InputError(f"among_references must be ({count}, {count}), got {np.shape(among_references)}")
    if convention == "multicrafter":
        costs = None
        if off_pair_penalty:
            paired, alone = _off_pair(matrix, among_references)
            costs = off_pair_penalty / max(count - 1, 1) * (paired - alone)
        matching = match_with_penalties(
            matrix,
            missing_penalty=missing_penalty,
            extra_penalty=extra_penalty,
            min_similarity=min_similarity,
            pair_costs=costs,
        )
    else:
        matching = match(matrix)
    per_reference = np.zeros(count)
    for reference, face in matching.pairs:
        per_reference[reference] = matrix[reference, face]
    if convention == "multicrafter":
        missing, extra = len(matching.unmatched_references), len(matching.unmatched_faces)
        reward = (matching.total - missing_penalty * missing - extra_penalty * extra) / count
        if off_pair_penalty:
            reward -= off_pair_penalty * off_pair_similarity(matrix, matching, among_references)
    elif convention == "umo":
        reward = (2 * matching.total - matrix.sum()) / matrix.size if matrix.size else 0.0
    elif convention == "xverse":
        per_reference = matrix.max(1) if faces else per_reference
        reward = per_reference.mean()
    elif convention == "multihuman":
        reward = matching.total / count
    else:  # withanyone
        reward = matching.total / count if faces == count else float("nan")
    return IdentityScore(float(reward), per_reference, matching)


def multi_id_alignment_reward(
    reference_embeddings: Float[np.ndarray, "r d"],
    face_embeddings: Float[np.ndarray, "f d"],
    *,
    missing_penalty: float = 0.0,
    extra_penalty: float = 0.0,
    convention: Convention = "multicrafter",
    min_similarity: float = 0.0,
    off_pair_penalty: float = 0.0,
) -> IdentityScore:
    """How faithfully the references appear in one picture (MultiCrafter, arXiv 2509.21953, section 3.4).

    "multicrafter": ``max over one-to-one pairs P of (sum over P of cos - missing_penalty (r - |P|) - extra_penalty (f - |P|)) / r``. One
    face painted many times can be matched only once; a face whose cosine is at most ``min_similarity`` is nobody's: its reference counts
    as missing and the face as extra. Without ``off_pair_penalty`` between ``-missing_penalty - extra_penalty f / r`` and 1. Matching
    alone does not stop a face that blends several people: the mean of two orthogonal identities, painted twice, earns .71, and one
    faithful face beside a missing one earns .25 with a missing penalty of .5. ``off_pair_penalty`` takes `off_pair_similarity` away.
    "umo" (arXiv 2509.06818, MIMR): mean over the matrix of +cos on matched pairs, -cos elsewhere; does not punish a missing face.
    "xverse" (XVerseBench, arXiv 2506.21416): mean over references of the best face's cosine, not exclusive.
    "multihuman" (MultiHuman-Testbench, arXiv 2506.20879): matched sum / r, missing counts 0.
    "withanyone" (MultiID-Bench, arXiv 2510.14975): matched mean, NaN unless there are as many faces as references: such pictures are
    left out there, so average with `numpy.nanmean` and say how many were.

    Args:
        reference_embeddings: One per reference, any norm.
        face_embeddings: One per face found in the picture, may be empty.
        missing_penalty: Taken for each reference without a face ("multicrafter" only).
        extra_penalty: Taken for each face without a reference ("multicrafter" only).
        convention: See above.
        min_similarity: Cosine from which a face can be a reference's at all ("multicrafter" only); the face backends' ``same_person`` is a
            strict choice, 0 the paper's.
        off_pair_penalty: Taken times `off_pair_similarity`, beyond what the references share with each other ("multicrafter" only); 0 is
            the paper's, from .65 on the average face of two orthogonal people is worth less than one of them painted faithfully.

    Raises:
        ValueError: Nothing to look for, widths differ, an embedding is not finite, a penalty is negative, or the convention is unknown.

    >>> multi_id_alignment_reward(np.eye(2), np.eye(2)).reward
    1.0
    """
    pushed = finite("off_pair_penalty", off_pair_penalty, least=0.0) > 0
    among = cosine_similarity(reference_embeddings, reference_embeddings) if pushed else None
    return score_similarity(
        cosine_similarity(reference_embeddings, face_embeddings),
        missing_penalty=missing_penalty,
        extra_penalty=extra_penalty,
        convention=convention,
        min_similarity=min_similarity,
        off_pair_penalty=off_pair_penalty,
        among_references=among,
    )


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle in radians; the arctangent keeps small angles, which the arccosine of a rounded 1 would lose."""
    x, y = _unit(a, "embeddings")[0], _unit(b, "embeddings")[0]
    return float(2 * np.arctan2(np.linalg.norm(x - y), np.linalg.norm(x + y)))


def copy_paste(
    generated: Float[np.ndarray, " d"], target: Float[np.ndarray, " d"], reference: Float[np.ndarray, " d"]
) -> float:
    """``(angle(generated, target) - angle(generated, reference)) / angle(target, reference)`` (WithAnyone, arXiv 2510.14975).

    1: a copy of the reference; -1: the target itself; 0: as near to the one as to the other, and where target and reference coincide.

    Raises:
        ValueError: Widths differ, or an embedding is not finite.
    """
    if not np.shape(generated) == np.shape(target) == np.shape(reference):
        raise InputError(
            f"embeddings must have equal width, got {np.shape(generated)}, {np.shape(target)} and {np.shape(reference)}"
        )
    spread = _angle(target, reference)
    return 0.0 if spread < 1e-6 else (_angle(generated, target) - _angle(generated, reference)) / spread


def swap_matrix(similarity: Float[np.ndarray, "r f"]) -> Float[np.ndarray, "r r"]:
    """Confusion of identities: entry (i, j) is the similarity of reference i with the face matched to reference j (NaN if none).

    The diagonal is who was painted where they should be; a row whose largest entry lies elsewhere has leaked into that face.
    """
    matrix = check_similarity(similarity)
    result = np.full((len(matrix), len(matrix)), np.nan)
    for reference, face in match(matrix).pairs:
        result[:, reference] = matrix[:, face]
    return result


def placed_confusion(
    similarity: Float[np.ndarray, "r f"], expected: Float[np.ndarray, "r f"]
) -> Float[np.ndarray, "r r"]:
    """Who stands where somebody else was asked for: entry (i, j) is how like reference i the face at the place of reference j is.

    Optimal matching by looks alone cannot see two people who traded places. Where places are known (the boxes of a layout, of a target
    photo), match by place first, then compare looks: off the diagonal are the swaps.

    Args:
        similarity: Cosine of references with faces.
        expected: How well face f lies at the place asked for reference r, for example `box_overlap` of the two; larger is better.
            Faces that overlap nobody's place (0 or less) are nobody's.

    Raises:
        ValueError: The shapes differ.
    """
    looks, places = check_similarity(similarity), check_similarity(expected)
    if looks.shape != places.shape:
        raise InputError(f"expected must have the shape of similarity, {looks.shape}, got {places.shape}")
    result = np.full((len(looks), len(looks)), np.nan)
    for reference, face in match_with_penalties(places).pairs:
        result[:, reference] = looks[:, face]
    return result


def swap_rate(confusion: Float[np.ndarray, "r r"]) -> float:
    """Share of the painted references whose face is more like another reference than like its own; NaN if nobody was painted.

    >>> swap_rate(np.array([[0.2, 0.9], [0.8, 0.1]]))
    1.0
    """
    matrix = as_floats(confusion)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"confusion must be (num_references, num_references), got shape {matrix.shape}")
    painted = [j for j in range(len(matrix)) if not np.isnan(matrix[:, j]).any()]
    if not painted:
        return float("nan")
    return float(np.mean([matrix[:, j].max() > matrix[j, j] for j in painted]))


def box_overlap(a: Float[np.ndarray, "r 4"], b: Float[np.ndarray, "f 4"]) -> Float[np.ndarray, "r f"]:
    """Intersection over union of boxes (left, top, right, bottom).

    Raises:
        ValueError: They are no finite boxes.
    """
    a, b = as_floats(a), as_floats(b)
    for name, boxes in (("a", a), ("b", b)):
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
            raise InputError(f"{name} must be finite boxes (n, 4), got shape {boxes.shape}")
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (a, b)]
    result: np.ndarray = both / np.maximum(area[0][:, None] + area[1][None] - both, 1e-12)
    return result
