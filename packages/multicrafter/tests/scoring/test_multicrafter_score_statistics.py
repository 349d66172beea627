"""Intervals and tests against scipy, against enumeration, and on data without an effect."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multicrafter.scoring.statistics import bootstrap_interval, compare, holm, paired_test
from scipy import stats

NAN = float("nan")


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=60)
    ours = bootstrap_interval(values, resamples=20000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_pictures_of_one_prompt_do_not_count_as_independent():
    random = np.random.default_rng(1)
    means = random.normal(size=20)
    groups = [str(i) for i in range(20) for _ in range(8)]
    values = np.repeat(means, 8) + 0.01 * random.normal(size=160)
    clustered, naive = bootstrap_interval(values, groups), bootstrap_interval(values)
    alone = bootstrap_interval(means)
    assert clustered.high - clustered.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)
    assert (clustered.cases, clustered.groups) == (160, 20)


def test_prompts_with_more_pictures_weigh_more_in_the_mean_and_in_every_resample():
    values, groups = [0.0, *[1.0] * 9], ["a", *["b"] * 9]
    middle = bootstrap_interval(values, groups, level=0.2)  # half of the resamples hold both prompts
    assert middle.mean == 0.9 and (middle.low, middle.high) == (0.9, 0.9)


def test_prompts_count_alike_in_the_paired_test():
    sizes, effect = (1, 5, 2), (1.0, -0.5, 0.8)
    difference = np.repeat(effect, sizes)
    groups = [name for name, size in zip("abc", sizes) for _ in range(size)]
    test = paired_test(np.zeros(8), difference, groups)
    flips = [abs(np.dot(signs, effect)) for signs in itertools.product((1, -1), repeat=3)]
    assert test.p == pytest.approx(np.mean(np.array(flips) >= sum(effect) - 1e-9)) == 0.5


def test_coverage_of_the_interval():
    random = np.random.default_rng(2)
    hits = 0
    for i in range(150):
        e = bootstrap_interval(random.normal(size=40), resamples=400, seed=i)
        hits += e.low <= 0 <= e.high
    assert 0.87 <= hits / 150 <= 0.99


def test_nan_is_left_out_and_nothing_gives_nan():
    assert bootstrap_interval([1.0, NAN, 3.0]).mean == 2.0
    empty = bootstrap_interval([NAN, NAN])
    assert np.isnan(empty.mean) and empty.cases == 0
    assert np.isnan(paired_test([NAN], [1.0], ["a"]).p)
    with pytest.raises(ValueError, match="one name per value"):
        bootstrap_interval([1.0], ["a", "b"])


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-3, 3, allow_subnormal=False).map(lambda x: round(x, 2)), min_size=2, max_size=8))
def test_p_equals_that_of_all_sign_flips(differences):
    d = np.array(differences)
    test = paired_test(np.zeros(len(d)), d, [str(i) for i in range(len(d))])
    flips = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=len(d))]
    exact = np.mean(np.array(flips) >= abs(d.mean()) - 1e-12)
    assert test.p == pytest.approx(min(1.0, exact), abs=1e-9)
    assert test.difference == pytest.approx(d.mean())


def test_without_an_effect_p_is_uniform_and_with_one_it_is_small():
    random = np.random.default_rng(3)
    groups = [str(i) for i in range(24)]
    p = [
        paired_test(random.normal(size=24), random.normal(size=24), groups, resamples=199, seed=i).p for i in range(120)
    ]
    assert 0.01 <= np.mean(np.array(p) < 0.1) <= 0.2
    base = random.normal(size=24)
    assert paired_test(base, base + 0.5 + 0.1 * random.normal(size=24), groups).p < 0.001


def test_direction_and_swapping():
    a, b = np.array([0.0, 0.1, 0.2, 0.3]), np.array([1.0, 1.2, 0.9, 1.5])
    there, back = paired_test(a, b, list("wxyz")), paired_test(b, a, list("wxyz"))
    assert there.difference > 0 > back.difference and there.p == pytest.approx(back.p)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert paired_test(a, a, list("wxyz")).p == 1.0
    assert paired_test(a, b, ["one"] * 4).p == 1.0  # one prompt proves nothing


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    corrected = holm({"a": 0.5, "b": NAN, "c": 0.9})
    assert (corrected["a"], corrected["c"]) == (1.0, 1.0)
    assert np.isnan(corrected["b"])


def test_compare_corrects_for_the_number_of_metrics():
    random = np.random.default_rng(4)
    a = {n: random.normal(size=12) for n in "xyz"}
    b = {n: v + random.normal(size=12) for n, v in a.items()} | {"only_b": np.ones(12)}
    result = compare(a, b, [str(i) for i in range(12)])
    assert set(result) == {"x", "y", "z"}
    assert {n: r.p_corrected for n, r in result.items()} == pytest.approx(holm({n: r.p for n, r in result.items()}))
