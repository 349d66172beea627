from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from gspo import clipped_surrogate_loss, group_advantages, group_statistics, multi_reward_advantages, reference
from hypothesis import given, settings

ORACLES = json.loads((Path(__file__).parent / "data" / "oracles.json").read_text())
NAN = float("nan")


@pytest.mark.parametrize("case", ORACLES["group_advantage"]["cases"])
def test_advantages_agree_with_flow_grpo(case: dict) -> None:
    names = sorted(set(case["prompts"]))
    ids = torch.tensor([names.index(p) for p in case["prompts"]])
    got = group_advantages(
        torch.tensor(case["rewards"], dtype=torch.float64), ids, scale="global" if case["global_std"] else "group"
    )
    torch.testing.assert_close(got, torch.tensor(case["advantages"], dtype=torch.float64), atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(-500, 500), min_size=4, max_size=12), st.integers(-10, 10))
@settings(deadline=None)
def test_advantages_are_centred_and_shift_invariant(values: list[int], shift: int) -> None:
    rewards = torch.tensor(values, dtype=torch.float64) / 100
    ids = torch.arange(len(values)) % 2
    a = group_advantages(rewards, ids)
    for group in (0, 1):
        assert abs(a[ids == group].sum().item()) < 1e-6
    torch.testing.assert_close(a, group_advantages(rewards + shift, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ddof", [0, 1])
def test_slow_twin(ddof: int) -> None:
    rewards, ids = torch.randn(9, dtype=torch.float64), torch.tensor([4, 7, 4, 7, 4, 7, 7, 4, 4])
    want = reference.group_advantages(rewards.tolist(), ids.tolist(), ddof=ddof, eps=0.01)
    got = group_advantages(rewards, ids, ddof=ddof, eps=0.01)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_scales() -> None:
    rewards, ids = torch.tensor([0.0, 2.0, 0.0, 20.0]), torch.tensor([0, 0, 1, 1])
    assert group_advantages(rewards, ids, eps=0.0).tolist() == [-1, 1, -1, 1]
    assert group_advantages(rewards, ids, scale="none").tolist() == [-1, 1, -10, 10]
    overall = rewards.std(correction=0).item()
    got = group_advantages(rewards, ids, scale="global", eps=0.0)
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -10.0, 10.0]) / overall)


def test_zero_variance_groups_are_zero_and_counted() -> None:
    rewards, ids = torch.tensor([0.1, 0.1, 0.1, 5.0, 6.0, 7.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert group_advantages(rewards, ids)[:3].tolist() == [0, 0, 0]
    assert group_advantages(rewards, ids, scale="none")[:3].tolist() == [0, 0, 0]
    assert group_statistics(rewards, ids)[:2] == (2, 1)
    # a third of a third is not exactly a third: rounding is no signal
    assert not group_advantages(torch.tensor([1 / 3, (0.1 + 0.2) / 0.9, 1 / 3]), torch.zeros(3, dtype=torch.long)).any()


def test_nan_rewards_count_in_nothing() -> None:
    rewards, ids = torch.tensor([1.0, NAN, 2.0, 3.0, NAN, 4.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    advantages = group_advantages(rewards, ids)
    assert advantages.isnan().tolist() == [False, True, False, False, True, False]
    torch.testing.assert_close(advantages[[0, 2, 3]], group_advantages(rewards[[0, 2, 3]], ids[[0, 2, 3]]))
    assert advantages[5] == 0, "one valid sample carries no signal"
    assert group_statistics(rewards, ids) == (2, 1, 2)
    ratio = torch.ones(6, requires_grad=True)
    clipped_surrogate_loss(ratio, advantages, 0.1).loss.backward()
    assert ratio.grad is not None and ratio.grad[1] == 0 and bool(torch.isfinite(ratio.grad).all())


def test_rewards_are_normalised_one_by_one() -> None:
    """GDPO: a reward with a hundred times the spread weighs no more."""
    ids = torch.zeros(4, dtype=torch.long)
    small, large = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([100.0, 100.0, 0.0, 0.0])
    got = multi_reward_advantages({"a": small, "b": large}, {"a": 1.0, "b": 0.5}, ids, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([-0.5, 1.5, -1.5, 0.5]))
    assert multi_reward_advantages({"a": small, "b": -small}, {"a": 1.0, "b": 1.0}, ids).abs().max() < 1e-6


def test_rows_may_come_in_any_order() -> None:
    rewards, ids = torch.randn(12), torch.arange(12) % 3 + 10
    order = torch.randperm(12)
    torch.testing.assert_close(group_advantages(rewards, ids)[order], group_advantages(rewards[order], ids[order]))
