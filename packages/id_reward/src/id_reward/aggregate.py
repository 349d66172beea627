"""Several scorers as one reward."""

from __future__ import annotations

import inspect
import math
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from id_reward.errors import InputError
from id_reward.floats import finite, part_values, whole
from id_reward.inputs import listed_batch
from id_reward.protocols import FaceBackend, Scorer
from id_reward.shapes import Float
from id_reward.statistics import RunningStatistics

NanPolicy = Literal["propagate", "zero", "raise"]
Normalization = tuple[float, float] | Literal["batch"]
REAL = (int, float, np.integer, np.floating)


class CompositeScore(NamedTuple):
    """totals (b,) and each part's raw values (b,) by name."""

    totals: Float[np.ndarray, " b"]
    parts: dict[str, Float[np.ndarray, " b"]]


def normalize(values: Float[np.ndarray, " b"], how: Normalization) -> Float[np.ndarray, " b"]:
    """``(value - shift) / scale``; "batch": with mean and spread of these values (0 where all are equal). What is not finite becomes NaN.

    Raises:
        ValueError: "batch" for a single value, which has no spread: it would count 0 whatever it is.

    >>> normalize(np.array([1.0, 3.0]), "batch").tolist()
    [-1.0, 1.0]
    """
    values = np.where(np.isfinite(values), values, np.nan)
    if how == "batch":
        if len(values) == 1:
            raise InputError(
                "normalization 'batch' must have at least two pictures, got one; give (shift, scale) instead"
            )
        finite = values[~np.isnan(values)]
        shift, scale = (finite.mean(), finite.std()) if len(finite) else (0.0, 1.0)
        result: np.ndarray = (values - shift) / (scale if scale > 1e-12 else 1.0)
        return result
    shift, scale = how
    return (values - shift) / scale


def _check_normalization(given: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Names of parts, each with "batch" or a finite shift and a positive scale."""
    unknown = given.keys() - parts.keys()
    if unknown:
        raise InputError(f"normalization must name parts {sorted(parts)}, got {sorted(unknown)}")
    for name, how in given.items():
        if isinstance(how, str) and how == "batch":
            continue
        pair = isinstance(how, (tuple, list)) and len(how) == 2 and all(isinstance(x, REAL) for x in how)
        if not pair or not (math.isfinite(how[0]) and 0 < how[1] < math.inf):
            raise InputError(
                f"normalization must be 'batch' or (shift, scale), finite and with positive scales, got {how!r} for {name}"
            )


class CompositeReward:
    """``total = sum over parts of weight * (value - shift) / scale``.

    Thread-safe, as far as its parts are. Parts that spend their time outside the interpreter (``releases_gil``: the backends of this
    package that run in C++ or on a GPU) run in threads, side by side; the others run one after the other.

    Args:
        parts: name -> (scorer, weight).
        normalization: name -> (shift, scale), or "batch" for mean and spread of the call at hand; (0, 1) where absent.
        nan_policy: What a part does that has no finite value: make the total NaN ("propagate": the trainer leaves the sample out), count as
            0 after normalisation ("zero"), or "raise". Infinity counts as no value. A part of weight 0 is only logged.
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
        if not isinstance(parts, Mapping):
            raise InputError(f"parts must map names to (scorer, weight), got {type(parts).__name__}")
        if not parts:
            raise InputError("parts must hold at least one scorer, got none")
        if "total" in parts:
            raise InputError("parts must have names of their own, got 'total', which is the name of their sum")
        if nan_policy not in ("propagate", "zero", "raise"):
            raise InputError(f"nan_policy must be 'propagate', 'zero' or 'raise', got {nan_policy!r}")
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size, least=1)
        for name, part in parts.items():
            if not (isinstance(part, tuple) and len(part) == 2 and callable(part[0])):
                raise InputError(f"parts must map names to (scorer, weight), got {part!r} for {name}")
            finite(f"the weight of {name}", part[1])
        self.parts, self.nan_policy = dict(parts), nan_policy
        self.batch_size, self.threads = batch_size, threads
        if not isinstance(normalization or {}, Mapping):
            raise InputError(f"normalization must map names to (shift, scale) or 'batch', got {normalization!r}")
        self.normalization = dict(normalization or {})
        _check_normalization(self.normalization, self.parts)
        self._lock = threading.Lock()
        self.running = {name: RunningStatistics() for name in [*self.parts, "total"]}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

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
            chunks.append(part_values(values, name, part.stop - part.start))
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
        if count == 1 and "batch" in self.normalization.values():
            name = next(name for name, how in self.normalization.items() if how == "batch")
            raise InputError(
                f"normalization 'batch' of {name} needs at least two pictures, got one: it would count 0; give (shift, scale)"
            )
        from concurrent.futures import ThreadPoolExecutor

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
            how = self.normalization.get(name, (0.0, 1.0))
            self._say_what_is_missing(name, values, how)
            if weight:
                part = float(weight) * normalize(values, how)
                totals += np.where(np.isnan(part), 0.0, part) if self.nan_policy == "zero" else part
            raw[name] = values
            with self._lock:
                self.running[name].update(values, seconds)
        if count and np.isnan(totals).all() and not any(np.isnan(values).all() for values in raw.values()):
            warnings.warn(f"none of the {count} pictures has a total: each lacks a part", stacklevel=2)
        with self._lock:
            self.running["total"].update(totals, 0.0)
        return CompositeScore(totals, raw)

    def _say_what_is_missing(self, name: str, values: np.ndarray, how: Normalization) -> None:
        """Raises or warns where a part lacks values in a way that would change totals without a word."""
        count, missing = len(values), int(np.isnan(values).sum())
        if self.nan_policy == "raise" and missing:
            raise InputError(
                f"{name} must return finite numbers, got NaN or infinity for {missing} of {count} pictures"
            )
        if missing and missing == count:
            warnings.warn(f"{name} has no value for any of the {count} pictures: all are NaN", stacklevel=3)
        elif how == "batch" and missing == count - 1 > 0:
            warnings.warn(
                f"{name} has a value for one picture of {count} only: normalised over the batch it counts 0",
                stacklevel=3,
            )

    def summary(self) -> dict[str, dict[str, float]]:
        """Statistics of every part and the total over all calls so far: count, nan, mean, std, min, max, seconds."""
        return {name: statistics.as_dict() for name, statistics in self.running.items()}

    @staticmethod
    def statistics(score: CompositeScore) -> dict[str, dict[str, float]]:
        """Mean, spread and NaN count of every part of one call."""
        everything = {**score.parts, "total": score.totals}
        known = {name: np.where(np.isfinite(v), v, np.nan) for name, v in everything.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN: the mean is NaN
            return {
                name: {"mean": float(np.nanmean(v)), "std": float(np.nanstd(v)), "nan": int(np.isnan(v).sum())}
                for name, v in known.items()
            }


def as_composite(scorer: Any, name: str = "reward") -> CompositeReward:
    """Whatever can be made a composite of: a composite, a scorer, or a dictionary of ``name -> (scorer, weight)``.

    Args:
        scorer: What a user gave.
        name: Name of the part, where a single scorer was given.

    Raises:
        InputError: It cannot be called as a scorer; the message says what it could be.

    >>> as_composite(lambda images, prompts, references: [1.0] * len(images))([0], ["x"], [[]]).totals.tolist()
    [1.0]
    """
    if isinstance(scorer, CompositeReward):
        return scorer
    if isinstance(scorer, Mapping):
        return CompositeReward(scorer)
    if not isinstance(name, str):
        raise InputError(f"name must be a text, got {name!r}"[:300])
    about = getattr(scorer, "__name__", type(scorer).__name__)
    wanted = f"a CompositeReward, a scorer(images, prompts, references), or a dictionary of name -> (scorer, weight), got {about}"
    if isinstance(scorer, type):
        raise InputError(f"reward must be {wanted}, which is a class: give an object of it")
    if isinstance(scorer, FaceBackend) and not callable(scorer):
        raise InputError(
            f"reward must be {wanted}, which is a face backend: IdentityScorer({about}()) makes a scorer of it"
        )
    try:
        inspect.signature(scorer).bind(None, None, None)
    except TypeError:
        raise InputError(f"reward must be {wanted}, which cannot be called with three arguments") from None
    except ValueError:
        pass  # a builtin that does not say what it takes
    return CompositeReward({name: (scorer, 1.0)})
