"""One batch on several ranks, in one process: shares, noise that agrees, and what a rank leaves to the others."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from gspo import (
    DanceSDE,
    FlowCPS,
    FlowSDE,
    OnlineConfig,
    OnlineTrainer,
    PolicyConfig,
    SlidingWindow,
    rollout,
    share_groups,
    shared_noise,
)  # fmt: skip
from hypothesis import given, settings

LINE = torch.linspace(1, 0, 7)
NAN = float("nan")


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8))
@settings(deadline=None)
def test_every_sample_is_on_exactly_one_rank_in_equal_numbers_or_refused(prompts: int, group: int, ranks: int) -> None:
    possible = prompts % ranks == 0 or (ranks % prompts == 0 and group % (ranks // prompts) == 0) or group % ranks == 0
    if not possible:
        with pytest.raises(ValueError, match="spread evenly"):
            share_groups(prompts, group, rank=0, num_ranks=ranks)
        return
    shares = [share_groups(prompts, group, rank=r, num_ranks=ranks) for r in range(ranks)]
    rows = [share.rows() for share in shares]
    assert sorted(torch.cat(rows).tolist()) == list(range(prompts * group))
    assert len({len(r) for r in rows}) == 1
    if prompts % ranks == 0:
        assert all(share.num_members == group for share in shares), "whole groups where there are enough prompts"


def test_wrong_shares_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"num_prompts and group_size must .* got 2 prompts of 4 and rank 2 of 2"):
        share_groups(2, 4, rank=2, num_ranks=2)


@pytest.mark.parametrize("kernel", [FlowSDE(), FlowCPS(), DanceSDE()])
@pytest.mark.parametrize(("prompts", "group", "ranks"), [(4, 2, 2), (1, 4, 2), (3, 4, 2), (2, 4, 4)])
def test_the_ranks_rollouts_are_the_rows_of_one(kernel, prompts: int, group: int, ranks: int) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    noise, tilt = torch.randn(prompts, 5, generator=g), torch.randn(prompts, 5, generator=g)
    policy = lambda x, s, index: 0.3 * x + tilt[index]  # noqa: E731  (depends on the prompt)
    whole = rollout(
        policy, noise, LINE, kernel=kernel, window=(1, 2), group_size=group, generator=torch.Generator().manual_seed(7)
    )
    for rank in range(ranks):
        share = share_groups(prompts, group, rank=rank, num_ranks=ranks)
        generator = torch.Generator().manual_seed(7)
        part = rollout(
            policy, noise[share.prompts], LINE, kernel=kernel, window=(1, 2), group_size=share.num_members,
            index=torch.arange(prompts)[share.prompts], step_noise=shared_noise(generator, share, (5,)),
        )  # fmt: skip
        rows = share.rows()
        torch.testing.assert_close(part.latents, whole.latents[rows])
        torch.testing.assert_close(part.log_prob_mean, whole.log_prob_mean[rows])
        assert part.index.tolist() == whole.index[rows].tolist()


def test_noise_from_outside_is_what_a_step_draws_with() -> None:
    x, v, z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    for kernel in (FlowSDE(), FlowCPS(), DanceSDE()):
        out = kernel.step(x, v, 0.8, 0.6, noise=z)
        torch.testing.assert_close(out.next_latents, out.mean + out.std[:, None] * z)
        own = kernel.step(x, v, 0.8, 0.6, generator=torch.Generator().manual_seed(3))
        given_ = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
        assert torch.equal(kernel.step(x, v, 0.8, 0.6, noise=given_).next_latents, own.next_latents)
        with pytest.raises(ValueError, match=r"noise must have the shape of latents \(2, 4\), got \(2, 3\)"):
            kernel.step(x, v, 0.8, 0.6, noise=z[:, :3])


class Setup:
    def __init__(self, **options) -> None:  # type: ignore[no-untyped-def]
        self.layer = torch.nn.Linear(5, 5, bias=False)
        torch.nn.init.normal_(self.layer.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        self.config = OnlineConfig(window=SlidingWindow(6), group_size=4, **options)
        self.trainer = OnlineTrainer(
            list(self.layer.parameters()), torch.optim.SGD(self.layer.parameters(), lr=0.1), self.config
        )
        self.break_at: float | None = None

    def policy(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        velocity = self.layer(x)
        if self.break_at is not None and abs(float(sigma[0]) - self.break_at) < 1e-6:
            velocity = torch.where(index[:, None] == 1, velocity * NAN, velocity)
        return velocity

    def step(self):  # type: ignore[no-untyped-def]
        noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        return self.trainer.step(self.policy, noise, LINE, lambda x, i: x[:, 0])


@pytest.mark.parametrize("place", [0, 2, 5], ids=["window", "after", "last"])
def test_a_velocity_that_is_not_finite_skips_the_step_if_that_is_wanted(place: int) -> None:
    setup = Setup(policy=PolicyConfig(on_nonfinite="skip"))
    before = setup.layer.weight.clone()
    setup.break_at = float(LINE[place])
    report = setup.step()
    assert report.broken_velocities == 1 and report.update.skipped and torch.equal(setup.layer.weight, before)
    assert report.summary()["skipped"] == 1
    setup.break_at = None
    assert not setup.step().update.skipped and not torch.equal(setup.layer.weight, before)
    raising = Setup()
    raising.break_at = float(LINE[place])
    with pytest.raises(ValueError, match="velocity must be finite"):
        raising.step()


def test_one_that_breaks_in_the_update_only_skips_it_too() -> None:
    setup = Setup(policy=PolicyConfig(on_nonfinite="skip"))
    before, real = setup.layer.weight.clone(), setup.policy

    def reward(x, i):  # type: ignore[no-untyped-def]
        setup.break_at = float(LINE[1])
        return x[:, 0]

    noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    report = setup.trainer.step(real, noise, LINE, reward)
    assert report.broken_velocities == 0 and report.update.skipped and torch.equal(setup.layer.weight, before)
    assert all(p.grad is None for p in setup.layer.parameters())


def test_a_split_batch_on_one_rank_is_the_batch() -> None:
    split, plain = Setup(split_batch=True), Setup()
    for _ in range(3):
        assert torch.equal(split.step().rewards, plain.step().rewards)
    assert torch.equal(split.layer.weight, plain.layer.weight)
