"""The three dispatches, forward and backward; the named baseline is "dense", which computes every expert for every token."""

from __future__ import annotations

import os

import pytest
import torch
from moe_lora.dispatch import experts

FULL = os.environ.get("BENCH_SIZE") == "full"
TOKENS, WIDTH, RANK = (4096, 1024, 64) if FULL else (128, 64, 8)


@pytest.mark.parametrize("dispatch", ["grouped", "loop", "dense"])
@pytest.mark.parametrize("num_experts", [4, 16])
def test_dispatch(benchmark, dispatch, num_experts):
    torch.manual_seed(0)
    h = torch.randn(TOKENS, WIDTH, requires_grad=True)
    a = torch.randn(num_experts, RANK, WIDTH, requires_grad=True)
    b = torch.randn(num_experts, WIDTH, RANK, requires_grad=True)
    weights, index = torch.rand(TOKENS, 1), torch.randint(num_experts, (TOKENS, 1))

    def step():
        experts(h, a, b, weights, index, dispatch).sum().backward()

    benchmark.pedantic(step, rounds=5 if FULL else 2, warmup_rounds=1)
