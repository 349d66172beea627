"""Faces that blend several references: what they earn, and what the off-pair penalty does about it."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from id_reward import (
    CompositeReward,
    Evaluator,
    IdentityScorer,
    OffPairSimilarity,
    cosine_similarity,
    match,
    multi_id_alignment_reward,
    off_pair_similarity,
    score_similarity,
)
from id_reward.examples.adapters import Standin
from id_reward.examples.average_face import main, study

EMBEDDINGS = st.tuples(st.integers(1, 3), st.integers(0, 3)).flatmap(
    lambda s: arrays(np.float64, (s[0] + s[1], 4), elements=st.floats(-1, 1, allow_subnormal=False)).map(
        lambda rows: (rows[: s[0]], rows[s[0] :])
    )
)
PENALTIES = st.fixed_dictionaries({
    "missing_penalty": st.sampled_from([0.0, 0.5]), "extra_penalty": st.sampled_from([0.0, 0.3]),
    "off_pair_penalty": st.sampled_from([0.0, 0.3, 1.0, 4.0]), "min_similarity": st.sampled_from([0.0, 0.2]),
})  # fmt: skip


def reference_reward(
    cosine: np.ndarray,
    among: np.ndarray,
    *,
    missing_penalty: float,
    extra_penalty: float,
    off_pair_penalty: float,
    min_similarity: float,
) -> float:
    """The definition, by trying every one-to-one matching, partial ones too; sums written out."""
    references, faces = cosine.shape
    best = -np.inf
    for size in range(min(references, faces) + 1):
        for rows in itertools.combinations(range(references), size):
            for columns in itertools.permutations(range(faces), size):
                owner = dict(zip(columns, rows))
                if any(cosine[r, f] <= min_similarity for f, r in owner.items()):
                    continue
                off = 0.0
                for f in range(faces):
                    for i in range(references):
                        if f not in owner:
                            off += max(cosine[i, f], 0)
                        elif i != owner[f]:
                            off += max(cosine[i, f] - max(among[i, owner[f]], 0), 0)
                total = sum(cosine[r, f] for f, r in owner.items())
                total -= missing_penalty * (references - size) + extra_penalty * (faces - size)
                best = max(best, total - off_pair_penalty * off / max(references - 1, 1))
    return best / references


@given(EMBEDDINGS, PENALTIES)
@settings(deadline=None, max_examples=200)
def test_the_reward_is_the_best_over_all_matchings(embeddings, penalties) -> None:
    references, faces = embeddings
    cosine = cosine_similarity(references, faces).reshape(len(references), len(faces))
    among = cosine_similarity(references, references)
    score = multi_id_alignment_reward(references, faces, **penalties)
    assert score.reward == pytest.approx(reference_reward(cosine, among, **penalties), abs=1e-9)
    off = off_pair_similarity(cosine, score.matching, among)
    assert off >= 0
    if penalties["off_pair_penalty"] == 0:
        assert score.reward <= 1 + 1e-9


@given(EMBEDDINGS)
@settings(deadline=None)
def test_faithful_faces_cost_nothing_however_alike_the_people_are(embeddings) -> None:
    references, _ = embeddings
    references = references + 1e-3 * np.eye(len(references), 4)
    among = cosine_similarity(references, references)
    faithful = match(among)
    if faithful.pairs == tuple((i, i) for i in range(len(references))):
        assert off_pair_similarity(among, faithful, among) == pytest.approx(0, abs=1e-12)


def test_the_average_face_by_hand() -> None:
    """.707 against .25 for one faithful face: matching alone does not stop it."""
    table = study(2)
    average, missing = table["the average face, for all"], table["one is missing"]
    assert average["ours, off-pair 0.0"] == pytest.approx(0.5**0.5)
    assert missing["ours, off-pair 0.0"] == missing["ours, off-pair 1.0"] == pytest.approx(0.25)
    assert average["ours, off-pair 0.5"] == pytest.approx(0.5**0.5 / 2)
    assert average["ours, off-pair 1.0"] == pytest.approx(0) and average["umo"] == pytest.approx(0)
    for row in (0.0, 0.5, 1.0):
        assert table["everybody, faithful"][f"ours, off-pair {row}"] == pytest.approx(1)
    # where the guide says that the order turns: (1 - w) / sqrt(2) = .25
    turns = 1 - 0.25 * 2**0.5
    assert turns == pytest.approx(0.646, abs=1e-3)
    mean = np.full((2, 2), 0.5**0.5)
    for weight, better in ((turns - 0.01, True), (turns + 0.01, False)):
        got = score_similarity(mean, missing_penalty=0.5, off_pair_penalty=weight).reward
        assert (got > 0.25) == better


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_average_of_several_people(count) -> None:
    references = np.eye(count, 8)
    faces = np.repeat(references.mean(0, keepdims=True), count, 0)
    assert multi_id_alignment_reward(references, faces).reward == pytest.approx(count**-0.5)
    assert multi_id_alignment_reward(references, faces, off_pair_penalty=1.0).reward == pytest.approx(0)


def test_blending_more_earns_less() -> None:
    """Two people and two faces that move towards each other: without the penalty the reward falls slowly, with it quickly."""
    people = np.eye(2)
    angles = np.linspace(0, np.pi / 4, 6)
    with_penalty, without = [], []
    for angle in angles:
        faces = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        without.append(multi_id_alignment_reward(people, faces).reward)
        with_penalty.append(multi_id_alignment_reward(people, faces, off_pair_penalty=0.7).reward)
    np.testing.assert_allclose(without, np.cos(angles))
    np.testing.assert_allclose(with_penalty, np.cos(angles) - 0.7 * np.sin(angles))


def test_a_copy_of_somebody_is_nobodys_and_costs() -> None:
    people = np.eye(2)
    twins = np.vstack([people, people[:1]])
    assert multi_id_alignment_reward(people, twins, off_pair_penalty=0.4).reward == pytest.approx(1 - 0.4 / 2)


def test_among_references_must_fit() -> None:
    with pytest.raises(ValueError, match=r"among_references must be \(2, 2\), got \(1, 2\)"):
        score_similarity(np.eye(2), off_pair_penalty=1.0, among_references=np.zeros((1, 2)))
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="off_pair_penalty must be a finite number, at least 0"):
            score_similarity(np.eye(2), off_pair_penalty=wrong)


def test_in_the_scorer_the_composite_and_the_evaluator() -> None:
    people = np.eye(2, 4)
    average = np.repeat(people.mean(0, keepdims=True), 2, 0)
    pictures, references = [people, average, np.zeros((0, 4))], [[people[:1], people[1:]]] * 3
    plain = IdentityScorer(Standin())
    scorer = IdentityScorer(Standin(), off_pair_penalty=1.0)
    np.testing.assert_allclose(scorer(pictures, [""] * 3, references), [1, 0, 0], atol=1e-12)
    reward = CompositeReward({"identity": (plain, 1.0), "blend": (OffPairSimilarity(plain), -1.0)})
    score = reward(pictures, [""] * 3, references)
    np.testing.assert_allclose(score.parts["blend"], [0, 0.5**0.5, 0], atol=1e-12)
    np.testing.assert_allclose(score.totals, [1, 0, 0], atol=1e-12)
    with pytest.warns(UserWarning, match="no references"):
        assert np.isnan(OffPairSimilarity(plain)(pictures[:1], [""], [[]])).all()
    found = Evaluator(identity=scorer)(pictures, [""] * 3, references)
    np.testing.assert_allclose(found.conventions["multicrafter"], [1, 0, 0], atol=1e-12)


def test_the_example_prints_its_table(capsys) -> None:
    main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and "0.707" in printed[-1]
