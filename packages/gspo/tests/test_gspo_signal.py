"""Signal and noise: estimators against slow twins, and against a linear-Gaussian world where both are known."""

from __future__ import annotations

import math

import pytest
import torch
from gspo import SignalLog, controlled_variance, gradient_signal, walk_ratio
from gspo import reference_forward as slow
from gspo.signal_estimators import clip_activity, random_walk_length, samples_needed, within_group_variance
from hypothesis import given, settings
from hypothesis import strategies as st

NAN = float("nan")


def batches(count: int, size: int, signal: float, noise: float, seed: int) -> torch.Tensor:
    """Gradients of ``count`` batches, each the mean of ``size`` samples ``mu + noise * z`` in 50 dimensions, |mu| = signal."""
    mu = torch.zeros(50)
    mu[0] = signal
    z = torch.randn(count, 50, generator=torch.Generator().manual_seed(seed))
    return mu + noise * z / math.sqrt(size)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(2, 6))
def test_estimates_equal_the_slow_twin(seed: int, count: int) -> None:
    gradients = batches(count, 4, 1.0, 1.0, seed)
    found = gradient_signal(gradients, 4)
    signal, noise, cosine = slow.gradient_signal(gradients.tolist())
    assert found.squared_signal == pytest.approx(signal, rel=1e-4, abs=1e-5)
    assert found.squared_noise == pytest.approx(noise, rel=1e-4, abs=1e-5)
    assert found.cosine == pytest.approx(cosine, rel=1e-4, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_shares_do_not_depend_on_the_unit_of_the_reward(seed: int, scale: float) -> None:
    gradients = batches(5, 4, 1.0, 1.0, seed).double()
    one, other = gradient_signal(gradients, 4), gradient_signal(scale * gradients, 4)
    assert other.squared_signal == pytest.approx(scale**2 * one.squared_signal, rel=1e-6)
    for name in ("share", "cosine", "cosine_error", "samples_for_half", "samples_at_least"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6)


def test_signal_and_noise_are_unbiased() -> None:
    """|mu|^2 = 2.25, noise of a batch of 16: 50 * 4 / 16 = 12.5. Means over 2,000 repetitions lie within 4 of their errors."""
    found = [gradient_signal(batches(4, 16, 1.5, 2.0, seed), 16) for seed in range(2000)]
    for name, truth in (("squared_signal", 2.25), ("squared_noise", 12.5)):
        values = torch.tensor([getattr(f, name) for f in found])
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(2000), name


def test_samples_needed_gives_the_cosine_that_was_asked_for() -> None:
    """Noise 50 * 4 per sample over |mu|^2 = 2.25: 88.9 samples; batches of so many then have a mean cosine of .5."""
    exact = samples_needed(2.25, 12.5, 16)
    assert exact == pytest.approx(50 * 4 / 2.25)
    for cosine in (0.2, 0.5, 0.8):
        size = round(samples_needed(2.25, 12.5, 16, cosine=cosine))
        found = [gradient_signal(batches(4, size, 1.5, 2.0, seed), size).cosine for seed in range(300)]
        assert sum(found) / 300 == pytest.approx(cosine, abs=0.02)


@pytest.mark.parametrize(("signal", "share"), [(0.0, 0.0), (1.5, 2.25 / 14.75), (10.0, 100 / 112.5)])
def test_the_share_is_that_of_the_world(signal: float, share: float) -> None:
    found = gradient_signal(batches(400, 16, signal, 2.0, 0), 16)
    assert found.share == pytest.approx(share, abs=0.01)
    assert found.cosine == pytest.approx(share, abs=0.02)
    if signal == 0:
        assert found.samples_at_least > 3000


@pytest.mark.parametrize("signal", [0.0, 1.0, 3.0])
def test_the_error_of_the_cosine_covers(signal: float) -> None:
    """Its mean over repetitions is near the spread that repetitions really have: at most 1.6 times off, never below .8."""
    found = [gradient_signal(batches(8, 16, signal, 2.0, seed), 16) for seed in range(400)]
    spread = float(torch.tensor([f.cosine for f in found]).std())
    claimed = sum(f.cosine_error for f in found) / len(found)
    assert 0.8 < claimed / spread < 1.6


def test_no_signal_needs_endless_samples() -> None:
    assert samples_needed(0.0, 1.0, 8) == math.inf
    found = gradient_signal(torch.tensor([[1.0, 0.0], [-1.0, 0.1]]), 8)
    assert found.samples_for_half == math.inf and found.squared_signal < 0
    assert math.isnan(found.cosine_error) and math.isnan(found.samples_at_least)
    same = gradient_signal(torch.ones(3, 4), 8)
    assert same.cosine == pytest.approx(1) and same.samples_for_half == pytest.approx(0, abs=1e-9)
    assert gradient_signal(torch.zeros(3, 4), 8).share == 0


def test_controlled_variance_in_a_world_of_two_noises() -> None:
    """R = 3 start + 4 step: groups that share their start see 16 of 25."""
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(4000).repeat_interleave(5)
    start, step = torch.randn(4000, generator=g)[ids], torch.randn(20000, generator=g)
    free = 3 * torch.randn(20000, generator=g) + 4 * torch.randn(20000, generator=g)
    found = controlled_variance(3 * start + 4 * step + ids, ids, free + 7 * ids, ids)
    assert found.controlled == pytest.approx(16, rel=0.03) and found.total == pytest.approx(25, rel=0.03)
    assert found.share == pytest.approx(0.64, abs=0.03)


def test_within_group_variance_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, NAN, 16.0, 5.0])
    assert within_group_variance(rewards, torch.tensor([0, 0, 1, 1, 1, 2])) == pytest.approx((2 + 18) / 2)
    with pytest.raises(ValueError, match="two finite ones"):
        within_group_variance(torch.tensor([1.0, NAN]), torch.tensor([0, 0]))


def test_clip_activity_by_hand() -> None:
    assert clip_activity(torch.tensor([0.5, 1.0, 4.0, 3.0]), 2.0).fraction == 0.5
    found = clip_activity(torch.tensor([0.013, 0.01, 0.012]), 1.0)
    assert found.fraction == 0 and found.relative_norm == pytest.approx(0.012)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_random_walk_with_momentum_has_ratio_one_and_a_straight_line_more(momentum: float) -> None:
    g = torch.Generator().manual_seed(0)
    ratios, k = [], 30
    for _ in range(300):
        velocity, updates = torch.zeros(20), []
        for step in range(200 + k):
            velocity = momentum * velocity + (1 - momentum) * torch.randn(20, generator=g)
            if step >= 200:
                updates.append(velocity)
        ratios.append(walk_ratio(torch.stack(updates), momentum))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)
    assert walk_ratio(torch.ones(k, 3), momentum) == pytest.approx(k / random_walk_length(k, momentum))


@pytest.mark.parametrize("momentum", [0.3, 0.8])
def test_the_length_of_a_random_walk_is_the_double_sum(momentum: float) -> None:
    for k in (1, 2, 7):
        double = sum(momentum ** abs(i - j) for i in range(k) for j in range(k)) / k
        assert random_walk_length(k, momentum) == pytest.approx(double)


class Stream:
    """A parameter whose gradients are ``mu + noise``, iteration by iteration."""

    def __init__(self, signal: float, noise: float) -> None:
        self.parts = [torch.nn.Parameter(torch.zeros(20, 2)), torch.nn.Parameter(torch.zeros(10))]
        self.unused = torch.nn.Parameter(torch.zeros(3))
        self.mu = [torch.zeros(20, 2), torch.zeros(10)]
        self.mu[0][0, 0] = signal
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.parts, self.unused]

    def step(self) -> float:
        for parameter, mu in zip(self.parts, self.mu, strict=True):
            parameter.grad = mu + self.noise * torch.randn(mu.shape, generator=self.generator)
        return float(torch.cat([p.grad.flatten() for p in self.parts if p.grad is not None]).norm())


def test_the_log_finds_signal_and_noise_of_a_run() -> None:
    """|mu|^2 = 9, noise 50 * .36 = 18 in batches of 32: share 1/3, and 64 samples for a cosine of .5."""
    stream, log = Stream(3.0, 0.6), SignalLog(rate=0.001)
    for _ in range(1500):
        norm = stream.step()
        torch.nn.utils.clip_grad_norm_(stream.parameters, 0.7)
        found = log.observe(stream.parameters, num_samples=32, grad_norm=norm, max_grad_norm=0.7)
    assert found["signal_share"] == pytest.approx(1 / 3, abs=0.02)
    assert found["gradient_cosine"] == pytest.approx(1 / 3, abs=0.02)
    assert found["samples_for_half_cosine"] == pytest.approx(64, rel=0.1)
    assert found["clipped"] == 1 and found["relative_norm"] == pytest.approx(math.sqrt(27) / 0.7, rel=0.03)
    assert math.isnan(found["walk_ratio"])


@pytest.mark.parametrize("signal", [0.0, 5.0, 20.0])
def test_the_log_measures_the_walk(signal: float) -> None:
    """Ten updates in 50 dimensions of noise 1: (100 mu^2 + 10 * 50) / (10 (mu^2 + 50))."""
    stream, log = Stream(signal, 1.0), SignalLog(walk_window=10)
    optimizer = torch.optim.SGD(stream.parameters, lr=0.1)
    ratios = []
    for _ in range(201):
        stream.step()
        found = log.observe(stream.parameters, num_samples=1)
        ratios.append(found["walk_ratio"])
        optimizer.step()
    known = ratios[10::10]
    assert len(known) == 20 and math.isnan(ratios[9])
    exact = (100 * signal**2 + 500) / (10 * (signal**2 + 50))
    assert sum(known) / len(known) == pytest.approx(exact, rel=0.15)


def test_the_log_forgets_and_resumes() -> None:
    stream, log = Stream(3.0, 0.0), SignalLog(rate=0.5)
    for _ in range(20):
        stream.step()
        log.observe(stream.parameters, num_samples=8)
    assert log.summary()["gradient_cosine"] == pytest.approx(1)
    other = SignalLog(rate=0.5)
    other.load_state_dict(log.state_dict())
    assert str(other.summary()) == str(log.summary())
    stream.mu[0].mul_(-1)
    for _ in range(2):
        stream.step()
        found = log.observe(stream.parameters, num_samples=8)
    assert found["gradient_cosine"] < 0.6


@pytest.mark.parametrize("at", [1, 2, 7, 13])
def test_a_log_that_is_resumed_goes_on_as_if_nothing_had_happened(at: int) -> None:
    """The gradient and the copies of the weights are in its state: the iteration after a resume has its partner, the walk its start."""

    def run(stop: int | None) -> list[str]:
        stream, log = Stream(3.0, 0.6), SignalLog(walk_window=5, momentum=0.9)
        optimizer = torch.optim.SGD(stream.parameters, lr=0.1)
        said = []
        for step in range(20):
            if step == stop:
                state = {k: v.clone() for k, v in log.state_dict().items()}
                log.observe(stream.parameters, num_samples=8)  # what the old one does later must not reach the new one
                log = SignalLog(walk_window=5, momentum=0.9)
                log.load_state_dict(state)
            stream.step()
            said.append(str(log.observe(stream.parameters, num_samples=8, max_grad_norm=1.0)))
            optimizer.step()
        return said

    assert run(at) == run(None)


def test_what_is_not_finite_is_not_taken_in() -> None:
    stream, log = Stream(1.0, 0.1), SignalLog()
    for _ in range(3):
        stream.step()
        log.observe(stream.parameters, num_samples=8)
    before = log.summary()
    stream.parts[0].grad = torch.full((20, 2), NAN)
    assert str(log.observe(stream.parameters, num_samples=8)) == str(before)
    for parameter in stream.parameters:
        parameter.grad = None
    assert str(log.observe(stream.parameters, num_samples=8)) == str(before)
