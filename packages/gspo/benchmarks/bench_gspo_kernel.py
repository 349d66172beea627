"""A kernel step against the bare arithmetic (the named baseline): five elementwise passes over (16, 1024, 64).

mean = a x; mean += b v; next = mean + std z; d = (next - mean)^2; mean of d. "draw" has the same random numbers drawn in both, "score"
neither the draw nor its pass.
"""

from __future__ import annotations

import os

import pytest
import torch
from gspo import FlowCPS, FlowSDE

SHAPE = (16, 1024, 64) if os.environ.get("BENCH_SIZE") == "full" else (16, 64, 16)


@pytest.mark.parametrize("mode", ["score", "draw"])
@pytest.mark.parametrize("form", ["bare arithmetic", "FlowSDE", "FlowCPS"])
def test_kernel_step(benchmark, mode, form):
    g = torch.Generator().manual_seed(0)
    x, v, stored = (torch.randn(SHAPE, generator=g) for _ in range(3))
    a, b, std = (torch.full((16, 1, 1), value) for value in (0.9, -0.1, 0.2))

    def bare():
        mean = (x * a).addcmul_(v, b)
        sample = stored if mode == "score" else torch.addcmul(mean, torch.randn(SHAPE, generator=g), std)
        return torch.nn.functional.mse_loss(sample, mean, reduction="none").flatten(1).mean(1)

    kernel = FlowCPS() if form == "FlowCPS" else FlowSDE()

    def ours():
        return kernel.step(x, v, 0.8, 0.7, next_latents=stored if mode == "score" else None, generator=g)

    benchmark.group = f"kernel step, {mode}"
    benchmark.pedantic(bare if form == "bare arithmetic" else ours, rounds=60, warmup_rounds=5)
