"""Rewards that are missing, come by name, or fail: as TRL allows, and nothing is lost without a word."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from gspo import (
    MissingRewards,
    OnlineConfig,
    OnlineTrainer,
    RobustReward,
    Scores,
    SlidingWindow,
    group_advantages,
    multi_reward_advantages,
)  # fmt: skip
from gspo.reward import RewardTable

NAN = float("nan")
IDS = [0, 0, 0, 0]
CPU = torch.device("cpu")


def test_two_functions_each_silent_on_the_others_tasks() -> None:
    """Prompts 0 are drawings, prompts 1 texts; each reward knows one of them."""
    ids = [0, 0, 1, 1]
    rewards = {"drawing": [0.0, 1.0, None, None], "text": [None, None, 5.0, 3.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = multi_reward_advantages(rewards, {"drawing": 1.0, "text": 2.0}, ids, eps=0.0)
    assert got.tolist() == [-1, 1, 2, -2]


def test_a_sample_keeps_the_rewards_it_has() -> None:
    rewards = {"a": [0.0, 1.0, NAN, NAN], "b": [None, 1.0, 3.0, NAN]}
    got = multi_reward_advantages(rewards, {"a": 1.0, "b": 1.0}, IDS, eps=0.0)
    assert got[:3].tolist() == [-1, 1 - 1, 1] and got[3].isnan()


@pytest.mark.parametrize("missing", [None, NAN, float("inf")])
def test_a_reward_of_weight_0_drops_nobody(missing) -> None:  # type: ignore[no-untyped-def]
    rewards = {"a": [0.0, 1.0], "b": [missing, missing]}
    got = multi_reward_advantages(rewards, {"a": 1.0, "b": 0.0}, [0, 0], eps=0.0)
    assert got.tolist() == [-1, 1]
    # and where it is all that is there, it is no reward
    assert multi_reward_advantages({"a": [0, 1, None], "b": [1, 2, 3]}, {"a": 1, "b": 0}, [0, 0, 0])[2].isnan()


@pytest.mark.parametrize(
    "call",
    [
        lambda: group_advantages([None, NAN, float("inf")], [0, 0, 0]),
        lambda: multi_reward_advantages({"a": [None, None], "b": [NAN, NAN]}, {"a": 1, "b": 1}, [0, 0]),
        lambda: multi_reward_advantages({"a": [None, None], "b": [1.0, 2.0]}, {"a": 1, "b": 0}, [0, 0]),
        lambda: step(lambda x, i: [None] * len(x)),
        lambda: step(lambda x, i: {"a": [None] * len(x), "b": [NAN] * len(x)}),
        lambda: step(lambda x, i: Scores([None] * len(x), {"a": [1.0] * len(x)})),
    ],
)
def test_nothing_at_all_is_said(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(MissingRewards, match="nothing is learned"):
        call()


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": 0.0}, "not 0"), ({"a": NAN}, "finite"), ({"a": float("inf")}, "finite"), ({"b": 1.0}, "must name")],
)
def test_weights_that_cannot_count_are_refused(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_reward_advantages({"a": [0, 1]}, weights, [0, 0])


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="group_ids must have the shape of rewards"):
        multi_reward_advantages({"a": [0, 1], "b": [0, 1, 2]}, {"a": 1, "b": 1}, [0, 0])


def step(reward, **options):  # type: ignore[no-untyped-def]
    layer = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    config = OnlineConfig(window=SlidingWindow(4), group_size=4, **options)
    trainer = OnlineTrainer(list(layer.parameters()), torch.optim.SGD(layer.parameters(), lr=0.1), config)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    return trainer.step(lambda x, s, i: layer(x), noise, torch.linspace(1, 0, 5), reward)


def test_a_step_trains_on_rewards_that_are_each_half_silent() -> None:
    def reward(x, index):  # type: ignore[no-untyped-def]
        first, second = x[:, 0].tolist(), x[:, 1].tolist()
        return {
            "a": [v if i == 0 else None for v, i in zip(first, index.tolist())],
            "b": [v if i == 1 else None for v, i in zip(second, index.tolist())],
        }

    report = step(reward)
    assert report.update.num_samples == 8 and report.groups == (2, 0, 0)
    summary = report.summary()
    assert summary["reward_a"] == pytest.approx(float(report.parts["a"][:4].mean()), rel=1e-5)
    assert summary["reward"] == pytest.approx(float(torch.cat([report.parts["a"][:4], report.parts["b"][4:]]).mean()))


def test_the_sum_may_be_normalised_instead() -> None:
    """TRL's default: the weighted sum of what a sample has, then its z-score."""
    reward = lambda x, i: {"a": x[:, 0].tolist(), "b": [None, *(10 * x[1:, 1]).tolist()]}  # noqa: E731
    report = step(reward, reward_aggregation="sum_then_normalize", reward_weights={"a": 2.0, "b": 1.0})
    x = report.rollout.latents
    total = 2 * x[:, 0] + torch.cat([torch.zeros(1), 10 * x[1:, 1]])
    torch.testing.assert_close(report.rewards.float(), total)
    torch.testing.assert_close(
        report.advantages.float(), group_advantages(total, report.group_ids), atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(report.advantages, step(reward).advantages)


def test_totals_are_trained_and_parts_reported() -> None:
    report = step(lambda x, i: Scores(x[:, 0], {"text": x[:, 1], "size": [None] * len(x)}))
    torch.testing.assert_close(report.advantages, step(lambda x, i: x[:, 0]).advantages)
    assert set(report.parts) == {"text", "size"} and str(report.summary()["reward_size"]) == "nan"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "reward_fn must return 2 numbers, one per sample, got shape"),
        ("ab", "reward_fn must return 2 numbers.*got str"),
        (3.0, "reward_fn must return 2 numbers.*got float"),
        ({"a": [1.0, 2.0], "b": torch.zeros(2, 1)}, "for 'b'"),
        (Scores([1.0, 2.0], {"a": [1.0]}), "for 'a'"),
    ],
)
def test_rewards_of_another_shape_are_one_sentence(values, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        RewardTable(values, 2, CPU, {})


class Judge:
    """Fails as often as it is told, and on some pictures always."""

    def __init__(self, failures: int = 0, broken: tuple = (), form: str = "numbers") -> None:
        self.failures, self.broken, self.form, self.calls = failures, broken, form, []

    def __call__(self, pictures, prompts):  # type: ignore[no-untyped-def]
        self.calls.append(len(pictures))
        if len(self.calls) <= self.failures or any(p in self.broken for p in pictures):
            raise ConnectionError("no judge")
        values = [float(p) for p in pictures]
        return {"numbers": values, "names": {"a": values}, "scores": Scores(values, {"a": values})}[self.form]


def test_a_failing_judge_is_asked_again_with_growing_patience(caplog: pytest.LogCaptureFixture) -> None:
    judge, waits = Judge(failures=2), []
    reward = RobustReward(judge, retries=2, wait_s=0.5, sleep=waits.append)
    with caplog.at_level(logging.WARNING, "gspo"):
        assert reward([1, 2], ["x", "y"]) == [1.0, 2.0]
    assert waits == [0.5, 1.0] and judge.calls == [2, 2, 2] and reward.num_failed == 0
    assert [r.message for r in caplog.records][1] == "the reward raised ConnectionError: no judge (attempt 2 of 3)"


@pytest.mark.parametrize("form", ["numbers", "names", "scores"])
def test_only_the_pictures_that_break_a_judge_lose_their_reward(form: str) -> None:
    judge = Judge(broken=(2,), form=form)
    reward = RobustReward(judge, retries=1, sleep=lambda s: None)
    table = RewardTable(reward([1, 2, 3], ["x", "y", "z"]), 3, CPU, {})
    assert table.totals[[0, 2]].tolist() == [1, 3] and table.totals[1].isnan()
    assert list(table.parts) == ([] if form == "numbers" else ["a"])
    assert judge.calls == [3, 3, 1, 1, 1] and reward.num_failed == 1 and "no judge" in str(reward.last_error)
    assert table.by_name is (form == "names")


def test_columns_may_be_tensors_and_a_dead_judge_is_nan_not_a_crash() -> None:
    reward = RobustReward(lambda x: 1 / 0, retries=0)
    assert RewardTable(reward(torch.ones(2, 3)), 2, CPU, {}).totals.isnan().all() and reward.num_failed == 2
    with pytest.raises(KeyboardInterrupt):
        RobustReward(stop)([1])
    with pytest.raises(ValueError, match="retries"):
        RobustReward(len, retries=-1)


def stop(pictures):  # type: ignore[no-untyped-def]
    raise KeyboardInterrupt
