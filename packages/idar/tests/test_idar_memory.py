"""Bytes: what the allocator hands out while maps and gradients are computed, and what autograd keeps in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from idar import reference, subject_attention
from torch.profiler import ProfilerActivity, profile

DIRECTIONS = ["reference_to_image", "image_to_reference"]


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that the CPU allocator had handed out at a time, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    now = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def extra_bytes(function: Callable[..., torch.Tensor], heads: int, direction: str, **options: object) -> int:
    """Peak of forward and backward, without the two gradients that it is about."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 32 + 256 + 2 * 100, heads, 16, generator=g).transpose(1, 2).requires_grad_() for _ in "qk")

    def run() -> None:
        maps = function(q, k, [(288, 388), (388, 488)], (32, 288), direction=direction, **options)
        torch.autograd.grad(maps.square().sum(), (q, k))

    run()
    return peak_bytes(run) - 2 * q.numel() * q.element_size()


def test_the_count_counts() -> None:
    assert peak_bytes(lambda: torch.empty(1000) + torch.empty(1000)) in range(12_000, 13_000)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extra_memory_is_a_tenth_and_does_not_grow_with_heads(direction: str) -> None:
    few, many = (extra_bytes(subject_attention, h, direction, chunk_size=2 * 100 * 256) for h in (2, 24))
    naive = extra_bytes(reference.subject_attention, 24, direction)
    assert many <= 1.02 * few + 4096
    assert many <= naive / 10


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_autograd_keeps_the_given_tensors_and_nothing_else(direction: str) -> None:
    q, k = (torch.randn(1, 32, 4, 8).transpose(1, 2).requires_grad_() for _ in "qk")
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        subject_attention(q, k, [(16, 24), (24, 32)], (4, 16), direction=direction)
    new = {address: size for address, size in kept.items() if address not in (q.data_ptr(), k.data_ptr())}
    assert len(kept) - len(new) == 2
    assert sum(new.values()) <= 16 * 8  # the positions of the queries
