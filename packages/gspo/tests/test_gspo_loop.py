from __future__ import annotations

from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from gspo import FlowCPS, OnlineConfig, OnlineTrainer, PolicyConfig, SlidingWindow, policy_step

SIGMAS = torch.linspace(1, 0, 9)
NAN = float("nan")


class Setup:
    def __init__(self, **options) -> None:  # type: ignore[no-untyped-def]
        self.layer = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.normal_(self.layer.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=1e-2)
        self.config = OnlineConfig(window=SlidingWindow(8, interval=2), group_size=4, **options)
        self.trainer = OnlineTrainer(list(self.layer.parameters()), self.optimizer, self.config)

    def policy(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def step(self, seed: int, reward=None, **options):  # type: ignore[no-untyped-def]
        noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        return self.trainer.step(self.policy, noise, SIGMAS, reward or (lambda x, i: x[:, 0]), **options)


def test_step_reports_what_it_did_and_learns() -> None:
    setup = Setup(tail_steps=2, offload=True)
    reports = [setup.step(i) for i in range(30)]
    assert [r.window for r in reports[:4]] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert reports[5].iteration == 5 and reports[0].groups == (3, 0, 0)
    summary = reports[-1].summary()
    assert summary["reward"] > reports[0].summary()["reward"] + 0.1
    assert {"clip_fraction", "clip_range", "approx_kl", "ratio_mean", "kl", "grad_norm", "zero_variance_groups"} <= set(
        summary
    )
    torch.testing.assert_close(reports[0].rewards, reports[0].rollout.latents[:, 0])


def test_a_step_in_parts_is_the_same_step() -> None:
    whole, parts = Setup(), Setup(micro_batch_size=2, policy=PolicyConfig(micro_batch_size=2))
    called, policy = [], parts.policy
    parts.policy = lambda x, s, i: called.append(len(x)) or policy(x, s, i)  # type: ignore[method-assign]
    for i in range(3):
        torch.testing.assert_close(parts.step(i).rewards, whole.step(i).rewards)
    torch.testing.assert_close(parts.layer.weight, whole.layer.weight)
    assert max(called) == 2


def test_resumed_run_is_the_same_run() -> None:
    whole = Setup()
    for i in range(6):
        whole.step(i)
    first = Setup()
    for i in range(3):
        first.step(i)
    second = Setup()
    second.layer.load_state_dict(first.layer.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.trainer.load_state_dict(first.trainer.state_dict())
    assert second.trainer.iteration == 3 and second.trainer.trainer.tracker.ranges
    for i in range(3, 6):
        second.step(i)
    assert torch.equal(second.layer.weight, whole.layer.weight)
    assert all(isinstance(v, torch.Tensor) for v in second.trainer.state_dict().values())


def test_several_rewards_are_weighted_after_normalising() -> None:
    setup = Setup(reward_weights={"a": 1.0, "b": 0.0})
    reward = lambda x, i: {"a": x[:, 0], "b": (1e6 * x[:, 1]).tolist()}  # noqa: E731
    report = setup.step(0, reward)
    alone = Setup().step(0, lambda x, i: x[:, 0])
    torch.testing.assert_close(report.advantages, alone.advantages)
    assert set(report.parts) == {"a", "b"} and "reward_b" in report.summary()
    with pytest.raises(ValueError, match="weights"):
        Setup(reward_weights={"c": 1.0}).step(0, reward)


def test_missing_rewards_are_counted_and_never_reach_the_weights() -> None:
    setup = Setup()
    report = setup.step(0, lambda x, i: [None, NAN, float("inf"), *x[3:, 0].tolist()])
    assert report.groups.num_invalid_rewards == 3 and report.groups.num_zero_variance == 1
    assert report.update.num_samples == 8 and bool(torch.isfinite(setup.layer.weight).all())
    before = setup.layer.weight.clone()
    report = setup.step(1, lambda x, i: [NAN] * len(x))
    assert report.update.skipped and torch.equal(before, setup.layer.weight)
    assert str(report.summary()["reward"]) == "nan"


def test_step_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the package itself must refuse
    setup = Setup()
    for reward, word in (
        (lambda x, i: [], "reward_fn"),
        (lambda x, i: x, "reward_fn"),
        (lambda x, i: 3.0, "reward_fn"),
        (lambda x, i: {"a": [1.0]}, "'a'"),
        (lambda x, i: {}, "weights"),
    ):
        with pytest.raises(ValueError, match=word):
            setup.step(0, reward)
    with pytest.raises(ValueError, match="sigmas"):
        setup.trainer.step(setup.policy, torch.randn(1, 4), SIGMAS[:-1], lambda x, i: x[:, 0])
    for options, word in (
        ({"group_size": 1}, "group_size"),
        ({"tail_steps": 0}, "tail_steps"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"advantage_scale": "batch"}, "advantage_scale"),
    ):
        with pytest.raises((ValueError, TypeError), match=word):
            OnlineConfig(window=SlidingWindow(8), **options)


class Router(torch.nn.Module):
    """A policy of two experts whose choice can be recorded and replayed, as any MoE layer's can."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.gate = torch.nn.Parameter(torch.randn(4, 2, generator=g))
        self.experts = torch.nn.Parameter(torch.randn(2, 4, 4, generator=g) * 0.2)
        self.forced: torch.Tensor | None = None
        self.chosen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.chosen = (x @ self.gate).argmax(1) if self.forced is None else self.forced
        return torch.einsum("bi,bij->bj", x, self.experts[self.chosen])


def test_routing_is_recorded_in_the_rollout_and_replayed_in_the_update() -> None:
    torch.manual_seed(1)
    model, kept, replayed = Router(), {}, []

    @contextmanager
    def record(position: int, rows: torch.Tensor):  # type: ignore[no-untyped-def]
        yield
        kept[position] = model.chosen

    @contextmanager
    def replay(position: int, rows: torch.Tensor):  # type: ignore[no-untyped-def]
        model.forced = kept[position][rows]
        yield
        replayed.append(bool((model.chosen == kept[position][rows]).all()))
        model.forced = None

    config = OnlineConfig(
        window=SlidingWindow(8), group_size=4, kernel=FlowCPS(),
        policy=PolicyConfig(ratio="step", micro_batch_size=5, num_inner_epochs=3, clip_range=0.1),
    )  # fmt: skip
    trainer = OnlineTrainer(list(model.parameters()), torch.optim.SGD([model.experts], lr=0.1), config)
    report = policy_step(
        trainer.trainer, model, torch.randn(3, 4), SIGMAS, lambda x, i: x[:, 0], config, record=record, replay=replay
    )
    assert set(kept) == {0, 1} and all(len(v) == 12 for v in kept.values())
    assert len(replayed) == 3 * 2 * 3 and all(replayed) and not report.update.skipped
    assert len({int(v) for v in kept[0]}) == 2, "both experts are in use, or the test is blind"


@pytest.mark.parametrize("split_batch", [False, True])
def test_members_with_noise_of_their_own_that_is_alike_are_a_group_that_shares_its_start(split_batch) -> None:
    """The same starts, written out: everything is the same, but that the policy is told which start it is."""
    shared, own = (
        Setup(share_prefix=False, own_noise=own, split_batch=split_batch, tail_steps=2) for own in (False, True)
    )
    told: list[int] = []
    policy = own.policy
    own.policy = lambda x, s, i: told.extend(i.tolist()) or policy(x, s, i)  # type: ignore[method-assign]
    for seed in range(3):
        noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        first = shared.trainer.step(shared.policy, noise, SIGMAS, lambda x, i: x[:, 0] + i)
        second = own.trainer.step(own.policy, noise.repeat_interleave(4, 0), SIGMAS, lambda x, i: x[:, 0] + i // 4)
        assert torch.equal(second.rewards, first.rewards) and torch.equal(second.advantages, first.advantages)
        assert torch.equal(second.group_ids, first.group_ids)
        assert second.rollout.index.tolist() == list(range(12))
    assert torch.equal(own.layer.weight, shared.layer.weight) and set(told) == set(range(12))


def test_noise_of_their_own_spreads_a_group_further() -> None:
    apart, together = Setup(own_noise=True), Setup()
    noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    own = apart.trainer.step(apart.policy, noise, SIGMAS, lambda x, i: x[:, 0])
    assert own.scalars["reward_spread"] > 1.5 * together.step(0).scalars["reward_spread"]


def test_noise_that_is_no_row_for_every_member_is_refused() -> None:
    setup = Setup(own_noise=True)
    with pytest.raises(ValueError, match=r"noise must have a row for each of 4 members .*, got 3 rows"):
        setup.step(0)
    noise = torch.randn(12, 4)
    with pytest.raises(ValueError, match=r"group_ids must have one entry per group \(3\), got \(12,\)"):
        setup.trainer.step(setup.policy, noise, SIGMAS, lambda x, i: x[:, 0], group_ids=torch.arange(12))
