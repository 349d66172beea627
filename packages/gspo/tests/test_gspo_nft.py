"""DiffusionNFT: the loss against its slow twin, its directions, and its optimum in closed form."""

from __future__ import annotations

import pytest
import torch
from gspo import AdvantageWeightedMatching, DecaySchedule, DiffusionNFT, NoiseLevels, awm_loss, nft_loss, optimality
from gspo import reference_forward as slow
from gspo.forward import ForwardPoint
from hypothesis import given, settings
from hypothesis import strategies as st

NAN = float("nan")


def case(seed: int = 0, shape: tuple[int, ...] = (4, 2, 3)) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    velocity, old, target = (torch.randn(shape, generator=g) for _ in range(3))
    return velocity.requires_grad_(True), old, target, torch.rand(shape[0], generator=g) * 0.9 + 0.05


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("weighting", ["none", "self_normalized"])
@pytest.mark.parametrize("reward", [[1.0, 0.0, 0.5, 0.3], [0.2, NAN, 0.9, NAN]])
def test_loss_and_gradient_equal_the_slow_twin(beta: float, weighting: str, reward: list[float]) -> None:
    velocity, old, target, sigma = case()
    fast = nft_loss(velocity, old, target, torch.tensor(reward), beta=beta, sigma=sigma, weighting=weighting)
    (got,) = torch.autograd.grad(fast, velocity)
    loops = slow.nft_loss(velocity, old, target, reward, beta, sigma.tolist(), weighting == "self_normalized")
    (want,) = torch.autograd.grad(loops, velocity)
    torch.testing.assert_close(fast, loops, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert want.abs().max() > 1e-3


@pytest.mark.parametrize("weighting", ["none", "sigma", "sigma_squared", "self_normalized"])
@pytest.mark.parametrize(("r", "sign"), [(1.0, 1), (0.75, 1), (0.5, 0), (0.25, -1), (0.0, -1)])
def test_at_the_old_policy_the_gradient_is_towards_the_target_none_or_away(weighting: str, r: float, sign: int) -> None:
    _, old, target, sigma = case()
    velocity = old.clone().requires_grad_(True)
    loss = nft_loss(velocity, old, target, torch.full((4,), r), beta=0.7, sigma=sigma, weighting=weighting)
    (gradient,) = torch.autograd.grad(loss, velocity)
    downhill, towards = -gradient.flatten(1), (target - old).flatten(1)
    if sign == 0:
        assert downhill.abs().max() < 1e-7
        return
    cosine = torch.nn.functional.cosine_similarity(downhill, towards)
    torch.testing.assert_close(cosine, torch.full((4,), float(sign)), atol=1e-5, rtol=0)
    if weighting == "none":  # 2 beta (2 r - 1) (v_old - target), over 4 samples of 6 elements
        torch.testing.assert_close(gradient, 2 * 0.7 * (2 * r - 1) * (old - target) / (4 * 6), atol=1e-7, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(r=st.floats(0, 1), beta=st.floats(0.05, 4), seed=st.integers(0, 99))
def test_the_optimum_at_fixed_reward_is_the_closed_form(r: float, beta: float, seed: int) -> None:
    """A linear model, one free number per element, in fp64: gradient descent by Newton's exact step ends where the paper says."""
    velocity, old, target, _ = case(seed)
    leaf = velocity.detach().clone().requires_grad_(True)
    reward = torch.full((4,), r)
    (gradient,) = torch.autograd.grad(nft_loss(leaf, old, target, reward, beta=beta), leaf)
    curvature = 2 * beta**2 / (4 * 6)
    reached = leaf.detach() - gradient / curvature
    torch.testing.assert_close(reached, old + (2 * r - 1) * (target - old) / beta, atol=1e-4 / min(beta, 1), rtol=1e-5)


@pytest.mark.parametrize("weighting", ["none", "sigma", "sigma_squared"])
def test_a_linear_model_trained_by_gradient_descent_reaches_the_optimum_to_1e_5(weighting: str) -> None:
    """v = W x with as many rows as inputs: every target can be met, and so must be v_old + (2 r - 1)(target - v_old) / beta."""
    g = torch.Generator().manual_seed(3)
    x = torch.linalg.qr(torch.randn(4, 4, generator=g))[0] * 2
    old, target = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    reward, beta, sigma = torch.tensor([1.0, 0.8, 0.5, 0.1]), 0.5, torch.tensor([0.9, 0.6, 0.5, 0.3])
    weight = torch.zeros(4, 3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=4.0)
    for _ in range(600):
        optimizer.zero_grad()
        nft_loss(x @ weight, old, target, reward, beta=beta, sigma=sigma, weighting=weighting).backward()
        optimizer.step()
    want = old + (2 * reward[:, None] - 1) * (target - old) / beta
    assert (x @ weight - want).abs().max() < 1e-5


def test_no_gradient_reaches_the_old_policy() -> None:
    velocity, old, target, sigma = case()
    old.requires_grad_(True)
    loss = nft_loss(velocity, old, target, torch.full((4,), 0.8), beta=1.0, sigma=sigma, weighting="self_normalized")
    loss.backward()
    assert old.grad is None
    assert velocity.grad is not None


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.1, 10), seed=st.integers(0, 50))
def test_self_normalised_losses_grow_like_the_error_not_its_square(scale: float, seed: int) -> None:
    velocity, old, target, sigma = case(seed)
    reward = torch.tensor([1.0, 0.0, 0.5, 0.2])
    options = {"beta": 1.0, "sigma": sigma, "weighting": "self_normalized"}
    one = nft_loss(velocity, old, target, reward, **options)
    other = nft_loss(scale * velocity, scale * old, scale * target, reward, **options)
    torch.testing.assert_close(other, scale * one, rtol=1e-4, atol=1e-5)


def test_one_reward_per_token_is_a_mean_over_tokens() -> None:
    velocity, old, target, sigma = case(shape=(3, 5, 2))
    reward = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    got = nft_loss(velocity, old, target, reward, beta=0.5, sigma=sigma, reduction="none")
    for n in range(5):
        alone = nft_loss(velocity[:, n], old[:, n], target[:, n], reward[:, n], beta=0.5, reduction="none")
        torch.testing.assert_close(got[:, n], alone)
    same = nft_loss(
        velocity, old, target, reward[:, :1].expand(3, 5), beta=0.5, sigma=sigma, weighting="self_normalized"
    )
    rows = nft_loss(velocity, old, target, reward[:, 0], beta=0.5, sigma=sigma, weighting="self_normalized")
    torch.testing.assert_close(same, rows)


def test_missing_rewards_are_left_out_of_the_mean_and_are_0_one_by_one() -> None:
    velocity, old, target, _ = case()
    reward = torch.tensor([0.9, NAN, 0.2, NAN])
    kept = torch.tensor([0, 2])
    alone = nft_loss(velocity[kept], old[kept], target[kept], reward[kept], beta=1.0)
    torch.testing.assert_close(nft_loss(velocity, old, target, reward, beta=1.0), alone)
    single = nft_loss(velocity, old, target, reward, beta=1.0, reduction="none")
    assert single[[1, 3]].tolist() == [0, 0]
    assert nft_loss(velocity, old, target, torch.full((4,), NAN), beta=1.0).item() == 0


def test_rewards_become_probabilities() -> None:
    got = optimality(torch.tensor([-10.0, -5.0, -1.0, 0.0, 1.0, 5.0, NAN]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.4, 0.5, 0.6, 1.0, NAN]), equal_nan=True)


@pytest.mark.parametrize("weighting", ["none", "sigma", "sigma_squared"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_at_the_old_policy_the_objective_has_the_gradient_of_advantage_weighted_matching(
    weighting: str, beta: float
) -> None:
    """Two objectives from two papers meet where theory says they must: (2 r - 1) advantage_clip = A."""
    _, old, target, sigma = case()
    advantages = torch.tensor([1.5, -0.5, 0.0, 2.0])
    point = ForwardPoint(old, sigma, target)
    gradients = []
    for objective in (DiffusionNFT(beta=beta, weighting=weighting), AdvantageWeightedMatching(weighting=weighting)):
        velocity = old.clone().requires_grad_(True)
        losses = objective.loss(velocity, velocity.detach(), point, advantages).loss
        gradients.append(torch.autograd.grad(losses.sum(), velocity)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert gradients[1].abs().max() > 1e-2
    leaf = old.clone().requires_grad_(True)
    direct = awm_loss(leaf, old, target, advantages, sigma=sigma, weighting=weighting, reduction="none")
    torch.testing.assert_close(torch.autograd.grad(direct.sum(), leaf)[0], gradients[1])


def test_the_schedules_of_the_paper() -> None:
    on_policy, slow_start, late = (
        DecaySchedule(rate=0.0),
        DecaySchedule(),
        DecaySchedule(flat=75, rate=0.0075, cap=0.999),
    )
    assert [on_policy.at(i) for i in (0, 9, 999)] == [0, 0, 0]
    assert [slow_start.at(i) for i in (0, 100, 500, 9999)] == pytest.approx([0, 0.1, 0.5, 0.5])
    assert [late.at(i) for i in (0, 75, 85, 9999)] == pytest.approx([0, 0, 0.075, 0.999])


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 5), low=st.floats(0, 0.4), width=st.floats(0.1, 0.6), shift=st.floats(0.3, 5),
    sampling=st.sampled_from(["uniform", "logit_normal"]),
)  # fmt: skip
def test_noise_levels_stay_in_range_one_per_stratum(
    count: int, low: float, width: float, shift: float, sampling: str
) -> None:
    levels = NoiseLevels(count=count, sampling=sampling, low=low, high=min(low + width, 1.0), shift=shift)
    sigma = levels.draw(64, torch.Generator().manual_seed(0))
    bounds = [shift * s / (1 + (shift - 1) * s) for s in (levels.low, levels.high)]
    assert sigma.shape == (count, 64)
    assert float(sigma.min()) >= bounds[0] - 1e-6 and float(sigma.max()) <= bounds[1] + 1e-6
    assert float(sigma.min()) > 0 and float(sigma.max()) < 1
    assert bool((sigma[1:] >= sigma[:-1].amax(1, keepdim=True) - 1e-6).all()), "strata are in order and do not overlap"


def test_logit_normal_levels_have_its_quantiles() -> None:
    sigma = NoiseLevels(count=4, sampling="logit_normal", mean=0.3, std=0.8).draw(
        20000, torch.Generator().manual_seed(0)
    )
    logit = torch.logit(sigma.flatten())
    assert float(logit.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(logit.std()) == pytest.approx(0.8, abs=0.01)
