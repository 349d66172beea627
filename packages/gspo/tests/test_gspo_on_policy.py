"""The ratio is 1 before the first update, or something is wrong and somebody is told what."""

from __future__ import annotations

import warnings

import pytest
import torch
from gspo import (
    DanceSDE,
    FlowCPS,
    FlowSDE,
    OffPolicy,
    OnlineConfig,
    OnlineTrainer,
    PolicyConfig,
    PolicyTrainer,
    SlidingWindow,
    check_on_policy,
    group_advantages,
    rescore,
    rollout,
)  # fmt: skip
from gspo.on_policy import tolerance

LINE = torch.linspace(1, 0, 9)


class Policy(torch.nn.Module):
    def __init__(self, dropout: float = 0.0, width: int = 16) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)
        torch.nn.init.normal_(self.layer.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.layer.bias)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer(x))


def draw(policy, kernel=None, **options):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    return rollout(
        policy, torch.randn(3, 16, generator=g), LINE, kernel=kernel or FlowSDE(), window=(1, 2), group_size=4, generator=g,
        **options,
    )  # fmt: skip


def update(policy, drawn, kernel=None, **options):  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    trainer = PolicyTrainer(list(policy.parameters()), optimizer, PolicyConfig(num_inner_epochs=1, **options))
    return trainer.update(policy, drawn, group_advantages(drawn.latents.sum(1), drawn.index), kernel)


@pytest.mark.parametrize("ratio", ["sequence", "step", "guarded"])
def test_on_policy_nobody_says_anything(ratio: str) -> None:
    policy = Policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = update(policy, draw(policy), ratio=ratio, off_policy="raise")
    assert statistics.initial_log_ratio == 0
    assert check_on_policy(Policy(), draw(Policy())) == (0.0, None)


@pytest.mark.parametrize("ratio", ["sequence", "step", "guarded"])
@pytest.mark.parametrize("in_rollout", [True, False])
def test_dropout_is_named(ratio: str, in_rollout: bool) -> None:
    torch.manual_seed(0)
    policy = Policy(dropout=0.3)
    policy.train(in_rollout)
    drawn = draw(policy)
    policy.train()
    with pytest.warns(OffPolicy, match=r"dropout\? call model.eval\(\)"):
        statistics = update(policy, drawn, ratio=ratio)
    assert statistics.initial_log_ratio > 1e-4 and not statistics.skipped
    with pytest.raises(ValueError, match="dropout"):
        update(policy, drawn, ratio=ratio, off_policy="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(policy, drawn, ratio=ratio, off_policy="allow")


def test_a_policy_that_has_moved_is_named_once_and_untouched_where_that_is_refused() -> None:
    policy = Policy()
    drawn = draw(policy)
    with torch.no_grad():
        policy.layer.bias += 0.1
    before = policy.layer.weight.clone()
    with pytest.raises(ValueError, match=r"must give a ratio of 1 .* its parameters have changed since"):
        update(policy, drawn, off_policy="raise")
    assert torch.equal(policy.layer.weight, before) and policy.layer.weight.grad is None
    trainer = PolicyTrainer(list(policy.parameters()), torch.optim.SGD(policy.parameters(), lr=0.0), PolicyConfig())
    advantages = group_advantages(drawn.latents.sum(1), drawn.index)
    with pytest.warns(OffPolicy):
        trainer.update(policy, drawn, advantages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.update(policy, drawn, advantages)
    assert "parameters" in str(check_on_policy(policy, drawn).problem)


def test_rounding_of_half_precision_in_batches_of_another_size_is_named() -> None:
    """A policy whose answer depends on the size of the batch, as half-precision matrix products do."""
    policy = Policy(width=16)
    rounding = lambda x, s, i: policy(x, s, i) * (1 + 0.02 * (len(x) != 12))  # noqa: E731
    drawn = draw(rounding)
    advantages = group_advantages(drawn.latents.sum(1), drawn.index)
    advantages[:4] = 0.0
    config = PolicyConfig(num_inner_epochs=1)
    trainer = PolicyTrainer(list(policy.parameters()), torch.optim.SGD(policy.parameters(), lr=0.0), config)
    with pytest.warns(OffPolicy, match="drop_zero_variance=False"):
        trainer.update(rounding, drawn, advantages)


def test_the_tolerance_is_above_what_fp32_rounds_and_below_what_matters() -> None:
    policy, drawn = Policy(), draw(Policy())
    rounded = lambda x, s, i: policy(x.double().float(), s, i) * (1 + 3e-7)  # noqa: E731
    assert check_on_policy(rounded, drawn).problem is None
    assert check_on_policy(lambda x, s, i: policy(x, s, i) * 1.01, drawn).problem is not None
    assert tolerance(drawn) == pytest.approx(2.5e-5)


@pytest.mark.parametrize("other", [FlowSDE(0.5), FlowCPS(0.8), DanceSDE(0.3)])
def test_another_kernel_than_the_rollouts_is_refused_before_anything_happens(other) -> None:  # type: ignore[no-untyped-def]
    policy = Policy()
    drawn = draw(policy)
    for call in (lambda: update(policy, drawn, other), lambda: rescore(policy, drawn, other)):
        with pytest.raises(ValueError, match=r"kernel must be the one that drew the rollout \(std .* at step 1\), got"):
            call()
    assert policy.layer.weight.grad is None
    assert update(policy, drawn, FlowSDE()).initial_log_ratio == 0, "an equal one is fine"
    assert update(policy, drawn).initial_log_ratio == 0, "and none is needed"


def test_a_rollout_without_a_kernel_needs_one() -> None:
    from dataclasses import replace

    policy = Policy()
    drawn = replace(draw(policy), kernel=None)
    with pytest.raises(ValueError, match="kernel must be given for a rollout that does not hold the kernel"):
        update(policy, drawn)
    assert update(policy, drawn, FlowSDE()).initial_log_ratio == 0


def test_a_resumed_trainer_takes_the_clip_range_it_is_given() -> None:
    def trainer(clip_range):  # type: ignore[no-untyped-def]
        parameter = torch.nn.Parameter(torch.zeros(2))
        return PolicyTrainer([parameter], torch.optim.SGD([parameter], lr=0.1), PolicyConfig(clip_range=clip_range))

    old = trainer(0.2)
    for given, after in ((0.01, 0.01), ((0.1, 0.3), (0.1, 0.3)), ("auto", 0.2)):
        new = trainer(given)
        new.load_state_dict(old.state_dict())
        assert new.clip_range == after
    measured = trainer("auto")
    measured.tracker.observe(3, 5e-4)
    new = trainer(0.01)
    new.load_state_dict(measured.state_dict())
    assert new.clip_range == 0.01
    again = trainer("auto")
    again.load_state_dict(measured.state_dict())
    assert again.tracker.at(3) == 5e-4
    with pytest.raises(ValueError, match="state must hold 'clip_range'"):
        again.load_state_dict({})


def test_a_resumed_online_trainer_clips_as_configured() -> None:
    def online(clip_range):  # type: ignore[no-untyped-def]
        policy = Policy()
        config = OnlineConfig(window=SlidingWindow(8), group_size=4, policy=PolicyConfig(clip_range=clip_range))
        return policy, OnlineTrainer(list(policy.parameters()), torch.optim.SGD(policy.parameters(), lr=0.1), config)

    policy, first = online(1.0)
    first.step(policy, torch.randn(2, 16), LINE, lambda x, i: x.sum(1))
    policy, second = online(1e-9)
    second.load_state_dict(first.state_dict())
    report = second.step(policy, torch.randn(2, 16), LINE, lambda x, i: x.sum(1))
    assert report.update.clip_range == 1e-9 and report.iteration == 1
    assert report.update.surrogate.clip_fraction > 0.5
    with pytest.raises(ValueError, match="state must hold 'iteration' and 'generator'"):
        second.load_state_dict({"iteration": torch.tensor(1)})


def test_a_string_is_no_list_of_prompts() -> None:
    from gspo.integrations.diffusers import PipelinePolicy
    from gspo.integrations.trl import trl_reward

    for call in (
        lambda: PipelinePolicy(None, "a red fox"),
        lambda: trl_reward(len, "a red fox", lambda x, i: list(x)),
    ):
        with pytest.raises(ValueError, match=r"prompts must be a list of prompts, got the string 'a red fox'"):
            call()
    with pytest.raises(ValueError, match=r"columns\['answer'\] must be a list, got the string 'ab'"):
        trl_reward(len, ["x", "y"], lambda x, i: list(x), columns={"answer": "ab"})
