"""Streaming subject attention, forward and backward, against the materialised definition (the named baseline)."""

from __future__ import annotations

import os

import idar
import pytest
import torch
from idar import reference

FULL = os.environ.get("BENCH_SIZE") == "full"
IMAGE, REFERENCE = (2304, 1024) if FULL else (64, 16)


@pytest.mark.parametrize("direction", ["reference_to_image", "image_to_reference"])
@pytest.mark.parametrize("implementation", ["streaming", "materialised"])
def test_forward_and_backward(benchmark, direction, implementation):
    torch.manual_seed(0)
    length = 32 + IMAGE + 2 * REFERENCE
    query, key = (torch.randn(1, 4, length, 64, requires_grad=True) for _ in range(2))
    spans = [(32 + IMAGE + i * REFERENCE, 32 + IMAGE + (i + 1) * REFERENCE) for i in range(2)]
    function = idar.subject_attention if implementation == "streaming" else reference.subject_attention

    def step():
        function(query, key, spans, (32, 32 + IMAGE), direction=direction).square().sum().backward()

    benchmark.pedantic(step, rounds=5 if FULL else 2, warmup_rounds=1)
