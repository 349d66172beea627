"""The recipes for other people's loops: short, and all of them the same algorithm as `OnlineTrainer`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gspo import FlowSDE, PolicyConfig, PolicyTrainer, group_advantages, rollout
from gspo.examples import stand_ins
from gspo.examples.pointmass import PointPolicy, reward
from gspo.examples.verl_omni_loss import compute_loss

RECIPES = ["flow_grpo_style", "flow_factory_style", "verl_omni_loss"]
EPOCHS = 6


def recipe(name: str):  # type: ignore[no-untyped-def]
    if name == "flow_grpo_style":
        pytest.importorskip("accelerate", reason="needs gspo[accelerate]")
    return importlib.import_module(f"gspo.examples.{name}")


@pytest.fixture(scope="module")
def by_gspos_own_trainer() -> list[float]:
    generator, rewards = torch.Generator().manual_seed(0), []
    policy = PointPolicy(generator=generator)
    config = PolicyConfig(clip_range=0.02, num_inner_epochs=2, max_grad_norm=1e3)
    trainer = PolicyTrainer(list(policy.parameters()), torch.optim.Adam(policy.parameters(), lr=3e-3), config)
    for _ in range(EPOCHS):
        drawn = rollout(
            policy, torch.randn(8, 2, generator=generator), stand_ins.SIGMAS, kernel=FlowSDE(), window=stand_ins.WINDOW, group_size=12,
            generator=generator,
        )  # fmt: skip
        values = reward(drawn.latents, drawn.index)
        trainer.update(policy, drawn, group_advantages(values, drawn.index))
        rewards.append(float(values.mean()))
    return rewards


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short(name: str) -> None:
    assert len(Path(recipe(name).__file__).read_text().splitlines()) < 60


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_the_steps_of_gspos_own_trainer(name: str, by_gspos_own_trainer: list[float]) -> None:
    """Same draws, same updates: every epoch's reward agrees, up to rounding that training has let grow."""
    assert recipe(name).main(epochs=EPOCHS) == pytest.approx(by_gspos_own_trainer, rel=1e-3)


def moved(take) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """What ``take(policy, optimizer, generator)`` subtracts from the weights by plain gradient descent of rate 1."""
    generator = torch.Generator().manual_seed(0)
    policy = PointPolicy(generator=generator)
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    take(policy, torch.optim.SGD(policy.parameters(), lr=1.0), generator)
    return before - torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


def by_policy_trainer(policy, optimizer, generator) -> None:  # type: ignore[no-untyped-def]
    config = PolicyConfig(clip_range=0.02, num_inner_epochs=1, max_grad_norm=1e9)
    drawn = rollout(
        policy, torch.randn(8, 2, generator=generator), stand_ins.SIGMAS, kernel=FlowSDE(), window=stand_ins.WINDOW, group_size=12,
        generator=generator,
    )  # fmt: skip
    advantages = group_advantages(reward(drawn.latents, drawn.index), drawn.index)
    PolicyTrainer(list(policy.parameters()), optimizer, config).update(policy, drawn, advantages)


def by_accelerate(policy, optimizer, generator) -> None:  # type: ignore[no-untyped-def]
    accelerator = pytest.importorskip("accelerate", reason="needs gspo[accelerate]").Accelerator(
        gradient_accumulation_steps=len(stand_ins.WINDOW), cpu=True
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    samples = stand_ins.sample(policy, 8, 12, generator)
    samples["advantages"] = group_advantages(reward(samples["final"], samples["index"]), samples["index"])
    recipe("flow_grpo_style").update(accelerator, policy, optimizer, samples, clip_range=0.02)


def by_adapter(policy, optimizer, generator) -> None:  # type: ignore[no-untyped-def]
    adapter = stand_ins.PointAdapter(torch.Generator())
    adapter.transformer, adapter.generator = policy, generator
    samples = adapter.inference(8, 12)
    for s, advantage in zip(
        samples, group_advantages([s.reward for s in samples], [s.prompt for s in samples]), strict=True
    ):
        s.advantage = advantage
    args = {"clip_range": (-0.02, 0.02), "adv_clip_range": (-5, 5), "per_device_batch_size": 40, "num_inner_epochs": 1}
    recipe("flow_factory_style").GSPOTrainer(adapter, optimizer, SimpleNamespace(**args)).optimize(samples)


@pytest.mark.parametrize("take", [by_accelerate, by_adapter])
def test_a_recipes_gradient_is_that_of_gspos_own_trainer(take) -> None:  # type: ignore[no-untyped-def]
    """Adam does not see a wrong factor; plain descent does."""
    want = moved(by_policy_trainer)
    assert want.norm() > 1e-4
    torch.testing.assert_close(moved(take), want, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_moves_the_point(name: str) -> None:
    rewards = recipe(name).main()
    assert rewards[0] < -2 and min(rewards[-5:]) > -0.1


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_one_step_have_verl_omnis_loss_and_metrics(weighted: bool) -> None:
    """Its formula written out: the mean of w max(-A r, -A clip(r)), A clipped; and what it logs."""
    g = torch.Generator().manual_seed(0)
    old = torch.randn(32, generator=g)
    new = (old + 0.1 * torch.randn(32, generator=g)).requires_grad_()
    gains, weights = 4 * torch.randn(32, generator=g), torch.rand(32, generator=g)
    config = SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=0.05, adv_clip_max=5.0))
    loss, metrics = compute_loss(
        old_log_prob=old,
        log_prob=new,
        advantages=gains,
        config=config,
        rollout_is_weights=weights if weighted else None,
    )
    ratio, clipped = (new - old).exp(), gains.clamp(-5, 5)
    want = torch.maximum(-clipped * ratio, -clipped * ratio.clamp(0.95, 1.05)) * (weights if weighted else 1)
    torch.testing.assert_close(loss, want.mean())
    (got,), (slope,) = torch.autograd.grad(loss, new), torch.autograd.grad(want.mean(), new)
    torch.testing.assert_close(got, slope)
    away = ratio.detach() - 1
    expected = {
        "ppo_kl": (old - new).mean(), "pg_clipfrac": (away.abs() > 0.05).float().mean(), "pg_clipfrac_higher": (away > 0.05).float().mean(),
        "pg_clipfrac_lower": (away < -0.05).float().mean(), "ratio_mean": ratio.mean(), "ratio_std": ratio.std(),
    }  # fmt: skip
    assert metrics == {f"actor/{k}": pytest.approx(float(v.detach()), abs=1e-6) for k, v in expected.items()}
    assert 0 < metrics["actor/pg_clipfrac_higher"] < metrics["actor/pg_clipfrac"] < 1


def test_rows_of_trajectories_have_one_ratio_each() -> None:
    old, config = torch.zeros(2, 3), SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=0.5, adv_clip_max=5.0))
    new = torch.tensor([[0.3, 0.0, 0.0], [0.0, -0.3, 0.3]])
    loss, metrics = compute_loss(old_log_prob=old, log_prob=new, advantages=torch.tensor([1.0, 2.0]), config=config)
    first = torch.tensor(0.1).exp()
    torch.testing.assert_close(loss, -(first + 2) / 2)
    assert metrics["actor/ratio_mean"] == pytest.approx(float((first + 1) / 2))
