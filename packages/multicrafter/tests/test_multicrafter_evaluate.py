"""The metrics on cases whose answer is known, the judges on the truth, the statistics against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from multicrafter.files import write_json
from multicrafter.scoring.evaluate import Interval, WorldJudges, bootstrap, difference, score_attributes, score_pictures
from multicrafter.training.scenes import EncodedScenes
from multicrafter.world import PEOPLE, WorldConfig, make_scenes
from multicrafter.world.judges.aesthetics import aesthetics, colourfulness, sharpness
from multicrafter.world.rewards import RewardConfig, tiny_reward

TRUTH = torch.tensor([[0, 1, 2, 3, 4, 1, 5, 0], [2, 2, 1, 0, 1, 2, 3, 1]])
STRANGER = torch.tensor([1, 5, 0, 6, 7, 3, 1, 2])


@pytest.fixture(scope="module")
def judges():
    return WorldJudges.load()


@pytest.fixture(scope="module")
def truth():
    scenes = make_scenes(
        160, WorldConfig(split="test", numbers=(2,), shared_attributes=4), torch.Generator().manual_seed(11)
    )
    return EncodedScenes(
        tokens=torch.zeros(160, 64, 1), references=torch.zeros(160, 2, 16, 1), masks=torch.zeros(160, 2, 64),
        captions=scenes.captions(), identities=scenes.identities, images=scenes.images,
        reference_images=scenes.references, setting=scenes.setting, time=scenes.time, grid=(8, 8), reference_grid=(4, 4),
    )  # fmt: skip


def test_perfect_pictures_score_one():
    score = score_attributes(TRUTH, TRUTH.flip(0), PEOPLE, STRANGER)
    assert (score.attributes, score.swaps) == (1.0, 0.0)


def test_a_missing_person_costs_all_its_attributes():
    score = score_attributes(TRUTH, TRUTH[:1], PEOPLE, STRANGER)
    assert score.attributes == 0.5
    assert score_attributes(TRUTH, TRUTH[:0], PEOPLE, STRANGER).attributes == 0.0


def test_one_person_painted_twice_is_half_right_and_swapped():
    score = score_attributes(TRUTH, TRUTH[[0, 0]], PEOPLE, STRANGER)
    telling = (
        7 / 14
    )  # the copy that is paired with the second reference shows the first one's value in all its telling attributes
    assert score.swaps == pytest.approx(telling)
    assert score.attributes == pytest.approx((8 + (TRUTH[0] == TRUTH[1]).sum()) / 16)


def test_one_exchanged_attribute_is_one_swap_each():
    read = TRUTH.clone()
    read[:, 3] = TRUTH.flip(0)[:, 3]
    score = score_attributes(TRUTH, read, PEOPLE, STRANGER)
    differ = int((TRUTH[0] != TRUTH[1]).sum())
    assert score.attributes == pytest.approx(14 / 16)
    assert score.swaps == pytest.approx(2 / (2 * differ))


def test_hidden_attributes_do_not_count():
    bare = TRUTH.clone()
    bare[0, 5], bare[0, 6] = 0, 0  # no hat: its colour cannot be seen
    read = bare.clone()
    read[0, 6] = 4
    assert score_attributes(bare, read, PEOPLE, STRANGER).attributes == 1.0


def test_judges_read_the_truth(judges, truth):
    """Floors well below what the recipes measured (world/weights/judges/*.json), far above chance."""
    metrics = score_pictures(truth.images, truth, judges)
    assert metrics["attributes"].mean() > 0.93
    assert metrics["count"].mean() > 0.97
    assert metrics["setting"].mean() > 0.97
    assert np.nanmean(metrics["swaps"]) < 0.05
    assert metrics["identity"].mean() > 0.75


def test_metrics_fall_where_the_picture_is_wrong(judges, truth):
    right = score_pictures(truth.images, truth, judges)
    wrong = score_pictures(truth.images.roll(1, 0), truth, judges)
    assert wrong["attributes"].mean() < 0.5
    assert wrong["identity"].mean() < right["identity"].mean() - 0.1
    assert wrong["text"].mean() < right["text"].mean()
    blank = score_pictures(torch.full_like(truth.images, 0.5), truth, judges)
    assert blank["attributes"].mean() < 0.1


def test_the_reward_prefers_the_right_people(truth):
    reward = tiny_reward(RewardConfig())
    references = [list(x) for x in truth.reference_images]
    right = reward(list(truth.images), truth.captions, references).totals
    wrong = reward(list(truth.images), truth.captions, references[1:] + references[:1]).totals
    assert (right > wrong).mean() > 0.85


def test_bootstrap_against_the_closed_form():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
    assert bootstrap([np.nan, 1.0, 3.0]).n == 2
    assert np.isnan(bootstrap([]).mean)


def test_differences_are_paired():
    a = {"x": np.array([1.0, 5.0, 9.0])}
    b = {"x": np.array([0.5, 4.5, 8.5]), "y": np.zeros(3)}
    assert difference(a, b) == {"x": Interval(0.5, 0.5, 0.5, 3)}


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"a": float("nan"), "b": bootstrap([1.0]), "c": (1, 2)})
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {
        "a": None,
        "b": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1},
        "c": [1, 2],
    }
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_aesthetics_of_known_pictures():
    grey = torch.full((1, 3, 16, 16), 0.5)
    half = torch.zeros(1, 3, 16, 16)
    half[:, 0, :, 8:] = 1.0
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert colourfulness(grey).item() == 0
    red = 0.5 + 0.3 * np.hypot(0.5, 0.25)
    assert colourfulness(half).item() == pytest.approx(np.hypot(0.5, 0.25) + red - 0.5, abs=1e-5)
    assert sharpness(half).item() == pytest.approx(1.0)
    assert sharpness(ramp).item() < 0.15
    assert aesthetics(half) > aesthetics(ramp) > aesthetics(grey)


def test_scenes_of_photos_have_no_truth_and_parts_of_other_scenes_are_refused(truth):
    photos = replace(truth, setting=None)
    with pytest.raises(ValueError, match="drawn"):
        _ = photos.truth
    with pytest.raises(ValueError, match="same scenes"):
        replace(truth, captions=truth.captions[:-1])
    with pytest.raises(ValueError, match="same scenes"):
        replace(truth, grid=(4, 8))
    with pytest.raises(TypeError, match="positional"):
        EncodedScenes(truth.tokens)
