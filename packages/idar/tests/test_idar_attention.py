from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from idar import reference, stratified_subset, subject_attention

SPANS, IMAGE = [(9, 13), (13, 18)], (3, 9)
DIRECTIONS = ["reference_to_image", "image_to_reference"]


def joint(dtype: torch.dtype = torch.float32, seed: int = 0, heads: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(2, heads, 18, 8, generator=g, dtype=torch.float64).mul(2).to(dtype).requires_grad_()
        for _ in range(2)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 7, 60])
def test_equals_materialised_attention_in_value_and_gradient(direction: str, chunk: int | None) -> None:
    q, k = joint()
    weight = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
    fast = subject_attention(q, k, SPANS, IMAGE, direction=direction, chunk_size=chunk)
    got = torch.autograd.grad((fast * weight).sum(), (q, k))
    slow = reference.subject_attention(q, k, SPANS, IMAGE, direction=direction)
    want = torch.autograd.grad((slow * weight).sum(), (q, k))
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str) -> None:
    q, k = joint(torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: subject_attention(a, b, SPANS, IMAGE, direction=direction, chunk_size=20), (q, k)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_to_its_resolution(direction: str) -> None:
    q, k = joint(torch.bfloat16)
    fast = subject_attention(q, k, SPANS, IMAGE, direction=direction)
    slow = reference.subject_attention(q, k, SPANS, IMAGE, direction=direction)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, slow, atol=1e-2, rtol=2e-2)
    fast.square().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.bfloat16


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_invariances(seed: int) -> None:
    q, k = (t.detach() for t in joint(seed=seed))
    maps = subject_attention(q, k, SPANS, IMAGE)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2))
    heads = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(subject_attention(q[:, heads], k[:, heads], SPANS, IMAGE), maps)
    order = torch.arange(18)
    order[3:9] = order[3:9].flip(0)
    torch.testing.assert_close(subject_attention(q[:, :, order], k[:, :, order], SPANS, IMAGE), maps.flip(-1))
    mass = subject_attention(q, k, SPANS, IMAGE, direction="image_to_reference")
    assert bool((mass >= 0).all()) and bool((mass.sum(1) <= 1 + 1e-6).all())


def test_extra_memory_does_not_grow_with_heads() -> None:
    """The largest tensor alive in forward or backward is a slice, not the matrix of all heads."""
    sizes: list[int] = []

    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    for heads in (2, 16):
        q, k = (torch.randn(1, heads, 640, 8, requires_grad=True) for _ in range(2))
        sizes.clear()
        with Largest():
            subject_attention(q, k, [(384, 512), (512, 640)], (128, 384), chunk_size=128 * 256).sum().backward()
        assert max(sizes) <= max(128 * 256, q.numel())


def test_stratified_subset_is_unbiased() -> None:
    q, k = (t.detach() for t in joint())
    full = subject_attention(q, k, [(9, 13)], IMAGE)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([subject_attention(q, k, [(9, 13)], IMAGE, num_samples=2, generator=g) for _ in range(2000)])
    error = (draws.mean(0) - full).abs() / (draws.std(0) / 2000**0.5 + 1e-9)
    assert error.max() < 5
    assert stratified_subset(8, 8).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("spans", "image", "word"),
    [
        ([(9, 19)], (3, 9), "subject_spans"),
        ([(9, 13), (12, 18)], (3, 9), "overlap"),
        ([], (3, 9), "subject_spans"),
        ([(9, 13)], (9, 9), "image_span"),
    ],
)
def test_bad_spans_are_named(spans: list[tuple[int, int]], image: tuple[int, int], word: str) -> None:
    q, k = joint()
    with pytest.raises(ValueError, match=word):
        subject_attention(q, k, spans, image)
