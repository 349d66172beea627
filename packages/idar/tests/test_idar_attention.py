"""Values and gradients of both directions against the definition, hand-computed cases, invariances, bad input."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from idar import reference, subject_attention

SPANS, IMAGE = [(9, 13), (13, 18)], (3, 9)
DIRECTIONS = ["reference_to_image", "image_to_reference"]


def joint(
    dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 2, heads: int = 3, length: int = 18, width: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys laid out as diffusers has them: (b, n, h, d) in memory."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, width)
    return tuple(
        torch.randn(shape, generator=g, dtype=torch.float64).mul(2).to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(2)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 7, 60])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_materialised_attention_in_value_and_gradient(direction: str, chunk: int | None, masked: bool) -> None:
    q, k = joint()
    mask = torch.rand(2, 18, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    weight = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
    fast = subject_attention(q, k, SPANS, IMAGE, direction=direction, chunk_size=chunk, key_mask=mask)
    got = torch.autograd.grad((fast * weight).sum(), (q, k))
    slow = reference.subject_attention(q, k, SPANS, IMAGE, direction=direction, key_mask=mask)
    want = torch.autograd.grad((slow * weight).sum(), (q, k))
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_spans_may_come_in_any_order(direction: str) -> None:
    """References before the image (FLUX.2-klein-KV), the last subject first."""
    q, k = joint()
    spans, image = [(12, 15), (1, 5)], (6, 12)  # keys before, between and behind the spans
    weight = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
    fast = subject_attention(q, k, spans, image, direction=direction)
    slow = reference.subject_attention(q, k, spans, image, direction=direction)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    got, want = (torch.autograd.grad((maps * weight).sum(), (q, k)) for maps in (fast, slow))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [None, 0.07])
def test_gradcheck(direction: str, scale: float | None) -> None:
    q, k = joint(torch.float64, batch=1, heads=2, length=9, width=3)  # a token before and one behind everything
    assert torch.autograd.gradcheck(
        lambda a, b: subject_attention(a, b, [(5, 7), (7, 8)], (1, 5), direction=direction, chunk_size=9, scale=scale),
        (q, k),
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_to_its_resolution(direction: str) -> None:
    """The twin computes in fp32 from the same bf16 input: values agree as in fp32, gradients to the rounding of bf16."""
    q, k = joint(torch.bfloat16)
    weight = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
    fast = subject_attention(q, k, SPANS, IMAGE, direction=direction)
    slow = reference.subject_attention(q, k, SPANS, IMAGE, direction=direction)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    got, want = (torch.autograd.grad((maps * weight).sum(), (q, k)) for maps in (fast, slow))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_around_it_changes_nothing(dtype: torch.dtype) -> None:
    q, k = joint(dtype)
    for direction in DIRECTIONS:
        plain = subject_attention(q, k, SPANS, IMAGE, direction=direction)
        want = torch.autograd.grad(plain.square().sum(), (q, k))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = subject_attention(q, k, SPANS, IMAGE, direction=direction)
            got = torch.autograd.grad(maps.square().sum(), (q, k))
        assert torch.equal(maps, plain)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_two_by_two_by_hand() -> None:
    """One text token, two image tokens, two references of one token; width 1 and scale 1, so that scores are products."""
    #                      text image     references
    query = torch.tensor([[[[5.0], [0.0], [math.log(2.0)], [math.log(3.0)], [0.0]]]])
    key = torch.tensor([[[[1.0], [0.0], [1.0], [2.0], [-1.0]]]])
    looks = subject_attention(query, key, [(3, 4), (4, 5)], (1, 3))
    # reference 1: scores (0, log 3) over the image; reference 2 has a zero query
    torch.testing.assert_close(looks, torch.tensor([[[1 / 4, 3 / 4], [1 / 2, 1 / 2]]]))
    takes = subject_attention(query, key, [(3, 4), (4, 5)], (1, 3), direction="image_to_reference")
    # image 1: five equal keys; image 2: exp(log 2 * key) = 2, 1, 2, 4, 1/2, in sum 19/2
    torch.testing.assert_close(takes, torch.tensor([[[1 / 5, 8 / 19], [1 / 5, 1 / 19]]]))


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_invariances(seed: int) -> None:
    """Heads in any order, image tokens permuted, references' tokens in any order; rows are distributions."""
    q, k = (t.detach() for t in joint(seed=seed))
    g = torch.Generator().manual_seed(seed)
    for direction in DIRECTIONS:
        maps = subject_attention(q, k, SPANS, IMAGE, direction=direction)
        heads = torch.randperm(3, generator=g)
        torch.testing.assert_close(subject_attention(q[:, heads], k[:, heads], SPANS, IMAGE, direction=direction), maps)
        order, shuffle = torch.arange(18), torch.randperm(6, generator=g)
        order[3:9] = order[3:9][shuffle]
        order[9:13] = order[9:13][torch.randperm(4, generator=g)]
        moved = subject_attention(q[:, :, order], k[:, :, order], SPANS, IMAGE, direction=direction)
        torch.testing.assert_close(moved, maps[..., shuffle])
    looks = subject_attention(q, k, SPANS, IMAGE)
    torch.testing.assert_close(looks.sum(-1), torch.ones(2, 2))
    takes = subject_attention(q, k, SPANS, IMAGE, direction="image_to_reference")
    assert bool((takes >= 0).all())
    assert bool((takes.sum(1) <= 1 + 1e-6).all())
    with_text = subject_attention(q, k, [(0, 3), *SPANS], IMAGE, direction="image_to_reference").sum(1)
    own = torch.softmax(q[:, :, 3:9] @ k.transpose(2, 3) * 8**-0.5, -1)[..., 3:9].sum(-1).mean(1)
    torch.testing.assert_close(with_text + own, torch.ones(2, 6))


def test_the_text_matters_to_the_picture_alone() -> None:
    q, k = (t.detach() for t in joint())
    other = k.clone()
    other[:, :, :3] += 3
    assert torch.equal(subject_attention(q, k, SPANS, IMAGE), subject_attention(q, other, SPANS, IMAGE))
    a, b = (subject_attention(q, x, SPANS, IMAGE, direction="image_to_reference") for x in (k, other))
    assert not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    ("spans", "image", "word"),
    [
        ([(9, 19)], (3, 9), "subject_spans"),
        ([(9, 13), (12, 18)], (3, 9), "overlap"),
        ([(8, 13)], (3, 9), "overlap"),
        ([], (3, 9), "subject_spans"),
        ([(9, 13)], (9, 9), "image_span"),
        ([(9, 13)], (-1, 9), "image_span"),
        ([(9, 13)], (9, 99), "image_span"),
    ],
)
def test_bad_spans_are_named(spans: list[tuple[int, int]], image: tuple[int, int], word: str) -> None:
    q, k = joint()
    with pytest.raises(ValueError, match=word):
        subject_attention(q, k, spans, image)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"direction": "sideways"}, "direction"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"scale": 0.0}, "scale"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_mask"),
        ({"key_mask": torch.zeros(2, 18, dtype=torch.bool)}, "key_mask"),
        ({"num_samples": 5}, "num_samples"),
        ({"num_samples": 2, "direction": "image_to_reference"}, "num_samples"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_options_are_named(options: dict[str, object], word: str) -> None:
    q, k = joint()
    with pytest.raises((ValueError, TypeError), match=word):
        subject_attention(q, k, SPANS, IMAGE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_queries_and_keys_that_are_not_finite_are_named(direction: str, bad: float) -> None:
    for which in (0, 1):
        for position in (4, 10):
            pair = [t.detach().clone() for t in joint()]
            pair[which][0, 1, position, 2] = bad
            used = direction == "reference_to_image" and (position == 10) == (which == 0)
            used |= direction == "image_to_reference" and (which == 1 or position == 4)
            if used:
                with pytest.raises(ValueError, match="finite"):
                    subject_attention(*pair, SPANS, IMAGE, direction=direction)


def test_shapes_are_named() -> None:
    q, k = joint()
    with pytest.raises((ValueError, TypeError), match=r"key|query"):
        subject_attention(q, k[:, :, :-1], SPANS, IMAGE)
