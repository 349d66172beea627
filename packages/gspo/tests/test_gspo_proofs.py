"""Statistics: the estimates are the policy gradient, and stochastic steps leave the marginals as they are."""

from __future__ import annotations

import pytest
import torch
from gspo import DanceSDE, FlowCPS, FlowODE, FlowSDE, PolicyConfig, PolicyTrainer, group_advantages, rollout
from gspo.reference import gaussian_velocity

SIGMAS = torch.linspace(1, 0, 7)
WINDOW, GROUP, BATCHES, DIM = (1, 2), 16, 60, 2


class Drift(torch.nn.Module):
    """velocity = 0.8 x + theta_t: linear, so that the final latents are a Gaussian whose mean is known."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([[0.0] * DIM, [0.3, -0.2], [0.1, 0.4], *[[0.0] * DIM] * 3]))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        step = int((SIGMAS[:-1] - sigma[0]).abs().argmin())
        return 0.8 * x + self.theta[step]


def closed_form(kernel, noise: torch.Tensor):  # type: ignore[no-untyped-def]
    """d E[-|x_final - c|^2] / d theta_t and the std of each window step, by propagating means."""
    theta = torch.tensor(
        [[0.0] * DIM, [0.3, -0.2], [0.1, 0.4], *[[0.0] * DIM] * 3], dtype=torch.float64, requires_grad=True
    )
    mean, stds = noise.double(), {}
    for t in range(6):
        s, s_next = SIGMAS[t].double(), SIGMAS[t + 1].double()
        a, b, std = kernel.coefficients(s, s_next, float(SIGMAS[1])) if t in WINDOW else (1.0, s_next - s, None)
        mean = a * mean + b * (0.8 * mean + theta[t])
        stds[t] = std
    # the variance does not depend on theta
    (gradient,) = torch.autograd.grad(-(mean - 1.0).square().sum(-1).mean(), theta)
    return gradient, stds


@pytest.mark.parametrize("kernel", [FlowSDE(), FlowCPS(0.6), DanceSDE(0.8)])
@pytest.mark.parametrize("ratio", ["step", "guarded", "sequence"])
def test_estimates_agree_with_the_closed_form_policy_gradient(ratio: str, kernel) -> None:  # type: ignore[no-untyped-def]
    """E[gradient of the loss at step t] = -w (1 - 1/G) / (n T) dJ/dtheta_t, with w = 1, or std_t for GRPO-Guard.

    n elements and T steps because log-probs are means over elements and losses means over steps; 1 - 1/G because a sample's own
    reward is in its group's mean.
    """
    model, g = Drift(), torch.Generator().manual_seed(0)
    noise = torch.randn(64, DIM, generator=g)
    config = PolicyConfig(ratio=ratio, clip_range=1.0, num_inner_epochs=1, max_grad_norm=1e9)  # type: ignore[arg-type]
    trainer = PolicyTrainer([model.theta], torch.optim.SGD([model.theta], lr=0.0), config)
    estimates = []
    for _ in range(BATCHES):
        drawn = rollout(model, noise, SIGMAS, kernel=kernel, window=WINDOW, group_size=GROUP, generator=g)
        rewards = -(drawn.latents - 1.0).square().sum(1)
        trainer.update(model, drawn, group_advantages(rewards, drawn.index, scale="none"), kernel)
        estimates.append(model.theta.grad.clone())
    gradient, stds = closed_form(kernel, noise)
    got = torch.stack(estimates).double()
    for t in WINDOW:
        weight = float(stds[t]) if ratio == "guarded" else 1.0
        want = -weight * (1 - 1 / GROUP) / (DIM * len(WINDOW)) * gradient[t]
        error = got[:, t].std(0) / BATCHES**0.5
        assert bool(((got[:, t].mean(0) - want).abs() < 4 * error).all()), (got[:, t].mean(0), want, error)
        assert bool((error < 0.1 * want.abs().max()).all()), "the error bars are small enough to tell"
    assert not got[:, [0, 3, 4, 5]].any(), "only the window is trained"


def final_latents(kernel, window: range, seed: int, steps: int = 100, count: int = 4000) -> torch.Tensor:  # type: ignore[no-untyped-def]
    g, levels = torch.Generator().manual_seed(seed), torch.linspace(1, 0, steps + 1).tolist()
    x = torch.randn(count, 1, generator=g)
    for i in range(steps):
        use = kernel if i in window else FlowODE()
        v = gaussian_velocity(x, levels[i], 1.0, 0.5)
        x = use.step(x, v, levels[i], levels[i + 1], generator=g, sigma_max=levels[1]).next_latents
    return x[:, 0]


@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        (FlowODE(), range(0)),
        (FlowSDE(), range(30, 32)),
        (FlowSDE(), range(98)),
        (FlowCPS(), range(30, 32)),
        (DanceSDE(), range(30, 32)),
        (DanceSDE(), range(20, 98)),
    ],
)
def test_marginals_stay_those_of_the_flow(kernel, window: range) -> None:  # type: ignore[no-untyped-def]
    """Kolmogorov-Smirnov against the data's N(1, 0.5^2), whose velocity is known in closed form."""
    stats = pytest.importorskip("scipy.stats", reason="needs gspo[test]")
    got = stats.kstest(final_latents(kernel, window, seed=0).numpy(), "norm", args=(1.0, 0.5))
    assert got.pvalue > 0.01


def test_kolmogorov_smirnov_would_notice() -> None:
    """It does for Flow-CPS over the whole schedule, whose noise is too small (docs/adr/0011), and for a velocity that is off."""
    stats = pytest.importorskip("scipy.stats", reason="needs gspo[test]")
    whole = final_latents(FlowCPS(), range(98), seed=0)
    assert stats.kstest(whole.numpy(), "norm", args=(1.0, 0.5)).pvalue < 1e-6 and whole.std() < 0.45
    shifted = final_latents(FlowSDE(), range(98), seed=0) + 0.1
    assert stats.kstest(shifted.numpy(), "norm", args=(1.0, 0.5)).pvalue < 1e-3
