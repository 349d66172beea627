"""`objective_step` and `draw`: samples, rewards and an update in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gspo import (
    AdvantageWeightedMatching,
    DiffusionNFT,
    ObjectiveConfig,
    ObjectiveTrainer,
    draw,
    group_advantages,
    objective_step,
)  # fmt: skip
from gspo.reference import gaussian_velocity
from linear_objective import LEVELS, NAN, Case


@pytest.mark.parametrize("objective", [DiffusionNFT(), AdvantageWeightedMatching()])
def test_training_raises_the_reward(objective: Any) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))

    def policy(x: torch.Tensor, s: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        """The exact flow to N(weight, .3^2)."""
        return gaussian_velocity(x - (1 - s[:, None]) * weight, s, 0.0, 0.3) - weight

    goal = torch.tensor([1.0, -0.5])
    reward = lambda x, i: -(x - goal).square().sum(1)  # noqa: E731
    trainer = ObjectiveTrainer([weight], torch.optim.Adam([weight], lr=0.02), objective)
    g = torch.Generator().manual_seed(0)
    reports = [
        objective_step(trainer, policy, torch.randn(32, 2, generator=g), torch.linspace(1, 0, 7), reward, group_size=8)
        for _ in range(120)
    ]
    torch.testing.assert_close(weight.detach(), goal, atol=0.15, rtol=0)
    assert reports[-1].summary()["reward"] > reports[0].summary()["reward"] + 0.8
    assert reports[-1].summary()["signal_share"] == reports[-1].summary()["signal_share"], "the log knows the signal"


def test_rewards_by_name_are_normalised_one_by_one_and_whitened() -> None:
    case = Case()
    trainer = case.trainer(DiffusionNFT(levels=LEVELS))
    reward = lambda x, i: {"small": x[:, 0] * 1e-3, "large": x[:, 1] * 1e3}  # noqa: E731
    noise = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    options: dict = {"group_size": 6, "reward_weights": {"small": 3.0, "large": 1.0}}
    plain = objective_step(trainer, case.policy, noise, torch.linspace(1, 0, 5), reward, **options)
    a, b = (group_advantages(plain.parts[k], plain.rollout.index) for k in ("small", "large"))
    torch.testing.assert_close(plain.advantages, 3 * a + b)
    white = objective_step(trainer, case.policy, noise, torch.linspace(1, 0, 5), reward, whiten_batch=True, **options)
    assert float(white.advantages.std(correction=0)) == pytest.approx(1, abs=1e-3)
    assert plain.groups.num_groups == 2


def test_any_solver_draws_and_parts_do_not_matter() -> None:
    policy = lambda x, s, i: gaussian_velocity(x, s, 1.0, 0.5)  # noqa: E731
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1, 0, 41)
    exact = 1.0 + 0.5 * noise  # the flow to N(1, .5^2) is this line
    for solver, tolerance in (("euler", 0.06), ("dpm_solver_2m", 0.01)):
        whole = draw(policy, noise, sigmas, group_size=3, solver=solver)
        assert torch.equal(
            draw(policy, noise, sigmas, group_size=3, solver=solver, micro_batch_size=4).latents, whole.latents
        )
        assert (whole.latents - exact).abs().max() < tolerance
        assert whole.index.tolist() == [0, 0, 0, 1, 1, 1]
        assert whole.num_function_evaluations == 6 * 40
        assert whole.trajectory == () and whole.log_prob_mean.shape == (6, 0)


def test_inner_epochs_are_no_independent_batches() -> None:
    """A reward that is noise: were the second epoch compared with the first, its gradient would look like a signal."""
    weight = torch.nn.Parameter(torch.zeros(30))
    policy = lambda x, s, i: gaussian_velocity(x, s, 0.0, 0.5) + 1e-3 * weight  # noqa: E731
    config = ObjectiveConfig(num_inner_epochs=2)
    trainer = ObjectiveTrainer([weight], torch.optim.SGD([weight], lr=1e-6), AdvantageWeightedMatching(), config)
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        noise = torch.randn(16, 30, generator=g)
        report = objective_step(
            trainer, policy, noise, torch.linspace(1, 0, 4), lambda x, i: torch.randn(len(x), generator=g), group_size=8
        )
    assert abs(report.update.signal["gradient_cosine"]) < 0.3


def test_half_precision_policies_get_their_own_dtype() -> None:
    layer = torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    seen = []

    def policy(x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, sigma.dtype))
        return layer(x)

    trainer = ObjectiveTrainer(list(layer.parameters()), torch.optim.SGD(layer.parameters(), lr=0.1), DiffusionNFT())
    noise = torch.randn(8, 3, dtype=torch.bfloat16)
    report = objective_step(trainer, policy, noise, torch.linspace(1, 0, 5), lambda x, i: x[:, 0].float(), group_size=4)
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert report.update.grad_norm > 0 and not report.update.skipped


def test_rows_that_are_their_own_prompts_form_the_groups_that_ids_say() -> None:
    """A policy may have to know which member it draws: then every row is a prompt, and groups are told."""
    noise, line = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(1, 0, 5)
    one, other = Case(), Case()
    found = [
        objective_step(
            case.trainer(DiffusionNFT(levels=LEVELS), lr=0.1),
            case.policy,
            noise,
            line,
            lambda x, i: x.sum(1),
            **options,
        )
        for case, options in (
            (one, {"group_size": 2}),
            (other, {"group_size": 1, "group_ids": torch.arange(3).repeat_interleave(2)}),
        )
    ]
    assert torch.equal(found[0].advantages, found[1].advantages) and torch.equal(one.weight, other.weight)
    assert found[1].rollout.index.tolist() == list(range(6))


def test_a_velocity_that_is_not_finite_costs_the_step_and_no_more() -> None:
    case, line = Case(), torch.linspace(1, 0, 5)
    trainer, before = case.trainer(AdvantageWeightedMatching(levels=LEVELS), lr=0.1), case.weight.detach().clone()
    broken = lambda x, s, i: torch.where(s[:, None] < 0.6, NAN, case.policy(x, s, i))  # noqa: E731
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="finite"):
        objective_step(trainer, broken, noise, line, lambda x, i: x.sum(1), group_size=2)
    report = objective_step(trainer, broken, noise, line, lambda x, i: x.sum(1), group_size=2, on_nonfinite="skip")
    assert report.update.skipped and torch.equal(case.weight, before) and trainer.iteration == 0
    report = objective_step(trainer, case.policy, noise, line, lambda x, i: x.sum(1), group_size=2, on_nonfinite="skip")
    assert not report.update.skipped and not torch.equal(case.weight, before)
