from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
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
    group_advantages,
    group_statistics,
    guarded_step_importance_ratio,
    multi_reward_advantages,
    reference,
    rescore,
    rollout,
    sequence_importance_ratio,
    step_importance_ratio,
)  # fmt: skip
from hypothesis import given, settings

ORACLES = json.loads((Path(__file__).parent / "data" / "oracles.json").read_text())
KERNELS = [FlowSDE(), FlowCPS(), DanceSDE()]


def step(case: dict, kernel, **options):  # type: ignore[no-untyped-def]
    t = {k: torch.tensor(case[k]) for k in ("sample", "velocity", "next_sample", "mean")}
    i, sigmas = case["index"], case["sigmas"]
    out = kernel.step(
        t["sample"],
        t["velocity"],
        sigmas[i],
        sigmas[i + 1],
        next_latents=t["next_sample"],
        sigma_max=sigmas[1],
        **options,
    )
    torch.testing.assert_close(out.mean, t["mean"], atol=1e-5, rtol=1e-5)
    return out, t


def inner(name: str) -> list[dict]:
    return [c for c in ORACLES[name]["cases"] if c["sigmas"][c["index"] + 1] > 0]


@pytest.mark.parametrize("case", inner("flow_sde"))
def test_flow_sde_agrees_with_flow_grpo(case: dict) -> None:
    out, _ = step(case, FlowSDE(case["noise_level"]))
    i, sigmas = case["index"], case["sigmas"]
    want = torch.tensor(case["std_dev_t"]).flatten() * (sigmas[i] - sigmas[i + 1]) ** 0.5
    torch.testing.assert_close(out.std, want.expand(len(out.std)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.log_prob_mean, torch.tensor(case["log_prob_mean"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", inner("flow_cps"))
def test_flow_cps_agrees_up_to_the_variance_it_leaves_out(case: dict) -> None:
    out, t = step(case, FlowCPS(case["noise_level"]))
    torch.testing.assert_close(
        reference.flow_cps_reference_log_prob(t["next_sample"], out.mean),
        torch.tensor(case["log_prob_mean_without_variance"]),
        atol=1e-5,
        rtol=1e-5,
    )
    full = torch.distributions.Normal(out.mean, out.std.view(-1, 1, 1, 1)).log_prob(t["next_sample"])
    torch.testing.assert_close(out.log_prob_mean, full.flatten(1).mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.log_prob_sum, full.flatten(1).sum(1), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("case", inner("dance_sde"))
def test_dance_sde_agrees_up_to_the_constants_it_leaves_out(case: dict) -> None:
    out, t = step(case, DanceSDE(case["eta"]))
    got = reference.dance_reference_log_prob(t["next_sample"], out.mean, out.std)
    torch.testing.assert_close(got, torch.tensor(case["log_prob_mean_without_constants"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ORACLES["group_advantage"]["cases"])
def test_advantages_agree_with_flow_grpo(case: dict) -> None:
    names = sorted(set(case["prompts"]))
    ids = torch.tensor([names.index(p) for p in case["prompts"]])
    got = group_advantages(
        torch.tensor(case["rewards"], dtype=torch.float64), ids, scale="global" if case["global_std"] else "group"
    )
    torch.testing.assert_close(got, torch.tensor(case["advantages"], dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ORACLES["mixgrpo_window"]["cases"])
def test_window_equals_the_reference_wherever_that_one_is_full(case: dict) -> None:
    ours = SlidingWindow(
        case["num_steps"], size=case["window"], stride=case["stride"], interval=case["iters_per_shift"]
    )
    sweep = len(ours.starts) * case["iters_per_shift"]
    for entry in case["schedule"]:
        if len(entry["window"]) == case["window"] and entry["first_iteration"] < sweep:
            assert list(ours.at(entry["first_iteration"])) == entry["window"]


@given(
    n=st.integers(2, 30),
    size=st.integers(1, 5),
    stride=st.integers(1, 5),
    iteration=st.integers(0, 5000),
    kind=st.sampled_from(["progressive", "random", "exp_decay"]),
)
@settings(deadline=None)
def test_window_is_never_empty_and_never_last(n: int, size: int, stride: int, iteration: int, kind: str) -> None:
    size = min(size, n - 1)
    w = SlidingWindow(n, size=size, stride=stride, interval=7, strategy=kind, seed=3)  # type: ignore[arg-type]
    got = w.at(iteration)
    assert len(got) == size and got[0] >= 0 and got[-1] <= n - 2 and list(got) == list(range(got[0], got[0] + size))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescoring_is_bit_equal_to_drawing(kernel, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(3, 4, 5, generator=g).to(dtype), torch.randn(3, 4, 5, generator=g).to(dtype)
    drawn = kernel.step(x, v, 0.8, 0.6, generator=g)
    again = kernel.step(x, v, 0.8, 0.6, next_latents=drawn.next_latents)
    assert drawn.next_latents.dtype == dtype and drawn.log_prob_mean.dtype == torch.float32
    assert torch.equal(drawn.log_prob_mean, again.log_prob_mean) and torch.equal(drawn.log_prob_sum, again.log_prob_sum)


def test_kernels_equal_their_slow_twins() -> None:
    out = FlowSDE(0.7).step(
        torch.tensor([[0.3]]), torch.tensor([[-1.2]]), 1.0, 0.9, next_latents=torch.tensor([[0.5]]), sigma_max=0.95
    )
    mean, std = reference.flow_sde_step(0.3, -1.2, 1.0, 0.9, 0.7, 0.95)
    assert out.mean.item() == pytest.approx(mean, rel=1e-5) and out.std.item() == pytest.approx(std, rel=1e-5)
    assert out.log_prob_mean is not None
    assert out.log_prob_mean.item() == pytest.approx(reference.log_prob([0.5], [mean], std), rel=1e-4)


@pytest.mark.parametrize("kernel", [*KERNELS[:2], FlowODE()])
def test_marginals_stay_those_of_the_flow(kernel) -> None:  # type: ignore[no-untyped-def]
    """Gaussian data N(1, 0.5^2): the velocity is known in closed form, and every kernel must end in that distribution."""
    g = torch.Generator().manual_seed(0)
    mu, tau = 1.0, 0.5

    def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
        variance = (1 - s) ** 2 * tau**2 + s**2
        data = mu + (1 - s) * tau**2 / variance * (x - (1 - s) * mu)
        return (x - data) / s if s > 0 else x

    x, sigmas = torch.randn(40_000, 1, generator=g), torch.linspace(1, 0, 101).tolist()
    for i in range(100):
        # CPS renews a fixed share of the noise at every step, so only a window of it leaves the marginals as they are
        stochastic = i in (30, 31) if isinstance(kernel, FlowCPS) else 0 <= i < 98
        use = kernel if stochastic else FlowODE()
        x = use.step(x, velocity(x, sigmas[i]), sigmas[i], sigmas[i + 1], generator=g, sigma_max=sigmas[1]).next_latents
    assert x.mean().item() == pytest.approx(mu, abs=0.03) and x.std().item() == pytest.approx(tau, abs=0.03)


def linear_policy(weight: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda x, sigma, index: x @ weight * (1 + 0.1 * index[:, None].to(x.dtype))


def test_shared_prefix_equals_plain_rollout_and_counts() -> None:
    weight, noise = torch.eye(6) * 0.5 + 0.1, torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    sigmas = torch.linspace(1, 0, 17)
    runs = [
        rollout(
            linear_policy(weight),
            noise,
            sigmas,
            kernel=FlowSDE(),
            window=(5, 6),
            group_size=4,
            share_prefix=shared,
            generator=torch.Generator().manual_seed(2),
        )
        for shared in (True, False)
    ]
    torch.testing.assert_close(runs[0].latents, runs[1].latents)
    torch.testing.assert_close(runs[0].log_prob_mean, runs[1].log_prob_mean)
    assert runs[0].num_function_evaluations == 3 * (5 + 4 * 11) and runs[1].num_function_evaluations == 3 * 4 * 16
    assert runs[0].index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # over a full sweep of the window, groups of 12: at least 1.55 times fewer
    counts = []
    for shared in (True, False):
        window = SlidingWindow(16, interval=1)
        counts.append(sum(
            rollout(
                lambda x, s, i: x, noise[:1], sigmas, kernel=FlowCPS(), window=window.at(t), group_size=12, share_prefix=shared
            ).num_function_evaluations
            for t in range(len(window.starts))
        ))  # fmt: skip
    assert counts[1] / counts[0] >= 1.55
    tail = sum(
        rollout(
            lambda x, s, i: x,
            noise[:1],
            sigmas,
            kernel=FlowCPS(),
            window=w,
            group_size=12,
            tail_steps=max(1, round(0.4 * (15 - w[-1]))),
        ).num_function_evaluations
        for w in (SlidingWindow(16, interval=1).at(t) for t in range(14))
    )
    assert counts[1] / tail >= 2.5


def test_second_order_tail_is_closer_than_euler_with_as_many_steps() -> None:
    def velocity(x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        s = sigma[:, None]
        variance = (1 - s) ** 2 * 0.25 + s**2
        return (x - 1 - (1 - s) * 0.25 / variance * (x - (1 - s))) / s

    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    from gspo.solver import solve_tail

    levels = torch.linspace(0.8, 0, 401).tolist()
    x, index = noise, torch.zeros(64, dtype=torch.long)

    def euler(grid: list[float]) -> torch.Tensor:
        y = x
        for a, b in zip(grid[:-1], grid[1:], strict=True):
            y = y + (b - a) * velocity(y, torch.full((64,), a), index)
        return y

    truth = euler(torch.linspace(0.8, 0, 4001).tolist())
    second, calls = solve_tail(velocity, x, index, levels, 6)
    first = euler(torch.linspace(0.8, 0, 7).tolist())
    assert calls == 6 and (second - truth).abs().mean() < 0.7 * (first - truth).abs().mean()


@pytest.mark.parametrize("kind", ["sequence", "step", "guarded"])
@pytest.mark.parametrize("kernel", [FlowSDE(), FlowCPS()])
def test_ratio_is_one_on_policy_and_the_update_raises_the_reward(kind: str, kernel) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    policy = lambda x, sigma, index: x + x @ weight  # noqa: E731
    optimizer = torch.optim.Adam([weight], lr=0.02)
    trainer = PolicyTrainer([weight], optimizer, PolicyConfig(ratio=kind))  # type: ignore[arg-type]
    g, sigmas, window = torch.Generator().manual_seed(0), torch.linspace(1, 0, 9), SlidingWindow(8, interval=5)
    means = []
    for iteration in range(40):
        got = rollout(
            policy,
            torch.randn(8, 2, generator=g),
            sigmas,
            kernel=kernel,
            window=window.at(iteration),
            group_size=8,
            generator=g,
        )
        reward = -(got.latents - 0.0).square().sum(1)
        means.append(reward.mean().item())
        with torch.no_grad():
            scores = rescore(policy, got, kernel)
        assert torch.equal(scores.log_prob_mean, got.log_prob_mean)
        stats = trainer.update(policy, got, group_advantages(reward, got.index), kernel)
        assert not stats.skipped
    assert sum(means[-10:]) > sum(means[:10])


def test_accumulated_gradient_equals_one_backward() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 3) * 0.1)
    policy = lambda x, sigma, index: x @ weight  # noqa: E731
    g = torch.Generator().manual_seed(0)
    got = rollout(
        policy,
        torch.randn(4, 3, generator=g),
        torch.linspace(1, 0, 9),
        kernel=FlowSDE(),
        window=(2, 3, 4),
        group_size=3,
        generator=g,
    )
    advantages = group_advantages(got.latents.sum(1), got.index)
    advantages[3] = torch.nan
    with torch.no_grad():
        weight += 0.01
    new = rescore(policy, got, FlowSDE()).log_prob_mean
    want = torch.autograd.grad(
        clipped_surrogate_loss(sequence_importance_ratio(new, got.log_prob_mean), advantages, 0.5).loss, weight
    )[0]
    trainer = PolicyTrainer(
        [weight], torch.optim.SGD([weight], lr=0.0), PolicyConfig(clip_range=0.5, num_inner_epochs=1, max_grad_norm=1e9)
    )
    trainer.update(policy, got, advantages, FlowSDE())
    torch.testing.assert_close(weight.grad, want)


def test_nan_reward_never_reaches_the_optimizer() -> None:
    rewards, ids = torch.tensor([1.0, float("nan"), 2.0, 3.0]), torch.tensor([0, 0, 0, 0])
    advantages = group_advantages(rewards, ids)
    assert advantages.isnan().tolist() == [False, True, False, False]
    assert group_statistics(rewards, ids).num_invalid_rewards == 1
    ratio = torch.ones(4, requires_grad=True)
    clipped_surrogate_loss(ratio, advantages, 0.1).loss.backward()
    assert ratio.grad is not None and ratio.grad[1] == 0 and bool(torch.isfinite(ratio.grad).all())


@given(st.lists(st.integers(-500, 500), min_size=4, max_size=12), st.integers(-10, 10))
@settings(deadline=None)
def test_advantages_are_centred_and_shift_invariant(values: list[int], shift: int) -> None:
    rewards = torch.tensor(values, dtype=torch.float64) / 100
    ids = torch.arange(len(values)) % 2
    a = group_advantages(rewards, ids)
    for group in (0, 1):
        assert abs(a[ids == group].sum().item()) < 1e-6
    torch.testing.assert_close(a, group_advantages(rewards + shift, ids), atol=1e-4, rtol=1e-4)


def test_zero_variance_groups_are_zero_and_counted() -> None:
    rewards, ids = torch.tensor([0.1, 0.1, 0.1, 5.0, 6.0, 7.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert group_advantages(rewards, ids)[:3].tolist() == [0, 0, 0]
    assert group_statistics(rewards, ids)[:2] == (2, 1)
    want = reference.group_advantages(rewards[3:].tolist(), [1, 1, 1])
    torch.testing.assert_close(group_advantages(rewards, ids)[3:], torch.tensor(want))
    both = multi_reward_advantages({"a": rewards, "b": -rewards}, {"a": 1.0, "b": 1.0}, ids)
    torch.testing.assert_close(both, torch.zeros(6), atol=1e-6, rtol=0)


def test_ratios_and_surrogate_by_hand() -> None:
    new, old = torch.tensor([[0.2, 0.4], [0.0, -0.2]]), torch.zeros(2, 2)
    torch.testing.assert_close(sequence_importance_ratio(new, old), torch.tensor([0.3, -0.1]).exp())
    torch.testing.assert_close(step_importance_ratio(new, old), new.exp())
    got = clipped_surrogate_loss(torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0]), 0.2)
    assert got.loss.item() == pytest.approx(-(1.2 - 0.8) / 2) and got.clip_fraction == 1
    torch.testing.assert_close(
        clipped_surrogate_loss(sequence_importance_ratio(new, old), torch.tensor([1.0, -2.0]), 0.1).loss,
        reference.surrogate(new, old, torch.tensor([1.0, -2.0]), 0.1),
    )
    assert gaussian_kl(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([0.5])).item() == pytest.approx(2.0)
    assert auto_clip_range(torch.tensor([1.1, 0.8, 1.0]), 0.5) == pytest.approx(0.1)


def test_guarded_ratio_is_centred_for_samples_of_the_old_policy() -> None:
    g = torch.Generator().manual_seed(0)
    old_mean, std = torch.zeros(4000, 1, 8), torch.full((4000, 1), 0.1)
    mean = old_mean + 0.05
    sample = old_mean + 0.1 * torch.randn(old_mean.shape, generator=g)
    log = lambda m: -((sample - m).square().mean(2)) / (2 * 0.01)  # noqa: E731
    plain = step_importance_ratio(log(mean), log(old_mean)).log().mean()
    guarded = guarded_step_importance_ratio(log(mean), log(old_mean), mean, old_mean, std).log().mean()
    assert plain < -0.1 and abs(guarded) < 0.002


@pytest.mark.parametrize(("call", "word"), [
    (lambda: rollout(lambda x, s, i: x, torch.zeros(1, 2), torch.tensor([1.0, 1.0, 0.0]), kernel=FlowSDE(), window=(0,)), "sigmas"),
    (lambda: rollout(lambda x, s, i: x, torch.zeros(1, 2), torch.linspace(1, 0, 5), kernel=FlowSDE(), window=()), "window"),
    (lambda: rollout(lambda x, s, i: x, torch.zeros(1, 2), torch.linspace(1, 0, 5), kernel=FlowSDE(), window=(3,)), "window"),
    (lambda: rollout(lambda x, s, i: x * torch.nan, torch.zeros(1, 2), torch.linspace(1, 0, 5), kernel=FlowSDE(), window=(1,)), "velocity"),
    (lambda: FlowSDE().step(torch.zeros(2, 3), torch.zeros(2, 4), 0.5, 0.4), "velocity"),
    (lambda: FlowSDE().step(torch.zeros(2, 3), torch.zeros(2, 3), 0.4, 0.5), "sigma_next"),
    (lambda: FlowCPS().step(torch.zeros(2, 3), torch.zeros(2, 3), 0.4, 0.0), "sigma_next"),
    (lambda: FlowSDE(0.0), "noise_level"),
    (lambda: group_advantages(torch.zeros(2), torch.tensor([0, 1])), "group_ids"),
    (lambda: group_advantages(torch.zeros(0), torch.zeros(0)), "rewards"),
    (lambda: clipped_surrogate_loss(torch.ones(2), torch.ones(3), 0.1), "advantages"),
    (lambda: SlidingWindow(4, size=4), "size"),
    (lambda: PolicyConfig(ratio="token"), "ratio"),  # type: ignore[arg-type]
])  # fmt: skip
def test_bad_input_is_named(call, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        call()
