"""What strangers handed over and what came of it: each of these was a wrong number without a word, a traceback, or half a change once."""

from __future__ import annotations

import math
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from gspo import (
    AdvantageWeightedMatching,
    ClipRangeTracker,
    DanceSDE,
    DecaySchedule,
    DiffusionNFT,
    FlowDPPO,
    FlowODE,
    FlowSDE,
    MovingAverage,
    NoiseLevels,
    ObjectiveConfig,
    ObjectiveTrainer,
    OnlineConfig,
    OnlineTrainer,
    PolicyConfig,
    RewardGradientConfig,
    RobustReward,
    SlidingWindow,
    auto_clip_range,
    clipped_surrogate_loss,
    controlled_variance,
    diagnose,
    draw,
    finished_samples,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_log_ratio,
    gdpo_advantages,
    gradient_signal,
    group_advantages,
    group_has_signal,
    group_statistics,
    importance_ratio,
    multi_reward_advantages,
    objective_batches,
    objective_step,
    optimality,
    policy_batches,
    rollout,
    sequence_importance_ratio,
    surrogate_gradient,
    whiten,
)
from gspo.diagnostics import BatchOutcome

NAN, INF = math.nan, math.inf
IDS, LINE = [0, 0, 1, 1], torch.linspace(1, 0, 5)
REWARDS = [1.0, 2.0, 3.0, 5.0]


@pytest.fixture(autouse=True)
def without_shape_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' shape hook would catch wrong kinds before the package does; here the package must."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# advantages


@pytest.mark.parametrize(
    "masked", [np.ma.array([1.0, 9.0, 3.0, 5.0], mask=[0, 1, 0, 0]), np.ma.array([1, 9, 3, 5], mask=[0, 1, 0, 0])]
)
def test_a_masked_reward_is_missing(masked: Any) -> None:
    want = group_advantages([1.0, None, 3.0, 5.0], IDS)
    torch.testing.assert_close(group_advantages(masked, IDS).to(want.dtype), want, equal_nan=True)
    assert group_statistics(masked, IDS).num_invalid_rewards == 1


@pytest.mark.parametrize(
    ("call_it", "words"),
    [
        (lambda: group_advantages(REWARDS, IDS, eps=NAN), "eps must be"), (lambda: group_advantages(REWARDS, IDS, eps=-1.0), "eps must be"),
        (lambda: group_advantages(REWARDS, IDS, eps=INF), "eps must be"), (lambda: group_advantages(REWARDS, IDS, eps="a"), "eps must be"),
        (lambda: group_advantages(REWARDS, IDS, ddof=5), "ddof must be 0 or 1"), (lambda: group_advantages(REWARDS, IDS, ddof=NAN), "ddof must"),
        (lambda: group_advantages(REWARDS, IDS, ddof=0.5), "ddof must be 0 or 1"),
        (lambda: group_advantages([1e308, -1e308, 1.0, 2.0], IDS), "small enough to be squared"),
        (lambda: group_advantages([np.complex64(1 + 2j), 1, 2, 3], IDS), "rewards must be numbers"),
        (lambda: group_advantages(torch.eye(4)[0].to_sparse(), IDS), "dense tensor"),
        (lambda: group_advantages(torch.zeros(4, device="meta"), IDS), "device meta"),
        (lambda: group_advantages(torch.tensor([2**64 - 1, 0, 1, 2], dtype=torch.uint64), IDS), r"at most 2\^53"),
        (lambda: group_advantages(torch.tensor([-(2**63), 0, 1, 2]), IDS), r"at most 2\^53"),
        (lambda: multi_reward_advantages({"a": REWARDS}, {"a": "1"}, IDS), "weights must be finite numbers, got '1'"),
        (lambda: multi_reward_advantages({"a": REWARDS}, {"a": None}, IDS), "weights must be finite numbers, got None"),
        (lambda: multi_reward_advantages([REWARDS], [1.0], IDS), "dictionaries by name, got list"),
        (lambda: gdpo_advantages([REWARDS], [1.0], IDS), "dictionaries by name, got list"),
        (lambda: whiten([1.0, 2.0], eps=NAN), "eps must be"), (lambda: whiten([1.0, 2.0], eps=-2.0), "eps must be"),
        (lambda: group_has_signal([1.0, 0.0], torch.zeros(2)), "group_ids must be whole"),
        (lambda: group_has_signal([1.0, 0.0], [0, 0, 1]), r"must both be \(b,\)"),
        (lambda: gradient_signal([[1.0], [2.0]], 4), "gradients must be a torch tensor"),
        (lambda: gradient_signal(torch.randn(3, 2), INF), "samples_per_batch must be positive"),
        (lambda: optimality([1.0]), "advantages must be a torch tensor"),
        (lambda: optimality(torch.ones(2), advantage_clip=INF), "advantage_clip must be positive"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(call_it: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call_it()
    assert "\n" not in str(caught.value)


def test_lists_and_arrays_are_taken_everywhere() -> None:
    assert whiten([3.0, -3.0], eps=0.0).tolist() == whiten(np.array([3.0, -3.0]), eps=0.0).tolist() == [1.0, -1.0]
    assert group_has_signal([1.0, 0.0, 0.0, 0.0], IDS).tolist() == [True, True, False, False]
    assert controlled_variance([0.0, 1.0], [0, 0], [0.0, 2.0], [0, 0]).share == 0.25
    mixed = {"a": REWARDS, 1: REWARDS}
    assert torch.equal(multi_reward_advantages(mixed, {"a": 1, 1: 1}, IDS), 2 * group_advantages(REWARDS, IDS))


# settings


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (DiffusionNFT, {"beta": INF}), (DiffusionNFT, {"beta": "1"}), (DiffusionNFT, {"advantage_clip": INF}), (DiffusionNFT, {"beta": None}),
        (AdvantageWeightedMatching, {"clip_range": INF}), (AdvantageWeightedMatching, {"old_coef": INF}),
        (AdvantageWeightedMatching, {"clip_range": "a"}), (FlowDPPO, {"threshold": INF}), (FlowDPPO, {"threshold": "a"}),
        (DecaySchedule, {"rate": INF}), (DecaySchedule, {"flat": NAN}), (NoiseLevels, {"count": 1.5}), (NoiseLevels, {"count": "3"}),
        (NoiseLevels, {"low": "a"}), (ObjectiveConfig, {"num_inner_epochs": 1.5}), (PolicyConfig, {"num_inner_epochs": 1.5}),
        (PolicyConfig, {"micro_batch_size": "2"}), (PolicyConfig, {"kl_coef": "0"}), (FlowSDE, {"noise_level": INF}),
        (FlowSDE, {"noise_level": "a"}), (DanceSDE, {"eta": INF}),
    ],
)  # fmt: skip
def test_settings_are_finite_and_of_their_kind(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 2.5}, {"group_size": "4"}, {"seed": NAN}, {"seed": 1.5}, {"seed": 2**70}, {"reward_weights": {"a": NAN}},
        {"reward_weights": {"a": "x"}}, {"reward_weights": ["a"]}, {"tail_steps": 1.5},
    ],
)  # fmt: skip
def test_settings_of_a_run(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* must be"):
        OnlineConfig(**{"window": SlidingWindow(4), "kernel": FlowSDE(), **options})


@pytest.mark.parametrize(
    "options", [{"num_steps": 4.5}, {"num_steps": "4"}, {"num_steps": 10**12}, {"size": 1.5}, {"stride": NAN}]
)
def test_settings_of_a_window(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        SlidingWindow(**{"num_steps": 6, **options})
    for iteration in (1.5, NAN):
        with pytest.raises(ValueError, match="iteration must be a whole number"):
            SlidingWindow(6).at(iteration)  # type: ignore[arg-type]


# objectives


WEIGHT = torch.nn.Parameter(torch.ones(2))


def policy(x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x * WEIGHT


def trainer() -> Any:
    return ObjectiveTrainer([WEIGHT], torch.optim.SGD([WEIGHT], lr=0.0), DiffusionNFT(), ObjectiveConfig())


def step(reward: Any, **options: Any) -> Any:
    return objective_step(trainer(), policy, torch.randn(4, 2), LINE, reward, **{"group_size": 2, **options})


def test_a_reward_that_is_missing_for_some_leaves_the_others_in_the_report() -> None:
    """Two functions, each None for the other's tasks: the report said that no sample had a reward."""
    report = step(lambda x, i: {"a": [1, 2, None, None], "b": [None, None, 1, 3]})
    assert report.rewards.tolist() == [1, 2, 1, 3] and report.groups.num_invalid_rewards == 0
    assert report.summary()["reward"] == 1.75
    report = step(lambda x, i: {"a": REWARDS, "b": [None] * 4}, reward_weights={"a": 1.0, "b": 0.0})
    assert report.rewards.tolist() == REWARDS and report.summary()["invalid_rewards"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_ids": torch.tensor([0])}, "one entry per prompt"), ({"group_ids": torch.tensor([0, 1, 2])}, "one entry per prompt"),
        ({"group_ids": torch.tensor([0.0, 1.0])}, "group_ids must be whole"), ({"group_size": 2.0}, "group_size must be a whole number"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        step(lambda x, i: REWARDS, **options)


def test_groups_and_advantages_in_lists() -> None:
    assert torch.equal(
        step(lambda x, i: REWARDS, group_ids=[7, 7]).advantages,
        group_advantages(torch.tensor(REWARDS, dtype=torch.float64), [7] * 4),
    )
    drawn = finished_samples(
        torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.long)
    )
    losses = [trainer().update(policy, drawn, given).loss for given in ([1.0, -1.0, 0.0, 0.0], np.array([1, -1, 0, 0]))]
    assert losses == [trainer().update(policy, drawn, torch.tensor([1.0, -1.0, 0.0, 0.0])).loss] * 2


# diagnose


def outcome(rewards: Any = REWARDS, ids: Any = IDS, *free: Any, gradient: float = 1.0) -> Any:
    def batch(number: int) -> BatchOutcome:
        WEIGHT.grad = gradient * torch.randn(2, generator=torch.Generator().manual_seed(number))
        return BatchOutcome(rewards, ids, *free)

    return batch


@pytest.mark.parametrize("rewards", [REWARDS, np.array(REWARDS), torch.tensor([1, 2, 3, 5]), torch.tensor(REWARDS)])
def test_diagnose_takes_rewards_of_every_kind(rewards: Any) -> None:
    found = diagnose(outcome(rewards, IDS, rewards, IDS), [WEIGHT])
    assert found.mean_reward == 2.75 and found.controlled is not None and found.controlled.share == 1
    assert diagnose(outcome([1.0, None, 3.0, INF]), [WEIGHT]).mean_reward == 2


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        (outcome([NAN] * 4), {}, "rewards of batch 0 must hold a finite number"), (outcome(REWARDS, [0, 0, 1]), {}, r"must both be \(b,\)"),
        (outcome(REWARDS, IDS, REWARDS), {}, "must be given together"), (outcome(gradient=NAN), {}, "infinity in batch 0"),
        (outcome([], []), {}, "finite number"), (lambda n: REWARDS, {}, "must return a BatchOutcome, batch 0 returned list"),
        (outcome(), {"num_batches": 3.5}, "num_batches"), (outcome(), {"num_batches": "4"}, "num_batches"),
        (outcome(), {"max_grad_norm": NAN}, "max_grad_norm"), (outcome(), {"max_grad_norm": "1"}, "max_grad_norm"),
    ],
)  # fmt: skip
def test_diagnose_says_what_is_wrong_before_an_hour_is_over(batch: Any, options: dict[str, Any], words: str) -> None:
    drawn = []

    def counted(number: int) -> Any:
        drawn.append(number)
        return batch(number)

    with pytest.raises(ValueError, match=words):
        diagnose(counted, [WEIGHT], **options)
    assert len(drawn) == (0 if options else 1)


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 0.0}, {}])
def test_diagnose_weighs_what_is_there(weights: dict[str, float]) -> None:
    """A part that is missing for some samples made every total of the comparison NaN."""

    def reward(x: torch.Tensor, index: torch.Tensor) -> Any:
        return {"a": x.sum(1), "b": [None] * len(x)}

    config = OnlineConfig(window=SlidingWindow(4, size=1), kernel=FlowSDE(), group_size=2, reward_weights=weights)
    batch = policy_batches(
        policy, [WEIGHT], lambda n: torch.randn(2, 2), LINE, reward, config, generator=torch.Generator().manual_seed(0)
    )
    found = diagnose(batch, [WEIGHT], num_batches=3)
    assert math.isfinite(found.mean_reward) and found.controlled is not None and found.controlled.total > 0
    batch = objective_batches(
        policy, [WEIGHT], lambda n: torch.randn(4, 2), LINE, reward, DiffusionNFT(), group_size=2, reward_weights=weights
    )  # fmt: skip
    assert math.isfinite(diagnose(batch, [WEIGHT], num_batches=3).mean_reward)


# states


@pytest.mark.parametrize(
    "change",
    [
        {"generator": torch.zeros(3, dtype=torch.uint8)}, {"generator": [1, 2]}, {"iteration": torch.tensor(-5)},
        {"iteration": torch.tensor(NAN)},
        {"iteration": torch.tensor(1.5)}, {"policy.clip_range": torch.tensor(NAN)},
    ],
)  # fmt: skip
def test_a_state_that_is_refused_changes_nothing(change: dict[str, Any]) -> None:
    config = OnlineConfig(window=SlidingWindow(4, size=1), kernel=FlowSDE(), group_size=2)
    fresh = OnlineTrainer([WEIGHT], torch.optim.SGD([WEIGHT], lr=0.0), config)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="state"):
        fresh.load_state_dict(
            {**before, "policy.clip_range": torch.tensor(0.5), "iteration": torch.tensor(3), **change}
        )
    after = fresh.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_a_robust_reward_reads_one_number_a_sample() -> None:
    def failing(column: list[int]) -> Any:
        if len(column) > 1:
            raise KeyError("x")
        return [1.0, 2.0]

    with pytest.raises(ValueError, match="must return 1 numbers"):
        RobustReward(failing, retries=0)([1, 2])
    for options in ({"retries": NAN}, {"wait_s": INF}, {"wait_s": "1"}, {"retries": 1.5}):
        with pytest.raises(ValueError, match="must be"):
            RobustReward(failing, **options)  # type: ignore[arg-type]


# tensors that are none of real numbers


X, ONES, RATIO = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2), torch.tensor([1.1, 0.9])


def steps(x: Any, v: Any = X, **options: Any) -> Any:
    return FlowSDE().step(x, v, options.pop("sigma", 0.8), 0.6, **options)


def rolled(noise: Any = X, velocity: Any = lambda x, s, i: x, window: Any = (1,), **options: Any) -> Any:
    return rollout(velocity, noise, LINE, kernel=FlowSDE(), window=window, **{"group_size": 2, **options})


@pytest.mark.parametrize(
    ("run", "words"),
    [
        # samples that were drawn in the dtype of whole numbers were cut to whole numbers
        (lambda: steps((10 * X).long()), "latents must be a floating tensor, got dtype torch.int64"),
        (lambda: steps(X > 0), "latents must be a fl"),
        (lambda: FlowODE().step((10 * X).long(), X, 0.8, 0.6), "latents must be a floating"),
        (lambda: rolled((10 * X).long()), "noise must be a f"),
        (lambda: draw(policy, (10 * X).long(), LINE), "noise must be a floating"),
        (lambda: finished_samples((10 * X).long(), [0, 0]), "latents mu"),
        # of complex ones the imaginary part was dropped
        (lambda: steps(X + 1j), "latents must be real"),
        (lambda: steps(X, X * 1j), "velocity must be real"),
        (lambda: steps(X, next_latents=X * 1j), "next_latents must be real"),
        (lambda: steps(X, noise=X * 1j), "noise must be real"),
        (lambda: steps(X, sigma=torch.tensor(0.8 + 1j)), "sigma must be real"),
        (lambda: rolled(velocity=lambda x, s, i: x * 1j), "velocity must be r"),
        (lambda: draw(lambda x, s, i: x * 1j, X, LINE), "velocity must be real"),
        (lambda: FlowODE().step(X, X * 1j, 0.8, 0.6), "velocity must be r"),
        (lambda: gaussian_log_prob(X, X * 1j, ONES), "mean must be real"),
        (lambda: gaussian_log_ratio(X, X * 1j, X, ONES), "mean must be real"),
        (lambda: gaussian_kl(X, X * 1j, ONES), "mean must be real"),
        (lambda: sequence_importance_ratio(X, X * 1j), "old_log_prob must be real"),
        (
            lambda: clipped_surrogate_loss(X.exp(), [1, -1], 0.2, step_weights=torch.ones(4) * 1j),
            "step_weights must be real",
        ),
        (lambda: auto_clip_range(RATIO * 1j), "ratio must be real"),
        (lambda: group_advantages([torch.tensor(1j), 1, 2, 3], IDS), "real numbers"),
        # and these have no values to read
        (lambda: steps(X.to("meta")), "device meta"),
        (lambda: steps(X.to_sparse()), "dense tensor"),
        (lambda: steps(X, X.to("meta")), "device meta"),
        (lambda: group_advantages(REWARDS, torch.tensor(IDS).to_sparse()), "dense"),
        (lambda: group_advantages(REWARDS, torch.tensor(IDS, device="meta")), "device meta"),
        (lambda: clipped_surrogate_loss(RATIO.to("meta"), [1, -1], 0.2), "device meta"),
        # what is no tensor at all
        (lambda: FlowODE().step(X.numpy(), X, 0.8, 0.6), "latents must be a torch tensor"),
        (lambda: rolled(velocity=lambda x, s, i: None), "velocity must be a t"),
        (lambda: draw(lambda x, s, i: (x,), X, LINE), "velocity must be a torch tensor, got tuple"),
        (lambda: draw(policy, X.numpy(), LINE), "noise must be a t"),
        (lambda: sequence_importance_ratio(X, X.numpy()), "old_log_prob must be"),
        # shapes that torch would have broadcast
        (lambda: gaussian_log_prob(X, X[:1], ONES), "value and mean must share a shape"),
        (lambda: auto_clip_range(torch.ones(2, 2, 2)), r"ratio must be \(b,\)"),
        # names that meant "step" without a word
        (lambda: importance_ratio("sequense", X), "ratio must be 'sequence'"),
        (lambda: surrogate_gradient(X, [1, -1], 0.1, ratio="gspo"), "ratio must be"),
        # numbers of another kind
        (lambda: steps(X, sigma="0.8"), "sigma must be numbers"),
        (lambda: steps(X, sigma=None), "sigma_next must be below sigma"),
        (lambda: steps(X, sigma_max="0.9"), "sigma_max"),
        (lambda: rolled(group_size="2"), "group_size must be at least 1"),
        (lambda: rolled(group_size=2.0), "group_size must be at least 1"),
        (lambda: rolled(micro_batch_size=1.5), "micro_batch_size must be"),
        (lambda: rolled(tail_steps=1.5), "tail_steps must be"),
        (lambda: rolled(window=1), "window must be whole numbers"),
        (lambda: rolled(window=(1.0,)), "window must be whole numbers"),
        (lambda: draw(policy, X, ["1", "0"]), "sigmas must be numbers"),
        (lambda: draw(policy, X, torch.ones(2, 2)), "sigmas must be strictly"),
        (lambda: draw(policy, X, LINE, group_size=2.0), "group_size must be"),
        (lambda: clipped_surrogate_loss(RATIO, [1, -1], 10**400), "clip_range must"),
        (lambda: clipped_surrogate_loss(RATIO, [1, -1], 0.2, max_advantage="1"), "max_advantage must be"),
        (
            lambda: clipped_surrogate_loss(X.exp(), [1, -1], 0.2, step_weights=torch.tensor([1.0, NAN, 1, 1])),
            "step_weights must be",
        ),
        (lambda: clipped_surrogate_loss(X.exp(), [1, -1], 0.2, step_weights=-torch.ones(4)), "step_weights must be"),
        (lambda: auto_clip_range(RATIO, "0.1"), "target_clip_fraction must be"),
        (lambda: group_advantages(REWARDS, IDS, process_group="world"), "process_group must"),
        (lambda: group_advantages([np.int64(2**53 + 1), np.int64(2**53 + 2), 1, 2], IDS), r"at most 2\^53"),
        (lambda: whiten([1.0, 2.0], eps=10**400), "eps must be"),
        *[
            (lambda w=w: multi_reward_advantages({"a": REWARDS}, {"a": w}, IDS), "weights must be finite")
            for w in (1j, [1], 10**400)
        ],
        *[(lambda r=r: ClipRangeTracker(r), "rate must be") for r in (0, -1, 2, NAN, "a", None)],
        *[(lambda m=m: ClipRangeTracker().observe(0, m), "measured must be") for m in (0, -1, NAN, INF, "a", None)],
        *[
            (lambda s=s: ClipRangeTracker().load_state_dict(s), "state")
            for s in ({"clip_range.a": 1.0}, {"clip_range.0": "1"}, {"clip_range.0": 0.0})
        ],
    ],
)
def test_tensors_and_numbers_that_mean_something_else(run: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        run()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (OnlineConfig, "share_prefix"), (OnlineConfig, "offload"), (OnlineConfig, "split_batch"), (PolicyConfig, "reduce_gradients"),
        (PolicyConfig, "drop_zero_variance"), (ObjectiveConfig, "drop_silent_rows"), (ObjectiveConfig, "reduce_gradients"),
        (RewardGradientConfig, "recompute"), (RewardGradientConfig, "reduce_gradients"),
    ],
)  # fmt: skip
def test_the_text_false_is_not_true(make: Any, name: str) -> None:
    """A configuration's "false" in quotes switched the setting on."""
    needed = {"window": SlidingWindow(4)} if make is OnlineConfig else {}
    for value in ("false", 0, None):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got"):
            make(**needed, **{name: value})


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (OnlineConfig, {"kernel": "flow_sde"}), (OnlineConfig, {"window": (0, 1)}), (OnlineConfig, {"policy": {"ratio": "step"}}),
        (PolicyConfig, {"max_grad_norm": "1"}), (PolicyConfig, {"max_grad_norm": None}), (PolicyConfig, {"clip_range": np.array([0.1, 0.2])}),
        (ObjectiveConfig, {"seed": 1.5}), (ObjectiveConfig, {"walk_window": "8"}), (ObjectiveConfig, {"max_grad_norm": "1"}),
        (RewardGradientConfig, {"seed": NAN}), (RewardGradientConfig, {"max_grad_norm": None}), (RewardGradientConfig, {"walk_window": -1}),
    ],
)  # fmt: skip
def test_parts_of_a_configuration_are_of_their_kind(make: Any, options: dict[str, Any]) -> None:
    needed = {"window": SlidingWindow(4)} if make is OnlineConfig else {}
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        make(**{**needed, **options})


@pytest.mark.parametrize(
    "state", [{"0": torch.full((2,), NAN)}, {"0": torch.ones(2) * 1j}, {"0": np.ones(2)}, [torch.ones(2)]]
)
def test_an_average_that_is_none_is_not_taken_over(state: Any) -> None:
    average = MovingAverage([WEIGHT])
    with pytest.raises(ValueError, match="state"):
        average.load_state_dict(state)
    assert average.is_current


def test_arrays_in_another_order_of_bytes_and_of_rows() -> None:
    """torch takes neither, and said so in its own words."""
    want = group_advantages(REWARDS, IDS)
    swapped, reversed_ = np.array(REWARDS, dtype=">f8"), np.array(REWARDS[::-1])[::-1]
    for given in (swapped, reversed_, np.array([REWARDS, REWARDS]).T[:, 0]):
        torch.testing.assert_close(group_advantages(given, IDS), want.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(group_advantages(REWARDS, np.array(IDS, dtype=">i8")[::-1].copy()[::-1]), want)
    assert steps(X, sigma=np.float32(0.8)).std.shape == (2,) and steps(X, sigma=[0.8, 0.8]).std.shape == (2,)
    assert (
        clipped_surrogate_loss(RATIO, [1, -1], np.float32(0.25)).loss
        == clipped_surrogate_loss(RATIO, [1, -1], 0.25).loss
    )


def test_a_missing_value_of_pandas_is_missing() -> None:
    NAType = type("NAType", (), {})  # pandas itself is no dependency
    found, want = group_advantages([1.0, NAType(), 3.0, 5.0], IDS), group_advantages([1.0, None, 3.0, 5.0], IDS)
    torch.testing.assert_close(found, want, equal_nan=True)


def test_an_infinite_advantage_is_left_out_of_the_clip_range() -> None:
    """As in the loss; it counted as one that pushes up."""
    ratio = torch.tensor([1.5, 1.1, 1.2, 0.9])
    assert auto_clip_range(ratio, 0.25, [INF, 1.0, 1.0, NAN]) == auto_clip_range(ratio[1:3], 0.25, [1.0, 1.0])
