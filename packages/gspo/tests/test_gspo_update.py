"""The update: what it accumulates step by step equals one graph over everything."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from gspo import (
    FlowCPS,
    FlowSDE,
    PolicyConfig,
    PolicyTrainer,
    SlidingWindow,
    gaussian_kl,
    group_advantages,
    guard_step_weights,
    rescore,
    rollout,
)  # fmt: skip
from gspo.reference import update_loss

NAN = float("nan")


class Case:
    """A linear policy, a rollout of it, advantages with a NaN and a flat group, and a policy that has moved since."""

    def __init__(self, moved: float = 0.1, sigmas: torch.Tensor | None = None, kernel=None) -> None:  # type: ignore[no-untyped-def]
        g = torch.Generator().manual_seed(0)
        self.kernel = kernel or FlowSDE()
        self.weight = torch.nn.Parameter(torch.randn(3, 3, generator=g) * 0.1)
        self.rollout = rollout(
            self.policy, torch.randn(4, 3, generator=g), torch.linspace(1, 0, 9) if sigmas is None else sigmas,
            kernel=self.kernel, window=(2, 3, 4), group_size=3, generator=g,
        )  # fmt: skip
        rewards = self.rollout.latents.sum(1).clone()
        rewards[3:6] = 0.5
        self.advantages = group_advantages(rewards, self.rollout.index)
        self.advantages[7] = NAN
        self.kept = torch.tensor([0, 1, 2, 6, 8, 9, 10, 11])
        with torch.no_grad():
            self.weight += moved * torch.randn(3, 3, generator=torch.Generator().manual_seed(7))

    def policy(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def trained_gradient(self, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
        extra = {k: options.pop(k) for k in ("reference", "replay") if k in options}
        config = PolicyConfig(
            **{"clip_range": 0.01, "num_inner_epochs": 1, "max_grad_norm": 1e9, "off_policy": "allow", **options}
        )
        trainer = PolicyTrainer([self.weight], torch.optim.SGD([self.weight], lr=0.0), config)
        self.statistics = trainer.update(self.policy, self.rollout, self.advantages, self.kernel, **extra)
        assert self.weight.grad is not None
        return self.weight.grad.clone()

    def slow_gradient(self, ratio: str, clip_range: float = 0.01) -> torch.Tensor:
        new = rescore(self.policy, self.rollout, self.kernel, rows=self.kept)
        old_mean = torch.stack([s.mean for s in self.rollout.trajectory], 1)[self.kept]
        scale, shift = torch.ones_like(new.std), torch.zeros_like(new.std)
        if ratio == "guarded":
            scale = new.std
            shift = torch.stack([gaussian_kl(new.mean[:, t], old_mean[:, t], new.std[:, t]) for t in range(3)], 1)
        loss = update_loss(
            new.log_prob_mean, self.rollout.log_prob_mean[self.kept], self.advantages[self.kept], clip_range, scale, shift,
            ratio == "sequence",
        )  # fmt: skip
        return torch.autograd.grad(loss, self.weight)[0]


@pytest.mark.parametrize("kernel", [FlowSDE(), FlowCPS()])
@pytest.mark.parametrize("ratio", ["sequence", "step", "guarded"])
@pytest.mark.parametrize(
    "options", [{}, {"micro_batch_size": 3}, {"micro_batch_size": 1}, {"drop_zero_variance": False}]
)
def test_accumulated_gradient_equals_one_graph(ratio: str, kernel, options: dict) -> None:  # type: ignore[no-untyped-def]
    case = Case(kernel=kernel)
    want = case.slow_gradient(ratio)
    torch.testing.assert_close(case.trained_gradient(ratio=ratio, **options), want, atol=1e-6, rtol=1e-3)
    assert case.statistics.num_samples == 8
    assert 0 < case.statistics.surrogate.clip_fraction < 1, "some of it is clipped, or the test is blind to the clip"
    assert want.abs().max() > 1e-3


def test_guarded_steps_are_reweighted_on_uneven_schedules() -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.75, 0.6, 0.3, 0.1, 0.05, 0.0])
    case = Case(sigmas=sigmas, moved=0.0)
    weights = guard_step_weights(sigmas[2:5], sigmas[3:6])
    new = rescore(case.policy, case.rollout, case.kernel, rows=case.kept)
    # on policy the gradient of the ratio is std times that of the log-prob
    per_step = (case.advantages[case.kept, None] * new.std.detach() * new.log_prob_mean).mean(0) * weights / 3
    want = torch.autograd.grad(-per_step.sum(), case.weight)[0]
    torch.testing.assert_close(case.trained_gradient(ratio="guarded"), want, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("ratio", ["sequence", "step", "guarded"])
def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(ratio: str) -> None:
    case = Case(moved=0.0)
    case.trained_gradient(ratio=ratio, clip_range=1e-9, drop_zero_variance=False)
    surrogate = case.statistics.surrogate
    assert surrogate.ratio_mean == 1 and surrogate.ratio_std == 0 and surrogate.clip_fraction == 0
    assert case.statistics.grad_norm > 0
    # one pass is enough where nothing has moved; a sequence ratio needs two afterwards
    assert case.statistics.num_function_evaluations == 12 * 3
    case = Case()
    case.trained_gradient(ratio=ratio, drop_zero_variance=False)
    assert case.statistics.num_function_evaluations == 12 * 3 * (2 if ratio == "sequence" else 1)


def test_offloaded_rollouts_give_the_same_update() -> None:
    case = Case()
    want = case.trained_gradient()
    on_cpu = tuple(s._replace(latents=s.latents.clone(), mean=s.mean.clone()) for s in case.rollout.trajectory)
    object.__setattr__(case.rollout, "trajectory", on_cpu)
    assert torch.equal(case.trained_gradient(), want)


def test_kl_to_the_reference_is_added_with_its_gradient() -> None:
    case = Case()
    base = torch.randn(3, 3) * 0.1

    @contextmanager
    def reference():  # type: ignore[no-untyped-def]
        kept = case.weight.data
        case.weight.data = base
        yield
        case.weight.data = kept

    # over all samples: the one without a reward and those of the flat group too
    new = rescore(case.policy, case.rollout, case.kernel)
    with torch.no_grad(), reference():
        fixed = rescore(case.policy, case.rollout, case.kernel)
    kl = torch.stack([gaussian_kl(new.mean[:, t], fixed.mean[:, t], new.std[:, t]) for t in range(3)]).mean()
    (gradient,) = torch.autograd.grad(kl, case.weight)
    want = case.slow_gradient("sequence") + 0.7 * gradient
    got = case.trained_gradient(kl_coef=0.7, reference=reference, micro_batch_size=3)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)
    assert case.statistics.kl == pytest.approx(kl.item(), rel=1e-4)
    with pytest.raises(ValueError, match="reference"):
        case.trained_gradient(kl_coef=0.7)


def test_memory_does_not_grow_with_the_window() -> None:
    """Count what autograd keeps alive: the peak of saved tensors is that of one step, whatever the window."""

    def peak(window: tuple[int, ...], micro_batch_size: int | None = None) -> int:
        weight = torch.nn.Parameter(torch.eye(64) * 0.1)
        policy = lambda x, s, i: torch.tanh(x @ weight) @ weight  # noqa: E731
        got = rollout(
            policy, torch.randn(2, 64), torch.linspace(1, 0, 13), kernel=FlowSDE(), window=window, group_size=4
        )
        held, highest = [0], [0]

        class Handle:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor
                held[0] += tensor.numel()
                highest[0] = max(highest[0], held[0])

            def __del__(self) -> None:
                held[0] -= self.tensor.numel()

        config = PolicyConfig(num_inner_epochs=2, clip_range=0.1, micro_batch_size=micro_batch_size)
        trainer = PolicyTrainer([weight], torch.optim.SGD([weight], lr=0.1), config)
        with torch.autograd.graph.saved_tensors_hooks(Handle, lambda handle: handle.tensor):
            trainer.update(policy, got, group_advantages(got.latents.sum(1), got.index), FlowSDE())
        return highest[0]

    one, six = peak((3,)), peak((3, 4, 5, 6, 7, 8))
    assert six <= 1.02 * one
    assert peak((3, 4), micro_batch_size=2) < 0.9 * one


def test_nothing_to_learn_is_skipped_and_a_broken_gradient_does_no_harm() -> None:
    case = Case()
    before = case.weight.detach().clone()
    for advantages in (torch.zeros(12), torch.full((12,), NAN)):
        trainer = PolicyTrainer([case.weight], torch.optim.SGD([case.weight], lr=1.0), PolicyConfig())
        assert trainer.update(case.policy, case.rollout, advantages, case.kernel).skipped
    assert torch.equal(case.weight, before)
    with torch.no_grad():
        case.weight.mul_(1)
    broken = lambda x, s, i: (x @ case.weight) * torch.sqrt((x * 0) @ case.weight)  # noqa: E731  (gradient of sqrt at 0)
    statistics = PolicyTrainer(
        [case.weight], torch.optim.SGD([case.weight], lr=1.0), PolicyConfig(clip_range=0.1, off_policy="allow")
    ).update(broken, case.rollout, case.advantages, case.kernel)
    assert statistics.skipped and torch.equal(case.weight, before)


def test_replayed_rows_keep_their_place() -> None:
    """With routing hooks no row is dropped, and micro-batches tell which rows they hold."""
    case, seen = Case(), []

    @contextmanager
    def replay(position: int, rows: torch.Tensor):  # type: ignore[no-untyped-def]
        seen.append((position, rows.tolist()))
        yield

    want = case.slow_gradient("step")
    got = case.trained_gradient(ratio="step", replay=replay, micro_batch_size=8)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)
    assert seen == [(p, rows) for p in range(3) for rows in (list(range(8)), list(range(8, 12)))]


def one_step(rewards: list, **options):  # type: ignore[no-untyped-def]
    """The gradient of one on-policy update, and its statistics, for groups of 3 with these rewards."""
    g = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(3, 3, generator=g) * 0.1)
    policy = lambda x, s, i: x @ weight  # noqa: E731
    got = rollout(
        policy, torch.randn(len(rewards) // 3, 3, generator=g), torch.linspace(1, 0, 9), kernel=FlowSDE(), window=(2, 3),
        group_size=3, generator=g,
    )  # fmt: skip
    config = PolicyConfig(num_inner_epochs=1, max_grad_norm=1e9, **options)
    trainer = PolicyTrainer([weight], torch.optim.SGD([weight], lr=0.0), config)
    statistics = trainer.update(policy, got, group_advantages(rewards, got.index, eps=0.0))
    new = rescore(policy, got)
    return weight, statistics, new


@pytest.mark.parametrize("ratio", ["sequence", "step", "guarded"])
def test_an_advantage_of_0_inside_a_group_with_a_signal_is_a_sample_like_others(ratio: str) -> None:
    """Rewards 1, 2, 3: the mean is over three samples, not over the two that pull."""
    weight, statistics, new = one_step([1, 2, 3], ratio=ratio)
    assert statistics.num_samples == 3
    gain = torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5
    per_entry = new.log_prob_mean * (new.std.detach() if ratio == "guarded" else 1.0)
    want = torch.autograd.grad(-(per_entry * gain[:, None]).mean(), weight)[0]
    torch.testing.assert_close(weight.grad, want, atol=1e-6, rtol=1e-4)


def test_only_groups_without_variance_are_dropped_from_the_mean() -> None:
    weight, statistics, new = one_step([1, 2, 3, 5, 5, 5, None, 1, 1.5, None, 2, 2])
    assert statistics.num_samples == 3 + 2
    gain = torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5, -1.0, 1.0])
    rows = torch.tensor([0, 1, 2, 7, 8])
    want = torch.autograd.grad(-(new.log_prob_mean[rows].mean(1) * gain).mean(), weight)[0]
    torch.testing.assert_close(weight.grad, want, atol=1e-6, rtol=1e-4)
    assert one_step([5, 5, 5])[1].skipped and one_step([None, None, 1])[1].skipped


def test_the_divergence_is_a_mean_over_samples_without_a_signal_too() -> None:
    """Every group is flat: no surrogate, and still the reference holds the policy."""
    case, base = Case(), torch.zeros(3, 3)

    @contextmanager
    def reference():  # type: ignore[no-untyped-def]
        kept = case.weight.data
        case.weight.data = base
        yield
        case.weight.data = kept

    new = rescore(case.policy, case.rollout)
    with torch.no_grad(), reference():
        fixed = rescore(case.policy, case.rollout)
    kl = torch.stack([gaussian_kl(new.mean[:, t], fixed.mean[:, t], new.std[:, t]) for t in range(3)]).mean()
    (want,) = torch.autograd.grad(kl, case.weight)
    case.advantages = torch.zeros(12)
    got = case.trained_gradient(kl_coef=1.0, reference=reference)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)
    assert not case.statistics.skipped and case.statistics.num_samples == 0


@pytest.mark.parametrize("kind", ["sequence", "step", "guarded"])
@pytest.mark.parametrize("kernel", [FlowSDE(), FlowCPS()])
def test_the_update_raises_the_reward(kind: str, kernel) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    policy = lambda x, sigma, index: x + x @ weight  # noqa: E731
    trainer = PolicyTrainer([weight], torch.optim.Adam([weight], lr=0.02), PolicyConfig(ratio=kind))  # type: ignore[arg-type]
    g, sigmas, window = torch.Generator().manual_seed(0), torch.linspace(1, 0, 9), SlidingWindow(8, interval=5)
    means = []
    for iteration in range(40):
        got = rollout(
            policy, torch.randn(8, 2, generator=g), sigmas, kernel=kernel, window=window.at(iteration), group_size=8,
            generator=g,
        )  # fmt: skip
        reward = -got.latents.square().sum(1)
        means.append(reward.mean().item())
        assert not trainer.update(policy, got, group_advantages(reward, got.index), kernel).skipped
    assert sum(means[-10:]) > 0.75 * sum(means[:10])
