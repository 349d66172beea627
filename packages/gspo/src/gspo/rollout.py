"""Rollouts: stochastic steps inside the window, deterministic ones elsewhere, the common prefix taken once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.checks import check_bool, check_function, check_whole, one_line
from gspo.inputs import Ids, SupportsArray, as_ids, as_numbers, require_floating
from gspo.sde import FlowODE, Kernel
from gspo.solver import solve_tail

VelocityFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(latents (b, ...), sigma (b,), index (b,)) -> velocity (b, ...)``, noise - data."""

Hook = Callable[[int, Tensor], AbstractContextManager[object]]
"""``(position in the window, rows (b,)) -> context`` around a velocity of the window: routing is recorded and replayed here."""

StepNoise = Callable[[int], Tensor]
"""``position in the window -> standard normal noise (b, ...)`` that a step draws with, on any device."""

Sigmas = Float[Tensor, " t"] | Sequence[float] | SupportsArray
"""Noise levels, from 1 to 0."""


class WindowStep(NamedTuple):
    """One stochastic step of a rollout: all that the update needs to score it again.

    Attributes:
        step: Its place in the schedule.
        sigma: Noise level before.
        sigma_next: Noise level after.
        latents: Before, (b, ...).
        next_latents: After, (b, ...).
        mean: Of the old policy's Gaussian, (b, ...) fp32.
        std: Of the step, (b,).
        log_prob_mean: Of the old policy, (b,), nats per element.
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
        kernel: Of the stochastic steps; None if unknown.
    """

    latents: Float[Tensor, "b ..."]
    trajectory: tuple[WindowStep, ...]
    log_prob_mean: Float[Tensor, "b t"]
    index: Int[Tensor, " b"]
    num_function_evaluations: int
    sigma_max: float
    kernel: Kernel | None = None


def check_sigmas(sigmas: Sigmas, window: Sequence[int]) -> list[float]:
    """Validates a schedule and a window on it; returns the schedule as floats.

    Raises:
        ValueError: sigmas do not strictly decrease, leave [0, 1], or the window is empty, not consecutive, or touches the end.
    """
    numbers = as_numbers("sigmas", sigmas)
    levels = numbers.tolist() if numbers.dim() == 1 else [float("nan")]
    if len(levels) < 2:
        raise ValueError(f"sigmas must be strictly decreasing with at least 2 entries, got {levels}")
    for step, (level, level_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if not level_next < level:
            raise ValueError(
                f"sigmas must be strictly decreasing with at least 2 entries, got {level_next:.6g} after {level:.6g} at step {step}"
            )
    if levels[0] > 1 or levels[-1] < 0:
        raise ValueError(
            f"sigmas must lie in [0, 1], as those of flow-matching schedulers do, got {levels[0]:.6g} to {levels[-1]:.6g}"
        )
    if levels[-1] > 0.01:
        warnings.warn(f"sigmas end at {levels[-1]:.4g}, not at 0: the final latents still hold noise", stacklevel=3)
    steps = as_ids("window", window).tolist()
    if not steps or steps != list(range(steps[0], steps[0] + len(steps))):
        raise ValueError(f"window must hold consecutive steps, got {steps}")
    if steps[0] < 0 or steps[-1] > len(levels) - 2 or levels[steps[-1] + 1] <= 0:
        raise ValueError(f"window must lie in [0, {len(levels) - 3}] and not reach sigma 0, got {steps}")
    return levels


@torch.no_grad()
def rollout(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "p ..."],
    sigmas: Sigmas,
    *,
    kernel: Kernel,
    window: Sequence[int],
    group_size: int = 1,
    share_prefix: bool = True,
    generator: torch.Generator | None = None,
    offload: bool = False,
    tail_steps: int | None = None,
    micro_batch_size: int | None = None,
    record: Hook | None = None,
    step_noise: StepNoise | None = None,
    index: Ids | None = None,
) -> Rollout:
    """Samples ``group_size`` members from every row of ``noise``.

    Steps in ``window`` follow ``kernel``, the others the ODE. Members of a group start from the same noise, so the steps
    before the window are equal for all of them: with ``share_prefix`` they are taken once a group. The result equals
    ``share_prefix=False`` up to the rounding of differently sized batches.

    Args:
        velocity_fn: ``(latents (b, ...), sigma (b,), index (b,)) -> velocity``; index says which prompt each latent belongs to.
        noise: One start per prompt.
        sigmas: Noise levels from 1 to 0, strictly decreasing, one more than steps.
        kernel: FlowSDE, FlowCPS or DanceSDE.
        window: Consecutive stochastic steps, not the last one.
        group_size: Members per prompt.
        share_prefix: Take the steps before the window once per group.
        generator: Source of the steps' noise.
        offload: Keep the trajectory in CPU memory; the update brings back what it scores.
        tail_steps: After the window, take this many second-order steps (DPM-Solver++ 2M, `gspo.solver`) instead of the
            remaining Euler steps.
        micro_batch_size: Rows per call of ``velocity_fn``; None takes all. The draws do not depend on it.
        record: Context manager around every velocity of the window, called with the position in the window and the rows; an
            MoE policy records its routing there, for `PolicyTrainer.update` to replay.
        step_noise: The noise of the window's steps from outside, in place of the generator's: several ranks that draw all of it alike
            and use their rows agree with one process (`gspo.shared_noise`).
        index: Prompt of each row of ``noise``, as ``velocity_fn`` gets it; by default the row's number.

    Raises:
        ValueError: See `check_sigmas`; or noise has no row or no second axis, group_size, tail_steps or micro_batch_size < 1, the kernel
            draws nothing, or a velocity is not finite or has another shape than the latents.
    """
    levels = check_sigmas(sigmas, window)
    _check(noise, kernel, group_size=group_size, tail_steps=tail_steps, micro_batch_size=micro_batch_size)
    check_function(velocity_fn=velocity_fn)
    check_bool(share_prefix=share_prefix, offload=offload)
    first, last = window[0], window[-1]
    prompts = torch.arange(len(noise)) if index is None else as_ids("index", index)
    if prompts.shape != noise.shape[:1]:
        raise ValueError(f"index must have one entry per row of noise ({len(noise)}), got shape {tuple(prompts.shape)}")
    prompts = prompts.to(noise.device)
    members = prompts.repeat_interleave(group_size)
    ask = _InParts(velocity_fn, micro_batch_size, record)
    x, prompt = (noise, prompts) if share_prefix else (noise.repeat_interleave(group_size, 0), members)
    trajectory: list[WindowStep] = []
    for step in range(len(levels) - 1):
        if step == first and share_prefix:
            x, prompt = x.repeat_interleave(group_size, 0), members
        if step == last + 1 and tail_steps is not None:
            x, _ = solve_tail(ask, x, prompt, levels[step:], tail_steps)
            break
        sigma, sigma_next, inside = levels[step], levels[step + 1], first <= step <= last
        velocity = ask(x, torch.full((len(x),), sigma, device=x.device), prompt, step - first if inside else None)
        if not inside:
            x = FlowODE().step(x, velocity, sigma, sigma_next).next_latents
            continue
        given: dict[str, Any] = {} if step_noise is None else {"noise": step_noise(step - first).to(x.device)}
        out = kernel.step(x, velocity, sigma, sigma_next, generator=generator, sigma_max=levels[1], **given)
        before = trajectory[-1].next_latents if trajectory else x.cpu() if offload else x
        kept = (t.cpu() if offload else t for t in (out.next_latents, out.mean, out.std, out.log_prob_mean))
        trajectory.append(WindowStep(step, sigma, sigma_next, before, *kept))
        x = out.next_latents
    log_probs = torch.stack([s.log_prob_mean for s in trajectory], 1)
    return Rollout(x, tuple(trajectory), log_probs, members, ask.rows, levels[1], kernel)


class _InParts:
    """``velocity_fn`` called with so many rows at a time, and within ``record`` in the window; counts the rows."""

    def __init__(self, velocity_fn: VelocityFunction, size: int | None, record: Hook | None) -> None:
        self.velocity_fn, self.size, self.record, self.rows = velocity_fn, size, record, 0

    def __call__(self, x: Tensor, sigma: Tensor, index: Tensor, position: int | None = None) -> Tensor:
        self.rows += len(x)
        found, size = [], self.size or len(x)
        everything = torch.arange(len(x), device=x.device)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            inside = self.record is not None and position is not None
            with self.record(position, everything[part]) if inside else nullcontext():  # type: ignore[misc,arg-type]
                found.append(self.velocity_fn(x[part], sigma[part], index[part]))
        return found[0] if len(found) == 1 else torch.cat(found)


def _check(noise: Tensor, kernel: Kernel, *, group_size: int, **at_least_one: int | None) -> None:
    require_floating(noise=noise)
    if noise.dim() < 2 or len(noise) == 0:
        raise ValueError(f"noise must be (p, ...) with p at least 1, got shape {tuple(noise.shape)}")
    check_whole(1, group_size=group_size, **{name: n for name, n in at_least_one.items() if n is not None})
    if isinstance(kernel, FlowODE) or not isinstance(kernel, Kernel):
        raise ValueError(f"kernel must draw noise (FlowSDE, FlowCPS, DanceSDE), got {one_line(kernel)}")
