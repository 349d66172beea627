"""Schedules that people have: they start at 1, or all but there, and a step keeps its noise within the flow."""

from __future__ import annotations

import itertools
import warnings

import hypothesis.strategies as st
import pytest
import torch
from gspo import DanceSDE, FlowCPS, FlowODE, FlowSDE, rescore, rollout
from gspo.reference import gaussian_velocity
from hypothesis import given, settings

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def std(sigma: float, sigma_next: float, sigma_max: float | None = None, noise_level: float = 0.7) -> float:
    levels = (torch.tensor(s, dtype=torch.float64) for s in (sigma, sigma_next))
    return float(FlowSDE(noise_level).coefficients(*levels, sigma_max)[2])


@pytest.mark.parametrize("sigma", [1 - 1e-9, 0.999999, 0.9999, 0.999, 0.99])
@pytest.mark.parametrize("sigma_max", [None, 0.9])
def test_just_below_1_is_1(sigma: float, sigma_max: float | None) -> None:
    """UniPC starts at .999999: sqrt(sigma / (1 - sigma)) would be 1000 there."""
    assert std(sigma, 0.9, sigma_max) == pytest.approx(std(1.0, 0.9, sigma_max), rel=0.06)
    assert std(sigma, 0.9, sigma_max) < 0.71


def test_away_from_1_the_formula_is_that_of_the_paper() -> None:
    for sigma, after in ((0.95, 0.9), (0.9643, 0.9231), (0.999, 0.998), (0.5, 0.1)):
        want = 0.7 * (sigma / (1 - sigma)) ** 0.5 * (sigma - after) ** 0.5
        assert std(sigma, after, 0.97) == pytest.approx(want, rel=1e-6)
        assert std(sigma, after) == pytest.approx(want, rel=1e-6)


@given(st.integers(2, 60), st.floats(0.2, 12), st.sampled_from([0.0, 1e-6, 1e-3, 3e-4]), st.floats(0.1, 0.76))
@settings(deadline=None)
def test_no_schedule_draws_more_noise_than_there_is(steps: int, shift: float, below: float, noise_level: float) -> None:
    """Any shift, any number of steps, starting at 1 or a little below: at most 1.64 noise levels (shift 12, the second of three steps)."""
    line = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = (shift * line / (1 + (shift - 1) * line)).tolist()
    levels[0] -= below * (1 - levels[1])
    for a, b in zip(levels[:-2], levels[1:-1], strict=True):
        assert std(a, b, levels[1], noise_level) <= 1.25 * a + 1e-9


def test_two_levels_that_are_both_all_but_1_do_not_explode() -> None:
    assert std(0.9999, 0.9, 0.9999) < 0.71


@pytest.mark.parametrize("level", [float, lambda value: torch.tensor([value])])
def test_a_step_that_draws_more_than_the_latents_hold_is_said_every_time(level) -> None:
    x, said = torch.zeros(1, 2), r"FlowSDE draws noise of std 2.60 from sigma 0.9 to 0.6, more than the latents hold"
    for _ in range(2):
        with pytest.warns(UserWarning, match=said) as caught:
            out = FlowSDE(1.5811).step(x, x, level(0.9), level(0.6), next_latents=x, sigma_max=0.9)
        assert float(out.std) == pytest.approx(2.598, abs=0.001) and caught[0].filename == __file__


def test_a_level_is_the_same_as_a_number_and_as_a_row() -> None:
    x, v, after = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    for kernel in (FlowSDE(), FlowCPS(), DanceSDE()):
        one = kernel.step(x, v, 0.8, 0.7, next_latents=after, sigma_max=0.9)
        row = kernel.step(
            x,
            v,
            torch.full((3,), 0.8, dtype=torch.float64),
            torch.full((3,), 0.7, dtype=torch.float64),
            next_latents=after,
            sigma_max=0.9,
        )
        assert all(torch.equal(a, b) for a, b in zip(one, row, strict=True))
        with pytest.raises(ValueError, match="sigma_next must be below sigma"):
            kernel.step(x, v, 0.7, 0.8)


@pytest.mark.parametrize("kernel", [FlowSDE(), FlowCPS(), DanceSDE()])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
        ("UniPCMultistepScheduler", FLOW),
        ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
        ("DPMSolverMultistepScheduler", FLOW),
        ("DPMSolverSinglestepScheduler", FLOW),
    ],
)
def test_schedulers_of_the_field_work(name: str, options: dict, kernel) -> None:  # type: ignore[no-untyped-def]
    """Noise within bounds, rescoring exact, and samples of the right spread, on the exact flow to N(0, .5^2)."""
    diffusers = pytest.importorskip("diffusers", reason="needs gspo[diffusers]")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(30)
    policy = lambda x, s, i: gaussian_velocity(x, s, 0.0, 0.5)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = rollout(
            policy, torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)), scheduler.sigmas, kernel=kernel,
            window=(0, 1, 2), group_size=2, generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
    assert max(float(step.std.max()) for step in drawn.trajectory) <= 1
    assert torch.equal(rescore(policy, drawn).log_prob_mean, drawn.log_prob_mean)
    if not isinstance(kernel, FlowCPS):  # which keeps its marginals in small windows only: docs/adr/0011
        x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(2))
        for a, b in itertools.pairwise(scheduler.sigmas.tolist()):
            x = FlowODE().step(x, policy(x, torch.full((4,), a), None), a, b).next_latents
        assert float(drawn.latents.std()) == pytest.approx(float(x.std()), abs=0.07)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}, "strictly decreasing .* got 0.857286 after 0.857286 at step 1"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "strictly decreasing"),
        ("UniPCMultistepScheduler", {**FLOW, "final_sigmas_type": "sigma_min"}, "strictly decreasing"),
        ("UniPCMultistepScheduler", {}, r"must lie in \[0, 1\], as those of flow-matching schedulers do, got 157"),
        ("DPMSolverMultistepScheduler", {}, r"must lie in \[0, 1\]"),
        ("EulerDiscreteScheduler", {}, r"must lie in \[0, 1\]"),
        ("EDMEulerScheduler", {}, r"must lie in \[0, 1\]"),
    ],
)
def test_schedulers_of_other_models_are_one_sentence(name: str, options: dict, message: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs gspo[diffusers]")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match=message) as raised:
        rollout(lambda x, s, i: x, torch.zeros(1, 2), scheduler.sigmas, kernel=FlowSDE(), window=(0,))
    assert len(str(raised.value)) < 160


def test_a_schedule_that_ends_early_is_said() -> None:
    with pytest.warns(UserWarning, match="sigmas end at 0.2, not at 0"):
        rollout(lambda x, s, i: x, torch.zeros(1, 2), [1, 0.6, 0.2], kernel=FlowSDE(), window=(0,))
