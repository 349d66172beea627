"""`diagnose` in a linear-Gaussian world, where what the window controls and what is signal are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from gspo import (
    DiffusionNFT,
    FlowSDE,
    OnlineConfig,
    PolicyConfig,
    SlidingWindow,
    diagnose,
    objective_batches,
    policy_batches,
)  # fmt: skip
from gspo.diagnostics import BatchOutcome
from gspo.reference import gaussian_velocity

SIGMAS = torch.linspace(1, 0, 9)
STD = 0.5


class Toy:
    """The exact flow to N(shift, STD^2 I) in two dimensions; the reward is the first coordinate."""

    def __init__(self) -> None:
        self.shift = torch.nn.Parameter(torch.zeros(2))
        self.generator = torch.Generator().manual_seed(0)

    def policy(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return gaussian_velocity(x - (1 - sigma[:, None]) * self.shift, sigma, 0.0, STD) - self.shift

    def starts(self, number: int) -> torch.Tensor:
        return torch.randn(40, 2, generator=self.generator)


def through(window: tuple[int, ...]) -> tuple[float, float]:
    """Variance of the first coordinate that the window's noise and the start contribute, by following the linear steps."""
    kernel, gains, start = FlowSDE(), [], 1.0
    for step in range(8):
        sigma, after = float(SIGMAS[step]), float(SIGMAS[step + 1])
        slope = float(gaussian_velocity(torch.ones(1, 1), sigma, 0.0, STD))
        if step in window:
            level, level_after = torch.tensor([sigma]), torch.tensor([after])
            a, b, std = (float(c) for c in kernel.coefficients(level, level_after, float(SIGMAS[1])))
        else:
            a, b, std = 1.0, after - sigma, 0.0
        factor = a + b * slope
        start *= factor
        gains = [g * factor for g in gains]
        if std:
            gains.append(std)
    return sum(g * g for g in gains), start**2


@pytest.mark.parametrize("at", [0, 3])
def test_what_the_window_controls_is_the_closed_form(at: int) -> None:
    toy = Toy()
    window = SlidingWindow(8, size=2, interval=1)
    config = OnlineConfig(window=window, group_size=10, tail_steps=None, policy=PolicyConfig(ratio="step"))
    batch = policy_batches(
        toy.policy, [toy.shift], toy.starts, SIGMAS, lambda x, i: x[:, 0], config, iteration=at, generator=toy.generator
    )
    found = diagnose(batch, [toy.shift], num_batches=12)
    controlled, _ = through(window.at(at))
    total = sum(through(window.at(at)))
    assert found.controlled is not None
    # 12 batches of 40 groups of 10: 4,320 degrees of freedom, a standard error of 2.2 %
    assert found.controlled.controlled == pytest.approx(controlled, rel=0.08)
    assert found.controlled.total == pytest.approx(total, rel=0.08)
    assert found.controlled.share == pytest.approx(controlled / total, rel=0.12)
    assert 0.02 < found.controlled.share < 0.98


def test_signal_and_noise_of_a_policy_gradient_are_the_closed_form() -> None:
    """With advantages that are not scaled, the gradient in the shift is known: signal along the reward, noise in both directions.

    Per sample and element: l = step noise * d mean / d shift / (n std). Summed over the window, the expected gradient of the mean
    reward through the window's own steps is sum_t (gain_t * std_t) * (b_t * slope of v in the shift) / (n std_t).
    """
    toy, window = Toy(), (1, 2)
    config = OnlineConfig(
        window=SlidingWindow(8, size=2, interval=1),
        group_size=10,
        advantage_scale="none",
        policy=PolicyConfig(ratio="step"),
    )
    batch = policy_batches(
        toy.policy, [toy.shift], toy.starts, SIGMAS, lambda x, i: x[:, 0], config, iteration=1, free=False,
        generator=toy.generator,
    )  # fmt: skip
    found = diagnose(batch, [toy.shift], num_batches=60)
    expected, gains = 0.0, []
    for step in range(8):
        sigma, after = float(SIGMAS[step]), float(SIGMAS[step + 1])
        slope = float(gaussian_velocity(torch.ones(1, 1), sigma, 0.0, STD))
        inside = step in window
        a, b, std = 1.0, after - sigma, 0.0
        if inside:
            a, b, std = (
                float(c) for c in FlowSDE().coefficients(torch.tensor([sigma]), torch.tensor([after]), float(SIGMAS[1]))
            )
        gains = [(g * (a + b * slope), s) for g, s in gains]
        if inside:
            in_shift = -(1 - sigma) * slope - 1  # dv / d shift
            gains.append((std, b * in_shift / std))
    # E[R z_t] = gain_t; d log-ratio / d shift = z_t * (d mean / d shift) / std_t, over n = 2 elements and 2 steps; group mean: 9/10
    expected = sum(gain * score for gain, score in gains) / 2 / 2 * 9 / 10
    assert found.gradient.squared_signal == pytest.approx(expected**2, rel=0.15)
    assert found.gradient.share == pytest.approx(expected**2 / (expected**2 + found.gradient.squared_noise), rel=0.01)
    assert found.updates_to_signal == pytest.approx(found.gradient.squared_noise / found.gradient.squared_signal)
    assert found.controlled is None and found.samples_per_batch == 400


def test_a_reward_that_is_noise_has_no_signal() -> None:
    toy = Toy()
    objective = DiffusionNFT()
    noise = torch.Generator().manual_seed(7)

    def starts(number: int) -> torch.Tensor:
        return torch.randn(64, 2, generator=toy.generator)

    found = {}
    for name, reward in (
        ("noise", lambda x, i: torch.randn(len(x), generator=noise)),
        ("reward", lambda x, i: x[:, 0]),
    ):
        batch = objective_batches(toy.policy, [toy.shift], starts, SIGMAS, reward, objective)
        found[name] = diagnose(batch, [toy.shift], num_batches=16)
    assert abs(found["noise"].gradient.cosine) < 3 * found["noise"].gradient.cosine_error
    assert found["reward"].gradient.cosine > 0.5
    assert found["reward"].gradient.samples_for_half < 64
    assert found["noise"].gradient.samples_at_least > 64


def test_it_changes_nothing_and_says_what_it_saw() -> None:
    toy = Toy()
    config = OnlineConfig(window=SlidingWindow(8), group_size=10, policy=PolicyConfig(max_grad_norm=0.05))
    batch = policy_batches(
        toy.policy, [toy.shift], toy.starts, SIGMAS, lambda x, i: x[:, 0], config, generator=toy.generator
    )
    before = toy.shift.detach().clone()
    found = diagnose(batch, [toy.shift], num_batches=4, max_grad_norm=1e-6)
    assert torch.equal(toy.shift, before) and toy.shift.grad is None
    assert found.clip.fraction == 1, "norms are those before any clip"
    assert math.isfinite(found.mean_reward)
    assert "cosine of two batches" in found.report() and "under control" in found.report()
    assert set(found.summary()) >= {"gradient_cosine", "controlled_share", "clipped", "updates_to_signal"}


def test_several_rewards_are_weighed_as_in_training() -> None:
    toy = Toy()
    config = OnlineConfig(window=SlidingWindow(8), group_size=10, reward_weights={"a": 2.0, "b": 0.0})
    reward = lambda x, i: {"a": x[:, 0], "b": x[:, 1].tolist()}  # noqa: E731
    batch = policy_batches(toy.policy, [toy.shift], toy.starts, SIGMAS, reward, config, generator=toy.generator)
    found = diagnose(batch, [toy.shift], num_batches=4)
    assert found.controlled is not None
    assert found.controlled.total == pytest.approx(4 * sum(through((0, 1))), rel=0.2)


def test_mistakes_are_one_sentence() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    nothing = BatchOutcome(torch.zeros(4), torch.zeros(4, dtype=torch.long))

    def leaves_none(number: int) -> BatchOutcome:
        return nothing

    def moves(number: int) -> BatchOutcome:
        weight.grad = torch.ones(2)
        with torch.no_grad():
            weight.add_(1)
        return nothing

    with pytest.raises(ValueError, match="num_batches must be at least 3"):
        diagnose(leaves_none, [weight], num_batches=2)
    with pytest.raises(ValueError, match="batch 0 left none"):
        diagnose(leaves_none, [weight])
    with pytest.raises(ValueError, match="must not move the parameters"):
        diagnose(moves, [weight])
    with pytest.raises(ValueError, match="at least one parameter"):
        diagnose(leaves_none, [])


def test_a_setting_in_which_members_have_noise_of_their_own_is_diagnosed_as_it_is_trained() -> None:
    """Each group is one of members (not one of starts), and nothing is drawn to compare it with: it is free itself."""
    toy = Toy()
    config = OnlineConfig(window=SlidingWindow(8, size=2), group_size=4, own_noise=True, policy=PolicyConfig())
    batches = policy_batches(
        toy.policy, [toy.shift], toy.starts, SIGMAS, lambda x, i: x[:, 0] + i // 4, config, generator=toy.generator
    )
    outcome = batches(0)
    assert outcome.free_rewards is None and outcome.group_ids.tolist() == [i // 4 for i in range(40)]
    found = diagnose(batches, [toy.shift], num_batches=12)
    assert found.controlled is None and found.samples_per_batch == 40 and found.gradient.cosine > 0.5
