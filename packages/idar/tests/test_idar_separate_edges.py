"""Edges of `separate_attention` that need no model of diffusers: types, rows, heads, empty masks, masks with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from idar import SubjectLayout, attention_owners, capture_attention, separate_attention, separation_bias

LAYOUT = SubjectLayout.in_order(2, 4, [2, 1])
MASKS = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 0]]])


class Joint(torch.nn.Module):
    """Attention of a sequence to itself; queries, keys and values are the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def passed(x: torch.Tensor, masks: Any, layout: Any = LAYOUT, **options: Any) -> torch.Tensor:
    model = torch.nn.Sequential(Joint())
    with separate_attention(model, {"joint": model[0]}, layout, masks, **options):
        output: torch.Tensor = model(x)
    return output


def sequence(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 2, 9, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("background", ["none", "all"])
def test_masks_of_every_type(dtype: torch.dtype, background: Any) -> None:
    x = sequence()
    want = passed(x, MASKS, background=background)
    torch.testing.assert_close(passed(x, MASKS.to(dtype), background=background), want)
    assert not torch.allclose(want, Joint()(x), atol=1e-3)


def test_a_type_of_the_model_keeps_its_type() -> None:
    x = sequence()
    for dtype in (torch.bfloat16, torch.float64):
        found = passed(x.to(dtype), MASKS)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), passed(x, MASKS), atol=0.05, rtol=0.05)


def test_one_row_of_masks_serves_all_rows() -> None:
    x = sequence(3)
    torch.testing.assert_close(passed(x, MASKS), passed(x, MASKS.expand(3, -1, -1)))
    assert torch.equal(passed(x, MASKS)[1:2], passed(x[1:2], MASKS))
    assert passed(sequence(3)[:, :, :, :], torch.zeros(1, 2, 4)).isfinite().all()


def test_a_subject_that_is_nowhere_is_read_by_nobody() -> None:
    x, masks = sequence(), MASKS.clone()
    masks[:, 1] = 0
    model = torch.nn.Sequential(Joint())
    with (
        separate_attention(model, {"joint": model[0]}, LAYOUT, masks),
        capture_attention(model, {"joint": model[0]}, LAYOUT) as captured,
    ):
        output = model(x)
    assert captured.maps[:, 1].abs().max() == 0 and captured.maps[:, 0, :2].min() > 0
    assert output.isfinite().all()


def test_masks_with_gradients_are_data() -> None:
    """log(0) has no gradient: none flows into masks, and that of the input is finite."""
    x, masks = sequence().requires_grad_(), MASKS.clone().requires_grad_()
    passed(x, masks).square().sum().backward()
    assert masks.grad is None and x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    ("masks", "options", "word"),
    [
        (MASKS[:0], {}, "at least one row"),
        (MASKS * 1j, {}, "real"),
        (MASKS, {"heads": [0, 2]}, "heads must be below the attention's 2"),
        (MASKS, {"heads": [-1]}, "heads"),
        (MASKS.expand(2, -1, -1), {}, "one row per sample"),
        (attention_owners, {"layout": [LAYOUT] * 3}, "router"),
    ],
)
def test_what_does_not_fit_is_named(masks: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        passed(sequence(3), masks, **options)


def test_text_that_comes_last_is_let_alone() -> None:
    """Known by length or not, the bias is 0 there."""
    x = sequence()
    last = SubjectLayout.in_order(2, 4, [2, 1], text="last")
    loose = SubjectLayout(num_text=2, image_span=last.image_span, subject_spans=last.subject_spans)
    want = torch.nn.functional.scaled_dot_product_attention(
        x, x, x, attn_mask=separation_bias(last, MASKS, num_tokens=9)
    )
    torch.testing.assert_close(passed(x, MASKS, last), want)
    torch.testing.assert_close(passed(x, MASKS, loose), want)
