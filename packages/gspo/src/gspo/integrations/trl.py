"""Reward functions and settings as TRL has them; needs nothing of TRL but its conventions (TRL >= 0.20).

A TRL reward function is called with keywords, ``f(prompts=[...], completions=[...], completion_ids=..., <columns>=[...])``, and
returns one number per completion, or None where it does not apply. Here completions are what ``decode`` makes of the latents.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gspo.loop import RewardFunction, as_rewards
from gspo.step import PolicyConfig

TRLRewardFunction = Callable[..., Any]


def trl_reward(
    reward_funcs: TRLRewardFunction | Sequence[TRLRewardFunction],
    prompts: Sequence[Any],
    decode: Callable[[Tensor, Tensor], Sequence[Any]],
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> RewardFunction:
    """A `gspo.loop.RewardFunction` made of reward functions with TRL's signature.

    Args:
        reward_funcs: One or several; their names become the rewards' names, as in TRL. Coroutine functions are awaited.
        prompts: One per row of the noise.
        decode: ``(latents, index) -> completions``, for example `PipelinePolicy.decode`.
        columns: Further columns of the data set, one entry per prompt.

    Raises:
        ValueError: Two functions share a name, or a column has another length than prompts; when called, a function returns another
            number of rewards.
    """
    functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    if not functions or len(set(names)) != len(names):
        raise ValueError(f"reward_funcs must be at least one function, each with its own name, got {names}")
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of prompts, got the string {prompts!r}; write [{prompts!r}]")
    columns = dict(columns or {})
    for name, column in columns.items():
        if isinstance(column, str):
            raise ValueError(f"columns[{name!r}] must be a list, got the string {column!r}")
        if len(column) != len(prompts):
            raise ValueError(f"columns[{name!r}] must have one entry per prompt ({len(prompts)}), got {len(column)}")

    def reward_fn(latents: Tensor, index: Tensor) -> dict[str, Tensor]:
        rows = index.tolist()
        options = {
            "prompts": [prompts[i] for i in rows],
            "completions": list(decode(latents, index)),
            "completion_ids": [None] * len(rows),
            **{name: [column[i] for i in rows] for name, column in columns.items()},
        }
        results = {}
        for name, function in zip(names, functions, strict=True):
            values = function(**options)
            if inspect.isawaitable(values):
                values = asyncio.run(_wait(values))
            results[name] = as_rewards(values, len(rows), torch.device("cpu"), name).to(latents.device)
        return results

    return reward_fn


async def _wait(values: Any) -> Any:
    return await values


LEVELS = {"sequence": "sequence", "sequence_token": "sequence", "token": "step"}
SCALES = {"group": "group", "batch": "global", "none": "none", "True": "group", "False": "none"}


def from_grpo_config(config: Any) -> tuple[PolicyConfig, str]:
    """The `PolicyConfig` and the ``advantage_scale`` that say what a ``trl.GRPOConfig`` says.

    ``importance_sampling_level`` "sequence" is GSPO, "token" the step ratio (a denoising step is what a token is there); ``epsilon``
    is the clip range, ``beta`` the weight of the KL, ``num_iterations`` the inner epochs. Log-probs there are per token, here per
    element: a clip range that was tuned on text means nothing for pictures, so consider ``clip_range="auto"``.

    Raises:
        ValueError: The configuration asks for something gspo does not do: an ``epsilon_high`` of its own, a loss with another mean.
    """
    high = getattr(config, "epsilon_high", None)
    if high is not None and high != config.epsilon:
        raise ValueError(f"epsilon_high must equal epsilon (clip ranges are symmetric here), got {high}")
    if config.loss_type not in ("grpo", "dapo", "bnpo"):
        raise ValueError(
            f"loss_type must be 'grpo', 'dapo' or 'bnpo' (the same where all trajectories are equally long), got {config.loss_type!r}"
        )
    level = config.importance_sampling_level
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level must be one of {tuple(LEVELS)}, got {level!r}")
    policy = PolicyConfig(
        ratio=LEVELS[level],  # type: ignore[arg-type]
        clip_range=config.epsilon,
        kl_coef=config.beta,
        num_inner_epochs=config.num_iterations,
        max_grad_norm=config.max_grad_norm,
    )
    return policy, SCALES[str(config.scale_rewards)]
