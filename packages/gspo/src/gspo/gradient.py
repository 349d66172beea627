"""The gradient of the surrogate loss per log-ratio: what a loop needs that calls backward once per denoising step."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import one_line
from gspo.inputs import Numbers, require_tensor
from gspo.objective import ClipRange, Reduction, clipped_surrogate_loss
from gspo.ratio import RatioKind, importance_ratio


def surrogate_gradient(
    log_ratio: Float[Tensor, "b t"],
    advantages: Numbers,
    clip_range: ClipRange,
    *,
    ratio: RatioKind = "sequence",
    step_weights: Float[Tensor, " t"] | None = None,
    sample_weights: Numbers | None = None,
    max_advantage: float | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "b t"]:
    """``g_it = dL / dl_it`` of `clipped_surrogate_loss` at these log-ratios l, without the policy's graph.

    The loss reaches the policy only through ``dL = sum_it g_it dl_it``. So a loop that holds the graph of one step at a time calls
    ``(g[:, t] * log_ratio_t).sum().backward()`` at each, and has the gradient of the whole: memory does not grow with the window.
    With r the ratio, N what is averaged over (b samples; b t entries for step ratios), T the number of steps:

        sequence:         g_it = -w_i A_i r_i / (N T)         step, guarded:  g_it = -w_i w_t A_i r_it / N
        0 where the clip removes the entry, or its sample is left out

    Args:
        log_ratio: Of all steps: `Rescored.log_ratio`, or for "guarded" `guarded_log_ratio`.
        advantages: See `clipped_surrogate_loss`, as are the other arguments.
        clip_range: See there.
        ratio: Which ratio the log-ratios become.
        step_weights: See there.
        sample_weights: See there.
        max_advantage: See there.
        reduction: "mean" or "sum".

    Raises:
        ValueError: See `clipped_surrogate_loss`.

    >>> surrogate_gradient(torch.zeros(2, 2), [1.0, -1.0], 0.1).tolist()
    [[-0.25, -0.25], [0.25, 0.25]]
    """
    require_tensor(log_ratio=log_ratio)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum' (a gradient needs one loss), got {one_line(reduction)}")
    with torch.enable_grad():
        leaf = log_ratio.detach().requires_grad_(True)
        surrogate = clipped_surrogate_loss(
            importance_ratio(ratio, leaf), advantages, clip_range, step_weights=step_weights,
            sample_weights=sample_weights, max_advantage=max_advantage, reduction=reduction,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(surrogate.loss, leaf)
    return gradient
