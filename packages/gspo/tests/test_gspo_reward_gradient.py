"""Direct reward gradients: equal to autograd through the whole sampler, written out."""

from __future__ import annotations

import pytest
import torch
from gspo import RewardGradientConfig, RewardGradientTrainer, draft_samples, refl_samples

SIGMAS = torch.tensor([1.0, 0.7, 0.2, 0.0])
INDEX = torch.arange(4)
NAN = float("nan")


class Case:
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 3, generator=g) * 0.3)
        self.noise = torch.randn(4, 3, generator=g)

    def policy(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) * (1 + sigma[:, None]) + 0.1 * index[:, None]

    def reward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return -(x - 1).square().sum(1) * (1 + index)

    def written_out(self, free: int) -> torch.Tensor:
        """Three steps in one graph, the first ``3 - free`` without gradients."""
        levels, x = [1.0, 0.7, 0.2, 0.0], self.noise
        for i in range(3):
            v = self.policy(x, torch.full((4,), levels[i]), INDEX)
            x = x + (levels[i + 1] - levels[i]) * (v if i >= 3 - free else v.detach())
        return torch.autograd.grad(-self.reward(x, INDEX).mean(), self.weight)[0]

    def trained(self, lr: float = 0.0, reward=None, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
        config = RewardGradientConfig(**{"max_grad_norm": 1e9, **options})
        trainer = RewardGradientTrainer([self.weight], torch.optim.SGD([self.weight], lr=lr), config)
        self.statistics = trainer.step(self.policy, self.noise, SIGMAS, reward or self.reward, index=INDEX)
        assert self.weight.grad is not None
        return self.weight.grad.clone()


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}, {"micro_batch_size": 1}, {"recompute": True}])
@pytest.mark.parametrize(("last_steps", "free"), [(None, 3), (3, 3), (2, 2), (1, 1)])
def test_equals_autograd_through_the_whole_sampler(last_steps: int | None, free: int, options: dict) -> None:
    case = Case()
    want = case.written_out(free)
    torch.testing.assert_close(case.trained(last_steps=last_steps, **options), want, atol=1e-6, rtol=1e-4)
    assert case.statistics.num_function_evaluations == 12
    assert want.abs().max() > 1e-2


def test_truncation_matters_here() -> None:
    case = Case()
    whole, last = case.written_out(3), case.written_out(1)
    assert (whole - last).abs().max() > 1e-2, "or the test above could not tell them apart"


@pytest.mark.parametrize("step", [0, 1, 2])
def test_refl_is_the_gradient_of_one_prediction(step: int) -> None:
    case = Case()
    levels, x = [1.0, 0.7, 0.2, 0.0], case.noise
    for i in range(step):
        x = (x + (levels[i + 1] - levels[i]) * case.policy(x, torch.full((4,), levels[i]), INDEX)).detach()
    v = case.policy(x, torch.full((4,), levels[step]), INDEX)
    want = torch.autograd.grad(-case.reward(x - levels[step] * v, INDEX).mean(), case.weight)[0]
    found = refl_samples(case.policy, case.noise, SIGMAS, INDEX, step)
    (got,) = torch.autograd.grad(-case.reward(found, INDEX).mean(), case.weight)
    torch.testing.assert_close(got, want)


def test_the_last_steps_prediction_is_draft_1() -> None:
    case = Case()
    one = draft_samples(case.policy, case.noise, SIGMAS, INDEX, last_steps=1)
    torch.testing.assert_close(refl_samples(case.policy, case.noise, SIGMAS, INDEX, 2), one)
    got = case.trained(method="refl", refl_from=0.9)
    torch.testing.assert_close(got, case.written_out(1), atol=1e-6, rtol=1e-4)
    assert case.statistics.num_function_evaluations == 12


def test_refl_draws_its_step_from_the_late_ones_and_resumes() -> None:
    case = Case()
    config = RewardGradientConfig(method="refl", refl_from=0.5, seed=3)
    trainer = RewardGradientTrainer([case.weight], torch.optim.SGD([case.weight], lr=0.0), config)
    sigmas = torch.linspace(1, 0, 9)
    costs = [trainer.step(case.policy, case.noise, sigmas, case.reward).num_function_evaluations for _ in range(6)]
    state = {k: v.clone() for k, v in trainer.state_dict().items()}
    after = [trainer.step(case.policy, case.noise, sigmas, case.reward).num_function_evaluations for _ in range(6)]
    steps = {c // 4 - 1 for c in costs + after}
    assert steps <= {4, 5, 6, 7} and len(steps) > 2
    trainer.load_state_dict(state)
    again = [trainer.step(case.policy, case.noise, sigmas, case.reward).num_function_evaluations for _ in range(6)]
    assert again == after and trainer.iteration == 12


def test_a_missing_reward_leaves_its_sample_out_of_the_mean() -> None:
    case = Case()
    kept = torch.tensor([0, 2, 3])
    x = draft_samples(case.policy, case.noise, SIGMAS, INDEX, last_steps=None)
    (want,) = torch.autograd.grad(-case.reward(x, INDEX)[kept].mean(), case.weight)
    missing = lambda x, i: torch.where(i == 1, torch.nan, case.reward(x, i))  # noqa: E731
    torch.testing.assert_close(case.trained(last_steps=None, reward=missing), want, atol=1e-6, rtol=1e-4)
    assert case.statistics.num_samples == 3 and not case.statistics.skipped
    before = case.weight.detach().clone()
    config = RewardGradientConfig()
    trainer = RewardGradientTrainer([case.weight], torch.optim.SGD([case.weight], lr=1.0), config)
    statistics = trainer.step(case.policy, case.noise, SIGMAS, lambda x, i: x.sum(1) * NAN)
    assert statistics.skipped and torch.equal(case.weight, before)


def test_recomputing_keeps_no_activations() -> None:
    def peak(recompute: bool) -> int:
        weight = torch.nn.Parameter(torch.eye(32) * 0.1)
        policy = lambda x, s, i: torch.tanh(torch.tanh(torch.tanh(x @ weight) @ weight) @ weight)  # noqa: E731
        held, highest = [0], [0]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[0] += tensor.numel()
            highest[0] = max(highest[0], held[0])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            x = draft_samples(policy, torch.randn(8, 32), torch.linspace(1, 0, 9), torch.arange(8), recompute=recompute)
        assert x.requires_grad
        return highest[0]

    assert peak(True) < 0.5 * peak(False)


def test_it_climbs() -> None:
    case = Case()
    trainer = RewardGradientTrainer(
        [case.weight], torch.optim.Adam([case.weight], lr=0.05), RewardGradientConfig(last_steps=None, walk_window=4)
    )
    found = [trainer.step(case.policy, case.noise, SIGMAS, case.reward, index=INDEX) for _ in range(30)]
    assert found[-1].rewards.mean() > found[0].rewards.mean() + 0.5
    assert found[-1].signal["gradient_cosine"] > 0.5, "the same noise every time: all signal"
