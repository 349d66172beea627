from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import hypothesis.strategies as st
import pytest
from gspo import SlidingWindow
from hypothesis import given, settings

ORACLES = json.loads((Path(__file__).parent / "data" / "oracles.json").read_text())


@pytest.mark.parametrize("case", ORACLES["mixgrpo_window"]["cases"])
def test_window_equals_the_reference_wherever_that_one_is_full(case: dict) -> None:
    ours = SlidingWindow(
        case["num_steps"], size=case["window"], stride=case["stride"], interval=case["iters_per_shift"]
    )
    sweep = len(ours.starts) * case["iters_per_shift"]
    compared = 0
    for entry in case["schedule"]:
        if len(entry["window"]) == case["window"] and entry["first_iteration"] < sweep:
            assert list(ours.at(entry["first_iteration"])) == entry["window"]
            compared += 1
    assert compared > 0


@given(
    n=st.integers(2, 30),
    size=st.integers(1, 5),
    stride=st.integers(1, 5),
    iteration=st.integers(0, 5000),
    kind=st.sampled_from(["progressive", "random", "exp_decay"]),
)
@settings(deadline=None)
def test_window_is_never_empty_and_never_last(n: int, size: int, stride: int, iteration: int, kind: str) -> None:
    size = min(size, n - 1)
    w = SlidingWindow(n, size=size, stride=stride, interval=7, strategy=kind, seed=3)  # type: ignore[arg-type]
    got = w.at(iteration)
    assert len(got) == size and got[0] >= 0 and got[-1] <= n - 2 and list(got) == list(range(got[0], got[0] + size))


@pytest.mark.parametrize("kind", ["progressive", "random", "exp_decay"])
def test_schedule_is_a_function_of_its_integers(kind: str) -> None:
    """What two ranks, or a resumed run, build from the same few numbers is the same schedule."""
    window = SlidingWindow(16, interval=3, strategy=kind, seed=5)  # type: ignore[arg-type]
    again = SlidingWindow(**asdict(window))
    assert [window.at(i) for i in range(200)] == [again.at(i) for i in range(200)]
    assert all(window.at(3 * i) == window.at(3 * i + 2) for i in range(10)) or kind == "exp_decay"


def test_every_start_gets_its_stay() -> None:
    window = SlidingWindow(16, size=2, interval=50, strategy="exp_decay")
    counts = Counter(window.at(i)[0] for i in range(sum(window.stays)))
    # tau(l) = ceil(50 exp(-0.1 relu(l - 8))), MixGRPO's formula with the threshold at half of the steps
    assert counts == {start: math.ceil(50 * math.exp(-0.1 * max(0, start - 8))) for start in range(14)}
    assert window.at(sum(window.stays))[0] == 0
    progressive = Counter(SlidingWindow(16, interval=50).at(i)[0] for i in range(700))
    assert progressive == dict.fromkeys(range(14), 50)


def test_random_starts_are_uniform_and_seeded() -> None:
    starts = [SlidingWindow(16, interval=1, strategy="random", seed=1).at(i)[0] for i in range(2800)]
    counts = Counter(starts)
    assert set(counts) == set(range(14)) and max(abs(c - 200) for c in counts.values()) < 60
    assert starts != [SlidingWindow(16, interval=1, strategy="random", seed=2).at(i)[0] for i in range(2800)]


@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_fixed_window_stays_where_it_is_put(start: int) -> None:
    window = SlidingWindow(8, size=2, interval=4, strategy="fixed", start=start)
    assert {window.at(i) for i in (0, 1, 4, 1000)} == {(start, start + 1)} and window.starts == (start,)


@pytest.mark.parametrize(
    "options", [{"strategy": "fixed", "start": 6}, {"strategy": "fixed", "start": -1}, {"start": 1}]
)
def test_a_window_that_cannot_stay_there_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=rf"start must be .* got {options['start']}"):
        SlidingWindow(8, size=2, **options)
