"""Numbers as models return them, and what is missing or infinite among them: never a wrong total without a word."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from id_reward import (
    CompositeReward,
    Evaluator,
    Faces,
    IdentityScorer,
    box_overlap,
    copy_paste,
    cosine_similarity,
    id_confidence,
    match,
    multi_id_alignment_reward,
    score_similarity,
    swap_matrix,
    swap_rate,
)
from id_reward.aggregate import normalize
from id_reward.floats import as_floats, part_values
from id_reward.integrations.rewards import FlowGRPOReward, TRLReward, VerlOmniReward
from id_reward.statistics import RunningStatistics

NAN, INF = float("nan"), float("inf")


def gives(values):  # type: ignore[no-untyped-def]
    return lambda images, prompts, references: values


def total(values, count: int = 2, **options):  # type: ignore[no-untyped-def]
    return CompositeReward({"x": (gives(values), 1.0)}, **options)([0] * count, [""] * count, [[]] * count)


def test_every_kind_of_numbers_a_scorer_may_return() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    one = torch.tensor([0.5, 2.0])
    kinds = [
        one, one.bfloat16(), one.half(), one.double(), one.requires_grad_(), (one > 1).int(), [torch.tensor(0.5).bfloat16(), torch.tensor(2.0)],
        [one[0], 2.0], (0.5, 2), np.array([0.5, 2], np.float16), [np.float32(0.5), 2], [True, 2],
    ]  # fmt: skip
    for values in kinds:
        assert total(values).totals.tolist() in ([0.5, 2], [0, 1], [1, 2]), values
    assert np.isnan(total([None, 2.0]).totals).tolist() == [True, False]
    np.testing.assert_allclose(as_floats([[one, one], [one, one]]).shape, (2, 2, 2))
    assert Evaluator(text=gives(one.bfloat16()))([0, 0], [""] * 2, [[]] * 2).values["CLIP-T"].tolist() == [0.5, 2]


def test_the_core_takes_tensors_of_every_precision() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    references, faces = np.eye(2, 4), np.eye(3, 4)[[1, 0, 2]]
    cosine = cosine_similarity(references, faces)
    calls = {
        "reward": lambda a, b: multi_id_alignment_reward(a, b, extra_penalty=0.25).reward,
        "cosine": cosine_similarity, "copy-paste": lambda a, b: copy_paste(a[0], a[1], b[0]),
    }  # fmt: skip
    matrix_calls = [lambda m: match(m).total, lambda m: score_similarity(m).reward, swap_matrix, id_confidence]
    for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        as_tensor = lambda a, kind=kind: torch.tensor(a, dtype=kind, requires_grad=True)  # noqa: E731
        for name, call in calls.items():
            np.testing.assert_allclose(
                call(as_tensor(references), as_tensor(faces)), call(references, faces), err_msg=name
            )
        for call in matrix_calls:
            np.testing.assert_allclose(call(as_tensor(cosine)), call(cosine))
        assert swap_rate(as_tensor(np.eye(2))) == 0
        boxes = np.array([[0.0, 0, 2, 2]])
        np.testing.assert_allclose(box_overlap(as_tensor(boxes), as_tensor(boxes)), 1)


def test_backends_and_embedders_may_return_tensors() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")

    class Backend:
        def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
            rows = [torch.tensor(i).bfloat16() for i in images]
            return [Faces(torch.zeros(len(r), 4), torch.ones(len(r)), r) for r in rows]

    people = np.eye(2, 4)
    evaluate = Evaluator(
        identity=IdentityScorer(Backend()),
        clip_pictures=lambda images: torch.stack([torch.tensor(i).sum(0) for i in images]).bfloat16(),
    )
    found = evaluate([people, people[:1]], [""] * 2, [[people[:1], people[1:]]] * 2)
    assert found.values["Face-Sim"].tolist() == [1, 0.5]
    np.testing.assert_allclose(found.values["CLIP-I"], [0.5**0.5, 0.5], atol=1e-12)


@pytest.mark.parametrize(
    "values", [["a", "b"], [1j, 2], {"x": 1}, [[1], [2]], [1], 3.0, "12", None, [[1, 2], [3]], [1, "b"]]
)
def test_what_is_no_number_per_picture_is_refused_in_one_sentence(values) -> None:
    with pytest.raises(ValueError, match="x must return 2") as caught:
        total(values)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_raise_means_every_number_that_is_not_finite(bad) -> None:
    with pytest.raises(ValueError, match="x must return finite numbers, got NaN or infinity for 1 of 2 pictures"):
        total([bad, 1.0], nan_policy="raise")


@pytest.mark.parametrize("bad", [NAN, INF, -INF, None])
def test_infinity_counts_as_no_value(bad) -> None:
    assert np.isnan(total([bad, 1.0]).totals).tolist() == [True, False]
    assert total([bad, 1.0], nan_policy="zero").totals.tolist() == [0, 1]
    score = total([bad, 1.0, 3.0], 3, normalization={"x": "batch"})
    assert np.isnan(score.totals[0]) and score.totals[1:].tolist() == [-1, 1]
    assert np.isnan(score.parts["x"]).tolist() == [True, False, False]
    assert np.isnan(part_values([bad, 1.0], "x", 2)).tolist() == [True, False]


def test_no_mean_over_nan_and_infinity() -> None:
    with pytest.warns(UserWarning, match="x has no value for any of the 2"):
        score = total([NAN, INF])
    assert (
        np.isnan(CompositeReward.statistics(score)["x"]["mean"]) and CompositeReward.statistics(score)["x"]["nan"] == 2
    )
    running = RunningStatistics()
    running.update(np.array([NAN, INF, 2.0, -INF]))
    assert (running.mean, running.nan, running.high) == (2, 3, 2)
    reward = CompositeReward({"x": (gives([NAN, INF, 1.0]), 1.0)})
    scores, details = FlowGRPOReward(reward)([0] * 3, [""] * 3, [{"references": []}] * 3)
    assert scores["avg"] == [1, 1, 1] and details["missing"] == [True, True, False]
    assert TRLReward(reward)(prompts=[""] * 3, completions=[0] * 3, references=[[]] * 3) == [None, None, 1.0]


def test_a_batch_of_one_has_no_spread() -> None:
    """It counted 0, whatever the picture was."""
    for values in ([0.2], [0.9]):
        with pytest.raises(ValueError, match="'batch' of x needs at least two pictures, got one: it would count 0"):
            total(values, 1, normalization={"x": "batch"})
    with pytest.raises(ValueError, match="at least two pictures"):
        normalize(np.array([3.0]), "batch")
    called: list[int] = []
    reward = CompositeReward({"x": (lambda i, p, r: called.append(1), 1.0)}, normalization={"x": "batch"})
    with pytest.raises(ValueError, match="batch"):
        reward([0], [""], [[]])
    assert called == []  # before work begins
    with pytest.raises(
        ValueError, match=r"verl scores one picture at a time, so x must be normalised by \(shift, scale\)"
    ):
        VerlOmniReward(reward)
    assert reward([], [], []).totals.shape == (0,)


def test_one_value_among_missing_ones_is_said() -> None:
    with pytest.warns(UserWarning, match="x has a value for one picture of 3 only"):
        assert total([NAN, 5.0, NAN], 3, normalization={"x": "batch"}).totals[1] == 0


def test_a_part_of_weight_0_is_logged_and_changes_nothing() -> None:
    reward = CompositeReward({"x": (gives([1.0, 2.0]), 1.0), "watched": (gives([NAN, INF]), 0.0)})
    with pytest.warns(UserWarning, match="watched"):
        score = reward([0, 0], [""] * 2, [[]] * 2)
    assert score.totals.tolist() == [1, 2] and np.isnan(score.parts["watched"]).all()


def test_totals_that_are_all_missing_are_said() -> None:
    reward = CompositeReward({"a": (gives([NAN, 1.0]), 1.0), "b": (gives([1.0, NAN]), 1.0)})
    with pytest.warns(UserWarning, match="none of the 2 pictures has a total: each lacks a part"):
        assert np.isnan(reward([0, 0], [""] * 2, [[]] * 2).totals).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert total([NAN, 1.0]).totals[1] == 1


@pytest.mark.parametrize("how", ["mean", None, (1.0,), (NAN, 1.0), (0.0, INF), (0.0, NAN), (0.0, -1.0), ("a", "b"), 3])
def test_normalization_is_checked(how) -> None:
    with pytest.raises(ValueError, match="normalization must be 'batch' or"):
        CompositeReward({"x": (len, 1.0)}, normalization={"x": how})  # type: ignore[dict-item]


@pytest.mark.parametrize("weight", [NAN, INF, "1", None])
def test_weights_are_checked(weight) -> None:
    with pytest.raises(ValueError, match="the weight of x must be a finite number"):
        CompositeReward({"x": (len, weight)})  # type: ignore[dict-item]
