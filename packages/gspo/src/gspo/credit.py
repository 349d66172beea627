"""Credit by subject: a reward that is a sum over subjects weighs each subject's own tokens.

The reward of a picture of several people is a sum, and each term looks at one region. The ordinary policy gradient weighs the score of
every token with the whole sum, although the noise in one region says nothing about another region's reward: those products are
zero on average and only add noise. Here a token is weighed with the rewards that it can have caused.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import one_line
from gspo.inputs import require_tensor
from gspo.ratio import gaussian_log_ratio

Background = Literal["sum", "zero"]


def token_advantages(
    advantages: Float[Tensor, "b s"], regions: Float[Tensor, "b s n"], *, background: Background = "sum"
) -> Float[Tensor, "b n"]:
    """One advantage per token from one per subject (our choice, docs/adr/0016-credit-by-subject.md).

        share_sn = region_sn / max(1, sum_s region_sn)                 (overlapping subjects split a token)
        rest_n   = 1 - sum_s share_sn                                  (what belongs to nobody)
        A_n      = sum_s share_sn A_s + rest_n * (sum_s A_s or 0)

    Where regions do not influence each other, the gradient has the expectation of the ordinary one, in which every token has
    ``sum_s A_s``, and less variance. Where they do, what a token does to another subject's reward is not credited.

    Args:
        advantages: One per sample and subject, each normalised on its own (see `gspo.group_advantages`); NaN where a subject
            has no reward makes the tokens that it would weigh NaN, and so leaves them out.
        regions: How much of each token belongs to each subject, in [0, 1], (b, s, n).
        background: "sum": tokens of nobody are weighed with all subjects, which they can influence. "zero": they are not trained.

    Returns:
        (b, n), for `gspo.nft_loss`, `gspo.awm_loss` or `ObjectiveTrainer.update` with latents (b, n, ...).

    Raises:
        ValueError: Shapes do not match, or regions leave [0, 1].

    >>> regions = torch.tensor([[[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]])
    >>> token_advantages(torch.tensor([[2.0, -1.0]]), regions).tolist()
    [[2.0, -1.0, 1.0, 0.5]]
    """
    if background not in ("sum", "zero"):
        raise ValueError(f"background must be 'sum' or 'zero', got {one_line(background)}")
    require_tensor(advantages=advantages, regions=regions)
    if advantages.dim() != 2 or regions.dim() != 3 or regions.shape[:2] != advantages.shape:
        raise ValueError(
            f"advantages must be (b, s) and regions (b, s, n), got {tuple(advantages.shape)} and {tuple(regions.shape)}"
        )
    if not bool(((regions >= 0) & (regions <= 1)).all()):
        raise ValueError(f"regions must be in [0, 1], got {float(regions.min()):g} to {float(regions.max()):g}")
    share = regions / regions.sum(1, keepdim=True).clamp_min(1)
    weight = share
    if background == "sum":
        weight = share + (1 - share.sum(1, keepdim=True))
    # 0 * NaN is NaN: a subject without a reward must not reach tokens that are not its own
    terms = torch.where(weight > 0, weight * advantages[..., None], torch.zeros_like(weight))
    return terms.sum(1)


def token_log_ratio(
    next_latents: Float[Tensor, "b n ..."],
    mean: Float[Tensor, "b n ..."],
    old_mean: Float[Tensor, "b n ..."],
    std: Float[Tensor, " b"],
) -> Float[Tensor, "b n"]:
    """`gaussian_log_ratio` of every token: its mean over tokens is that of the sample.

    Args:
        next_latents: The samples, (b, n, ...).
        mean: Of the policy, same shape; may carry gradients.
        old_mean: Of the policy that drew the samples.
        std: Of the step, (b,).

    >>> x = torch.tensor([[[1.0], [2.0]]])
    >>> token_log_ratio(x, torch.full_like(x, 0.5), torch.zeros_like(x), torch.ones(1)).tolist()
    [[0.375, 0.875]]
    """
    require_tensor(next_latents=next_latents, mean=mean, old_mean=old_mean, std=std)
    if next_latents.dim() < 2:
        raise ValueError(f"next_latents must be (b, n, ...), got shape {tuple(next_latents.shape)}")
    if not next_latents.shape == mean.shape == old_mean.shape or std.shape != next_latents.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (next_latents, mean, old_mean, std))
        raise ValueError(f"next_latents, mean and old_mean must be alike and std (b,), got {shapes}")
    rows, tokens = next_latents.shape[:2]
    x, new, old = (t.reshape(rows * tokens, -1) for t in (next_latents, mean, old_mean))
    return gaussian_log_ratio(x, new, old, std.repeat_interleave(tokens)).reshape(rows, tokens)
