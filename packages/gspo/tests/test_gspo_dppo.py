"""Flow-DPPO's mask: its slow twin, its four quadrants, and what it leaves of the policy gradient."""

from __future__ import annotations

import pytest
import torch
from gspo import (
    FlowCPS,
    FlowDPPO,
    FlowSDE,
    ObjectiveConfig,
    ObjectiveTrainer,
    PolicyConfig,
    PolicyTrainer,
    group_advantages,
    kl_mask,
    masked_surrogate_loss,
    rescore,
    rollout,
)
from gspo import reference_forward as slow
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), threshold=st.floats(0, 0.5))
def test_mask_equals_the_slow_twin(seed: int, threshold: float) -> None:
    g = torch.Generator().manual_seed(seed)
    old_mean = torch.randn(6, 2, 2, generator=g)
    mean = old_mean + 0.5 * torch.randn(6, 2, 2, generator=g)
    log_prob, old = torch.randn(6, generator=g), torch.randn(6, generator=g)
    std, advantages = torch.rand(6, generator=g) + 0.3, torch.randn(6, generator=g)
    advantages[0] = 0
    got = kl_mask(log_prob - old, mean, old_mean, std, advantages, threshold=threshold)
    assert got.tolist() == slow.kl_mask(
        log_prob.tolist(), old.tolist(), mean, old_mean, std.tolist(), advantages.tolist(), threshold
    )


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "far", "keeps"),
    [(0.1, 1, True, False), (0.1, 1, False, True), (-0.1, 1, True, True), (0.1, -1, True, True), (-0.1, -1, True, False),
     (-0.1, -1, False, True), (0.0, 1, True, True), (0.1, 0, True, True)],
)  # fmt: skip
def test_only_what_is_far_and_goes_further_is_masked(
    log_ratio: float, advantage: float, far: bool, keeps: bool
) -> None:
    mean, std = torch.full((1, 4), 0.2 if far else 0.1), torch.tensor([0.5])
    # divergences .08 and .02
    got = kl_mask(
        torch.tensor([log_ratio]), mean, torch.zeros(1, 4), std, torch.tensor([float(advantage)]), threshold=0.05
    )
    assert got.item() == keeps


def test_several_steps_at_once_are_single_steps_side_by_side() -> None:
    g = torch.Generator().manual_seed(0)
    mean, old = torch.randn(5, 3, 4, generator=g), torch.randn(5, 3, 4, generator=g)
    log_ratio, std = torch.randn(5, 3, generator=g), torch.rand(5, 3, generator=g) + 0.5
    advantages = torch.randn(5, generator=g)
    whole = kl_mask(log_ratio, mean, old, std, advantages, threshold=1.0)
    for t in range(3):
        alone = kl_mask(log_ratio[:, t], mean[:, t], old[:, t], std[:, t], advantages, threshold=1.0)
        assert torch.equal(whole[:, t], alone)
    assert 0 < int(whole.sum()) < whole.numel()


class Case:
    """A linear policy, its rollout, and the policy some steps later."""

    def __init__(self, moved: float, kernel=None) -> None:  # type: ignore[no-untyped-def]
        g = torch.Generator().manual_seed(0)
        self.kernel = kernel or FlowSDE()
        self.weight = torch.nn.Parameter(torch.randn(3, 3, generator=g) * 0.1)
        self.rollout = rollout(
            self.policy, torch.randn(4, 3, generator=g), torch.linspace(1, 0, 9), kernel=self.kernel, window=(0, 1, 2),
            group_size=4, generator=g,
        )  # fmt: skip
        self.advantages = group_advantages(self.rollout.latents.sum(1), self.rollout.index)
        with torch.no_grad():
            self.weight += moved * torch.randn(3, 3, generator=torch.Generator().manual_seed(7))

    def policy(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def gradient(self, threshold: float, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
        config = ObjectiveConfig(max_grad_norm=1e9, **options)
        objective = FlowDPPO(threshold=threshold, kernel=self.kernel)
        trainer = ObjectiveTrainer([self.weight], torch.optim.SGD([self.weight], lr=0.0), objective, config)
        self.statistics = trainer.update(self.policy, self.rollout, self.advantages)
        assert self.weight.grad is not None
        return self.weight.grad.clone()


@pytest.mark.parametrize("kernel", [FlowSDE(), FlowCPS()])
@pytest.mark.parametrize("moved", [0.0, 0.2])
def test_inside_the_mask_it_is_the_unclipped_policy_gradient(moved: float, kernel) -> None:  # type: ignore[no-untyped-def]
    case = Case(moved, kernel)
    new = rescore(case.policy, case.rollout, case.kernel)
    loss = -((new.log_prob_mean - case.rollout.log_prob_mean).exp() * case.advantages[:, None]).mean()
    (want,) = torch.autograd.grad(loss, case.weight)
    got = case.gradient(threshold=1e9)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)
    assert case.statistics.metrics["mask_fraction"] == 0
    assert want.abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}, {"micro_batch_size": 1}, {"drop_silent_rows": False}])
def test_with_a_threshold_it_is_the_gradient_of_what_is_kept(options: dict) -> None:
    case = Case(0.3)
    new = rescore(case.policy, case.rollout, case.kernel)
    old_mean = torch.stack([s.mean for s in case.rollout.trajectory], 1)
    divergence = (new.mean.detach() - old_mean).square().flatten(2).mean(2) / (2 * new.std**2)
    threshold = float(divergence.median())
    keep = kl_mask(new.log_ratio, new.mean, old_mean, new.std, case.advantages, threshold=threshold)
    assert 0 < int(keep.sum()) < keep.numel()
    terms = new.log_ratio.exp() * case.advantages[:, None]
    (want,) = torch.autograd.grad(-(terms * keep).mean(), case.weight, retain_graph=True)
    torch.testing.assert_close(case.gradient(threshold, **options), want, atol=1e-6, rtol=1e-3)
    assert case.statistics.metrics["mask_fraction"] == pytest.approx(1 - float(keep.float().mean()), abs=1e-6)
    assert case.statistics.metrics["divergence"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    loss = masked_surrogate_loss(new.log_ratio, case.advantages, keep)
    torch.testing.assert_close(torch.autograd.grad(loss, case.weight)[0], want, atol=1e-6, rtol=1e-3)


def test_on_policy_it_is_the_step_ratio_of_the_ratio_trainer() -> None:
    """Two trainers, one gradient."""
    case = Case(0.0)
    got = case.gradient(threshold=0.0)
    config = PolicyConfig(ratio="step", num_inner_epochs=1, max_grad_norm=1e9, clip_range=1.0)
    PolicyTrainer([case.weight], torch.optim.SGD([case.weight], lr=0.0), config).update(
        case.policy, case.rollout, case.advantages, case.kernel
    )
    torch.testing.assert_close(got, case.weight.grad, atol=1e-7, rtol=1e-4)
    assert case.statistics.metrics == {"divergence": 0.0, "mask_fraction": 0.0}


def test_advantages_per_token_mask_and_weigh_their_own_token() -> None:
    case = Case(0.3)
    equal = case.advantages[:, None].expand(16, 3)
    # a token of one element: divergence and ratio are its own
    config = ObjectiveConfig(max_grad_norm=1e9)
    objective = FlowDPPO(threshold=1e9, kernel=case.kernel)
    trainer = ObjectiveTrainer([case.weight], torch.optim.SGD([case.weight], lr=0.0), objective, config)
    trainer.update(case.policy, case.rollout, equal.contiguous())
    new = rescore(case.policy, case.rollout, case.kernel)
    x = torch.stack([s.next_latents for s in case.rollout.trajectory], 1)
    old = torch.stack([s.mean for s in case.rollout.trajectory], 1)
    step = new.mean - old
    per_token = step * (2 * (x - old) - step) / (2 * new.std[..., None] ** 2)
    want = torch.autograd.grad(-(per_token.exp() * case.advantages[:, None, None]).mean(), case.weight)[0]
    torch.testing.assert_close(case.weight.grad, want, atol=1e-6, rtol=1e-3)
