"""The tiny world: masks, identities, splits, captions, determinism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multicrafter.world import (
    FAMILIES,
    OBJECTS,
    PEOPLE,
    SETTINGS,
    TIMES,
    WorldConfig,
    make_references,
    make_scenes,
)
from multicrafter.world.judges.network import STRIDE, Maps, find


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", ["people", "objects"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_subject_has_a_mask_where_it_is(family, number):
    scenes = make_scenes(24, WorldConfig(family=family, numbers=(number,)), seeded(number))
    assert scenes.masks.shape == (24, number, 64, 64)
    assert ((scenes.masks >= 0) & (scenes.masks <= 1 + 1e-5)).all()
    assert (scenes.masks.sum(1) <= 1 + 1e-4).all(), "visible parts never add up to more than the pixel"
    assert (scenes.masks.sum((2, 3)) > 20).float().mean() > 0.97, "nearly every subject is visible"
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    mass = scenes.masks.sum((2, 3)).clamp_min(1e-6)
    cx, cy = (scenes.masks * x).sum((2, 3)) / mass, (scenes.masks * y).sum((2, 3)) / mass
    inside = (
        (cx > scenes.boxes[..., 0] - 2)
        & (cx < scenes.boxes[..., 2] + 2)
        & (cy > scenes.boxes[..., 1] - 2)
        & (cy < scenes.boxes[..., 3] + 2)
    )
    assert inside[scenes.masks.sum((2, 3)) > 20].float().mean() > 0.95


def test_a_mask_marks_exactly_the_pixels_that_depend_on_its_subject():
    """Another shirt changes pixels inside the wearer's mask and nowhere else."""
    one, other = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0]]), torch.tensor([[3, 1, 1, 2, 3, 1, 1, 1]])
    assert {tuple(i[0].tolist()) for i in (one, other)} != set()
    changed = one.clone()
    changed[0, [a.name for a in PEOPLE.attributes].index("shirt")] = 5
    config = WorldConfig(numbers=(2,))
    before = make_scenes(1, config, seeded(3), identities=torch.stack([one, other], 1))
    after = make_scenes(1, config, seeded(3), identities=torch.stack([changed, other], 1))
    moved = (before.images - after.images).abs().amax(1)[0] > 1e-4
    assert moved.any()
    assert (before.masks[0, 0][moved] > 0).all()


def test_the_order_of_the_references_does_not_say_who_stands_where():
    scenes = make_scenes(400, WorldConfig(numbers=(2,)), seeded(5))
    left_first = (scenes.boxes[:, 0, 0] < scenes.boxes[:, 1, 0]).float().mean()
    assert 0.4 < left_first < 0.6


def test_splits_are_disjoint_and_large():
    total = 1
    for size in PEOPLE.sizes:
        total *= size
    assert total >= 100_000
    seen = {}
    for split in ("train", "validation", "test"):
        rows = PEOPLE.sample(3000, split, seeded(1))
        seen[split] = {tuple(r) for r in rows.tolist()}
        assert (PEOPLE.canonical(rows) == rows).all()
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 7), st.integers(0, 2**31))
def test_look_alikes_share_attributes_but_are_never_equal(shared, seed):
    first = PEOPLE.sample(16, "test", seeded(seed))
    second = PEOPLE.sample(16, "test", seeded(seed + 1), like=first, shared=shared)
    assert (first != second).any(1).all()
    close = (first == second).sum(1) >= shared - 1  # what a hidden attribute shows may be canonicalised away
    assert close.all() if shared < 7 else close.float().mean() > 0.5


def test_a_split_without_a_look_alike_that_close_gives_the_next_best():
    """Some of 400 people have no neighbour that differs in one attribute and is of the test split: this must end."""
    first = PEOPLE.sample(400, "test", seeded(0))
    second = PEOPLE.sample(400, "test", seeded(1), like=first, shared=7)
    same = (first == second).sum(1)
    assert (PEOPLE.split_of(second) == 2).all() and (first != second).any(1).all()
    assert (same >= 5).all() and (same >= 6).float().mean() > 0.8


def test_shared_attributes_vary_from_row_to_row():
    scenes = make_scenes(300, WorldConfig(numbers=(2,), shared_attributes=7), seeded(2))
    same = (scenes.identities[:, 0] == scenes.identities[:, 1]).sum(1)
    assert len(same.unique()) >= 6


def test_references_show_another_pose_than_the_scene():
    identities = PEOPLE.sample(1, "train", seeded(0)).expand(8, -1)
    pictures = make_references(PEOPLE, identities, 32, seeded(1))
    assert pictures.shape == (8, 3, 32, 32)
    assert (pictures[1:] - pictures[:1]).abs().mean((1, 2, 3)).min() > 0.02


def test_captions_follow_the_scene_and_hide_identities():
    scenes = make_scenes(200, WorldConfig(numbers=(1, 2, 3, 4)), seeded(4))
    words = {c for a in PEOPLE.attributes for c in a.categories} - {"none", "short", "long"}
    for i, caption in enumerate(scenes.captions()):
        assert SETTINGS[int(scenes.setting[i])] in caption
        assert TIMES[int(scenes.time[i])] in caption
        assert caption.split()[0] == ("one", "two", "three", "four")[int(scenes.number[i]) - 1]
        assert not words & set(caption.replace(",", "").split())


def test_equal_seeds_give_equal_worlds():
    config = WorldConfig(numbers=(1, 2))
    a, b, c = (make_scenes(5, config, seeded(s)) for s in (7, 7, 8))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.images, c.images)


@pytest.mark.parametrize(
    "wrong",
    [
        {"family": "cats"},
        {"split": "all"},
        {"numbers": ()},
        {"numbers": (5,)},
        {"size": 8},
        {"shared_attributes": 8},
        {"weights": (1.0,)},
    ],
)
def test_wrong_worlds_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WorldConfig(**wrong)


def test_both_families_have_at_least_eight_attributes():
    assert all(len(f.attributes) >= 8 for f in FAMILIES.values())
    assert OBJECTS.sizes != PEOPLE.sizes


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_no_box_of_the_detector_ends_before_it_begins_whatever_its_network_says(seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return 4 * torch.randn(shape, generator=generator)

    offsets = drawn(2, 4, 8, 8)
    found = find(Maps(drawn(2, 8, 8), offsets, drawn(2, 3, 8, 8), drawn(2, 5)))
    assert len(found.boxes) and bool((found.boxes[:, 2:] >= found.boxes[:, :2]).all())
    straight = torch.cat([-offsets[:, :2].abs(), offsets[:, 2:].abs()], 1)
    maps = Maps(torch.full((2, 8, 8), -9.0), straight, drawn(2, 3, 8, 8), drawn(2, 5))
    maps.heat[1, 2, 3] = 9.0
    (box,) = find(maps).boxes
    expected = (straight[1, :, 2, 3] + torch.tensor([3.5, 2.5, 3.5, 2.5])) * STRIDE
    assert torch.equal(box, expected), "edges on the right sides stay where they are"
