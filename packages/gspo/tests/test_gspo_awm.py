"""Advantage-weighted matching: against its slow twin, and the limits that define it."""

from __future__ import annotations

import pytest
import torch
from gspo import AdvantageWeightedMatching, awm_loss
from gspo import reference_forward as slow
from gspo.awm import matching_log_ratio
from gspo.forward import ForwardPoint

NAN = float("nan")


def case(moved: float = 0.3) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    old, target = torch.randn(4, 2, 3, generator=g), torch.randn(4, 2, 3, generator=g)
    velocity = (old + moved * torch.randn(4, 2, 3, generator=g)).requires_grad_(True)
    return velocity, old, target, torch.tensor([0.9, 0.7, 0.4, 0.2])


@pytest.mark.parametrize("clip_range", [None, 0.1, 10.0])
@pytest.mark.parametrize("weighting", ["none", "sigma", "sigma_squared"])
@pytest.mark.parametrize("advantages", [[1.0, -1.0, 0.5, 2.0], [-0.3, NAN, 0.0, 1.0]])
def test_loss_and_gradient_equal_the_slow_twin(clip_range, weighting: str, advantages: list[float]) -> None:  # type: ignore[no-untyped-def]
    velocity, old, target, sigma = case()
    weight = {"none": torch.ones(4), "sigma": sigma, "sigma_squared": sigma**2}[weighting]
    fast = awm_loss(
        velocity, old, target, torch.tensor(advantages), clip_range=clip_range, sigma=sigma, weighting=weighting
    )
    (got,) = torch.autograd.grad(fast, velocity)
    loops = slow.awm_loss(velocity, old, target, advantages, clip_range, weight.tolist())
    (want,) = torch.autograd.grad(loops, velocity)
    torch.testing.assert_close(fast, loops, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert want.abs().max() > 1e-3


def test_on_policy_it_is_the_loss_of_pretraining_weighted() -> None:
    _, old, target, _ = case()
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])
    leaf = old.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(awm_loss(leaf, old, target, advantages, clip_range=1e-6), leaf)
    matching = (advantages * (leaf - target).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(got, torch.autograd.grad(matching, leaf)[0])


def test_the_clip_stops_what_has_gone_far_enough() -> None:
    velocity, old, target, _ = case(moved=0.0)
    closer = (velocity + 0.5 * (target - velocity)).detach().requires_grad_(True)
    good, bad = torch.ones(4), -torch.ones(4)
    for advantages, moves in ((good, False), (bad, True)):
        (gradient,) = torch.autograd.grad(awm_loss(closer, old, target, advantages, clip_range=0.01), closer)
        assert bool((gradient != 0).any()) == moves


def test_the_log_ratio_keeps_its_digits() -> None:
    """Two losses of 1e6 that differ by 1e-3: subtracted in fp32 nothing is left, in the closed form all of it."""
    g = torch.Generator().manual_seed(0)
    old = torch.randn(1, 1000, generator=g)
    target = old + 1000
    step = torch.full_like(old, 1e-6)
    found = matching_log_ratio(old + step, old, target, torch.zeros(1))
    exact = ((old.double() - target.double()) ** 2 - ((old + step).double() - target.double()) ** 2).mean()
    assert float(found) == pytest.approx(float(exact), rel=1e-3)
    assert float(matching_log_ratio(old, old, target, torch.zeros(1))) == 0


def test_held_near_the_old_policy() -> None:
    velocity, old, target, sigma = case()
    advantages = torch.tensor([1.0, 0.0, NAN, 2.0])
    point = ForwardPoint(old, sigma, target)
    plain = AdvantageWeightedMatching().loss(velocity, old, point, advantages)
    held = AdvantageWeightedMatching(old_coef=3.0).loss(velocity, old, point, advantages)
    squares = (velocity - old).square().flatten(1).mean(1)
    torch.testing.assert_close(
        held.loss - plain.loss, 3 * torch.where(torch.isfinite(advantages), squares, 0 * squares)
    )
    assert AdvantageWeightedMatching().silent_without_advantage
    assert not AdvantageWeightedMatching(old_coef=0.1).silent_without_advantage


def test_the_old_policy_is_held_constant() -> None:
    """Who forgets to detach hands the same tensor over twice; the gradient is that of the new policy all the same."""
    _, old, target, _ = case()
    leaf, advantages = old.clone().requires_grad_(True), torch.tensor([1.0, -1.0, 0.5, 2.0])
    (want,) = torch.autograd.grad(awm_loss(leaf, leaf.detach(), target, advantages), leaf)
    (got,) = torch.autograd.grad(awm_loss(leaf, leaf, target, advantages), leaf)
    assert torch.equal(got, want) and want.abs().max() > 1e-3
