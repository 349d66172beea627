"""Stochastic steps: the reference implementations' values, slow twins, exact densities."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from gspo import DanceSDE, FlowCPS, FlowODE, FlowSDE, gaussian_log_prob, reference
from gspo.sde import Kernel
from hypothesis import given, settings

ORACLES = json.loads((Path(__file__).parent / "data" / "oracles.json").read_text())
KERNELS = [FlowSDE(), FlowCPS(), DanceSDE()]
NAMES = ["flow_sde", "flow_cps", "dance_sde"]
OF = {
    "flow_sde": lambda case: FlowSDE(case["noise_level"]),
    "flow_cps": lambda case: FlowCPS(case["noise_level"]),
    "dance_sde": lambda case: DanceSDE(case["eta"]),
}
CASES = [(name, case) for name in NAMES for case in ORACLES[name]["cases"]]
INNER = [(name, case) for name, case in CASES if case["sigmas"][case["index"] + 1] > 0]


def tensors(case: dict) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(case[k]) for k in ("sample", "velocity", "next_sample", "mean")}


def step_of(name: str, case: dict):  # type: ignore[no-untyped-def]
    t, i, sigmas = tensors(case), case["index"], case["sigmas"]
    out = OF[name](case).step(
        t["sample"], t["velocity"], sigmas[i], sigmas[i + 1], next_latents=t["next_sample"], sigma_max=sigmas[1]
    )
    return out, t


@pytest.mark.parametrize(("name", "case"), CASES)
def test_mean_agrees_with_the_reference_on_every_step(name: str, case: dict) -> None:
    """The last step too: there the mean exists, only the density does not."""
    t, i, sigmas = tensors(case), case["index"], case["sigmas"]
    levels = (torch.tensor(sigmas[j], dtype=torch.float64) for j in (i, i + 1))
    a, b, _ = OF[name](case).coefficients(*levels, sigmas[1])
    torch.testing.assert_close((a * t["sample"] + b * t["velocity"]).float(), t["mean"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "case"), INNER)
def test_step_agrees_with_the_reference_up_to_the_terms_it_leaves_out(name: str, case: dict) -> None:
    """Flow-GRPO: the same log-prob. Dance-GRPO: no normaliser. Flow-CPS: no variance either. What is left out is asserted."""
    out, t = step_of(name, case)
    torch.testing.assert_close(out.mean, t["mean"], atol=1e-5, rtol=1e-5)
    if name == "flow_sde":
        i, sigmas = case["index"], case["sigmas"]
        std = torch.tensor(case["std_dev_t"]).flatten() * (sigmas[i] - sigmas[i + 1]) ** 0.5
        torch.testing.assert_close(out.std, std.expand(len(out.std)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.log_prob_mean, torch.tensor(case["log_prob_mean"]), atol=1e-5, rtol=1e-5)
        return
    normaliser = -out.std.log() - 0.5 * math.log(2 * math.pi)
    if name == "dance_sde":
        theirs = torch.tensor(case["log_prob_mean_without_constants"])
        torch.testing.assert_close(out.log_prob_mean, theirs + normaliser, atol=1e-5, rtol=1e-4)
        own = reference.dance_reference_log_prob(t["next_sample"], out.mean, out.std)
    else:
        theirs = torch.tensor(case["log_prob_mean_without_variance"])
        torch.testing.assert_close(out.std, torch.tensor(case["std"]).flatten().expand(2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.log_prob_mean, theirs / (2 * out.std**2) + normaliser, atol=1e-4, rtol=1e-4)
        own = reference.flow_cps_reference_log_prob(t["next_sample"], out.mean)
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_log_probs_are_full_gaussian_densities(kernel: Kernel) -> None:
    g = torch.Generator().manual_seed(0)
    out = kernel.step(torch.randn(3, 4, 5, generator=g), torch.randn(3, 4, 5, generator=g), 0.8, 0.6, generator=g)
    normal = torch.distributions.Normal(out.mean.double(), out.std.double().view(-1, 1, 1))
    full = normal.log_prob(out.next_latents.double()).flatten(1)
    torch.testing.assert_close(out.log_prob_mean.double(), full.mean(1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.log_prob_sum.double(), full.sum(1), atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rescoring_is_bit_equal_to_drawing(kernel: Kernel, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(3, 4, 5, generator=g).to(dtype), torch.randn(3, 4, 5, generator=g).to(dtype)
    for levels in ((0.8, 0.6), (torch.tensor([0.9, 0.8, 0.5]), torch.tensor([0.85, 0.3, 0.4]))):
        drawn = kernel.step(x, v, *levels, generator=g)
        again = kernel.step(x, v, *levels, next_latents=drawn.next_latents)
        assert drawn.next_latents.dtype == dtype
        assert {t.dtype for t in (drawn.mean, drawn.std, drawn.log_prob_mean, drawn.log_prob_sum)} == {torch.float32}
        assert torch.equal(drawn.log_prob_mean, again.log_prob_mean)
        assert torch.equal(drawn.log_prob_sum, again.log_prob_sum)


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_inputs_are_computed_in_fp32(kernel: Kernel) -> None:
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 6, generator=g).bfloat16() for _ in range(2))
    half, full = (kernel.step(t(x), t(v), 0.7, 0.5, next_latents=t(x)) for t in (lambda t: t, lambda t: t.float()))
    assert torch.equal(half.mean, full.mean) and torch.equal(half.log_prob_mean, full.log_prob_mean)


@given(
    x=st.floats(-3, 3), v=st.floats(-3, 3), y=st.floats(-3, 3), sigma=st.floats(0.05, 1), share=st.floats(0.05, 0.95),
    noise=st.floats(0.1, 0.95),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_kernels_equal_their_slow_twins(x: float, v: float, y: float, sigma: float, share: float, noise: float) -> None:
    after = share * sigma
    twins = [
        (FlowSDE(noise), reference.flow_sde_step(x, v, sigma, after, noise, 0.97)),
        (FlowCPS(noise), reference.flow_cps_step(x, v, sigma, after, noise)),
        (DanceSDE(noise), reference.dance_sde_step(x, v, sigma, after, noise)),
    ]
    row = [torch.tensor([[number]], dtype=torch.float64) for number in (x, v, y)]
    for kernel, (mean, std) in twins:
        out = kernel.step(*row[:2], sigma, after, next_latents=row[2], sigma_max=0.97)
        size = 1 + abs(mean) + abs(x) + abs(v)
        assert out.mean.item() == pytest.approx(mean, abs=1e-5 * size)
        assert out.std.item() == pytest.approx(std, rel=1e-5)
        want = reference.log_prob([y], [mean], std)
        assert out.log_prob_mean.item() == pytest.approx(want, rel=1e-3, abs=1e-3 + 1e-4 * abs(want))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_that_of_the_written_out_density(kernel: Kernel) -> None:
    """d log_prob / d velocity = b (x_next - mean) / (n std^2), and no gradient flows through the drawn sample."""
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 5, generator=g), torch.randn(2, 5, generator=g).requires_grad_()
    out = kernel.step(x, v, 0.8, 0.7, generator=g)
    out.log_prob_mean.sum().backward()
    b = kernel.coefficients(torch.tensor(0.8), torch.tensor(0.7))[1]
    want = b * (out.next_latents - out.mean.detach()) / (5 * out.std[:, None] ** 2)
    torch.testing.assert_close(v.grad, want, atol=1e-6, rtol=1e-4)
    assert not out.next_latents.requires_grad


@pytest.mark.parametrize("kernel", [FlowSDE(1e-4), FlowCPS(1e-4), DanceSDE(1e-4)])
def test_without_noise_every_kernel_is_the_ode(kernel: Kernel) -> None:
    x, v = torch.randn(2, 5), torch.randn(2, 5)
    ode = FlowODE().step(x, v, 0.8, 0.7)
    torch.testing.assert_close(kernel.step(x, v, 0.8, 0.7).mean, ode.mean, atol=1e-5, rtol=1e-5)
    assert ode.log_prob_mean is None and ode.log_prob_sum is None and not ode.std.any()
    torch.testing.assert_close(ode.next_latents, x - 0.1 * v)


@given(sigma=st.floats(0.1, 1), share=st.floats(0.05, 0.95), noise=st.floats(0.05, 1))
@settings(deadline=None, max_examples=50)
def test_cps_preserves_its_coefficients(sigma: float, share: float, noise: float) -> None:
    """x = (1 - sigma) data + sigma noise becomes (1 - sigma_next) data + noise of size sigma_next, kept and fresh together."""
    after = share * sigma
    a, b, std = FlowCPS(noise).coefficients(*(torch.tensor(s, dtype=torch.float64) for s in (sigma, after)))
    data = a * (1 - sigma) - b  # velocity = noise - data
    kept = a * sigma + b
    assert data.item() == pytest.approx(1 - after, abs=1e-9)
    assert (kept**2 + std**2).sqrt().item() == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_different_sigma_equal_rows_alone(kernel: Kernel) -> None:
    x, v, y = torch.randn(3, 3, 4)
    sigma, after = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.9, 0.5, 0.1])
    together = kernel.step(x, v, sigma, after, next_latents=y, sigma_max=0.95)
    for i in range(3):
        alone = kernel.step(
            x[i : i + 1], v[i : i + 1], float(sigma[i]), float(after[i]), next_latents=y[i : i + 1], sigma_max=0.95
        )
        torch.testing.assert_close(together.log_prob_mean[i], alone.log_prob_mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.mean[i], alone.mean[0])


def test_draws_have_the_stated_moments() -> None:
    x, v = torch.full((1, 100_000), 0.3), torch.full((1, 100_000), -1.0)
    for kernel in KERNELS:
        out = kernel.step(x, v, 0.8, 0.6, generator=torch.Generator().manual_seed(0))
        drawn = out.next_latents - out.mean
        assert drawn.mean().item() == pytest.approx(0, abs=4 * out.std.item() / 100_000**0.5)
        assert drawn.std().item() == pytest.approx(out.std.item(), rel=0.01)


def test_gaussian_log_prob_by_hand() -> None:
    mean, total = gaussian_log_prob(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([2.0]))
    want = -1 / 16 - math.log(2) - 0.5 * math.log(2 * math.pi)
    assert mean.item() == pytest.approx(want) and total.item() == pytest.approx(2 * want)
