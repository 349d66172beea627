from __future__ import annotations

import math

import pytest
import torch
from idar import idar_loss, leakage, map_iou, normalize_maps, peak_in_mask, token_masks

MAPS = torch.tensor([[[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]]])
MASKS = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])


def test_dice_by_hand() -> None:
    value = idar_loss(MAPS, MASKS, eps=0.0)
    # 1 - 2 * 0.8 / (1 + 2), for both subjects; the loss is their sum
    torch.testing.assert_close(value.per_subject, torch.full((1, 2), 1 - 1.6 / 3))
    torch.testing.assert_close(value.loss, torch.tensor(2 * (1 - 1.6 / 3)))


def test_other_kinds_by_hand() -> None:
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="soft_iou", eps=0.0).per_subject[0, 0], torch.tensor(1 - 0.8 / 2.2)
    )
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="cross_entropy", eps=1e-9).per_subject[0, 0], torch.tensor(-math.log(0.8))
    )
    want = -(math.log(0.6 / 0.7) + math.log(0.2 / 0.3)) / 2
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="share_cross_entropy", eps=1e-9).per_subject[0, 0], torch.tensor(want)
    )


def test_absent_subjects_are_left_out() -> None:
    masks = MASKS.clone()
    masks[:, 1] = 0
    value = idar_loss(MAPS, masks)
    assert value.present.tolist() == [[True, False]]
    torch.testing.assert_close(value.loss, idar_loss(MAPS[:, :1], MASKS[:, :1]).loss)
    with pytest.raises(ValueError, match="masks"):
        idar_loss(MAPS, torch.zeros_like(MASKS))


def test_weight_scales_samples() -> None:
    maps, masks = MAPS.repeat(2, 1, 1), MASKS.repeat(2, 1, 1)
    value = idar_loss(maps, masks, weight=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(value.loss, idar_loss(MAPS, MASKS).loss / 2)


def test_leakage_by_hand() -> None:
    torch.testing.assert_close(leakage(MAPS, MASKS), torch.full((1, 2), 0.2))
    assert leakage(torch.ones(1, 2, 4) / 4, MASKS)[0, 0] == 0.5
    assert leakage(MASKS / 2, MASKS).sum() == 0
    assert leakage(MAPS[:, :1], MASKS[:, :1]).isnan().all()


def test_iou_and_peak() -> None:
    assert map_iou(MAPS, MASKS).tolist() == [[0.5, 0.5]]
    assert peak_in_mask(MAPS, MASKS).tolist() == [[1.0, 1.0]]
    assert peak_in_mask(MAPS.flip(1), MASKS).tolist() == [[0.0, 0.0]]


def test_normalisations() -> None:
    assert normalize_maps(MAPS, "max").amax(-1).tolist() == [[1.0, 1.0]]
    assert normalize_maps(MAPS, "minmax").amin(-1).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(normalize_maps(MAPS, "share").sum(1), torch.ones(1, 4))
    torch.testing.assert_close(normalize_maps(MAPS * 3, "sum").sum(-1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="mode"):
        normalize_maps(MAPS, "softmax")  # type: ignore[arg-type]


def test_token_masks_pool_areas() -> None:
    masks = torch.zeros(1, 1, 4, 8)
    masks[..., :2, :3] = 1
    assert token_masks(masks, (2, 4)).tolist() == [[[1.0, 0.5, 0, 0, 0, 0, 0, 0]]]
    torch.testing.assert_close(token_masks(torch.ones(1, 2, 50, 33), (7, 5)), torch.ones(1, 2, 35))
    with pytest.raises(ValueError, match="masks"):
        token_masks(masks * 2, (2, 4))


@pytest.mark.parametrize("bad", [torch.full_like(MAPS, torch.nan), MAPS[:, :1]])
def test_bad_maps(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="maps"):
        idar_loss(bad, MASKS)
