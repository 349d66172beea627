"""Overlap without masks, and profiles over blocks and noise levels."""

from __future__ import annotations

import json

import pytest
import torch
from idar import attention_profile, leakage, map_iou, map_overlap, peak_in_mask


def test_overlap_by_hand() -> None:
    maps = torch.tensor([[[2.0, 2.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 3.0]]])
    torch.testing.assert_close(map_overlap(maps), torch.tensor([[0.25, 0.25, 0.0]]))  # half of one of two others
    assert map_overlap(maps[:, :1]).isnan().all()
    torch.testing.assert_close(map_overlap(maps[:, [0, 0]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="finite"):
        map_overlap(maps * torch.nan)


def test_a_profile_holds_each_metric_of_each_block_and_level() -> None:
    maps = torch.rand(2, 3, 4, 2, 9, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(4, 2, 9)
    masks[:, 0, :4], masks[:, 1, 5:] = 1, 1
    masks[0, 1] = 0  # absent in one sample: left out of its means
    profile = attention_profile(maps, masks, blocks=("a", "b"), sigmas=(0.9, 0.5, 0.1))
    assert {n: v.shape for n, v in profile.values.items()} == dict.fromkeys(
        ("overlap", "leakage", "map_iou", "peak_in_mask"), (2, 3, 2)
    )
    for name, metric in (("leakage", leakage), ("map_iou", map_iou), ("peak_in_mask", peak_in_mask)):
        torch.testing.assert_close(profile.values[name][1, 2], metric(maps[1, 2], masks).nanmean(0))
    torch.testing.assert_close(profile.values["overlap"][0, 1], map_overlap(maps[0, 1]).mean(0))
    assert json.loads(json.dumps(profile.to_dict()))["blocks"] == ["a", "b"]
    alone = attention_profile(maps[:, :, :, :1], blocks=("a", "b"), sigmas=(0.9, 0.5, 0.1))
    assert alone.to_dict()["overlap"][0][0] == [None]
    with pytest.raises(ValueError, match="blocks"):
        attention_profile(maps, blocks=("a",), sigmas=(0.9, 0.5, 0.1))
