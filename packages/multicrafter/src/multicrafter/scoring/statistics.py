"""Intervals and tests for scores of pictures, with pictures of one prompt kept together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """Mean, 95 % interval, number of cases and of groups behind it."""

    mean: float
    low: float
    high: float
    cases: int
    groups: int


class Comparison(NamedTuple):
    """b - a over the cases of both: mean, 95 % interval, two-sided p (of its own, and corrected for the number of metrics), cases, groups."""

    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    cases: int
    groups: int


def _sums(values: Sequence[float] | np.ndarray, groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the known values of each group that has any."""
    array = np.asarray(values, np.float64)
    if len(array) != len(groups):
        raise ValueError(f"groups must have one name per value ({len(array)}), got {len(groups)}")
    known = np.isfinite(array)
    _, index = np.unique(np.asarray(groups, dtype=str)[known], return_inverse=True)
    return np.bincount(index, array[known]), np.bincount(index)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    resamples: int = 5000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean and percentile bootstrap interval (Efron, 1979). NaN values are left out.

    With ``groups`` whole groups are drawn (cluster bootstrap, Field and Welsh, 2007); without, every value is its own.

    >>> bootstrap_interval([1.0, 1.0, float("nan")])
    Estimate(mean=1.0, low=1.0, high=1.0, cases=2, groups=2)
    """
    if groups is None:
        total = np.asarray(values, np.float64)
        total = total[np.isfinite(total)]
        count = np.ones(len(total), np.int64)
    else:
        total, count = _sums(values, groups)
    if not len(total):
        return Estimate(float("nan"), float("nan"), float("nan"), 0, 0)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, 500):  # in parts, so that many cases fit into memory
        rows = random.integers(len(total), size=(min(500, resamples - start), len(total)))
        means.append(total[rows].sum(1) / count[rows].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(total.sum() / count.sum()), float(low), float(high), int(count.sum()), len(total))


def paired_test(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    groups: Sequence[str],
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Whether b differs from a on the same cases: sign-flip permutation test of the groups' mean differences.

    Without an effect, a and b could trade places in every group: the mean difference is compared with those under random signs (all
    2^groups of them where that is no more than ``resamples``). p_corrected equals p here; see `holm`.

    Args:
        a: Scores of one run; cases where either is NaN are left out.
        b: Scores of the other, on the same cases.
        groups: Prompt of each case.
        resamples: Random signs tried.
        seed: Of them.
    """
    from scipy.stats import permutation_test

    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    interval = bootstrap_interval(difference, groups, seed=seed)
    if not interval.groups:
        return Comparison(float("nan"), float("nan"), float("nan"), float("nan"), float("nan"), 0, 0)
    total, count = _sums(difference, groups)
    means = total / count
    if not means.any():
        p = 1.0
    elif len(means) == 1:
        p = 1.0  # one prompt proves nothing
    else:
        p = permutation_test(
            (means,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=resamples,
            alternative="two-sided", rng=np.random.default_rng(seed),
        ).pvalue  # fmt: skip
    return Comparison(interval.mean, interval.low, interval.high, float(p), float(p), interval.cases, interval.groups)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values corrected for being many (Holm, 1979): sorted upwards, the i-th times (n - i), never falling. NaN stays NaN.

    >>> holm({"a": 0.01, "b": 0.04})
    {'a': 0.02, 'b': 0.04}
    """
    known = sorted((p, name) for name, p in p_values.items() if np.isfinite(p))
    corrected, floor = {}, 0.0
    for i, (p, name) in enumerate(known):
        floor = max(floor, min(1.0, p * (len(known) - i)))
        corrected[name] = floor
    return {name: corrected.get(name, float("nan")) for name in p_values}


def compare(
    a: Mapping[str, Float[np.ndarray, " n"]], b: Mapping[str, Float[np.ndarray, " n"]], groups: Sequence[str]
) -> dict[str, Comparison]:
    """`paired_test` of every metric of both, p values corrected by `holm`."""
    tests = {name: paired_test(a[name], b[name], groups) for name in a if name in b}
    corrected = holm({name: t.p for name, t in tests.items()})
    return {name: t._replace(p_corrected=corrected[name]) for name, t in tests.items()}
