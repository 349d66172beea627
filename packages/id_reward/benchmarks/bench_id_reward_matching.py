"""Optimal matching against the search over all assignments (the named baseline)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from id_reward import match


def all_assignments(similarity):
    rows = range(len(similarity))
    return max(sum(similarity[r, c] for r, c in zip(rows, p)) for p in itertools.permutations(rows))


@pytest.mark.parametrize("size", [2, 4, 6])
@pytest.mark.parametrize("implementation", [match, all_assignments], ids=["match", "all assignments"])
def test_matching(benchmark, implementation, size):
    similarity = np.random.default_rng(0).uniform(-1, 1, (size, size))
    benchmark.pedantic(implementation, (similarity,), rounds=20, warmup_rounds=1)
