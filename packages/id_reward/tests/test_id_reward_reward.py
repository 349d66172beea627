"""The composite, its statistics, the evaluator and the adapters."""

from __future__ import annotations

import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from id_reward import CompositeReward, Evaluator, Faces, IdentityScorer, id_confidence
from id_reward.aggregate import normalize
from id_reward.examples.adapters import Standin, main
from id_reward.integrations.rewards import FlowGRPOReward, TRLReward, VerlOmniReward
from id_reward.metrics import mean_reference_cosine
from id_reward.statistics import RunningStatistics

PEOPLE = np.eye(4)


class Free:
    """Says that it may run beside others, and waits for its neighbour: two of them finish only side by side."""

    releases_gil = True

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, images, prompts, references):  # type: ignore[no-untyped-def]
        self.barrier.wait(timeout=20)
        return np.arange(len(images), dtype=float)


def test_scorers_that_release_the_gil_run_side_by_side() -> None:
    barrier = threading.Barrier(2)
    reward = CompositeReward({"a": (Free(barrier), 1.0), "b": (Free(barrier), 2.0)})
    assert reward([0, 0], ["", ""], [[], []]).totals.tolist() == [0, 3]
    alone = CompositeReward(
        {"a": (Free(threading.Barrier(1)), 1.0), "b": (Free(threading.Barrier(1)), 2.0)}, threads=False
    )
    assert alone([0, 0], ["", ""], [[], []]).totals.tolist() == [0, 3]


def test_batches_equal_the_whole_and_devices_are_passed_on() -> None:
    sizes: list[int] = []

    class Part:
        device = "cpu"

        def to(self, device: str) -> None:
            self.device = device

        def __call__(self, images, prompts, references):  # type: ignore[no-untyped-def]
            sizes.append(len(images))
            return [float(i) for i in images]

    part = Part()
    images = [1, 2, 3, 4, 5]
    whole = CompositeReward({"x": (part, 1.0)}, normalization={"x": "batch"})(images, [""] * 5, [[]] * 5)
    reward = CompositeReward({"x": (part, 1.0)}, normalization={"x": "batch"}, batch_size=2)
    parts = reward.to("meta")(images, [""] * 5, [[]] * 5)
    assert sizes == [5, 2, 2, 1] and part.device == "meta"
    np.testing.assert_allclose(parts.totals, whole.totals)
    assert reward([], [], []).totals.shape == (0,)


def test_normalisation_by_hand() -> None:
    np.testing.assert_allclose(normalize(np.array([1.0, 2.0, 3.0]), (1.0, 2.0)), [0, 0.5, 1])
    found = normalize(np.array([1.0, np.nan, 3.0]), "batch")
    assert found[[0, 2]].tolist() == [-1, 1] and np.isnan(found[1])
    assert normalize(np.full(3, 7.0), "batch").tolist() == [0, 0, 0]


@given(st.lists(st.lists(st.floats(-100, 100) | st.just(float("nan")), max_size=5), min_size=1, max_size=6))
@settings(deadline=None)
def test_running_statistics_are_those_of_all_values(batches) -> None:
    running = RunningStatistics()
    for batch in batches:
        running.update(np.array(batch, float), 0.5)
    values = np.array([v for batch in batches for v in batch if not np.isnan(v)])
    found = running.as_dict()
    assert found["count"] == len(values) and found["nan"] == sum(map(len, batches)) - len(values)
    assert found["seconds"] == 0.5 * len(batches)
    if len(values):
        expected = [values.mean(), values.std(), values.min(), values.max()]
        np.testing.assert_allclose([found[k] for k in ("mean", "std", "min", "max")], expected, atol=1e-6)
    else:
        assert np.isnan(found["mean"])


def test_summary_counts_over_calls() -> None:
    reward = CompositeReward({"x": (lambda i, p, r: np.array([1.0, np.nan]), 2.0)})
    for _ in range(2):
        reward([0, 0], ["", ""], [[], []])
    assert reward.summary()["x"]["count"] == 2 and reward.summary()["x"]["nan"] == 2
    assert reward.summary()["total"]["mean"] == 2


@pytest.mark.parametrize(("call", "word"), [
    (lambda: CompositeReward({"x": (1, 1.0)}), "parts"),  # type: ignore[dict-item]
    (lambda: CompositeReward({"x": (Standin, float("nan"))}), "weight"),  # type: ignore[dict-item]
    (lambda: CompositeReward({"x": (len, 1.0)}, batch_size=0), "batch_size"),  # type: ignore[dict-item]
    (lambda: CompositeReward({"x": (len, 1.0)}, normalization={"y": (0, 1)}), "normalization"),  # type: ignore[dict-item]
    (lambda: CompositeReward({"x": (len, 1.0)}, normalization={"x": (0, 0)}), "scales"),  # type: ignore[dict-item]
    (lambda: CompositeReward({"x": (lambda *_: np.zeros(3), 1.0)})([0], [""], [[]]), "x must return 1"),
    (lambda: CompositeReward({"x": (lambda *_: np.zeros(1), 1.0)})([0], [], [[]]), "prompts"),
    (lambda: Evaluator(), "part"),
])  # fmt: skip
def test_what_is_wrong_is_named(call, word) -> None:
    with pytest.raises(ValueError, match=word):
        call()


def test_a_scorers_own_error_is_not_swallowed() -> None:
    class Broken:
        releases_gil = True

        def __call__(self, images, prompts, references):  # type: ignore[no-untyped-def]
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        CompositeReward({"x": (Broken(), 1.0), "y": (lambda i, p, r: np.zeros(len(i)), 1.0)})([0], [""], [[]])


def test_metrics_by_hand() -> None:
    """One picture with both people, one in which the first is painted twice, one without faces."""
    references = [PEOPLE[:1], PEOPLE[1:2]]
    likeness = np.array([[0.8, 0.6, 0, 0], [0.0, 1, 0, 0]])
    pictures = [likeness, PEOPLE[[0, 0]], np.zeros((0, 4))]
    constant = lambda value: lambda i, p, r: np.full(len(i), value)  # noqa: E731
    evaluate = Evaluator(
        identity=IdentityScorer(Standin()), text=constant(0.3), aesthetics=constant(0.2), others={"brightness": constant(1.0)},
        clip_pictures=lambda images: np.array([np.asarray(i).sum(0) + 1e-9 for i in images]),
    )  # fmt: skip
    targets = [[PEOPLE[2:3], PEOPLE[1:2]]] * 3
    result = evaluate(pictures, ["x"] * 3, [references] * 3, targets)
    values = result.values
    np.testing.assert_allclose(values["Face-Sim"], [0.9, 0.5, 0])
    np.testing.assert_allclose(values["ID-Sim"], [0.9, 0.5, 0])
    np.testing.assert_allclose(values["count"], [1, 1, 0])
    np.testing.assert_allclose(values["ID-Conf"], [(1 + 0.4) / 2, 0, np.nan])
    np.testing.assert_allclose(
        values["swaps"], [0, 0.5, np.nan]
    )  # one of the two equal faces had to be the second person's
    angle = np.arccos(0.8)
    np.testing.assert_allclose(values["copy-paste"][0], ((np.pi / 2 - angle) / (np.pi / 2) + 0) / 2)
    np.testing.assert_allclose(values["CLIP-I"][0], (0.8 + 1.6) / 2 / np.hypot(0.8, 1.6))
    assert values["CLIP-T"].tolist() == [0.3] * 3 and values["AES"].tolist() == [0.2] * 3
    assert np.isnan(result.conventions["withanyone"][2]) and result.conventions["multihuman"][1] == 0.5
    summary = result.summary()
    assert summary["ID-Conf"]["left_out"] == 1 and summary["ID-Conf"]["pictures"] == 2
    assert summary["Face-Sim"]["standard_error"] == pytest.approx(np.std([0.9, 0.5, 0], ddof=1) / np.sqrt(3))
    assert "| Face-Sim | 0.4667 |" in result.table()
    with pytest.raises(ValueError, match="targets"):
        evaluate(pictures, ["x"] * 3, [references] * 3, targets[:1])
    assert np.isnan(id_confidence(np.zeros((1, 1)))) and np.isnan(id_confidence(np.zeros((0, 2))))
    assert id_confidence(np.array([[0.5, -0.5], [-0.1, -0.2]])) == 0.5  # at most 1, and 0 where no face is alike
    assert np.isnan(mean_reference_cosine(PEOPLE[:1], [np.zeros((0, 4))])).all()


@pytest.fixture
def composite() -> CompositeReward:
    return CompositeReward({"identity": (IdentityScorer(Standin()), 1.0)})


REFERENCES = [PEOPLE[:1], PEOPLE[1:2]]
PICTURES = [PEOPLE[:2], PEOPLE[:1], np.full((1, 4), np.nan)]


def test_trl(composite) -> None:
    logged: dict[str, float] = {}
    adapter = TRLReward(composite)
    chat = [[{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "x"]
    found = adapter(
        prompts=chat,
        completions=PICTURES,
        references=[REFERENCES] * 3,
        log_metric=logged.__setitem__,
        trainer_state=None,
    )
    assert found == [1.0, 0.5, None]
    assert adapter.__name__ == "id_reward" and logged["id_reward/total"] == 0.75
    with pytest.raises(ValueError, match="references"):
        adapter(prompts=chat, completions=PICTURES)


def test_flow_grpo(composite) -> None:
    scores, details = FlowGRPOReward(composite)(PICTURES, ["x"] * 3, [{"references": REFERENCES}] * 3, only_strict=True)
    assert scores["avg"] == [1.0, 0.5, 0.75]  # the mean of the others
    assert np.isnan(scores["identity"][2]) and details["missing"] == [False, False, True]
    with pytest.raises(ValueError, match="sample 1"):
        FlowGRPOReward(composite)(PICTURES[:2], ["x"] * 2, [{"references": REFERENCES}, {}])


def test_verl_omni(composite) -> None:
    adapter = VerlOmniReward(composite, missing_score=-1.0)
    info = {"references": REFERENCES}
    assert adapter(data_source="d", solution_image=PICTURES[1], ground_truth="x", extra_info=info) == {
        "score": 0.5,
        "identity": 0.5,
    }
    assert adapter("d", PICTURES[2], "x", info, reward_router_address="")["score"] == -1
    with pytest.raises(ValueError, match="extra_info"):
        adapter("d", PICTURES[0], "x", None)


def test_pictures_as_trainers_hand_them_over() -> None:
    """A tensor (b, 3, h, w) falls into pictures."""
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    shapes: list[tuple[int, ...]] = []

    class Look:
        def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
            shapes.extend(tuple(i.shape) for i in images)
            return [Faces(np.zeros((1, 4)), np.ones(1), PEOPLE[:1]) for _ in images]

    reward = CompositeReward({"identity": (IdentityScorer(Look()), 1.0)})
    pictures = torch.zeros(2, 3, 8, 8)
    scores, _ = FlowGRPOReward(reward)(pictures, ["x"] * 2, [{"references": [torch.zeros(3, 4, 4)]}] * 2)
    assert scores["avg"] == [1, 1] and shapes == [(3, 4, 4), (3, 8, 8), (3, 8, 8)]


def test_the_example_runs() -> None:
    found = main()
    assert found["trl"] == pytest.approx(found["flow_grpo"]) and found["trl"][0] == 1
    assert found["trl"][1] < 0.5 and found["verl_omni"]["score"] == pytest.approx(found["trl"][1])
