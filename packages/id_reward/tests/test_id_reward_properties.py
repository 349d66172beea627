"""What must hold of the reward, whatever the similarity matrix (hypothesis), and against the slow search over all matchings."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis.extra.numpy import arrays
from id_reward import (
    CONVENTIONS,
    box_overlap,
    copy_paste,
    match,
    multi_id_alignment_reward,
    placed_confusion,
    score_similarity,
    swap_matrix,
    swap_rate,
)

# halves and tenths: many ties
VALUES = st.one_of(st.floats(-1, 1, allow_subnormal=False), st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.5, 1.0]))
MATRICES = st.tuples(st.integers(1, 4), st.integers(0, 4)).flatmap(lambda s: arrays(np.float64, s, elements=VALUES))
PENALTIES = st.fixed_dictionaries({
    "missing_penalty": st.sampled_from([0.0, 0.2, 1.0]),
    "extra_penalty": st.sampled_from([0.0, 0.3, 1.0]),
    "min_similarity": st.sampled_from([-0.2, 0.0, 0.4]),
})  # fmt: skip
EMBEDDINGS = st.tuples(st.integers(1, 4), st.integers(2, 8)).flatmap(
    lambda s: arrays(np.float64, s, elements=st.floats(-1, 1, allow_subnormal=False))
)


def reference_reward(
    matrix: np.ndarray, *, missing_penalty: float, extra_penalty: float, min_similarity: float
) -> float:
    """The definition, by trying every one-to-one matching, partial ones too."""
    references, faces = matrix.shape
    best = -np.inf
    for size in range(min(references, faces) + 1):
        for rows in itertools.combinations(range(references), size):
            for columns in itertools.permutations(range(faces), size):
                pairs = list(zip(rows, columns))
                if all(matrix[p] > min_similarity for p in pairs):
                    total = sum(matrix[p] for p in pairs)
                    best = max(best, total - missing_penalty * (references - size) - extra_penalty * (faces - size))
    return best / references


@given(MATRICES, PENALTIES)
@settings(deadline=None, max_examples=150)
def test_the_reward_is_the_best_over_all_matchings(matrix, penalties) -> None:
    score = score_similarity(matrix, **penalties)
    assert score.reward == pytest.approx(reference_reward(matrix, **penalties), abs=1e-9)
    pairs = score.matching.pairs
    assert len({r for r, _ in pairs}) == len({f for _, f in pairs}) == len(pairs)
    assert set(score.matching.unmatched_references) == set(range(matrix.shape[0])) - {r for r, _ in pairs}
    assert set(score.matching.unmatched_faces) == set(range(matrix.shape[1])) - {f for _, f in pairs}


@given(MATRICES, PENALTIES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_does_not_matter(matrix, penalties, random) -> None:
    rows, columns = list(range(matrix.shape[0])), list(range(matrix.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    shuffled = matrix[rows][:, columns]
    assert score_similarity(shuffled, **penalties).reward == pytest.approx(
        score_similarity(matrix, **penalties).reward, abs=1e-9
    )
    for convention in ("xverse", "multihuman", "umo"):
        assert score_similarity(shuffled, convention=convention).reward == pytest.approx(
            score_similarity(matrix, convention=convention).reward, abs=1e-9
        )


@given(MATRICES, PENALTIES)
@settings(deadline=None)
def test_it_is_bounded(matrix, penalties) -> None:
    low = -penalties["missing_penalty"] - penalties["extra_penalty"] * matrix.shape[1] / len(matrix)
    assert low + min(penalties["min_similarity"], 0) - 1e-9 <= score_similarity(matrix, **penalties).reward <= 1 + 1e-9
    plain = score_similarity(matrix).reward
    assert 0 <= plain <= 1


@given(MATRICES, PENALTIES, st.floats(0, 1), st.data())
@settings(deadline=None)
def test_it_is_monotone_in_every_pair(matrix, penalties, gain, data) -> None:
    assume(matrix.size)
    r = data.draw(st.integers(0, matrix.shape[0] - 1))
    f = data.draw(st.integers(0, matrix.shape[1] - 1))
    better = matrix.copy()
    better[r, f] = min(1.0, better[r, f] + gain)
    assert score_similarity(better, **penalties).reward >= score_similarity(matrix, **penalties).reward - 1e-9


@given(MATRICES, PENALTIES, st.floats(-1, 0))
@settings(deadline=None)
def test_a_strangers_face_never_helps(matrix, penalties, distance) -> None:
    """A stranger: somebody no reference is more like than min_similarity."""
    stranger = np.full((len(matrix), 1), penalties["min_similarity"] + distance)
    with_stranger = score_similarity(np.hstack([matrix, stranger]), **penalties).reward
    assert with_stranger <= score_similarity(matrix, **penalties).reward + 1e-9
    if penalties["extra_penalty"]:
        assert with_stranger < score_similarity(matrix, **penalties).reward


@given(MATRICES, PENALTIES)
@settings(deadline=None)
def test_removing_a_matched_face_never_helps(matrix, penalties) -> None:
    """By more than it would cost as an extra face: then one face too many has left, and the picture has in truth become better."""
    score = score_similarity(matrix, **penalties)
    for r, face in score.matching.pairs:
        if matrix[r, face] >= 0:
            fewer = np.delete(matrix, face, 1)
            saved = penalties["extra_penalty"] / len(matrix)
            assert score_similarity(fewer, **penalties).reward <= score.reward + saved + 1e-9


@given(EMBEDDINGS)
@settings(deadline=None)
def test_copies_of_one_face_never_beat_the_right_faces(people) -> None:
    assume((np.linalg.norm(people, axis=1) > 0.1).all())
    right = multi_id_alignment_reward(people, people, extra_penalty=0.1, missing_penalty=0.1).reward
    assert right == pytest.approx(1)
    mean = (people / np.linalg.norm(people, axis=1, keepdims=True)).mean(0)
    for face in (mean, *people):
        copies = np.repeat(face[None], len(people), 0)
        assert multi_id_alignment_reward(people, copies).reward <= right + 1e-9
        # a single copy earns as much as all copies where the convention is exclusive and matches cannot be shared
        assert (
            multi_id_alignment_reward(people, copies[:1]).reward
            <= multi_id_alignment_reward(people, copies).reward + 1e-9
        )


def test_a_face_painted_twice_earns_once_here_and_twice_elsewhere() -> None:
    people = np.eye(2, 4)
    one_twice = people[[0, 0]]
    assert multi_id_alignment_reward(people, one_twice).reward == pytest.approx(0.5)
    mean = np.full((2, 4), 0.0)
    mean[:, :2] = 1
    ours = multi_id_alignment_reward(people, mean[:1]).reward
    theirs = multi_id_alignment_reward(people, mean[:1], convention="xverse").reward
    assert ours == pytest.approx(np.sqrt(0.5) / 2) and theirs == pytest.approx(np.sqrt(0.5))


def test_conventions_by_hand() -> None:
    """2 references, 3 faces; the best assignment is (0, 1), (1, 0)."""
    matrix = np.array([[0.6, 0.8, 0.0], [0.7, 0.5, -0.2]])
    by_hand = {
        "multicrafter": (0.8 + 0.7) / 2,
        "multihuman": (0.8 + 0.7) / 2,
        "xverse": (0.8 + 0.7) / 2,
        "umo": (0.8 + 0.7 - (0.6 + 0.0 + 0.5 - 0.2)) / 6,
    }
    for name, value in by_hand.items():
        assert score_similarity(matrix, convention=name).reward == pytest.approx(value)
    assert np.isnan(score_similarity(matrix, convention="withanyone").reward)  # another count: left out there
    assert score_similarity(matrix[:, :2], convention="withanyone").reward == pytest.approx(0.75)
    assert set(by_hand) | {"withanyone"} == set(CONVENTIONS)
    missing = score_similarity(matrix[:, :1], missing_penalty=0.4, extra_penalty=0.1)
    assert missing.reward == pytest.approx((0.7 - 0.4) / 2) and missing.per_reference.tolist() == [0, 0.7]
    extra = score_similarity(matrix, missing_penalty=0.4, extra_penalty=0.1)
    assert extra.reward == pytest.approx((1.5 - 0.1) / 2)


def test_umo_does_not_punish_a_missing_face_and_ours_does() -> None:
    """peers.md: perfect .362, one missing .366; here with people who are somewhat alike."""
    people = np.eye(3) * 0.8 + 0.2
    perfect, missing = people, people[:2]
    assert multi_id_alignment_reward(people, missing, convention="umo").reward > (
        multi_id_alignment_reward(people, perfect, convention="umo").reward - 0.01
    )
    assert multi_id_alignment_reward(people, missing).reward < multi_id_alignment_reward(people, perfect).reward - 0.3


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_sides_match_nothing(shape) -> None:
    found = match(np.zeros(shape))
    assert found.pairs == () and found.total == 0
    assert found.unmatched_references == tuple(range(shape[0])) and found.unmatched_faces == tuple(range(shape[1]))


def test_ties_are_broken_the_same_way() -> None:
    matrix = np.full((3, 4), 0.5)
    assert len({match(matrix.copy()).pairs for _ in range(50)}) == 1


def test_swaps() -> None:
    """Two people who traded places: looks alone cannot tell, places can."""
    people = np.array([[0.9, 0.1], [0.2, 0.8]])  # face 0 is person 0
    assert swap_rate(swap_matrix(people)) == 0
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10.0]])
    asked = boxes[::-1]  # person 0 was asked for on the right
    confusion = placed_confusion(people, box_overlap(asked, boxes))
    np.testing.assert_allclose(confusion, [[0.1, 0.9], [0.8, 0.2]])
    assert swap_rate(confusion) == 1
    assert np.isnan(swap_rate(swap_matrix(np.zeros((2, 0)))))
    one = swap_matrix(np.array([[0.3], [0.6]]))
    assert np.isnan(one[:, 0]).all() and one[:, 1].tolist() == [0.3, 0.6]
    np.testing.assert_allclose(box_overlap(boxes[:1], np.array([[5, 0, 15, 10.0]])), [[1 / 3]])


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_copy_paste_has_its_limits(seed) -> None:
    rng = np.random.default_rng(seed)
    target, reference, generated = rng.normal(size=(3, 16))
    assert copy_paste(reference, target, reference) == pytest.approx(1)
    assert copy_paste(target, target, reference) == pytest.approx(-1)
    assert copy_paste(
        target + reference * np.linalg.norm(target) / np.linalg.norm(reference), target, reference
    ) == pytest.approx(0, abs=1e-6)
    assert -1 - 1e-9 <= copy_paste(generated, target, reference) <= 1 + 1e-9  # the triangle inequality of angles
    assert copy_paste(3 * generated, target, 2 * reference) == pytest.approx(copy_paste(generated, target, reference))
    assert copy_paste(generated, target, target) == 0
