"""One reward, three signatures: TRL, Flow-GRPO and verl-omni. Nothing is imported from them, so they need no extra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from id_reward.aggregate import CompositeReward, as_composite
from id_reward.errors import InputError
from id_reward.floats import finite
from id_reward.inputs import listed
from id_reward.protocols import Scorer
from id_reward.shapes import Float

Rewarding = CompositeReward | Scorer | Mapping[str, tuple[Scorer, float]]


def _text(prompt: Any, number: int) -> str:
    """A prompt as a string; of a conversation, what its last message says.

    Raises:
        InputError: It is neither.
    """
    if isinstance(prompt, str):
        return prompt
    try:
        content = prompt[-1]["content"]
        text = (
            content
            if isinstance(content, str)
            else " ".join(part.get("text", "") for part in content if part.get("type") == "text")
        )
    except (TypeError, LookupError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise InputError(f"prompts[{number}] must be a string or a conversation, got {repr(prompt)[:100]}")
    return text


def _mapping(given: Any, name: str) -> Mapping[str, Any]:
    """What holds the references.

    Raises:
        InputError: It is no dictionary.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{name} must be a dictionary, got {repr(given)[:100]}")
    return given


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _known_mean(values: Float[np.ndarray, " b"], otherwise: float) -> float:
    """Mean over frames that have a value."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else otherwise


class TRLReward:
    """``f(prompts, completions, **columns) -> list[float | None]``, what `trl.GRPOTrainer(reward_funcs=...)` calls.

    The completions are pictures; the references come from a column of the data set. None tells TRL that a sample has no reward.

    Args:
        reward: A composite, a scorer, or a dictionary of ``name -> (scorer, weight)``.
        references: Column with the references of each sample.
        name: What TRL logs it as.
    """

    def __init__(self, reward: Rewarding, *, references: str = "references", name: str = "id_reward") -> None:
        """Keeps the reward."""
        self.reward, self.references, self.__name__ = as_composite(reward), references, name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One reward per completion.

        Raises:
            ValueError: The column of references is missing.
        """
        if self.references not in columns:
            raise InputError(
                f"the data set must have a column {self.references!r}, got {', '.join(sorted(columns)) or 'none'}"
            )
        texts = [_text(prompt, number) for number, prompt in enumerate(listed(prompts, "prompts", "prompts"))]
        score = self.reward(completions, texts, columns[self.references])
        log = columns.get("log_metric")
        if callable(log):  # recent versions of TRL hand a logger over
            for name, row in CompositeReward.statistics(score).items():
                log(f"{self.__name__}/{name}", row["mean"])
        return [_number(value) for value in score.totals]


class FlowGRPOReward:
    """``f(images, prompts, metadata, only_strict=True) -> (scores, details)``, the rewards of Flow-GRPO and its descendants.

    ``scores`` is a dictionary of lists with "avg", the total, and each part; a sample without a reward gets the batch's mean there, so that its
    advantage is small, and its NaN stays visible in the parts.

    Args:
        reward: A composite, a scorer, or a dictionary of ``name -> (scorer, weight)``.
        references: Key of the references in each sample's metadata.
    """

    def __init__(self, reward: Rewarding, *, references: str = "references") -> None:
        """Keeps the reward."""
        self.reward, self.references = as_composite(reward), references
        if "avg" in self.reward.parts:
            raise InputError("parts must have names of their own, got 'avg', which is Flow-GRPO's name of their sum")

    def __call__(
        self, images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], only_strict: bool = True
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """All parts of all pictures.

        Raises:
            ValueError: A sample's metadata has no references.
        """
        if isinstance(metadata, (str, bytes, Mapping)) or not isinstance(metadata, Iterable):
            raise InputError(
                f"metadata must be a list of dictionaries, one for each picture, got {type(metadata).__name__}"
            )
        rows = [_mapping(one, f"metadata[{number}]") for number, one in enumerate(metadata)]
        lacking = [number for number, one in enumerate(rows) if self.references not in one]
        if lacking:
            raise InputError(f"metadata must hold {self.references!r}, which sample {lacking[0]} lacks")
        score = self.reward(images, prompts, [one[self.references] for one in rows])
        known = score.totals[~np.isnan(score.totals)]
        totals = np.where(np.isnan(score.totals), known.mean() if len(known) else 0.0, score.totals)
        scores = {name: values.tolist() for name, values in score.parts.items()}
        return {**scores, "avg": totals.tolist()}, {"missing": np.isnan(score.totals).tolist()}


class VerlOmniReward:
    """``f(data_source, solution_image, ground_truth, extra_info) -> dict``, one sample at a time, as verl's ``compute_score`` is called.

    "score" is what is trained on; the parts beside it are logged. A sample that cannot be scored gets ``missing_score``.

    Args:
        reward: A composite, a scorer, or a dictionary of ``name -> (scorer, weight)``.
        references: Key of the references in ``extra_info``.
        missing_score: Score of a sample without a reward.
    """

    def __init__(self, reward: Rewarding, *, references: str = "references", missing_score: float = 0.0) -> None:
        """Keeps the reward."""
        reward = as_composite(reward)
        batch = [name for name, how in reward.normalization.items() if how == "batch"]
        if batch:
            raise InputError(
                f"verl scores one picture at a time, so {batch[0]} must be normalised by (shift, scale), got 'batch'"
            )
        if "score" in reward.parts:
            raise InputError(
                "parts must have names of their own, got 'score', which is verl's name of what is trained on"
            )
        self.reward, self.references = reward, references
        self.missing_score = finite("missing_score", missing_score)

    def __call__(
        self,
        data_source: str,
        solution_image: Any,
        ground_truth: str,
        extra_info: Mapping[str, Any] | None = None,
        **ignored: Any,
    ) -> dict[str, float]:
        """Score and parts of one picture, or their means over frames (n, c, h, w); ``ground_truth`` is the prompt.

        Raises:
            ValueError: ``extra_info`` has no references.
        """
        extra = _mapping(extra_info or {}, "extra_info")
        if self.references not in extra:
            raise InputError(f"extra_info must hold {self.references!r}, got {', '.join(map(str, extra)) or 'nothing'}")
        frames = list(solution_image) if getattr(solution_image, "ndim", 3) == 4 else [solution_image]
        if not frames:
            raise InputError("solution_image must hold at least one frame, got none")
        score = self.reward(frames, [ground_truth] * len(frames), [extra[self.references]] * len(frames))
        parts = {name: _known_mean(values, float("nan")) for name, values in score.parts.items()}
        return {"score": _known_mean(score.totals, self.missing_score), **parts}
