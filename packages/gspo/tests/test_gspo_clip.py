from __future__ import annotations

import pytest
import torch
from gspo import (
    ClipRangeTracker,
    FlowCPS,
    FlowSDE,
    PolicyConfig,
    PolicyTrainer,
    auto_clip_range,
    clipped_surrogate_loss,
    group_advantages,
    rollout,
)  # fmt: skip


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.4])
def test_the_measured_range_clips_the_fraction_it_aims_at(fraction: float) -> None:
    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(400, generator=g)
    ratio = 1 + 1e-5 * (torch.randn(400, generator=g, dtype=torch.float64) + advantages)
    beta = auto_clip_range(ratio, fraction, advantages)
    got = clipped_surrogate_loss(ratio, advantages, beta).clip_fraction
    assert got.item() == pytest.approx(fraction, abs=0.005)
    assert 1e-6 < beta < 1e-4
    steps = ratio[:, None].expand(400, 3)
    assert auto_clip_range(steps, fraction, advantages) == pytest.approx(beta, rel=0.02)


def test_only_samples_with_a_signal_count() -> None:
    ratio = torch.tensor([1.1, 1.2, 1.3, 9.0, 9.0, 9.0])
    advantages = torch.tensor([1.0, 1.0, 1.0, 0.0, float("nan"), 0.0])
    assert auto_clip_range(ratio, 0.5, advantages) == pytest.approx(0.2)
    # a policy that went the wrong way everywhere: the distance stands in
    assert auto_clip_range(ratio[:3], 0.5, -advantages[:3]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="ratio"):
        auto_clip_range(torch.tensor([float("nan")]))


def test_tracker_remembers_per_window_and_round_trips() -> None:
    tracker = ClipRangeTracker(rate=0.25)
    assert tracker.at(3) is None
    tracker.observe(3, 1e-4)
    tracker.observe(7, 1.0)
    assert tracker.observe(3, 16e-4) == pytest.approx(2e-4)
    again = ClipRangeTracker(rate=0.25)
    again.load_state_dict({**tracker.state_dict(), "clip_range": 5.0})
    assert again.ranges == tracker.ranges and again.at(7) == 1.0
    with pytest.raises(ValueError, match="clip"):
        again.load_state_dict({"clip_range.1": -1.0})


def train(kernel, clip_range, updates: int = 6, lr: float = 0.05, width: int = 128):  # type: ignore[no-untyped-def]
    """A policy with a gain per element and many elements, whose log-ratios are small; returns the last epochs' statistics."""
    gain = torch.nn.Parameter(torch.zeros(width))
    policy = lambda x, s, i: x * (1 + gain)  # noqa: E731
    trainer = PolicyTrainer(
        [gain], torch.optim.Adam([gain], lr=lr), PolicyConfig(clip_range=clip_range, num_inner_epochs=3)
    )
    g, statistics = torch.Generator().manual_seed(0), []
    for _ in range(updates):
        got = rollout(
            policy, torch.randn(4, width, generator=g), torch.linspace(1, 0, 9), kernel=kernel, window=(2, 3), group_size=12,
            generator=g,
        )  # fmt: skip
        rewards = -got.latents.square().mean(1)
        statistics.append(trainer.update(policy, got, group_advantages(rewards, got.index), kernel))
    return trainer, statistics


def test_one_setting_serves_kernels_whose_ratios_differ() -> None:
    """SDE and CPS: auto keeps the clip fraction of both in range; the other kernel's number does not."""
    fractions, ranges = {}, {}
    for kernel in (FlowSDE(0.7), FlowCPS(0.1)):
        trainer, statistics = train(kernel, "auto")
        fractions[kernel] = sum(float(s.surrogate.clip_fraction) for s in statistics) / len(statistics)
        ranges[kernel] = trainer.tracker.at(2)
    sde, cps = fractions
    assert all(0.05 < f < 0.5 for f in fractions.values())
    assert ranges[cps] > 2.5 * ranges[sde]
    assert train(sde, ranges[sde] / 30)[1][-1].surrogate.clip_fraction > 0.6
    assert train(sde, ranges[sde] * 30)[1][-1].surrogate.clip_fraction == 0


def test_range_is_measured_after_the_first_update_only() -> None:
    trainer, _ = train(FlowSDE(), "auto", updates=1)
    assert list(trainer.tracker.ranges) == [2] and trainer.clip_range == trainer.tracker.at(2)
    gain = torch.nn.Parameter(torch.zeros(4))
    still = PolicyTrainer([gain], torch.optim.SGD([gain], lr=0.0), PolicyConfig())
    policy = lambda x, s, i: x * (1 + gain)  # noqa: E731
    got = rollout(policy, torch.randn(2, 4), torch.linspace(1, 0, 9), kernel=FlowSDE(), window=(2, 3), group_size=4)
    statistics = still.update(policy, got, group_advantages(got.latents.sum(1), got.index), FlowSDE())
    assert still.tracker.ranges == {} and statistics.clip_range == 0 and not statistics.skipped


def test_a_fixed_range_stays() -> None:
    trainer, statistics = train(FlowSDE(), 1e-3, updates=2)
    assert trainer.clip_range == 1e-3 and statistics[-1].clip_range == 1e-3 and trainer.tracker.ranges == {}
