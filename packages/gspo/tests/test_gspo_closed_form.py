"""The worlds of the comparison: their optimum is one, whatever draws, and every method moves towards it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gspo import draw
from gspo.examples import closed_form
from gspo.examples.closed_form import METHODS, TASKS, MixturePolicy, Setting, train
from gspo.reference import gaussian_velocity


def points(dimension: int) -> torch.Tensor:
    return 1.5 * torch.randn(500, dimension, generator=torch.Generator().manual_seed(0))


def test_one_component_is_the_exact_gaussian_flow() -> None:
    policy = MixturePolicy(torch.zeros(1), torch.full((1, 3), 0.7), torch.tensor([0.5]).log(), [])
    x, sigma = points(3), torch.rand(500, generator=torch.Generator().manual_seed(1)) * 0.98 + 0.01
    want = gaussian_velocity(x, sigma, 0.7, 0.5)
    torch.testing.assert_close(policy(x, sigma, torch.zeros(500)), want, atol=1e-4, rtol=1e-4)


def test_the_flow_draws_the_density_that_is_claimed() -> None:
    optimum = TASKS["mixture"]().optimum
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x = draw(optimum, noise, torch.linspace(1, 0, 65)).latents
    weights = optimum.logits.softmax(0).detach()
    nearest = (x[:, None] - optimum.means.detach()).square().sum(2).argmin(1)
    shares = torch.bincount(nearest, minlength=4) / len(x)
    torch.testing.assert_close(shares, weights, atol=0.03, rtol=0)
    torch.testing.assert_close(x[nearest == 0].mean(0), optimum.means.detach()[0], atol=0.03, rtol=0)
    assert weights.min() < 0.15 < weights.max(), "the tilt is there to be learnt"


def test_at_the_mixtures_optimum_the_reward_is_the_same_for_every_sample() -> None:
    task = TASKS["mixture"]()
    rewards = task.reward(task.optimum, points(2))
    assert float(rewards.std()) < 1e-4
    assert float(task.reward(task.start(), points(2)).std()) > 0.1


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_optimum_has_no_regret_and_its_neighbours_have(name: str) -> None:
    task = TASKS[name]()
    assert task.regret(task.optimum) == pytest.approx(0, abs=1e-5)
    assert task.regret(task.start()) > 0.1
    near = TASKS[name]().optimum
    for parameter in near.trained():
        with torch.no_grad():
            parameter.view(-1)[0] += 0.2
            assert task.regret(near) > 1e-4
            parameter.view(-1)[0] -= 0.2


@pytest.mark.parametrize("name", sorted(TASKS))
def test_regret_is_the_difference_of_mean_rewards(name: str) -> None:
    """Exact densities, drawn component by component: no sampler is involved."""
    task, g = TASKS[name](), torch.Generator().manual_seed(0)

    def mean_reward(policy: MixturePolicy) -> float:
        chosen = torch.multinomial(policy.logits.detach().softmax(0), 40_000, replacement=True, generator=g)
        spread = policy.log_stds.detach().exp()[chosen, None]
        x = policy.means.detach()[chosen] + spread * torch.randn(40_000, policy.dimension, generator=g)
        return float(task.reward(policy, x).mean())

    start = task.start()
    assert mean_reward(task.optimum) - mean_reward(start) == pytest.approx(task.regret(start), abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_nearer(method: str) -> None:
    run = train(replace(TASKS["gaussian"](), batch=(4, 8)), Setting(method=method, lr=0.1), budget=12_000, seed=0)
    assert run.regrets[-1] < 0.3 * run.regrets[0]
    assert run.evaluations[-1] >= 12_000 and len(run.evaluations) == len(run.regrets)
    assert all(b > a for a, b in zip(run.evaluations[:-1], run.evaluations[1:], strict=True))


def test_runs_repeat() -> None:
    one, other = (train(TASKS["mixture"](), Setting(method="nft"), budget=9_000, seed=3) for _ in range(2))
    assert torch.equal(one.policy.coordinates(), other.policy.coordinates()) and one.regrets == other.regrets


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert closed_form.main(["--budget", "6000", "--method", "awm", "--task", "gaussian"]) == 0
    assert "regret 0.7500 before" in capsys.readouterr().out
    for wrong in (["--budget", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--method", "ppo"]):
        with pytest.raises(SystemExit) as caught:
            closed_form.main(wrong)
        assert caught.value.code == 2
    with pytest.raises(ValueError, match="method must be one of"):
        Setting(method="ppo")
    with pytest.raises(ValueError, match="budget must be at least 1"):
        train(TASKS["gaussian"](), Setting(method="nft"), budget=0)
