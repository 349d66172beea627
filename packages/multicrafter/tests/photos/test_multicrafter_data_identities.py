"""Grouping faces by person and splitting people: against slow twins, scipy, and cases made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multicrafter.photos import identities, reference
from multicrafter.photos.identities import group_identities, similar_pairs, split_groups
from scipy.cluster.hierarchy import fcluster, linkage

SEED = st.integers(0, 2**32 - 1)


def people(random: np.random.Generator, count: int, width: int = 16) -> np.ndarray:
    rows = random.normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def faces_of(random: np.random.Generator, person: np.ndarray, noise: float, who: np.ndarray) -> np.ndarray:
    rows = person[who] + noise * random.normal(size=(len(who), person.shape[1]))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def partition(labels) -> set[frozenset[int]]:
    return {
        frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in set(np.asarray(labels).tolist())
    }


@settings(deadline=None, max_examples=60)
@given(SEED, st.integers(1, 24), st.floats(-0.2, 0.95))
def test_equals_the_slow_twin(seed, count, threshold):
    random = np.random.default_rng(seed)
    embeddings = faces_of(random, people(random, 4, 6), 0.25, random.integers(0, 4, count))
    photos = random.integers(0, max(1, count // 2), count).tolist()
    got = group_identities(embeddings, photos, threshold)
    assert (
        got.tolist()
        == reference.group_identities(embeddings.astype(np.float32).astype(np.float64), photos, threshold).tolist()
    )


@settings(deadline=None, max_examples=40)
@given(SEED, st.integers(2, 30), st.floats(0.0, 0.9))
def test_nobody_is_on_a_photo_twice_and_groups_are_as_similar_as_asked(seed, count, threshold):
    random = np.random.default_rng(seed)
    embeddings = faces_of(random, people(random, 5, 8), 0.2, random.integers(0, 5, count))
    photos = random.integers(0, count, count)
    labels = group_identities(embeddings, photos.tolist(), threshold)
    for group in partition(labels):
        rows = sorted(group)
        assert len(set(photos[rows].tolist())) == len(rows)
        assert labels[rows].min() == rows[0] == labels[rows].max()


def test_finds_the_true_people():
    random = np.random.default_rng(0)
    who = random.integers(0, 12, 150)
    labels = group_identities(faces_of(random, people(random, 12, 64), 0.05, who), list(range(150)), 0.5)
    assert partition(labels) == partition(who)


def test_agrees_with_average_linkage_where_every_face_has_its_own_photo():
    random = np.random.default_rng(1)
    who = random.integers(0, 8, 60)
    embeddings = faces_of(random, people(random, 8, 32), 0.08, who)
    tree = linkage(embeddings, "average", metric="cosine")
    assert partition(group_identities(embeddings, list(range(60)), 0.5)) == partition(fcluster(tree, 0.5, "distance"))


def test_a_chain_of_lookalikes_is_not_one_person():
    angles = np.deg2rad(np.arange(0, 180, 20))  # neighbours .94 alike, ends opposite
    chain = np.stack([np.cos(angles), np.sin(angles)], 1)
    labels = group_identities(chain, list(range(len(chain))), 0.9)
    assert len(partition(labels)) > 2
    for group in partition(labels):
        rows = sorted(group)
        cosine = chain[rows] @ chain[rows].T
        assert len(rows) == 1 or cosine[~np.eye(len(rows), dtype=bool)].mean() >= 0.9 - 1e-6


def test_pairs_do_not_depend_on_the_blocks(monkeypatch):
    random = np.random.default_rng(2)
    embeddings = people(random, 50, 8)
    whole = similar_pairs(embeddings, 0.3)
    monkeypatch.setattr(identities, "CHUNK", 7)
    parts = similar_pairs(embeddings, 0.3)
    # float32 products of blocks of another shape may differ in the last bit, and so may the order of ties
    assert set(zip(whole.i.tolist(), whole.j.tolist())) == set(zip(parts.i.tolist(), parts.j.tolist()))
    assert (whole.i < whole.j).all()
    np.testing.assert_allclose(np.sort(whole.cosine), np.sort(parts.cosine), atol=1e-6)


def test_no_faces_and_wrong_lengths():
    assert group_identities(np.zeros((0, 4)), [], 0.5).tolist() == []
    with pytest.raises(ValueError, match="one number per face"):
        group_identities(np.eye(3), [0, 1], 0.5)


GRAPHS = st.dictionaries(
    st.integers(0, 30).map("p{}".format), st.lists(st.integers(0, 15).map("id{}".format), max_size=4), max_size=25
)


@settings(deadline=None, max_examples=80)
@given(GRAPHS, st.floats(0, 1))
def test_no_identity_is_on_both_sides(graph, fraction):
    sides = split_groups(graph, fraction)
    assert sides.keys() == graph.keys()
    for identity in {i for people in graph.values() for i in people}:
        assert len({sides[p] for p, people in graph.items() if identity in people}) == 1


@settings(deadline=None, max_examples=40)
@given(GRAPHS, st.floats(0, 1))
def test_photos_of_strangers_move_nobody(graph, fraction):
    before = split_groups(graph, fraction)
    after = split_groups({**graph, "new": ["stranger"]}, fraction)
    assert {p for p, side in before.items() if side == "test"} <= {p for p, side in after.items() if side == "test"}


def test_a_group_that_is_nearly_everything_is_trained_on():
    """Found by 20,000 generated photos, of which one group of 19,938 went into the test split."""
    strangers = {f"s{i}": [f"x{i}"] for i in range(100)}
    for name in "abcdefghijklmnop":  # sixteen draws, some below any fraction
        fraction = 0.45
        known = {f"p{i}": [f"{name}{i}", f"{name}{i + 1}"] for i in range(100)}
        sides = split_groups({**known, **strangers}, fraction)
        assert {sides[p] for p in known} == {"train"}
        assert 0 < sum(side == "test" for side in sides.values()) <= 2 * fraction * 200


def test_the_fraction_is_met():
    graph = {f"p{i}": [f"id{i}"] for i in range(4000)}
    share = sum(side == "test" for side in split_groups(graph, 0.1).values()) / 4000
    assert share == pytest.approx(0.1, abs=0.02)
    assert set(split_groups(graph, 0.0).values()) == {"train"}
    assert set(split_groups(graph, 1.0).values()) == {"test"}
