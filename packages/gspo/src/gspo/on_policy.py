"""Is the ratio 1 before the first update? If not, why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gspo.rollout import Hook, Rollout, VelocityFunction
from gspo.score import rescore
from gspo.sde import Kernel

ON_POLICY = 1e-6
"""Log-ratios up to here are rounding: the policy is the one that drew the samples."""


class OffPolicy(UserWarning):
    """The policy of an update is not the one that drew the rollout."""


class OnPolicyCheck(NamedTuple):
    """Answer of `check_on_policy`.

    Attributes:
        log_ratio: Largest ``|log-ratio|`` before the first update, nats per element; 0 on policy.
        problem: What is wrong, in words; None on policy.
    """

    log_ratio: float
    problem: str | None


def tolerance(rollout: Rollout) -> float:
    """The largest log-ratio per element that rounding in fp32 explains.

    A mean that is off by a share d of the std moves the mean over n elements by about ``d / sqrt(n)``; fp32 keeps d below 1e-4.

    >>> from gspo import FlowSDE, rollout
    >>> drawn = rollout(lambda x, s, i: x, torch.zeros(1, 100), torch.linspace(1, 0, 4), kernel=FlowSDE(), window=(0,))
    >>> round(tolerance(drawn), 8)
    1e-05
    """
    elements = rollout.latents[0].numel()
    return float(max(ON_POLICY, 1e-4 / elements**0.5))


@torch.no_grad()
def check_on_policy(
    velocity_fn: VelocityFunction, rollout: Rollout, kernel: Kernel | None = None, *, replay: Hook | None = None
) -> OnPolicyCheck:
    """Scores a rollout with the policy that should have drawn it, before any update: the ratio must be 1.

    `PolicyTrainer` looks at this in its first pass anyway; a loop of your own can ask here.

    Raises:
        ValueError: The kernel is not the rollout's.

    >>> from gspo import FlowSDE, rollout
    >>> drawn = rollout(lambda x, s, i: x, torch.ones(1, 9), torch.linspace(1, 0, 4), kernel=FlowSDE(), window=(0,))
    >>> check_on_policy(lambda x, s, i: x, drawn).problem is None
    True
    >>> "parameters" in check_on_policy(lambda x, s, i: 1.5 * x, drawn).problem
    True
    """
    found = float(rescore(velocity_fn, rollout, kernel, replay=replay).log_ratio.abs().max())
    if found <= tolerance(rollout):
        return OnPolicyCheck(found, None)
    return OnPolicyCheck(found, problem(velocity_fn, rollout, found, kernel, replay=replay))


@torch.no_grad()
def problem(
    velocity_fn: VelocityFunction, rollout: Rollout, found: float, kernel: Kernel | None = None, *, replay: Hook | None
) -> str:
    """One sentence on why log-ratios up to ``found`` stand where 0 should; takes three passes over one step."""
    rows = torch.arange(min(2, len(rollout.latents)), device=rollout.latents.device)

    def mean(rows: Tensor | None) -> tuple[Tensor, float]:
        scored = rescore(velocity_fn, rollout, kernel, steps=[0], rows=rows, replay=replay)
        return scored.mean, float(scored.log_ratio.abs().max())

    (once, _), (twice, _), (_, whole) = mean(rows), mean(rows), mean(None)
    if not torch.equal(once, twice):
        cause = "it answers the same input differently each time (dropout? call model.eval(), in rollout and update)"
    elif whole <= ON_POLICY:
        cause = (
            "it rounds batches of another size differently (half precision? give rollout and update the same micro_batch_size "
            "and set drop_zero_variance=False)"
        )
    else:
        cause = (
            "its parameters have changed since, another policy drew the rollout, or it runs in another way (autocast, compile, "
            "attention kernel, routing)"
        )
    return f"the policy must give a ratio of 1 before the first update, got log-ratios up to {found:.1e} per element: {cause}"
