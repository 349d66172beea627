"""Area pooling: sizes that do not divide, aspect ratios, padding."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from idar import token_masks


def test_coverage_by_hand() -> None:
    masks = torch.zeros(1, 1, 4, 8)
    masks[..., :2, :3] = 1
    assert token_masks(masks, (2, 4)).tolist() == [[[1.0, 0.5, 0, 0, 0, 0, 0, 0]]]
    assert token_masks(masks.bool(), (2, 4)).tolist() == [[[1.0, 0.5, 0, 0, 0, 0, 0, 0]]]
    # three columns over eight pixels: 8/3 pixels each; the mask's three pixels are 2 2/3 and 1/3
    torch.testing.assert_close(token_masks(masks, (1, 3)), torch.tensor([[[0.5, 0.0625, 0.0]]]))


@given(
    height=st.integers(1, 30), width=st.integers(1, 30), rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_area_is_kept_whatever_the_sizes(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    masks = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(seed))
    pooled = token_masks(masks, (rows, columns))
    torch.testing.assert_close(pooled.mean(-1), masks.mean((2, 3)))
    if height % rows == 0 and width % columns == 0:
        want = torch.nn.functional.adaptive_avg_pool2d(masks, (rows, columns)).flatten(2)
        torch.testing.assert_close(pooled, want)
    torch.testing.assert_close(
        token_masks(masks.mT, (columns, rows)).unflatten(2, (columns, rows)).mT.flatten(2), pooled
    )
    padded = token_masks(masks, (rows, columns), fit="pad")
    area = (height * width) / max(height / rows, width / columns) ** 2 / (rows * columns)  # of the canvas
    torch.testing.assert_close(padded.mean(-1), masks.mean((2, 3)) * area)


def test_aspect_ratios() -> None:
    """A wide picture of which the left half is the subject, on a square canvas of 4 x 4 tokens."""
    masks = torch.zeros(1, 1, 10, 20)
    masks[..., :10] = 1
    grids = {fit: token_masks(masks, (4, 4), fit=fit).unflatten(2, (4, 4))[0, 0] for fit in ("stretch", "pad", "crop")}  # type: ignore[arg-type]
    left = torch.tensor([1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(grids["stretch"], left.expand(4, 4))
    torch.testing.assert_close(grids["pad"], torch.stack([left * 0, left, left, left * 0]))
    torch.testing.assert_close(grids["crop"], left.expand(4, 4))
    corner = torch.zeros(1, 1, 10, 20)
    corner[..., :5] = 1  # cut away by the crop, which keeps the middle 10 pixels
    assert token_masks(corner, (4, 4), fit="crop").sum() == 0


def test_padding_belongs_to_nobody() -> None:
    masks = torch.ones(1, 1, 4, 4)
    pooled = token_masks(masks, (2, 4), padding=(0, 0, 4, 0)).unflatten(2, (2, 4))
    assert pooled[0, 0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    pooled = token_masks(masks, (3, 1), padding=(0, 2, 0, 0)).flatten()
    assert pooled.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("masks", "options", "word"),
    [
        (torch.ones(1, 1, 4, 4) * 2, {}, "masks"),
        (torch.full((1, 1, 4, 4), torch.nan), {}, "masks"),
        (torch.ones(1, 1, 4, 4), {"fit": "squeeze"}, "fit"),
        (torch.ones(1, 1, 4, 4), {"padding": (0, -1, 0, 0)}, "padding"),
        (torch.ones(1, 1, 4, 4), {"grid": (0, 2)}, "grid"),
    ],
)
def test_bad_input_is_named(masks: torch.Tensor, options: dict[str, object], word: str) -> None:
    with pytest.raises(Exception, match=word) as caught:
        token_masks(masks, **{"grid": (2, 2), **options})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError) or "jaxtyping" in type(caught.value).__module__
