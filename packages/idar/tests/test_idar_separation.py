"""The bias that keeps subjects apart: its slow twin, its limits, its masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from idar import (
    ARROWS,
    SubjectLayout,
    attention_owners,
    box_masks,
    owner_masks,
    reference,
    separation_bias,
    subject_attention,
)
from idar.separation import TokenRoles, check_separation, separates_nothing


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    subjects = draw(st.integers(1, 4))
    layout = SubjectLayout.in_order(
        draw(st.integers(0, 3)),
        draw(st.integers(1, 5)),
        draw(st.lists(st.integers(1, 3), min_size=subjects, max_size=subjects)),
        text=draw(st.sampled_from(["first", "last"])),
    )
    rows = draw(st.integers(1, 2))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(rows, subjects, layout.num_image, generator=generator)
    if draw(st.booleans()):
        masks = masks.round()
    return {
        "layout": layout,
        "masks": masks,
        "strength": draw(st.sampled_from([0.0, 0.25, 1.0])),
        "background": draw(st.sampled_from(["none", "all"])),
        "arrows": tuple(draw(st.lists(st.sampled_from(ARROWS), unique=True))),
        "num_tokens": layout.stop + draw(st.integers(0, 2)),
    }


@given(cases())
@settings(max_examples=60, deadline=None)
def test_equals_the_slow_twin_and_the_roles_of_single_tokens(case: dict[str, object]) -> None:
    bias = separation_bias(**case)  # type: ignore[arg-type]
    torch.testing.assert_close(bias, reference.separation_bias(**case))  # type: ignore[arg-type]
    layout, masks, length = case["layout"], case["masks"], case["num_tokens"]
    assert isinstance(masks, torch.Tensor) and isinstance(length, int)
    roles = TokenRoles([layout], masks, case["background"], case["arrows"], length)  # type: ignore[list-item, arg-type]
    row = torch.arange(len(masks))[:, None, None]
    token = torch.arange(length)
    allowed = roles.allowed(row, token[None, :, None], token[None, None])
    strength = case["strength"]
    assert isinstance(strength, float)
    torch.testing.assert_close(bias[:, 0].exp(), 1 - strength * (1 - allowed))
    if separates_nothing(strength, masks, case["background"], case["arrows"]):  # type: ignore[arg-type]
        assert bool((bias == 0).all())


def test_two_people_by_hand() -> None:
    """Text 1, image tokens (A, B, nobody), references of A and B with a token each."""
    layout = SubjectLayout.in_order(1, 3, [1, 1])
    masks = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    want = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 0, 1],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 0, 1, 0, 0, 1],
        ]
    )
    assert torch.equal(separation_bias(layout, masks)[0, 0].exp(), want.float())
    free = separation_bias(layout, masks, background="all")[0, 0].exp()
    assert free[3].tolist() == [1, 1, 1, 1, 1, 1] and free[4].tolist() == [1, 1, 0, 1, 1, 0]
    apart = separation_bias(layout, masks, arrows=("image_to_image",))[0, 0].exp()
    assert apart[1].tolist() == [1, 1, 0, 1, 1, 1] and apart[3].tolist() == [1] * 6
    assert separation_bias(layout, masks, strength=0.75)[0, 0, 1, 5].exp().item() == pytest.approx(0.25)


def test_weights_multiply_the_probabilities() -> None:
    """p' is w p, normalised: the meaning of a soft mask."""
    torch.manual_seed(0)
    layout = SubjectLayout.in_order(2, 4, [2, 2])
    query, key = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    masks = torch.rand(1, 2, 4)
    bias = separation_bias(layout, masks)
    plain = (query @ key.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    weighted = plain * bias.exp()
    want = weighted / weighted.sum(-1, keepdim=True)
    got = (query @ key.transpose(-1, -2) / math.sqrt(8) + bias).softmax(-1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("direction", ["reference_to_image", "image_to_reference"])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_maps_under_a_bias(direction: str, chunk: int | None) -> None:
    torch.manual_seed(0)
    layout = SubjectLayout.in_order(3, 6, [2, 2])
    query, key = (torch.randn(2, 3, 13, 4, dtype=torch.float64, requires_grad=True) for _ in "qk")
    masks = torch.rand(2, 2, 6, dtype=torch.float64)
    masks[0] = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    bias = separation_bias(layout, masks)
    given = (query, key, layout.subject_spans, layout.image_span)
    maps = subject_attention(*given, direction=direction, chunk_size=chunk, bias=bias)  # type: ignore[arg-type]
    want = reference.subject_attention(*given, direction=direction, bias=bias)
    torch.testing.assert_close(maps, want, atol=1e-6, rtol=1e-6)
    weights = torch.rand_like(maps)
    got = torch.autograd.grad((maps * weights).sum(), (query, key))
    expected = torch.autograd.grad((want * weights).sum(), (query, key))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert bool((maps[0, 0, 3:] == 0).all()) and bool((maps[0, 1, :3] == 0).all())


def test_a_reference_that_may_look_nowhere_has_an_empty_map() -> None:
    layout = SubjectLayout.in_order(1, 4, [1, 1])
    masks = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 0, 0]]])
    query = torch.randn(1, 2, 7, 4, requires_grad=True)
    maps = subject_attention(query, query, layout.subject_spans, layout.image_span, bias=separation_bias(layout, masks))
    maps.square().sum().backward()
    assert bool((maps[0, 1] == 0).all()) and maps[0, 0].sum().item() == pytest.approx(1.0)
    assert query.grad is not None and bool(torch.isfinite(query.grad).all())


def test_layouts_row_by_row() -> None:
    """Two rows whose references have other sizes: each is separated by its own layout."""
    layouts = [SubjectLayout.in_order(1, 2, [1, 3]), SubjectLayout.in_order(1, 2, [2, 2])]
    masks = torch.eye(2).expand(2, 2, 2)
    both = separation_bias(layouts, masks)
    for row in range(2):
        assert torch.equal(both[row], separation_bias(layouts[row], masks[:1])[0])


def test_strength_row_by_row() -> None:
    layout = SubjectLayout.in_order(1, 2, [1, 1])
    masks = torch.eye(2).expand(2, 2, 2)
    bias = separation_bias(layout, masks, strength=torch.tensor([1.0, 0.0]))
    assert bool((bias[1] == 0).all()) and torch.equal(bias[:1], separation_bias(layout, masks[:1]))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"masks": torch.eye(2)}, "masks must be"),
        ({"masks": torch.ones(1, 3, 2)}, "masks must be"),
        ({"masks": torch.ones(1, 1, 2)}, "masks must be"),
        ({"masks": 2 * torch.eye(2)[None]}, "masks must lie"),
        ({"masks": torch.full((1, 2, 2), torch.nan)}, "masks must lie"),
        ({"strength": 1.5}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": torch.ones(3)}, "strength"),
        ({"background": "some"}, "background"),
        ({"arrows": ("image_to_moon",)}, "arrows"),
        ({"arrows": "image_to_image"}, "arrows"),
        ({"num_tokens": 3}, "num_tokens"),
    ],
)
def test_refusals(changes: dict[str, object], word: str) -> None:
    given = {"layout": SubjectLayout.in_order(1, 2, [1, 1]), "masks": torch.eye(2)[None], **changes}
    with pytest.raises(ValueError, match=word):
        separation_bias(**given)  # type: ignore[arg-type]


def test_layouts_must_be_one_or_one_per_row() -> None:
    layout = SubjectLayout.in_order(1, 2, [1, 1])
    with pytest.raises(ValueError, match="layout"):
        check_separation([layout] * 3, torch.eye(2).expand(2, 2, 2), 1.0, "none", ())


def test_owners() -> None:
    coverage = torch.tensor([[[0.9, 0.4, 0.1, 0.5], [0.2, 0.6, 0.1, 0.5]]])
    assert owner_masks(coverage).tolist() == [[[1, 0, 0, 1], [0, 1, 0, 0]]]
    assert owner_masks(coverage, threshold=0.7).tolist() == [[[1, 0, 0, 0], [0, 0, 0, 0]]]
    with pytest.raises(ValueError, match="threshold"):
        owner_masks(coverage, threshold=0.0)
    with pytest.raises(ValueError, match="coverage"):
        owner_masks(coverage * torch.nan)


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_boxes_become_masks_that_never_overlap(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, extent = 40 * torch.rand(2, 3, 2, generator=generator), 24 * torch.rand(2, 3, 2, generator=generator)
    boxes = torch.cat([low, low + extent], 2)
    masks = box_masks(boxes, (8, 6), (64, 48))
    assert bool((masks.sum(1) <= 1).all())
    alone = box_masks(boxes[:, :1], (8, 6), (64, 48))
    assert bool((masks[:, 0] <= alone[:, 0]).all())
    centre_y, centre_x = (torch.arange(8) + 0.5) * 8, (torch.arange(6) + 0.5) * 8
    for row in range(2):
        left, top, right, bottom = boxes[row, 0].tolist()
        inside = ((centre_y >= top - 2) & (centre_y <= bottom + 2))[:, None] & (
            (centre_x >= left - 2) & (centre_x <= right + 2)
        )
        assert torch.equal(alone[row, 0].view(8, 6) > 0, inside)


def test_the_nearer_of_two_overlapping_boxes_wins() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 40.0, 64.0], [24.0, 0.0, 64.0, 64.0]]])
    masks = box_masks(boxes, (1, 8), (64, 64), margin=0.0)[0]
    assert masks.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_a_subject_without_a_box_gets_no_token() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0], [torch.nan] * 4]])
    masks = box_masks(boxes, (2, 2), (64, 64))
    assert bool((masks[0, 0] == 1).all()) and bool((masks[0, 1] == 0).all())


def test_bad_boxes() -> None:
    with pytest.raises(ValueError, match="boxes"):
        box_masks(torch.tensor([[[5.0, 0.0, 1.0, 4.0]]]), (2, 2), (8, 8))
    with pytest.raises(ValueError, match="boxes"):
        box_masks(torch.zeros(1, 4), (2, 2), (8, 8))
    with pytest.raises(ValueError, match="margin"):
        box_masks(torch.zeros(1, 1, 4), (2, 2), (8, 8), margin=-1.0)


def test_attention_owners_follow_the_larger_share() -> None:
    layout = SubjectLayout.in_order(1, 2, [1, 1])
    query, key = torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2)
    query[0, 0, 1], query[0, 0, 2] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    key[0, 0, 3], key[0, 0, 4] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert attention_owners(query, key, layout)[0].tolist() == [[1, 0], [0, 1]]
