"""Ratios, the surrogate, the KL."""

from __future__ import annotations

import pytest
import torch
from gspo import (
    clipped_surrogate_loss,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_log_ratio,
    guard_step_weights,
    guarded_step_importance_ratio,
    reference,
    sequence_importance_ratio,
    step_importance_ratio,
)  # fmt: skip


def test_ratios_and_surrogate_by_hand() -> None:
    new, old = torch.tensor([[0.2, 0.4], [0.0, -0.2]]), torch.zeros(2, 2)
    torch.testing.assert_close(sequence_importance_ratio(new, old), torch.tensor([0.3, -0.1]).exp())
    torch.testing.assert_close(step_importance_ratio(new, old), new.exp())
    got = clipped_surrogate_loss(torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0]), 0.2)
    assert got.loss.item() == pytest.approx(-(1.2 - 0.8) / 2) and got.clip_fraction == 1
    assert got.ratio_mean == 1 and got.ratio_std == 0.5
    assert got.approx_kl.item() == pytest.approx(
        ((0.5 - torch.tensor(1.5).log()) + (-0.5 - torch.tensor(0.5).log())).item() / 2
    )
    # the clip never takes the gradient of a sample that would have to come back
    kept = clipped_surrogate_loss(torch.tensor([1.5, 0.5]), torch.tensor([-1.0, 1.0]), 0.2)
    assert kept.clip_fraction == 0 and kept.loss.item() == pytest.approx((1.5 - 0.5) / 2)


def test_surrogate_equals_its_slow_twin_with_gradients() -> None:
    old, advantages = torch.randn(6, 3), torch.randn(6)
    start = old + 0.2 * torch.randn(6, 3)
    fast, slow = (start.clone().requires_grad_() for _ in range(2))
    one = clipped_surrogate_loss(sequence_importance_ratio(fast, old), advantages, 0.1).loss
    two = reference.surrogate(slow, old, advantages, 0.1)
    torch.testing.assert_close(one, two)
    one.backward()
    two.backward()
    torch.testing.assert_close(fast.grad, slow.grad)


def test_gradient_of_the_sequence_ratio_is_shared_by_its_steps() -> None:
    """d s = s * mean over t of d log pi."""
    new, old = torch.randn(4, 5).requires_grad_(), torch.randn(4, 5)
    ratio = sequence_importance_ratio(new, old)
    ratio.sum().backward()
    torch.testing.assert_close(new.grad, (ratio.detach() / 5)[:, None].expand(4, 5))


def test_step_weights_scale_steps() -> None:
    ratio, advantages = torch.ones(3, 2, requires_grad=True), torch.tensor([1.0, 2.0, float("nan")])
    weights = guard_step_weights(torch.tensor([1.0, 0.9]), torch.tensor([0.9, 0.6]))
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.5]))
    clipped_surrogate_loss(ratio, advantages, 0.1, step_weights=weights).loss.backward()
    torch.testing.assert_close(ratio.grad, -torch.tensor([[1.5, 0.5], [3.0, 1.0], [0.0, 0.0]]) / 4)


def test_kl_is_that_of_the_gaussians() -> None:
    mean, other, std = torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.tensor([0.5, 1.0, 2.0])
    normals = [torch.distributions.Normal(m, std.view(-1, 1, 1)) for m in (mean, other)]
    want = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), want)


def test_log_ratio_is_the_difference_of_log_probs_without_its_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    old, std = torch.randn(2, 2048, generator=g), torch.tensor([0.3, 0.05])
    x = old + std[:, None] * torch.randn(old.shape, generator=g)
    moved = torch.randn(old.shape, generator=g)
    for size, tolerance in ((0.1, 1e-4), (1e-5, 1e-2)):
        mean = old + size * moved
        exact = gaussian_log_prob_double(x, mean, std) - gaussian_log_prob_double(x, old, std)
        got = gaussian_log_ratio(x, mean, old, std)
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=0)
    # the subtraction loses what the direct form keeps
    mean = old + 1e-6 * moved
    exact = gaussian_log_prob_double(x, mean, std) - gaussian_log_prob_double(x, old, std)
    by_subtraction = gaussian_log_prob(x, mean, std)[0] - gaussian_log_prob(x, old, std)[0]
    direct = (gaussian_log_ratio(x, mean, old, std) - exact).abs()
    assert bool((direct < 0.2 * (by_subtraction - exact).abs()).all())
    assert not gaussian_log_ratio(x, old, old, std).any()


def gaussian_log_prob_double(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(mean.double(), std.double()[:, None]).log_prob(x.double()).mean(1)


def test_guarded_ratio_is_centred_and_equally_wide_at_every_step() -> None:
    """A sample of the old policy, a policy that moved by the same distance at two steps of very different std."""
    g = torch.Generator().manual_seed(0)
    std = torch.tensor([0.05, 0.5]).expand(4000, 2)
    old_mean = torch.zeros(4000, 2, 8)
    mean = old_mean + 0.02
    sample = old_mean + std[..., None] * torch.randn(old_mean.shape, generator=g)
    log_prob, old_log_prob = (-(sample - m).square().mean(2) / (2 * std.square()) - std.log() for m in (mean, old_mean))
    plain = step_importance_ratio(log_prob, old_log_prob).log()
    guarded = guarded_step_importance_ratio(log_prob, old_log_prob, mean, old_mean, std).log()
    error = guarded.std(0) / 4000**0.5
    assert plain[:, 0].mean() < -0.05 and plain.std(0)[0] > 5 * plain.std(0)[1]
    assert bool((guarded.mean(0).abs() < 4 * error).all())
    torch.testing.assert_close(guarded.std(0)[0], guarded.std(0)[1], rtol=0.06, atol=0)
