"""GDPO in full: its slow twin, and what whitening is for."""

from __future__ import annotations

import pytest
import torch
from gspo import gdpo_advantages, multi_reward_advantages, whiten
from gspo import reference_forward as slow
from hypothesis import given, settings
from hypothesis import strategies as st

NAN = float("nan")
IDS = torch.tensor([0, 1, 0, 1, 2, 2, 0, 1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), number=st.integers(1, 4))
def test_advantages_equal_the_slow_twin(seed: int, number: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards = {f"r{k}": 10.0**k * torch.randn(8, generator=g) for k in range(number)}
    weights = {f"r{k}": float(torch.rand((), generator=g)) + 0.1 for k in range(number)}
    got = gdpo_advantages(rewards, weights, IDS)
    want = slow.gdpo_advantages([r.tolist() for r in rewards.values()], list(weights.values()), IDS.tolist())
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-3, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 50))
def test_the_size_of_a_step_depends_on_neither_number_nor_weights_of_rewards(seed: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards = {k: torch.randn(8, generator=g) for k in "abc"}
    one = gdpo_advantages(rewards, dict.fromkeys("abc", 1.0), IDS)
    other = gdpo_advantages(rewards, dict.fromkeys("abc", scale), IDS)
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    assert float(one.std(correction=0)) == pytest.approx(1, abs=1e-2)


def test_whitening_leaves_order_and_missing_samples_as_they_are() -> None:
    advantages = torch.tensor([1.0, NAN, -2.0, 0.5])
    got = whiten(advantages, eps=0.0)
    assert torch.isnan(got).tolist() == [False, True, False, False]
    kept = got[[0, 2, 3]]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6) and float(kept.std(correction=0)) == pytest.approx(1)
    assert kept.argsort().tolist() == [1, 2, 0]
    raw = whiten(advantages, center=False, eps=0.0)
    assert raw[0] / raw[3] == pytest.approx(2) and raw[2] < 0


def test_a_batch_without_a_signal_stays_without() -> None:
    assert whiten(torch.zeros(4)).tolist() == [0, 0, 0, 0]
    assert whiten(torch.full((3,), 0.1)).tolist() == [0, 0, 0], "rounding is no signal"
    flat = {"a": torch.ones(8), "b": torch.ones(8)}
    assert gdpo_advantages(flat, {"a": 1.0, "b": 2.0}, IDS).abs().max() == 0


def test_rewards_that_disagree_are_told_apart() -> None:
    """The paper's own example: sums 1, 1, 2 look like two values, normalised one by one they are three."""
    rewards = {"correct": torch.tensor([1.0, 0.0, 1.0, 0.0]), "format": torch.tensor([0.0, 1.0, 1.0, 1.0])}
    ids, weights = torch.zeros(4, dtype=torch.long), {"correct": 1.0, "format": 1.0}
    assert len(set((rewards["correct"] + rewards["format"]).tolist())) == 2
    got = gdpo_advantages(rewards, weights, ids)
    assert len({round(a, 3) for a in got.tolist()}) == 3
    plain = multi_reward_advantages(rewards, weights, ids)
    torch.testing.assert_close(got, (plain - plain.mean()) / (plain.std(correction=0) + 1e-4))
