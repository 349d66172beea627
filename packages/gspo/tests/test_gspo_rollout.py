from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from gspo import FlowCPS, FlowODE, FlowSDE, SlidingWindow, rescore, rollout
from gspo.reference import gaussian_velocity
from gspo.solver import dpm_solver_2m_step, solve_tail, tail_sigmas

SIGMAS = torch.linspace(1, 0, 17)


def linear_policy(weight: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda x, sigma, index: x @ weight * (1 + 0.1 * index[:, None].to(x.dtype))


def draw(policy, noise, **options):  # type: ignore[no-untyped-def]
    options = {"kernel": FlowSDE(), "window": (5, 6), "group_size": 4, **options}
    return rollout(policy, noise, SIGMAS, generator=torch.Generator().manual_seed(2), **options)


@pytest.mark.parametrize("tail_steps", [None, 3])
@pytest.mark.parametrize("window", [(0, 1), (5, 6), (13, 14)])
def test_shared_prefix_equals_plain_rollout(window: tuple[int, int], tail_steps: int | None) -> None:
    weight, noise = torch.eye(6) * 0.5 + 0.1, torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    one, two = (
        draw(linear_policy(weight), noise, window=window, tail_steps=tail_steps, share_prefix=shared)
        for shared in (True, False)
    )
    torch.testing.assert_close(one.latents, two.latents)
    torch.testing.assert_close(one.log_prob_mean, two.log_prob_mean)
    after = tail_steps or 15 - window[1]
    assert one.num_function_evaluations == 3 * (window[0] + 4 * (2 + after))
    assert two.num_function_evaluations == 3 * 4 * (window[0] + 2 + after)
    assert one.index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [s.step for s in one.trajectory] == list(window)
    assert (one.latents[0] - one.latents[1]).abs().max() > 1e-3, "members differ"


def test_counted_evaluations_are_the_calls_made() -> None:
    calls = []
    for options in ({}, {"share_prefix": False}, {"tail_steps": 2}):
        calls.clear()
        got = draw(lambda x, s, i: calls.append(len(x)) or x, torch.randn(3, 6), **options)
        assert sum(calls) == got.num_function_evaluations


def test_evaluations_over_a_sweep() -> None:
    """16 steps, windows of 2, groups of 12: the shared prefix alone, and with a second-order tail of 40 % of the steps left."""

    def sweep(tail: float | None, shared: bool) -> int:
        counts = 0
        for w in (SlidingWindow(16, interval=1).at(t) for t in range(14)):
            steps = None if tail is None else max(1, round(tail * (15 - w[-1])))
            counts += rollout(
                lambda x, s, i: x, torch.randn(1, 2), SIGMAS, kernel=FlowCPS(), window=w, group_size=12,
                share_prefix=shared, tail_steps=steps,
            ).num_function_evaluations  # fmt: skip
        return counts

    plain = sweep(None, False)
    assert plain == 14 * 12 * 16
    assert plain / sweep(None, True) >= 1.55
    assert plain / sweep(0.4, True) >= 2.5


def test_rollout_is_its_steps_one_by_one() -> None:
    """Written out by hand from kernels, with the same generator."""
    weight, noise = torch.randn(3, 3) * 0.3, torch.randn(2, 3)
    policy = linear_policy(weight)
    got = draw(policy, noise, window=(1, 2), group_size=2)
    g, index, x = torch.Generator().manual_seed(2), torch.tensor([0, 0, 1, 1]), noise.repeat_interleave(2, 0)
    levels = SIGMAS.tolist()
    for step in range(16):
        kernel = FlowSDE() if step in (1, 2) else FlowODE()
        v = policy(x, torch.full((4,), levels[step]), index)
        x = kernel.step(x, v, levels[step], levels[step + 1], generator=g, sigma_max=levels[1]).next_latents
    torch.testing.assert_close(got.latents, x)
    assert torch.equal(got.trajectory[0].next_latents, got.trajectory[1].latents)


def test_offloaded_trajectory_is_the_same_and_scores_the_same() -> None:
    policy, noise = linear_policy(torch.eye(6) * 0.4), torch.randn(3, 6)
    here, away = (draw(policy, noise, offload=offload) for offload in (False, True))
    for one, two in zip(here.trajectory, away.trajectory, strict=True):
        assert two.latents.device.type == "cpu"
        assert torch.equal(one.latents, two.latents) and torch.equal(one.mean, two.mean)
    again = rescore(policy, away, FlowSDE())
    assert torch.equal(again.log_prob_mean, here.log_prob_mean)
    assert not again.log_ratio.any()
    kept = {t.data_ptr() for s in away.trajectory for t in (s.latents, s.next_latents)}
    assert len(kept) == 3, "consecutive steps share what lies between them"


def test_rescoring_rows_and_steps() -> None:
    policy, noise = linear_policy(torch.eye(6) * 0.4), torch.randn(3, 6)
    got = draw(policy, noise)
    rows = torch.tensor([7, 2])
    part = rescore(linear_policy(torch.eye(6) * 0.5), got, FlowSDE(), rows=rows, steps=[1])
    whole = rescore(linear_policy(torch.eye(6) * 0.5), got, FlowSDE())
    torch.testing.assert_close(part.log_ratio, whole.log_ratio[rows][:, 1:])
    torch.testing.assert_close(part.mean, whole.mean[rows][:, 1:])
    difference = whole.log_prob_mean - got.log_prob_mean
    torch.testing.assert_close(whole.log_ratio, difference, atol=1e-5, rtol=1e-4)


def test_hooks_enclose_the_windows_velocities_only() -> None:
    inside, calls = [], []

    @contextmanager
    def hook(position: int, rows: torch.Tensor):  # type: ignore[no-untyped-def]
        inside.append((position, rows.tolist()))
        yield
        inside.append(None)

    def policy(x, sigma, index):  # type: ignore[no-untyped-def]
        calls.append(bool(inside) and inside[-1] is not None)
        return x

    got = draw(policy, torch.randn(2, 3), record=hook, group_size=2)
    assert [i for i, c in enumerate(calls) if c] == [5, 6]
    assert [entry for entry in inside if entry] == [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3])]
    inside.clear()
    rescore(policy, got, FlowSDE(), replay=hook, rows=torch.tensor([1, 3]))
    assert [entry for entry in inside if entry] == [(0, [1, 3]), (1, [1, 3])]


@pytest.mark.parametrize("tail_steps", [None, 2])
@pytest.mark.parametrize("size", [1, 5, 8, 100])
def test_a_rollout_in_parts_is_the_same_rollout(size: int, tail_steps: int | None) -> None:
    weight, noise = torch.eye(6) * 0.5 + 0.1, torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    calls, recorded = [], []

    def policy(x, sigma, index):  # type: ignore[no-untyped-def]
        calls.append(len(x))
        return linear_policy(weight)(x, sigma, index)

    @contextmanager
    def hook(position: int, rows: torch.Tensor):  # type: ignore[no-untyped-def]
        before = len(calls)
        yield
        recorded.append((position, rows.tolist()))
        assert calls[before:] == [len(rows)], "one call of the policy, with these rows"

    whole = draw(linear_policy(weight), noise, tail_steps=tail_steps)
    got = draw(policy, noise, tail_steps=tail_steps, micro_batch_size=size, record=hook)
    torch.testing.assert_close(got.latents, whole.latents)
    torch.testing.assert_close(got.log_prob_mean, whole.log_prob_mean)
    assert max(calls) <= size
    assert sum(calls) == got.num_function_evaluations == whole.num_function_evaluations
    for position in (0, 1):
        assert [r for p, rows in recorded if p == position for r in rows] == list(range(8))


def exact(x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return gaussian_velocity(x, sigma, 1.0, 0.5)


def euler(x: torch.Tensor, grid: list[float]) -> torch.Tensor:
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        x = x + (b - a) * exact(x, torch.full((len(x),), a), torch.zeros(len(x)))
    return x


def test_second_order_tail_is_closer_than_euler_and_converges_faster() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = euler(x, torch.linspace(0.8, 0, 20001, dtype=torch.float64).tolist())
    levels, index = torch.linspace(0.8, 0, 401).tolist(), torch.zeros(64, dtype=torch.long)

    def error(steps: int) -> float:
        got, calls = solve_tail(exact, x.float(), index, levels, steps)
        assert calls == steps
        return float((got - truth).abs().mean())

    first = float((euler(x, torch.linspace(0.8, 0, 7).tolist()) - truth).abs().mean())
    assert error(6) < 0.5 * first
    assert error(40) < error(20) / 2.5, "halving the step divides a first-order error by 2, a second-order one by 4"


def test_solver_is_exact_for_a_point_and_matches_diffusers() -> None:
    """Data that is one point: the predicted clean sample is constant, so one step of any size is exact."""
    x, data = torch.randn(2, 3), torch.full((2, 3), 0.7)
    noise = torch.randn(2, 3)
    x = 0.2 * data + 0.8 * noise
    torch.testing.assert_close(dpm_solver_2m_step(x, data, None, 0.8, 0.3, None), 0.7 * data + 0.3 * noise)
    torch.testing.assert_close(dpm_solver_2m_step(noise, data, None, 1.0, 0.4, None), 0.6 * data + 0.4 * noise)
    diffusers = pytest.importorskip("diffusers", reason="needs gspo[diffusers]")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2, lower_order_final=False,
        final_sigmas_type="zero", euler_at_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.tolist()
    ours = theirs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    previous, before = None, None
    for i, t in enumerate(scheduler.timesteps[:5]):
        theirs = scheduler.step(exact(theirs, torch.full((4,), sigmas[i]), t), t, theirs).prev_sample
        data = ours - sigmas[i] * exact(ours, torch.full((4,), sigmas[i]), t)
        ours = dpm_solver_2m_step(ours, data, previous, sigmas[i], sigmas[i + 1], before)
        previous, before = data, sigmas[i]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_tail_levels_follow_a_shifted_schedule() -> None:
    shifted = [1.0, 0.9, 0.75, 0.5, 0.0]
    assert tail_sigmas(shifted, 2) == [1.0, 0.75, 0.0]
    assert tail_sigmas(shifted, 4) == shifted
