"""A rollout of sixteen steps and groups of twelve: the common prefix taken once, and a short tail, against neither (the named baseline)."""

from __future__ import annotations

import os

import pytest
import torch
from gspo import FlowSDE, SlidingWindow, rollout

WIDTH = 2048 if os.environ.get("BENCH_SIZE") == "full" else 64


@pytest.mark.parametrize("start", [0, 7, 13])
@pytest.mark.parametrize("form", ["plain", "shared prefix", "shared prefix and tail"])
def test_rollout(benchmark, start, form):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH))
    noise, sigmas = torch.randn(4, WIDTH), torch.linspace(1, 0, 17)
    window = next(w for w in (SlidingWindow(16, size=2).at(50 * i) for i in range(14)) if w[0] == start)
    options = {"share_prefix": form != "plain", "tail_steps": 2 if form.endswith("tail") else None}

    def run():
        return rollout(
            lambda x, s, i: network(x), noise, sigmas, kernel=FlowSDE(), window=window, group_size=12,
            generator=torch.Generator().manual_seed(0), **options,
        )  # fmt: skip

    drawn = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["function_evaluations"] = drawn.num_function_evaluations
