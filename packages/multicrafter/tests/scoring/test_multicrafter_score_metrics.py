"""Metrics of one picture by hand, and of drawn people whose identities are known."""

from __future__ import annotations

import numpy as np
import pytest
from multicrafter.scoring import metrics
from multicrafter.scoring.judges import parse_score

WORST = np.array([[0.9, 0.8], [0.7, 0.1]])


def test_conventions_side_by_side_by_hand():
    values = metrics.identity_metrics(WORST, people=2)
    assert values["face_sim"] == pytest.approx((0.8 + 0.7) / 2)
    assert values["id_xverse"] == pytest.approx((0.9 + 0.7) / 2)
    assert values["id_multihuman"] == pytest.approx(0.75)
    assert values["id_multiid"] == pytest.approx(0.75)
    assert values["id_umo"] == pytest.approx((0.8 + 0.7 - 0.9 - 0.1) / 4)
    assert (values["count"], values["missing"], values["extra"]) == (1.0, 0.0, 0.0)


def test_where_the_conventions_part():
    """One face for two references: only some of them notice."""
    values = metrics.identity_metrics(np.array([[0.9], [0.8]]), people=2)
    assert values["face_sim"] == pytest.approx(0.45)
    assert values["id_xverse"] == pytest.approx(0.85)  # the same face twice
    assert np.isnan(values["id_multiid"])  # left out there
    assert (values["count"], values["missing"]) == (0.0, 0.5)
    nobody = metrics.identity_metrics(np.zeros((2, 0)), people=2)
    assert nobody["face_sim"] == nobody["id_xverse"] == nobody["id_multihuman"] == 0.0
    crowd = metrics.identity_metrics(np.array([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1]]), people=2)
    assert (crowd["extra"], crowd["count"]) == (1.0, 0.0)
    negative = metrics.identity_metrics(np.array([[-0.4]]), people=1)
    assert negative["id_multihuman"] == pytest.approx(-0.4) and negative["face_sim"] == 0.0


def test_swaps_by_place():
    faces = np.array([[10, 10, 20, 20], [70, 10, 80, 20]], float)
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    right_way = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert metrics.swaps(right_way, faces, [left, right], (100, 100)) == 0.0
    assert metrics.swaps(right_way, faces, [right, left], (100, 100)) == 1.0
    assert metrics.swaps(right_way[:, ::-1], faces, [left, right], (100, 100)) == 1.0
    assert metrics.swaps(right_way[:, ::-1], faces, [None, None], (100, 100)) == 0.0  # looks alone cannot see it
    assert np.isnan(metrics.swaps(right_way[:1], faces, [left], (100, 100)))
    assert np.isnan(metrics.swaps(np.zeros((2, 0)), np.zeros((0, 4)), [left, right], (100, 100)))


def test_copy_paste_ends():
    reference, target = np.array([[1.0, 0.0]]), np.array([[np.cos(1.0), np.sin(1.0)]])
    assert metrics.copy_paste_metric(reference, reference, target) == pytest.approx(1.0)
    assert metrics.copy_paste_metric(reference, target, target) == pytest.approx(-1.0)
    between = np.array([[np.cos(0.5), np.sin(0.5)]])
    assert metrics.copy_paste_metric(reference, between, target) == pytest.approx(0.0, abs=1e-9)
    assert np.isnan(metrics.copy_paste_metric(reference, np.zeros((0, 2)), target))


def test_whole_and_matched_similarity():
    references = np.eye(3)[:2]
    assert metrics.mean_similarity(np.array([1.0, 1.0, 0.0]), references) == pytest.approx(np.sqrt(0.5))
    assert metrics.matched_similarity(references, np.eye(3)[[1, 0]], [(0, 1), (1, 0)]) == pytest.approx(1.0)
    assert metrics.matched_similarity(references, np.eye(3)[[0]], [(0, 0)]) == pytest.approx(
        0.5
    )  # a missing one counts 0
    assert np.isnan(metrics.mean_similarity(np.ones(3), np.zeros((0, 3))))


def test_geometric_mean_and_answers():
    assert metrics.omnicontext(9, 4) == 6 and metrics.omnicontext(-1, 5) == 0
    assert [parse_score(t) for t in ("8", "I say 7.5.", "10/10")] == [8, 7.5, 10]
    assert all(np.isnan(parse_score(t)) for t in ("", "great", "42"))


@pytest.mark.parametrize("face", [(5, 5, 15, 20), (0, 0, 90, 90), (95, 95, 99, 99)])
def test_head_boxes_lie_inside(face):
    left, top, right, bottom = metrics.head_box(face, (100, 100))
    assert 0 <= left < right <= 100 and 0 <= top < bottom <= 100
    assert right - left == bottom - top


# -- pictures


def test_the_right_people_score_higher_in_every_convention(scored):
    right, wrong = (scored[n].summary() for n in ("right", "wrong"))
    for name in ("face_sim", "id_xverse", "id_multihuman", "id_multiid", "id_umo", "id_omnicontext", "clip_i_matched"):
        assert right[name].mean > wrong[name].mean, name
    assert right["face_sim"].mean > 0.8
    assert right["swap_rate"].mean == 0.0
    assert right["count"].mean == 1.0
    assert right["face_sim"].cases == 6


def test_a_target_scored_as_a_picture_is_no_copy_of_the_references(asked, scored):
    from multicrafter.scoring.judges import JudgeConfig, Judges
    from multicrafter.scoring.manifest import find_cases, read_prompts
    from multicrafter.scoring.score import score

    _, prompts = read_prompts(asked / "manifest.jsonl")
    itself = score(
        find_cases(prompts, asked / "target"), Judges(JudgeConfig(faces="tiny")), name="target", progress=False
    )
    assert itself.summary()["copy_paste"].mean == pytest.approx(-1.0, abs=1e-4)
    assert scored["right"].summary()["copy_paste"].mean > -1.0
    assert "clip_t" not in itself.names  # no CLIP was given


def test_categories_and_their_macro_mean(scored):
    parts = scored["right"].by_category()
    assert set(parts) == {"even", "odd", "macro"}
    assert parts["macro"]["face_sim"].mean == pytest.approx(
        (parts["even"]["face_sim"].mean + parts["odd"]["face_sim"].mean) / 2
    )
