"""Several scorers as one reward."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from id_reward.inputs import listed_batch
from id_reward.protocols import Scorer
from id_reward.statistics import RunningStatistics

NanPolicy = Literal["propagate", "zero", "raise"]
Normalization = tuple[float, float] | Literal["batch"]


class CompositeScore(NamedTuple):
    """totals (b,) and each part's raw values (b,) by name."""

    totals: Float[np.ndarray, " b"]
    parts: dict[str, Float[np.ndarray, " b"]]


def normalize(values: Float[np.ndarray, " b"], how: Normalization) -> Float[np.ndarray, " b"]:
    """``(value - shift) / scale``; "batch": with mean and spread of these values (0 where all are equal). NaN stays NaN.

    >>> normalize(np.array([1.0, 3.0]), "batch").tolist()
    [-1.0, 1.0]
    """
    if how == "batch":
        finite = values[~np.isnan(values)]
        shift, scale = (finite.mean(), finite.std()) if len(finite) else (0.0, 1.0)
        result: np.ndarray = (values - shift) / (scale if scale > 1e-12 else 1.0)
        return result
    shift, scale = how
    return (values - shift) / scale


class CompositeReward:
    """``total = sum over parts of weight * (value - shift) / scale``.

    Parts that spend their time outside the interpreter (``releases_gil``: the backends of this package that run in C++ or on a GPU) run in
    threads, side by side; the others run one after the other.

    Args:
        parts: name -> (scorer, weight).
        normalization: name -> (shift, scale), or "batch" for mean and spread of the call at hand; (0, 1) where absent.
        nan_policy: What a NaN of one part does: make the total NaN ("propagate": the trainer leaves the sample out), count as 0 after
            normalisation ("zero"), or "raise".
        batch_size: Pictures given to a scorer at a time; None: all.
        threads: Whether to use threads at all.

    >>> reward = CompositeReward({"length": (lambda images, prompts, references: [len(p) for p in prompts], 2.0)})
    >>> reward([None, None], ["a", "abc"], [[], []]).totals.tolist()
    [2.0, 6.0]
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Scorer, float]],
        *,
        normalization: Mapping[str, Normalization] | None = None,
        nan_policy: NanPolicy = "propagate",
        batch_size: int | None = None,
        threads: bool = True,
    ) -> None:
        """Validates names, weights and policy."""
        if not parts:
            raise ValueError("parts must hold at least one scorer, got none")
        if nan_policy not in ("propagate", "zero", "raise"):
            raise ValueError(f"nan_policy must be 'propagate', 'zero' or 'raise', got {nan_policy!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for name, part in parts.items():
            if not (isinstance(part, tuple) and len(part) == 2 and callable(part[0])):
                raise ValueError(f"parts must map names to (scorer, weight), got {part!r} for {name}")
            if not np.isfinite(part[1]):
                raise ValueError(f"the weight of {name} must be finite, got {part[1]}")
        self.parts, self.nan_policy = dict(parts), nan_policy
        self.batch_size, self.threads = batch_size, threads
        self.normalization = dict(normalization or {})
        unknown = self.normalization.keys() - self.parts.keys()
        if unknown:
            raise ValueError(f"normalization must name parts {sorted(self.parts)}, got {sorted(unknown)}")
        if any(how != "batch" and not how[1] > 0 for how in self.normalization.values()):
            raise ValueError(f"normalization must have positive scales, got {self.normalization}")
        self.running = {name: RunningStatistics() for name in [*self.parts, "total"]}

    def to(self, device: Any) -> CompositeReward:
        """Moves every scorer that can be moved to a device."""
        for scorer, _ in self.parts.values():
            if hasattr(scorer, "to"):
                scorer.to(device)
        return self

    def _values(
        self, name: str, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> tuple[np.ndarray, float]:
        """One part's values for all pictures, and the seconds they took."""
        scorer, count, start = self.parts[name][0], len(images), time.perf_counter()
        size, chunks = self.batch_size or max(count, 1), []
        for at in range(0, count, size):
            part = slice(at, min(at + size, count))
            values = scorer(images[part], prompts[part], references[part])
            if hasattr(values, "detach"):
                values = values.detach().cpu().numpy()
            chunk = np.asarray(values, np.float64)
            if chunk.shape != (part.stop - part.start,):
                raise ValueError(f"{name} must return {part.stop - part.start} values, got shape {chunk.shape}")
            chunks.append(chunk)
        return np.concatenate(chunks) if chunks else np.zeros(0), time.perf_counter() - start

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> CompositeScore:
        """Scores a batch.

        Raises:
            ValueError: Lengths differ, a scorer returns another number of values, or a NaN under "raise".
        """
        images, prompts, references = listed_batch(images, prompts, references)
        count = len(images)
        free = [n for n, (s, _) in self.parts.items() if self.threads and getattr(s, "releases_gil", False)]
        measured: dict[str, tuple[np.ndarray, float]] = {}
        with ThreadPoolExecutor(max(len(free), 1)) as pool:
            running = {name: pool.submit(self._values, name, images, prompts, references) for name in free}
            for name in self.parts:
                if name not in running:
                    measured[name] = self._values(name, images, prompts, references)
            measured |= {name: future.result() for name, future in running.items()}
        totals, raw = np.zeros(count), {}
        for name, (_, weight) in self.parts.items():
            values, seconds = measured[name]
            missing = int(np.isnan(values).sum())
            if missing and missing == count:
                warnings.warn(f"{name} has no value for any of the {count} pictures: all are NaN", stacklevel=2)
            if self.nan_policy == "raise" and missing:
                raise ValueError(f"{name} must return numbers, got NaN for {missing} of {count} pictures")
            part = weight * normalize(values, self.normalization.get(name, (0.0, 1.0)))
            totals += np.where(np.isnan(part), 0.0, part) if self.nan_policy == "zero" else part
            raw[name] = values
            self.running[name].update(values, seconds)
        self.running["total"].update(totals, 0.0)
        return CompositeScore(totals, raw)

    def summary(self) -> dict[str, dict[str, float]]:
        """Statistics of every part and the total over all calls so far: count, nan, mean, std, min, max, seconds."""
        return {name: statistics.as_dict() for name, statistics in self.running.items()}

    @staticmethod
    def statistics(score: CompositeScore) -> dict[str, dict[str, float]]:
        """Mean, spread and NaN count of every part of one call."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN: the mean is NaN
            return {
                name: {"mean": float(np.nanmean(v)), "std": float(np.nanstd(v)), "nan": int(np.isnan(v).sum())}
                for name, v in {**score.parts, "total": score.totals}.items()
            }
