"""Bad input to objectives, their trainers and estimators: one sentence that names the argument, what came and what is expected."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
from gspo import (
    AdvantageWeightedMatching,
    DecaySchedule,
    DiffusionNFT,
    FlowDPPO,
    FlowSDE,
    MovingAverage,
    NoiseLevels,
    ObjectiveConfig,
    ObjectiveTrainer,
    RewardGradientConfig,
    RewardGradientTrainer,
    SignalLog,
    awm_loss,
    draft_samples,
    draw,
    finished_samples,
    gdpo_advantages,
    gradient_signal,
    kl_mask,
    masked_surrogate_loss,
    nft_loss,
    objective_step,
    optimality,
    refl_samples,
    rollout,
    token_advantages,
    token_log_ratio,
    walk_ratio,
    whiten,
)  # fmt: skip
from gspo.forward import noised
from gspo.signal_estimators import clip_activity, controlled_variance, random_walk_length, samples_needed

NAN, Z = float("nan"), torch.zeros
LINE = torch.linspace(1, 0, 5)
WEIGHT = torch.nn.Parameter(torch.ones(2))


@pytest.fixture(autouse=True)
def without_shape_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' shape hook would catch wrong shapes before the package does; here the package must."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def policy(x, sigma, index):  # type: ignore[no-untyped-def]
    return x * WEIGHT


def trainer(objective=None, **options):  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD([WEIGHT], lr=0.0)
    return ObjectiveTrainer([WEIGHT], optimizer, objective or DiffusionNFT(), ObjectiveConfig(**options))


def step(reward=lambda x, i: x.sum(1), noise=None, objective=None, **options):  # type: ignore[no-untyped-def]
    options = {"group_size": 2, **options}
    return objective_step(
        trainer(objective), policy, torch.randn(4, 2) if noise is None else noise, LINE, reward, **options
    )


def update(rollout=None, advantages=None, objective=None, velocity=policy, **options):  # type: ignore[no-untyped-def]
    rollout = rollout or finished_samples(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    advantages = torch.randn(len(rollout.latents)) if advantages is None else advantages
    return trainer(objective, **options).update(velocity, rollout, advantages)


def stochastic():  # type: ignore[no-untyped-def]
    drawn = rollout(policy, torch.randn(4, 2), LINE, kernel=FlowSDE(), window=(0,))
    if hasattr(drawn, "kernel"):
        object.__setattr__(drawn, "kernel", None)
    return drawn


def ascend(reward=lambda x, i: x.sum(1), noise=None, sigmas=LINE, velocity=policy, **options):  # type: ignore[no-untyped-def]
    config = RewardGradientConfig(**options)
    found = RewardGradientTrainer([WEIGHT], torch.optim.SGD([WEIGHT], lr=0.0), config)
    return found.step(velocity, torch.randn(4, 2) if noise is None else noise, sigmas, reward)


def nft(reward=(0.5, 0.5), beta=1.0, **options):  # type: ignore[no-untyped-def]
    return nft_loss(torch.randn(2, 3), Z(2, 3), Z(2, 3), torch.tensor(reward), beta=beta, **options)


CASES = [
    # losses
    (lambda: nft(beta=0.0), "beta must be positive, got 0"),
    (lambda: nft(beta=NAN), "beta must be positive"),
    (lambda: nft(reward=(0.5, 1.5)), r"reward must be in \[0, 1\], got 0.5 to 1.5"),
    (lambda: nft(reward=(-math.inf, 0.5)), r"reward must be in \[0, 1\]"),
    (lambda: nft(reward=(0.5, 0.5, 0.5)), r"reward must be \(b,\) or \(b, n\) for velocity \(2, 3\), got \(3,\)"),
    (lambda: nft(weighting="snr"), "weighting must be one of .* got 'snr'"),
    (lambda: nft(weighting="self_normalized"), r"sigma must be \(2,\) for weighting"),
    (lambda: nft(weighting="sigma", sigma=Z(3)), r"sigma must be \(2,\) .* got \(3,\)"),
    (lambda: nft(reduction="sum"), "reduction must be 'mean' or 'none', got 'sum'"),
    (lambda: nft_loss(Z(2, 3), Z(2, 4), Z(2, 3), Z(2), beta=1.0), r"old_velocity must have the shape .* got \(2, 4\)"),
    (lambda: nft_loss(Z(2, 3), Z(2, 3), Z(3, 3), Z(2), beta=1.0), "target must have the shape of velocity"),
    (lambda: nft_loss(Z(3), Z(3), Z(3), Z(3), beta=1.0), r"velocity must be \(b, ...\)"),
    (lambda: nft_loss(Z(0, 3), Z(0, 3), Z(0, 3), Z(0), beta=1.0), "b at least 1"),
    (lambda: optimality(Z(2), advantage_clip=0.0), "advantage_clip must be positive, got 0"),
    (lambda: awm_loss(Z(2, 3), Z(2, 3), Z(2, 3), Z(2), clip_range=0.0), "clip_range must be positive or None, got 0"),
    (lambda: awm_loss(Z(2, 3), Z(2, 3), Z(2, 3), Z(3)), r"advantages must be \(b,\)"),
    (lambda: awm_loss(Z(2, 3), Z(2, 3), Z(2, 3), Z(2), weighting="self_normalized"), "weighting must be one of"),
    (lambda: kl_mask(Z(2), Z(2, 3), Z(2, 3), Z(2), Z(2), threshold=-1.0), "threshold must not be negative, got -1"),
    (lambda: kl_mask(Z(2), Z(2, 3), Z(2, 3), Z(2), Z(2), threshold=NAN), "threshold must not be negative"),
    (lambda: kl_mask(Z(2), Z(3, 3), Z(3, 3), Z(2), Z(2), threshold=1.0), "mean and old_mean must be"),
    (lambda: kl_mask(Z(2), Z(2, 3), Z(2, 3), Z(3), Z(2), threshold=1.0), r"std must be \(2,\) .* got \(3,\)"),
    (lambda: kl_mask(Z(2), Z(2, 3), Z(2, 3), Z(2), Z(1), threshold=1.0), "advantages must be"),
    (
        lambda: masked_surrogate_loss(Z(2), Z(2), torch.ones(3, dtype=torch.bool)),
        "keep must have the shape of log_ratio",
    ),
    (lambda: noised(Z(2, 3), Z(2, 3), Z(3)), r"sigma be \(2,\), got .* \(3,\)"),
    # settings
    (lambda: DiffusionNFT(beta=-1.0), "beta must be positive, got -1"),
    (lambda: DiffusionNFT(advantage_clip=0.0), "advantage_clip must be positive"),
    (lambda: DiffusionNFT(weighting="all"), "weighting must be 'none', 'sigma', .* got 'all'"),
    (lambda: AdvantageWeightedMatching(old_coef=-0.1), "old_coef must not be negative"),
    (lambda: AdvantageWeightedMatching(clip_range=-0.1), "clip_range must be positive or None"),
    (lambda: AdvantageWeightedMatching(weighting="self_normalized"), "weighting must be 'none', 'sigma' or"),
    (lambda: FlowDPPO(threshold=-1e-6), "threshold must not be negative"),
    (lambda: DecaySchedule(cap=1.5), r"cap must be in \[0, 1\], got 1.5"),
    (lambda: DecaySchedule(rate=-1.0), "rate must not be negative"),
    (lambda: DecaySchedule(flat=-1), "flat must be at least 0"),
    (lambda: NoiseLevels(count=0), "count must be at least 1"),
    (lambda: NoiseLevels(low=0.6, high=0.5), "low and high must be 0 <= low < high <= 1, got 0.6 and 0.5"),
    (lambda: NoiseLevels(low=NAN), "low must be a finite number, got nan"),
    (lambda: NoiseLevels(sampling="normal"), "sampling must be 'uniform' or 'logit_normal', got 'normal'"),
    (lambda: NoiseLevels(shift=0.0), "shift must be positive, got 0"),
    (lambda: NoiseLevels(std=math.inf), "std must be a finite number"),
    (lambda: NoiseLevels(mean=NAN), "mean must be a finite number"),
    (lambda: ObjectiveConfig(num_inner_epochs=0), "num_inner_epochs must be at least 1"),
    (lambda: ObjectiveConfig(micro_batch_size=0), "micro_batch_size must be at least 1"),
    (lambda: ObjectiveConfig(kl_coef=NAN), "kl_coef must be a finite number, got nan"),
    (lambda: ObjectiveConfig(max_grad_norm=0.0), "max_grad_norm must be positive"),
    (lambda: RewardGradientConfig(method="reinforce"), "method must be 'draft' or 'refl', got 'reinforce'"),
    (lambda: RewardGradientConfig(last_steps=0), "last_steps must be at least 1 or None"),
    (lambda: RewardGradientConfig(refl_from=1.0), r"refl_from must be in \[0, 1\), got 1"),
    (lambda: RewardGradientConfig(max_grad_norm=-1.0), "max_grad_norm must be positive"),
    # trainers
    (lambda: update(advantages=Z(3)), r"advantages must be \(b,\) or \(b, n\) for latents \(4, 2\), got \(3,\)"),
    (lambda: update(objective=FlowDPPO()), "rollout must hold stochastic steps for FlowDPPO"),
    (
        lambda: update(stochastic(), objective=FlowDPPO()),
        "kernel must be given to FlowDPPO where the rollout does not say",
    ),
    (lambda: update(kl_coef=0.1), "reference must be given when kl_coef is positive"),
    (
        lambda: update(velocity=lambda x, s, i: x[:, :1]),
        r"velocity_fn must return the shape of latents \(4, 2\), got \(4, 1\)",
    ),
    (lambda: step(group_size=1), "group_size must be at least 2"),
    (lambda: step(group_size=3), "group_size must divide the 4 rows of noise, got 3"),
    (lambda: step(objective=FlowDPPO()), "trainer must have an objective without a trajectory, got FlowDPPO"),
    (lambda: step(reward=lambda x, i: x.sum()), "reward_fn must return 4 numbers"),
    (lambda: step(reward=lambda x, i: {"a": [1.0]}), "for 'a', got shape"),
    (
        lambda: step(reward=lambda x, i: {"a": x[:, 0]}, reward_weights={"b": 1.0}),
        r"weights must name the rewards \['a'\], got \['b'\]",
    ),
    (lambda: step(solver="heun"), "solver must be 'dpm_solver_2m' or 'euler', got 'heun'"),
    (lambda: draw(policy, torch.randn(2, 2), torch.tensor([0.0, 1.0])), "sigmas must be strictly decreasing"),
    (lambda: draw(policy, torch.randn(2, 2), torch.tensor([2.0, 1.0])), r"sigmas must lie in \[0, 1\]"),
    (lambda: draw(policy, torch.randn(2), LINE), r"noise must be \(b, ...\)"),
    (lambda: draw(policy, torch.randn(2, 2), LINE, micro_batch_size=0), "micro_batch_size must be at least 1"),
    (lambda: draw(lambda x, s, i: x * NAN, torch.randn(2, 2), LINE), "velocity must be finite"),
    (lambda: draw(lambda x, s, i: x * NAN, torch.randn(2, 2), LINE, solver="euler"), "velocity must be finite"),
    (lambda: finished_samples(Z(2, 3), Z(3, dtype=torch.long)), r"index \(b,\), got \(2, 3\) and \(3,\)"),
    (lambda: finished_samples(torch.full((2, 3), NAN), Z(2, dtype=torch.long)), "latents must be finite"),
    (lambda: MovingAverage([WEIGHT]).follow(1.5), r"decay must be in \[0, 1\], got 1.5"),
    (lambda: MovingAverage([WEIGHT]).load_state_dict({"0": Z(3)}), "state must hold the average of 1 parameters"),
    (lambda: ascend(reward=lambda x, i: x.detach().sum(1)), "reward_fn must be differentiable"),
    (lambda: ascend(reward=lambda x, i: x.sum()), r"a tensor of 4 numbers, one per sample, got \(\)"),
    (lambda: ascend(reward=lambda x, i: [1.0] * 4), "got list"),
    (lambda: ascend(last_steps=9), r"last_steps must be in \[1, 4\] or None, got 9"),
    (lambda: ascend(noise=Z(0, 2)), "b at least 1"),
    (lambda: ascend(sigmas=torch.tensor([1.0])), "at least 2 entries"),
    (lambda: ascend(velocity=lambda x, s, i: x[:1]), "velocity_fn must return the shape of latents"),
    (lambda: draft_samples(policy, Z(2, 2), LINE, Z(2), last_steps=0), "last_steps must be in"),
    (lambda: refl_samples(policy, Z(2, 2), LINE, Z(2), 4), r"step must be in \[0, 3\], got 4"),
    # advantages
    (lambda: whiten(Z(2, 2)), r"advantages must be \(b,\) with b at least 1, got shape \(2, 2\)"),
    (lambda: gdpo_advantages({}, {}, Z(2)), "weights must name the rewards"),
    (lambda: token_advantages(Z(2), Z(2, 2, 3)), r"advantages must be \(b, s\) and regions \(b, s, n\)"),
    (lambda: token_advantages(Z(2, 3), Z(2, 2, 3)), "advantages must be"),
    (lambda: token_advantages(Z(2, 2), torch.full((2, 2, 3), 1.5)), r"regions must be in \[0, 1\], got 1.5 to 1.5"),
    (lambda: token_advantages(Z(2, 2), torch.full((2, 2, 3), NAN)), r"regions must be in \[0, 1\]"),
    (
        lambda: token_advantages(Z(2, 2), Z(2, 2, 3), background="mean"),
        "background must be 'sum' or 'zero', got 'mean'",
    ),
    (lambda: token_log_ratio(Z(2), Z(2), Z(2), Z(2)), r"next_latents must be \(b, n, ...\)"),
    # estimators
    (lambda: gradient_signal(Z(1, 3), 8), r"gradients must be \(m, p\) with m at least 2, got shape \(1, 3\)"),
    (lambda: gradient_signal(torch.full((2, 3), NAN), 8), "gradients must be finite"),
    (lambda: gradient_signal(Z(2, 3), 0), "samples_per_batch must be positive, got 0"),
    (lambda: samples_needed(1.0, 1.0, 8, cosine=1.0), r"cosine must be in \(0, 1\), got 1"),
    (lambda: controlled_variance(Z(2), Z(3).long(), Z(2), Z(2).long()), r"rewards and group_ids must both be \(b,\)"),
    (lambda: clip_activity(Z(0), 1.0), r"norms must be \(m,\)"),
    (lambda: clip_activity(Z(2), 0.0), "max_grad_norm must be positive"),
    (lambda: walk_ratio(Z(1, 3)), r"updates must be \(k, p\) with k at least 2"),
    (lambda: random_walk_length(0), "num_updates must be at least 1"),
    (lambda: random_walk_length(3, 1.0), r"momentum must be in \[0, 1\), got 1"),
    (lambda: SignalLog(rate=0.0), r"rate must be in \(0, 1\], got 0"),
    (lambda: SignalLog(walk_window=1), "walk_window must be 0 or at least 2, got 1"),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message[:60] for _, message in CASES])
def test_bad_input_is_one_sentence(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
