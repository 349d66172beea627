"""Rollouts: stochastic steps inside the window, deterministic ones elsewhere, the common prefix taken once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.sde import FlowODE, Kernel

VelocityFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class WindowStep(NamedTuple):
    """One stochastic step of a rollout: all that the update needs to score it again.

    latents, next_latents: (b, ...) before and after; sigma, sigma_next: floats; mean (b, ...) fp32 and std (b,) of the old
    policy; log_prob_mean (b,) of the old policy, nats per element.
    """

    step: int
    sigma: float
    sigma_next: float
    latents: Float[Tensor, "b ..."]
    next_latents: Float[Tensor, "b ..."]
    mean: Float[Tensor, "b ..."]
    std: Float[Tensor, " b"]
    log_prob_mean: Float[Tensor, " b"]


@dataclass(frozen=True)
class Rollout:
    """Finished samples and the stochastic part of how they came about.

    Attributes:
        latents: Final latents, (p * group_size, ...), members of prompt p at rows p * group_size onwards.
        trajectory: The window's steps only, in order.
        log_prob_mean: Old policy's log-probs, (b, t in window), nats per element.
        index: Prompt of each row, (b,).
        num_function_evaluations: Rows for which the velocity was computed.
        sigma_max: What stood for sigma == 1.
    """

    latents: Float[Tensor, "b ..."]
    trajectory: tuple[WindowStep, ...]
    log_prob_mean: Float[Tensor, "b t"]
    index: Int[Tensor, " b"]
    num_function_evaluations: int
    sigma_max: float


def check_sigmas(sigmas: Float[Tensor, " t"], window: Sequence[int]) -> list[float]:
    """Validates a schedule and a window on it; returns the schedule as floats.

    Raises:
        ValueError: sigmas do not strictly decrease, leave [0, 1], or the window is empty, not consecutive, or touches the end.
    """
    levels = [float(s) for s in sigmas]
    if len(levels) < 2 or any(b >= a for a, b in zip(levels[:-1], levels[1:], strict=True)):
        raise ValueError(f"sigmas must be strictly decreasing with at least 2 entries, got {levels}")
    if levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas must lie in [0, 1], got {levels}")
    steps = list(window)
    if steps != list(range(steps[0], steps[0] + len(steps))) if steps else True:
        raise ValueError(f"window must hold consecutive steps, got {steps}")
    if steps[0] < 0 or steps[-1] > len(levels) - 2 or levels[steps[-1] + 1] <= 0:
        raise ValueError(f"window must lie in [0, {len(levels) - 3}] and not reach sigma 0, got {steps}")
    return levels


@torch.no_grad()
def rollout(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "p ..."],
    sigmas: Float[Tensor, " t"],
    *,
    kernel: Kernel,
    window: Sequence[int],
    group_size: int = 1,
    share_prefix: bool = True,
    generator: torch.Generator | None = None,
    offload: bool = False,
    tail_steps: int | None = None,
) -> Rollout:
    """Samples ``group_size`` members from every row of ``noise``.

    Steps in ``window`` follow ``kernel``, the others the ODE. Members of a group start from the same noise, so the steps
    before the window are equal for all of them: with ``share_prefix`` they are taken once a group. The result equals
    ``share_prefix=False`` up to the rounding of differently sized batches.

    Args:
        velocity_fn: ``(latents (b, ...), sigma (b,), index (b,)) -> velocity``; index says which row of ``noise`` (prompt)
            each latent belongs to.
        noise: One start per prompt.
        sigmas: Noise levels from 1 to 0, strictly decreasing, one more than steps.
        kernel: FlowSDE, FlowCPS or DanceSDE.
        window: Consecutive stochastic steps, not the last one.
        group_size: Members per prompt.
        share_prefix: Take the steps before the window once per group.
        generator: Source of the steps' noise.
        offload: Keep the trajectory in CPU memory.
        tail_steps: After the window, take this many second-order steps (DPM-Solver++ 2M, `gspo.solver`) instead of the
            remaining Euler steps.

    Raises:
        ValueError: See `check_sigmas`; or group_size < 1.
    """
    from gspo.solver import solve_tail

    levels = check_sigmas(sigmas, window)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    first, last = window[0], window[-1]
    ode, evaluations = FlowODE(), 0
    index = torch.arange(len(noise), device=noise.device)
    members = index.repeat_interleave(group_size)
    x = noise
    if not share_prefix:
        x, index = x.repeat_interleave(group_size, 0), members
    trajectory: list[WindowStep] = []
    for step in range(len(levels) - 1):
        if step == first and share_prefix:
            x, index = x.repeat_interleave(group_size, 0), members
        if step == last + 1 and tail_steps is not None:
            x, count = solve_tail(velocity_fn, x, index, levels[step:], tail_steps)
            evaluations += count * len(x)
            break
        sigma, sigma_next = levels[step], levels[step + 1]
        velocity = velocity_fn(x, torch.full((len(x),), sigma, device=x.device), index)
        evaluations += len(x)
        if first <= step <= last:
            out = kernel.step(x, velocity, sigma, sigma_next, generator=generator, sigma_max=levels[1])
            assert out.log_prob_mean is not None
            tensors = (x, out.next_latents, out.mean, out.std, out.log_prob_mean)
            trajectory.append(WindowStep(step, sigma, sigma_next, *(t.cpu() if offload else t for t in tensors)))
        else:
            out = ode.step(x, velocity, sigma, sigma_next)
        x = out.next_latents
    log_probs = torch.stack([s.log_prob_mean for s in trajectory], 1)
    return Rollout(x, tuple(trajectory), log_probs, members, evaluations, levels[1])
