"""Bad input is a ValueError that names the argument, what came and what is expected."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from gspo import (
    DanceSDE,
    FlowCPS,
    FlowODE,
    FlowSDE,
    PolicyConfig,
    PolicyTrainer,
    SlidingWindow,
    auto_clip_range,
    clipped_surrogate_loss,
    gaussian_kl,
    gaussian_log_ratio,
    group_advantages,
    group_statistics,
    guard_step_weights,
    guarded_step_importance_ratio,
    multi_reward_advantages,
    rollout,
    sequence_importance_ratio,
)  # fmt: skip

NAN, Z = float("nan"), torch.zeros
LINE = torch.linspace(1, 0, 5)
IDS = torch.tensor([0, 0])


@pytest.fixture(autouse=True)
def without_shape_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' shape hook would catch wrong shapes before the package does; here the package must."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def draw(noise=None, sigmas=LINE, policy=None, kernel=None, window=(1,), **options):  # type: ignore[no-untyped-def]
    policy = policy or (lambda x, s, i: x)
    return rollout(
        policy, Z(1, 2) if noise is None else noise, sigmas, kernel=kernel or FlowSDE(), window=window, **options
    )


def late(x, sigma, index):  # type: ignore[no-untyped-def]
    """Finite in the window, not after it."""
    return x * (NAN if float(sigma[0]) <= 0.5 else 1.0)


STEP = FlowSDE().step
CASES = [
    # schedules and windows
    (lambda: draw(sigmas=torch.tensor([1.0, 1.0, 0.5, 0.0])), "sigmas must be strictly decreasing.*got"),
    (lambda: draw(sigmas=torch.tensor([0.5, 0.7, 0.2, 0.0])), "sigmas must be strictly decreasing"),
    (lambda: draw(sigmas=torch.tensor([1.0, NAN, 0.2, 0.0])), "sigmas must be strictly decreasing"),
    (lambda: draw(sigmas=torch.tensor([1.5, 0.7, 0.2, 0.0])), r"sigmas must lie in \[0, 1\]"),
    (lambda: draw(sigmas=torch.tensor([1.0])), "at least 2"),
    (lambda: draw(window=()), "window must hold"),
    (lambda: draw(window=(0, 2)), r"window must hold consecutive steps, got \[0, 2\]"),
    (lambda: draw(window=(3,)), "window must lie in .* not reach sigma 0"),
    (lambda: draw(window=(-1,)), "window must lie in"),
    (lambda: draw(noise=Z(3)), "noise"),
    (lambda: draw(noise=Z(0, 3)), "noise"),
    (lambda: draw(group_size=0), "group_size"),
    (lambda: draw(tail_steps=0), "tail_steps"),
    (lambda: draw(micro_batch_size=0), "micro_batch_size must be at least 1, as a whole number, got 0"),
    (lambda: draw(kernel=FlowODE()), "kernel must draw noise"),
    (lambda: SlidingWindow(1), "num_steps"),
    (lambda: SlidingWindow(4, size=4), "size"),
    (lambda: SlidingWindow(4, stride=0), "stride"),
    (lambda: SlidingWindow(4, strategy="x"), "strategy"),  # type: ignore[arg-type]
    (lambda: SlidingWindow(4, decay_rate=-1.0), "decay_rate"),
    (lambda: SlidingWindow(4).at(-1), "iteration"),
    # velocities
    (lambda: draw(policy=lambda x, s, i: x * NAN), "velocity must be finite"),
    (lambda: draw(policy=lambda x, s, i: x + float("inf"), window=(0,)), "velocity must be finite"),
    (lambda: draw(policy=late, tail_steps=1), "velocity must be finite"),
    (lambda: draw(policy=late), "velocity must be finite"),
    (lambda: draw(policy=lambda x, s, i: x[:, :1]), r"velocity must have the shape of latents \(1, 2\), got \(1, 1\)"),
    (lambda: draw(policy=lambda x, s, i: x if s[0] > 0.5 else x[:, :1], tail_steps=1), "velocity"),
    # kernels
    (lambda: STEP(Z(2, 3), Z(2, 4), 0.5, 0.4), "velocity must have the shape of latents"),
    (lambda: STEP(Z(2, 3), Z(2, 3), 0.5, 0.4, next_latents=Z(2, 4)), "next_latents must have the shape"),
    (lambda: STEP(Z(2, 3), Z(2, 3), 0.5, 0.4, next_latents=Z(2, 3) * NAN), "next_latents must be finite"),
    (lambda: STEP(Z(2, 3) * NAN, Z(2, 3), 0.5, 0.4), "latents must be finite"),
    (lambda: STEP(Z(2), Z(2), 0.5, 0.4), "latents must have a batch axis"),
    (lambda: STEP(Z(2, 3), Z(2, 3), 0.4, 0.5), "sigma_next must be below sigma"),
    (lambda: STEP(Z(2, 3), Z(2, 3), NAN, 0.5), "sigma_next must be below sigma"),
    (lambda: STEP(Z(2, 3), Z(2, 3), 1.4, 0.5), r"must lie in \[0, 1\]"),
    (lambda: STEP(Z(2, 3), Z(2, 3), torch.ones(3), 0.5), "sigma must be a number or have one entry per row"),
    (lambda: STEP(Z(2, 3), Z(2, 3), 1.0, 0.5, sigma_max=1.0), "sigma_max"),
    (lambda: FlowCPS().step(Z(2, 3), Z(2, 3), 0.4, 0.0), "sigma_next must be positive in a stochastic step"),
    (lambda: FlowSDE(0.0), "noise_level"),
    (lambda: FlowCPS(1.5), "noise_level"),
    (lambda: DanceSDE(-1.0), "eta"),
    # rewards and advantages
    (lambda: group_advantages(Z(2), torch.tensor([0, 1])), "group_ids.*got a group of one"),
    (lambda: group_statistics(Z(1), torch.tensor([0])), "group of one"),
    (lambda: group_advantages(Z(0), Z(0).long()), r"rewards must be \(b,\) with b at least 1, got shape \(0,\)"),
    (lambda: group_advantages(Z(2, 2), IDS), "rewards"),
    (lambda: group_advantages(Z(3), IDS), "group_ids must have the shape of rewards"),
    (lambda: group_advantages(Z(2), IDS, scale="batch"), "scale"),  # type: ignore[arg-type]
    (lambda: multi_reward_advantages({}, {}, IDS), "weights must name the rewards"),
    (
        lambda: multi_reward_advantages({"a": Z(2)}, {"b": 1.0}, IDS),
        r"weights must name the rewards \['a'\], got \['b'\]",
    ),
    # ratios and losses
    (lambda: sequence_importance_ratio(Z(2), Z(2)), "log_prob"),
    (lambda: sequence_importance_ratio(Z(2, 0), Z(2, 0)), "at least one step"),
    (lambda: guarded_step_importance_ratio(Z(2, 1), Z(2, 1), Z(2, 1, 3), Z(2, 1, 4), Z(2, 1)), "mean and old_mean"),
    (lambda: gaussian_log_ratio(Z(2, 3), Z(2, 3), Z(2, 4), Z(2)), "next_latents, mean and old_mean"),
    (lambda: clipped_surrogate_loss(torch.ones(2), torch.ones(3), 0.1), r"advantages must be \(b,\)"),
    (lambda: clipped_surrogate_loss(torch.ones(2), torch.ones(2), 0.0), "clip_range"),
    (lambda: clipped_surrogate_loss(torch.ones(2), torch.ones(2), 0.1, step_weights=Z(2)), "step_weights"),
    (lambda: guard_step_weights(Z(2), Z(2)), "sigma_next"),
    (lambda: gaussian_kl(Z(2, 3), Z(2, 4), Z(2)), "reference_mean"),
    (lambda: gaussian_kl(Z(2, 3), Z(2, 3), Z(3)), "std"),
    (lambda: auto_clip_range(torch.full((2,), NAN)), "ratio"),
    # configurations
    (lambda: PolicyConfig(ratio="token"), "ratio"),  # type: ignore[arg-type]
    (lambda: PolicyConfig(clip_range=0.0), "clip_range"),
    (lambda: PolicyConfig(clip_range="big"), "clip_range"),  # type: ignore[arg-type]
    (lambda: PolicyConfig(target_clip_fraction=1.0), "target_clip_fraction"),
    (lambda: PolicyConfig(clip_range_rate=0.0), "clip_range_rate"),
    (lambda: PolicyConfig(kl_coef=-1.0), "kl_coef"),
    (lambda: PolicyConfig(num_inner_epochs=0), "num_inner_epochs"),
    (lambda: PolicyConfig(micro_batch_size=0), "micro_batch_size"),
    (lambda: PolicyConfig(max_grad_norm=0.0), "max_grad_norm"),
    (
        lambda: PolicyTrainer([], None, PolicyConfig()).update(lambda x, s, i: x, draw(group_size=2), Z(3), FlowSDE()),  # type: ignore[arg-type]
        "advantages must be",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[f"{i}-{m[:24]}" for i, (_, m) in enumerate(CASES)])
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
