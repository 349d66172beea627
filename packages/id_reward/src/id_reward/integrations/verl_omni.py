"""The identity reward as a reward function of verl-omni.

In its configuration:

    reward.custom_reward_function.path=pkg://id_reward.integrations.verl_omni
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.missing_penalty=0.5

or as one of several, under ``MultiVisualRewardManager``:

    +reward.reward_functions.identity.path=pkg://id_reward.integrations.verl_omni
    +reward.reward_functions.identity.name=compute_score_http
    +reward.reward_functions.identity.server_url=http://scorer:8765

The references of a sample are in its ``extra_info["references"]``: paths, or pictures as data sets keep them. `compute_score` scores in the
reward worker, `compute_score_http` asks an `id-reward serve` elsewhere, so that many workers share one model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from id_reward.building import build_scorer
from id_reward.errors import InputError
from id_reward.integrations.rewards import VerlOmniReward

BUILDING = threading.Lock()


@lru_cache(maxsize=8)
def _reward(options: tuple[tuple[str, Any], ...], references: str, missing_score: float) -> VerlOmniReward:
    """One scorer for each set of options in a worker."""
    return VerlOmniReward(build_scorer(dict(options)), references=references, missing_score=missing_score)


@lru_cache(maxsize=8)
def _remote(server_url: str, timeout: float, retries: int, references: str, missing_score: float) -> VerlOmniReward:
    """One client for each server in a worker."""
    from id_reward.serving.client import RemoteScorer

    scorer = RemoteScorer(tuple(server_url.split(",")), timeout=timeout, retries=retries)
    return VerlOmniReward(scorer, references=references, missing_score=missing_score)


def compute_score(
    data_source: str,
    solution_image: Any,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    references: str = "references",
    missing_score: float = 0.0,
    scorer: str | None = None,
    backend: str | None = None,
    model: str | None = None,
    device: str | None = None,
    threshold: float | None = None,
    reference_threshold: float | None = None,
    convention: str | None = None,
    missing_penalty: float | None = None,
    extra_penalty: float | None = None,
    off_pair_penalty: float | None = None,
    min_similarity: float | None = None,
    reward_router_address: Any = None,
    reward_model_tokenizer: Any = None,
    model_name: Any = None,
) -> dict[str, float]:
    """Score of one picture (c, h, w), or the mean over frames (n, c, h, w), with the parts beside it.

    Args:
        data_source: Not used.
        solution_image: The picture, uint8 or floats.
        ground_truth: Its prompt.
        extra_info: Holds the references.
        references: Their key in ``extra_info``.
        missing_score: Score of a picture that cannot be scored.
        scorer: "package.module:function" that builds another reward.
        backend: Of faces.
        model: Of the backend insightface.
        device: Where the models run.
        threshold: Detector score from which a face counts.
        reference_threshold: The same in references.
        convention: See `id_reward.multi_id_alignment_reward`, as for the penalties.
        missing_penalty: For a reference without a face.
        extra_penalty: For a face without a reference.
        off_pair_penalty: For faces that blend several references.
        min_similarity: Cosine from which faces can match.
        reward_router_address: Given to every reward function; not used.
        reward_model_tokenizer: The same.
        model_name: The same.

    Raises:
        InputError: ``extra_info`` has no references, or an option does not fit.
    """
    del reward_router_address, reward_model_tokenizer, model_name
    options = {
        "scorer": scorer, "backend": backend, "model": model, "device": device, "threshold": threshold,
        "reference_threshold": reference_threshold, "convention": convention, "missing_penalty": missing_penalty,
        "extra_penalty": extra_penalty, "off_pair_penalty": off_pair_penalty, "min_similarity": min_similarity,
    }  # fmt: skip
    given = tuple(sorted((name, value) for name, value in options.items() if value is not None))
    for name, value in (*given, ("references", references)):
        if not isinstance(value, (str, int, float)):
            raise InputError(f"{name} must be a number or a string, got {value!r}")
    with BUILDING:  # verl-omni calls from several threads at once
        reward = _reward(given, references, missing_score)
    return reward(data_source, solution_image, ground_truth, extra_info)


async def compute_score_http(
    data_source: str,
    solution_image: Any,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    server_url: str,
    timeout: float = 120.0,
    retries: int = 2,
    references: str = "references",
    missing_score: float = 0.0,
) -> dict[str, float]:
    """`compute_score` by ``id-reward serve``; verl-omni's event loop goes on while it waits.

    Args:
        data_source: Not used.
        solution_image: The picture, or frames.
        ground_truth: Its prompt.
        extra_info: Holds the references.
        server_url: Where the server is; several, separated by commas, stand in for each other.
        timeout: Seconds for one request.
        retries: How often all servers are asked again.
        references: Their key in ``extra_info``.
        missing_score: Score of a picture that cannot be scored.

    Raises:
        InputError: ``extra_info`` has no references, or the server refuses the request.
        ScorerUnavailable: No server answers.
    """
    reward = _remote(server_url, timeout, retries, references, missing_score)
    return await asyncio.to_thread(reward, data_source, solution_image, ground_truth, extra_info)
