"""Stage 1 trains on a photo dataset; real photos go through the whole pipeline with the dlib backend."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from multicrafter.data.photos import BuildConfig, FilterConfig, WriteConfig, build
from multicrafter.data.photos.check import check_dataset
from multicrafter.data.photos.encode import encode_photos
from multicrafter.data.photos.people import inside
from multicrafter.data.photos.store import open_split

ROOT = Path(__file__).resolve().parents[4]


def train(pipe, scenes, steps=3):
    from dataclasses import replace

    from multicrafter.recipes import ablation
    from multicrafter.stages.pretrain import Pretrain

    config = ablation()["moe"].pretrain
    config = replace(config, num_steps=steps, batch=2, adapters=replace(config.adapters, rank=2, alpha=2.0))
    stage = Pretrain(pipe, config, scenes)
    before = {k: v.clone() for k, v in stage.adapters.state_dict().items()}
    history = [stage.step(i) for i in range(steps)]
    assert all(np.isfinite(list(m.values())).all() for m in history)
    assert any(not torch.equal(before[k], v) for k, v in stage.adapters.state_dict().items())
    return history


def test_stage_1_trains_on_the_result(built, pipe):
    scenes = encode_photos(pipe, built[0], num_subjects=2, count=8)
    assert scenes.images.shape == (8, 3, 64, 64) and scenes.references.shape[:2] == (8, 2)
    assert scenes.masks.shape == (8, 2, scenes.tokens.shape[1]) and scenes.masks.max() > 0.5
    history = train(pipe, scenes)
    assert "attention_loss" in history[0]


def test_records_without_the_number_of_subjects_are_one_sentence(built, pipe):
    with pytest.raises(ValueError, match="3 subjects"):
        encode_photos(pipe, built[0], num_subjects=3)
    with pytest.raises(ValueError, match="multiples"):
        encode_photos(pipe, built[0], size=60)


@pytest.fixture(scope="module")
def real():
    """Photos out of packages, as fetched by id_reward's script; nothing is committed."""
    pytest.importorskip("dlib")
    script = ROOT / "packages" / "id_reward" / "scripts" / "fetch_photos.py"
    folder = ROOT / ".photos"
    if not (folder / "insightface" / "t1.jpg").is_file():
        spec = importlib.util.spec_from_file_location("fetch_photos", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.main([])
        except (SystemExit, Exception) as error:
            pytest.skip(f"no registry to fetch photos from: {error}")
    if not (folder / "insightface" / "t1.jpg").is_file():
        pytest.skip("no registry to fetch photos from")
    return folder


@pytest.mark.slow
def test_real_photos_with_dlib(real, pipe, tmp_path):
    """Six faces in the group photo, masks inside their people, the man in three photos is one identity; stage 1 trains on it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    names = ["insightface/t1.jpg", *(f"face-recognition/{n}.jpg" for n in ("obama", "obama2", "obama3", "biden"))]
    names += ["face-api/sample1.jpg", "scikit-image/chelsea.png", "scikit-image/coffee.png"]
    for name in names:
        shutil.copy(real / name, photos)
    config = BuildConfig(faces="dlib", filter=FilterConfig(duplicate_distance=0), write=WriteConfig(test_fraction=0.0))
    summary = build(photos, tmp_path / "out", config, progress=False)
    assert check_dataset(tmp_path / "out", progress=False) == []
    store = open_split(tmp_path / "out")
    records = {r["source_file"]: r for r in store.records}
    assert records["t1.jpg"]["num_faces"] == records["t1.jpg"]["num_subjects"] == 6
    assert {d.path for d in summary.drops if d.reason == "no usable face"} == {"chelsea.png", "coffee.png"}
    on = Counter(s["identity"] for r in store.records for s in r["subjects"])
    man = {s["identity"] for n in ("obama", "obama2", "obama3") for s in records[f"{n}.jpg"]["subjects"]}
    assert len(man) == 1 and on[man.pop()] == 3
    assert sorted(on.values())[-2] == 1  # nobody else was mixed up
    for record in store.records:
        planes = np.asarray(store.open(record["masks"]))
        for subject in record["subjects"]:
            mask = planes >> subject["mask_bit"] & 1
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert inside(box, [x + d for x, d in zip(subject["body_box"], (-2, -2, 2, 2), strict=True)]) == 1.0
            left, top, right, bottom = (round(x) for x in subject["face_box"])
            assert mask[top:bottom, left:right].mean() > 0.7
    train(pipe, encode_photos(pipe, tmp_path / "out", num_subjects=records["sample1.jpg"]["num_subjects"], count=4))
