"""Reward functions and settings as TRL has them; needs nothing of TRL but its conventions (TRL >= 0.20).

A TRL reward function is called with keywords, ``f(prompts=[...], completions=[...], completion_ids=..., <columns>=[...])``, and
returns one number per completion, or None where it does not apply. Here completions are what ``decode`` makes of the latents.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gspo.inputs import one_by_one
from gspo.integrations.trl_config import GRPOSettings as GRPOSettings
from gspo.integrations.trl_config import translate
from gspo.loop import RewardFunction, as_rewards

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
    functions = [reward_funcs] if callable(reward_funcs) else one_by_one("reward_funcs", reward_funcs)
    if not all(map(callable, functions)):
        raise ValueError(f"reward_funcs must be functions, got {functions!r}")
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    if not functions or len(set(names)) != len(names):
        raise ValueError(f"reward_funcs must be at least one function, each with its own name, got {names}")
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of prompts, got the string {prompts!r}; write [{prompts!r}]")
    texts = one_by_one("prompts", prompts)  # by their places: the labels of a shuffled column of pandas are others
    given: dict[str, list[Any]] = {}
    for name, column in (columns or {}).items():
        if name in ("prompts", "completions", "completion_ids"):
            raise ValueError(
                f"columns must have names of their own, got {name!r}, which every reward function is given"
            )
        if isinstance(column, str):
            raise ValueError(f"columns[{name!r}] must be a list, got the string {column!r}")
        given[name] = one_by_one(f"columns[{name!r}]", column)
        if len(given[name]) != len(texts):
            raise ValueError(f"columns[{name!r}] must have one entry per prompt ({len(texts)}), got {len(given[name])}")

    def reward_fn(latents: Tensor, index: Tensor) -> dict[str, Tensor]:
        rows = index.tolist()
        if rows and max(rows) >= len(texts):
            raise ValueError(f"prompts must have one entry per row of noise, got {len(texts)} for row {max(rows)}")
        decoded = decode(latents, index)
        completions = [decoded] if isinstance(decoded, str) else list(decoded)
        if len(completions) != len(rows):
            raise ValueError(f"decode must give one completion per sample ({len(rows)}), got {len(completions)}")
        options = {
            "prompts": [texts[i] for i in rows],
            "completions": completions,
            "completion_ids": [None] * len(rows),
            **{name: [column[i] for i in rows] for name, column in given.items()},
        }
        results = {}
        for name, function in zip(names, functions, strict=True):
            values = function(**options)
            if inspect.isawaitable(values):
                values = _awaited(values)
            results[name] = as_rewards(values, len(rows), torch.device("cpu"), name).to(latents.device)
        return results

    return reward_fn


def _awaited(values: Any) -> Any:
    """What a coroutine gives; in a thread of its own where a loop runs already, as in a notebook."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, _wait(values)).result()


async def _wait(values: Any) -> Any:
    return await values


def from_grpo_config(config: Any, *, reward_names: Sequence[str] = ()) -> GRPOSettings:
    """Translates a ``trl.GRPOConfig``: ``OnlineConfig(window=..., kernel=..., **from_grpo_config(config).online)``.

    ``importance_sampling_level`` "sequence" is GSPO, "token" the step ratio (a denoising step is what a token is there); ``epsilon`` and
    ``epsilon_high`` are the clip range, ``beta`` the weight of the KL, ``num_iterations`` the inner epochs,
    ``per_device_train_batch_size`` the rows of a pass. Groups are scaled by the std of the sample, as there. Log-probs there are per
    token, here per element: a clip range that was tuned on text means nothing for pictures, so consider ``clip_range="auto"``.

    Args:
        config: A ``trl.GRPOConfig``, or any object with its fields; one that is missing has TRL's default.
        reward_names: Of the reward functions, in the order of ``reward_weights``; needed if those are given.

    Raises:
        ValueError: The configuration asks for something gspo does not do, or has a field that gspo does not know. The field is named.
    """
    return translate(config, reward_names)
