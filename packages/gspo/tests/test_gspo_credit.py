"""Credit by subject: one advantage per token, the expectation that it keeps and the variance that it removes."""

from __future__ import annotations

import pytest
import torch
from gspo import reference_forward as slow
from gspo import token_advantages, token_log_ratio
from gspo.ratio import gaussian_log_ratio
from hypothesis import given, settings
from hypothesis import strategies as st

NAN = float("nan")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), subjects=st.integers(1, 4), background=st.sampled_from(["sum", "zero"]))
def test_token_advantages_equal_the_slow_twin(seed: int, subjects: int, background: str) -> None:
    g = torch.Generator().manual_seed(seed)
    regions = torch.rand(3, subjects, 5, generator=g) * (torch.rand(3, subjects, 5, generator=g) > 0.4)
    advantages = torch.randn(3, subjects, generator=g)
    got = token_advantages(advantages, regions, background=background)  # type: ignore[arg-type]
    want = slow.token_advantages(advantages.tolist(), regions.tolist(), background)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-5)


def test_without_regions_every_token_has_the_whole_sum() -> None:
    advantages = torch.tensor([[1.0, -2.5]])
    assert token_advantages(advantages, torch.zeros(1, 2, 3)).tolist() == [[-1.5, -1.5, -1.5]]
    assert token_advantages(advantages, torch.zeros(1, 2, 3), background="zero").tolist() == [[0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_one_subject_everywhere_is_the_ordinary_advantage(seed: int) -> None:
    advantages = torch.randn(4, 1, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(token_advantages(advantages, torch.ones(4, 1, 6)), advantages.expand(4, 6))


def test_a_subject_without_a_reward_takes_only_its_own_tokens_out() -> None:
    regions = torch.tensor([[[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.5, 0.0]]])
    got = token_advantages(torch.tensor([[NAN, 2.0]]), regions)
    assert torch.isnan(got).tolist() == [[True, False, True, True]]
    assert got[0, 1] == 2
    got = token_advantages(torch.tensor([[NAN, 2.0]]), regions, background="zero")
    assert torch.isnan(got).tolist() == [[True, False, True, False]]


def test_log_ratios_of_tokens_average_to_that_of_the_sample() -> None:
    g = torch.Generator().manual_seed(0)
    x, old = torch.randn(4, 6, 3, generator=g), torch.randn(4, 6, 3, generator=g)
    mean = (old + 0.1 * torch.randn(4, 6, 3, generator=g)).requires_grad_(True)
    std = torch.rand(4, generator=g) + 0.5
    tokens = token_log_ratio(x, mean, old, std)
    torch.testing.assert_close(tokens.mean(1), gaussian_log_ratio(x, mean, old, std))
    (gradient,) = torch.autograd.grad(tokens[2, 3], mean)
    assert set(gradient.abs().sum(2).nonzero().flatten().tolist()) == {2, 3}, "a token's log-ratio is its own"


def test_credit_keeps_the_expected_gradient_and_removes_variance() -> None:
    """Subjects that do not influence each other: s tokens, x = mean + noise, R = sum_s x_s, whose gradient in the mean is 1 per token.

    Ordinary: g_n = (sum_s z_s) z_n has mean 1 and variance s + 1. By subject: g_n = z_n^2 has mean 1 and variance 2.
    """
    subjects, samples = 4, 200_000
    z = torch.randn(samples, subjects, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(samples, subjects, 1, requires_grad=True)
    log_ratio = token_log_ratio(z[..., None], mean, torch.zeros(samples, subjects, 1), torch.ones(samples))
    regions = torch.eye(subjects).expand(samples, subjects, subjects)
    for weights, variance in (
        (token_advantages(z, regions), 2),
        (z.sum(1, keepdim=True).expand(-1, subjects), subjects + 1),
    ):
        (gradient,) = torch.autograd.grad((weights * log_ratio).sum(), mean, retain_graph=True)
        assert float(gradient.mean()) == pytest.approx(1, abs=0.01)
        assert float(gradient.var()) == pytest.approx(variance, rel=0.03)
